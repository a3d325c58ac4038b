"""Records as pages: an executed notebook as HTML, with a row for each member of its run, and outputs/index.html over
all studies. Made from the files of the records and from nothing else.

What a cell printed or displayed, and what a record holds, may be text of a data set. It is escaped, or cleaned to an
allow-list of tags, and each page's Content-Security-Policy forbids every request and every script but the index's own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import os
import re
import shlex
import warnings
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from lib.record import read_json, redact, write_text
from lib.run import progress

ASSETS = Path(__file__).parent / "assets"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain"]
TAGS = (
    "a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr "
    "i img ins kbd li ol p pre s small span strong sub summary sup table tbody td tfoot th thead tr ul"
)
ATTRIBUTES = {
    "*": ["class", "id", "title"],
    "a": ["href"],
    "img": ["src", "alt", "width", "height"],
    "td": ["colspan", "rowspan"],
    "th": ["colspan", "rowspan", "scope"],
}
POINT = re.compile(r'<a class="point x(\d{1,4}) y(\d{1,4})"')
# The studies' own folders in the order of the index, and the command that makes each
COMMANDS = {
    "laptop-full": "./run_all.sh",
    "paper-full": "./run_all.sh full",
    "laptop-trial": "./run_all.sh trial",
    "paper-trial": "./run_all.sh trial --scale paper",
}
SYMBOLS = {"succeeded": "✓", "cached": "✓", "failed": "✗", "out_of_memory": "✗", "running": "…", "blocked": "■"}
RUN_FILES = {
    "page": "run.html",
    "notebook": "run.ipynb",
    "log": "train.log",
    "config": "config.yaml",
    "sweep": "sweep/sweep.html",
    "error": "attempts/error.log",
}
MEMBER_FILES = {
    "history": "history.jsonl",
    "predictions": "predictions.jsonl",
    "metrics": "metrics.json",
    "log": "train.log",
}
ANALYSIS_FILES = {
    "Analysis": "analysis.html",
    "its notebook": "analysis.ipynb",
    "verdicts as data": "claims.json",
    "metrics as data": "aggregated_metrics.json",
}


# ---- a notebook


def notebook_html(ipynb_path: str | Path, html_path: str | Path, *, command: str = "") -> Path:
    """Write the page of an executed notebook. `command` runs exactly it again; for a page in an outputs folder it is
    found, as are the links above it. The page of a run lists its members, each at the anchor of its name."""
    import nbformat

    ipynb, page = Path(ipynb_path).resolve(), Path(html_path).resolve()
    root = next((p for p in page.parents if p.name.split(",")[0] in COMMANDS), None)
    links, again = [("This notebook", _href(page.parent, ipynb))], ""
    if root is not None:
        (scale, mode), (study, run_id, *_) = root.name.split(",")[0].split("-"), (*page.relative_to(root).parts, "")
        again = f"./run_all.sh {mode} --scale {scale} --study {study}"
        again += f" --run {shlex.quote(run_id)} --force" if run_id not in ("", "comparison") else " --force"
        links.insert(0, ("All studies", _href(page.parent, root.parent / "index.html")))
    members = members_of(page.parent, page.parent) if page.name == "run.html" else []
    notebook = nbformat.read(ipynb, as_version=4)
    text = render(notebook, title=ipynb.stem, command=command or again, links=links, members=members)
    write_text(Path(html_path), redact(text))
    return Path(html_path)


def render(notebook, *, title: str, command: str = "", links=(), members=()) -> str:
    """The page as text: notebook text open, code folded, images embedded, formulas as MathML. `notebook` is an nbformat
    node; its first level-1 heading, if any, is the page's title."""
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    text = "\n\n".join(_markdown(cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
    heads = [(e.name, e.get_text().strip(), e["id"]) for e in BeautifulSoup(text, "html.parser")(["h1", "h2"])]
    contents = [(text, anchor) for name, text, anchor in heads if name == "h2"]
    page = {
        "title": next((text for name, text, _ in heads if name == "h1"), title),
        "command": command,
        "links": links,
        "members": members,
        "css": (ASSETS / "style.css").read_text(encoding="utf-8"),
        "policy": POLICY,
        "contents": contents + ([("Members", "members")] if members else []),
    }
    config = Config({"NbConvertBase": {"display_data_priority": SHOWN}})
    filters = {"markdown2html": _markdown, "safe_html": clean, "last_line": last_line_of_carriage_returns}
    templates = {"extra_template_basedirs": [str(ASSETS)], "template_name": "notebook"}
    exporter = HTMLExporter(config=config, filters=filters, **templates)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about outputs of kinds that are not shown: widgets, scripts
        return exporter.from_notebook_node(notebook, {"page": page})[0]


def clean(fragment: str) -> str:
    """HTML with only harmless tags and attributes: no script, no style, no event, images only where embedded. Table
    headers get their `scope`, which pandas leaves out."""
    import bleach
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(fragment, "html.parser")
    for element in soup(["style", "script"]):  # with what is inside, which bleach would keep as text
        element.decompose()
    for image in soup("img"):
        if not str(image.get("src", "")).startswith("data:image/"):
            image.replace_with(f"[{image.get('alt') or 'image'}]")
    for header in soup("th"):
        header["scope"] = header.get("scope") or ("row" if header.find_parent("tbody") else "col")
    protocols = {"http", "https", "mailto", "data"}
    return place_points(bleach.clean(str(soup), TAGS.split(), ATTRIBUTES, protocols=protocols, strip=True))


def place_points(fragment: str) -> str:
    """The links over a figure's points (plots.embed) at their places: `x123 y456` becomes 12.3 % and 45.6 %."""
    return POINT.sub(lambda m: f'<a class="point" style="left:{int(m[1]) / 10}%;top:{int(m[2]) / 10}%"', fragment)


def _markdown(source: str) -> str:
    """Markdown as HTML: tags in it are shown as text, formulas are MathML, images only where they are embedded, table
    headers have their scope."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return mathml(body, "block")

        def inline_math(self, body: str) -> str:
            return mathml(body, "inline")

        def latex_environment(self, name: str, body: str) -> str:
            return mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")

        def heading(self, text: str, level: int, **attrs) -> str:
            name = re.sub(r"[^a-z0-9]+", "-", re.sub("<[^>]*>", "", text).lower()).strip("-")
            return f'<h{level} id="{name}">{text}</h{level}>\n'

        def image(self, text: str, url: str, title: str | None = None) -> str:
            embedded = url.startswith("data:image/")
            return f'<img src="{html.escape(url)}" alt="{html.escape(text)}">' if embedded else f"[{html.escape(text)}]"

    text = MarkdownWithMath(renderer=Renderer(escape=True, allow_harmful_protocols=False)).render(source)
    return re.sub(r"<th(?=[ >])", '<th scope="col"', text)


def mathml(latex: str, display: str) -> str:
    """A formula as MathML, which browsers draw without a script; source that does not parse is shown as it is."""
    from latex2mathml.converter import convert

    try:
        return convert(latex, display=display)
    except Exception:  # the converter raises many kinds on malformed input; the reader still sees the formula's source
        return f"<code>{html.escape(latex)}</code>"


def last_line_of_carriage_returns(text: str) -> str:
    """What a terminal would show: of a line rewritten by carriage returns only the last state (progress bars)."""
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


# ---- the index


def index_html(outputs_root: str | Path) -> Path:
    """Write <outputs_root>/index.html from the records below it; a missing or torn file leaves a gap, never an error.
    The studies' own folders come first, each followed by its variations (`--set`, `--grid`)."""
    import jinja2

    root, groups = Path(outputs_root), []
    for folder in [p for name in COMMANDS for p in (root / name, *sorted(root.glob(f"{name},*"))) if p.is_dir()]:
        studies = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = [group for study in studies if (group := _group(root, study))]
        groups += sorted(found, key=lambda group: not group["claims"])  # what has verdicts before what has none
    script = (ASSETS / "table.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    loader = jinja2.FileSystemLoader(ASSETS)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "estimate": _estimate}
    text = environment.get_template("index.html.j2").render(
        groups=groups,
        css=(ASSETS / "style.css").read_text(encoding="utf-8"),
        script=script,
        policy=f"{POLICY}; script-src 'sha256-{digest}'",
        symbols=SYMBOLS,
    )
    write_text(root / "index.html", redact(text))
    return root / "index.html"


def _group(root: Path, study: Path) -> dict | None:
    """What the page says of one study at one scale and in one mode."""
    comparison = study / "comparison"
    folders = [p for p in sorted(study.iterdir()) if (p / "status.json").exists() or (p / "members").is_dir()]
    runs = [_run(root, path) for path in folders if path != comparison]
    if not runs and not comparison.is_dir():
        return None
    own, _, variation = study.parent.name.partition(",")
    scale, _, mode = own.partition("-")
    aggregated = read_json(comparison / "aggregated_metrics.json", {})
    status = read_json(comparison / "status.json", {})
    provenance = [read_json(path / "provenance.json") for path in (comparison, *folders)]
    claims = [_claim(claim) for claim in read_json(comparison / "claims.json", [])]
    return {
        "anchor": f"{study.parent.name}-{study.name}",
        "scale": scale,
        "mode": mode,
        "name": study.name.replace("_", "-").upper() + (f" ({variation})" if variation else ""),
        "command": status.get("command") or COMMANDS.get(own, ""),
        "claims": claims,
        "aggregated": aggregated,
        "figure": _figure(root, comparison, str(aggregated.get("primary_metric"))) if mode == "full" else "",
        "figures": [_figure_files(root, png) for png in sorted((comparison / "figures").glob("*.png"))],
        "analysis": _links(root, comparison, ANALYSIS_FILES),
        "analysis_error": status.get("error"),
        "runs": runs,
        "provenance": next(filter(None, provenance), {}),
    }


def _run(root: Path, folder: Path) -> dict:
    status = read_json(folder / "status.json", {})
    if status.get("status") == "running" and not progress.is_running(folder.parent.parent):
        status["status"] = "interrupted"  # its runner is gone
    links = dict(_links(root, folder, RUN_FILES))
    if status.get("status") not in ("failed", "out_of_memory"):
        links.pop("error", None)  # of an earlier attempt
    members, ended = members_of(folder, root), status.get("ended")
    counts = Counter(member["status"] for member in members)
    return {
        "id": folder.name,
        "page": links.pop("page", ""),
        "links": links,
        "status": str(status.get("status") or "no status"),
        "record": status,
        "ended": f"{datetime.fromtimestamp(ended, UTC):%Y-%m-%d %H:%M}" if _is_number(ended) else "",
        "members": ", ".join(f"{count} {name}" for name, count in counts.items()),
        "seeds": len({member["id"].rpartition("-s")[2] for member in members}),
        "listed": members,
    }


def members_of(folder: Path, page_folder: Path) -> list[dict]:
    """The members of the run in `folder`: how each ended (its sentinel says), its value of the run's key metric, and
    its files, as seen from `page_folder`."""
    metric = (read_json(folder / "metrics.json", {}).get("key_metric") or {}).get("name", "")
    members = []
    for path in sorted((folder / "members").glob("*/")):
        error = read_json(path / "error.json", {})
        status = read_json(path / "done.json", {}).get("status") or error.get("status", "unfinished")
        members.append(
            {
                "id": path.name,
                "status": str(status).replace("_", " "),
                "metric": metric.replace("_", " "),
                "value": _number(read_json(path / "metrics.json", {}).get(metric)),
                "error": str(error.get("exception", "")),
                "files": _links(page_folder, path, MEMBER_FILES),
            }
        )
    return members


def _claim(claim: dict) -> dict:
    """A claim of claims.json with its verdict and interval in words; an end that is null has no bound."""
    ends, verdict = claim.get("interval95"), str(claim.get("verdict") or "not evaluated").replace("_", " ")
    known = isinstance(ends, list) and any(end is not None for end in ends)
    interval = " to ".join("no bound" if end is None else _estimate(end) for end in ends) if known else "–"
    return {**claim, "verdict": verdict, "interval": interval}


def _figure(root: Path, comparison: Path, metric: str) -> str:
    """The figure that shows the result: the primary metric's, else the claims', else the first; embedded with its
    words, its points linked to their members."""
    from lib.plots import embed  # with matplotlib

    wanted = ("comparison_primary*", f"comparison_{metric}*", "comparison_seeds", "comparison_claims", "*")
    folder = comparison / "figures"
    path = next((found[0] for name in wanted if (found := sorted(folder.glob(f"{name}.png")))), None)
    if path is None:
        return ""
    words, here = path.with_name(f"{path.stem}.alt.txt"), quote(os.path.relpath(comparison, root))
    alt = words.read_text(encoding="utf-8").strip() if words.exists() else path.stem.replace("_", " ")
    links = read_json(path.with_name(f"{path.stem}.links.json"), [])
    links = [{**link, "href": os.path.normpath(os.path.join(here, link["href"]))} for link in links]
    return place_points(embed(path.read_bytes(), alt, links))


def _figure_files(root: Path, png: Path) -> dict:
    kinds = {kind: f"{png.stem}.{kind}" for kind in ("png", "pdf", "csv")}
    return {"name": png.stem.removeprefix("comparison_").replace("_", " "), "files": _links(root, png.parent, kinds)}


def _links(page_folder: Path, folder: Path, files: dict[str, str]) -> list[tuple[str, str]]:
    """(text, href) of those files that are there."""
    return [(text, _href(page_folder, folder / name)) for text, name in files.items() if (folder / name).exists()]


def _href(page_folder: Path, path: Path) -> str:
    return quote(os.path.relpath(path, page_folder))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object, digits: int = 3) -> str:
    text = f"{value:.{digits}g}" if _is_number(value) else "–"
    return (f"{value:.0f}" if "e+0" in text else text).replace("-", "−")


def _estimate(value: object) -> str:
    """Estimates and the ends of their intervals to the same three decimals, so that they can be compared."""
    if not _is_number(value):
        return "–"
    return (f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}").replace("-", "−")
