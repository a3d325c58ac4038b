"""Records as pages: an executed notebook as HTML, with a row for each member of its run, and outputs/index.html over
all studies. Made from the files of the records and from nothing else.

What a cell printed or displayed, and what a record holds, may be text of a data set. It is escaped, or cleaned to an
allow-list of tags, and each page's Content-Security-Policy forbids every request and every script but the index's own.
"""

import base64
import hashlib
import html
import os
import re
import shutil
import time
import warnings
from functools import cache, partial
from pathlib import Path
from urllib.parse import quote, unquote

from lib.config import ROOT, SCALES
from lib.errors import StudyError
from lib.record import read_json, redact, write_text
from lib.run import progress

ASSETS = Path(__file__).parent / "assets"
# the studies' own, in the order of the index
FOLDERS = [f"{scale}-{mode}" for mode in ("full", "try", "trial") for scale in SCALES]
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain"]
TAGS = """a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr
i img ins kbd li ol p pre s small span strong sub summary sup table tbody td tfoot th thead tr ul"""
ATTRIBUTES = {"alt", "class", "colspan", "height", "href", "id", "rowspan", "scope", "style", "title", "width"}
PUBLISHED = (".html", ".ipynb", ".json", ".yaml", ".csv", ".png", ".pdf")
PLACE = ("left", "top")  # of a link over a figure's point (plots.embed): no other style is let in


# ---- a notebook


def notebook_html(notebook: Path) -> Path:
    """Write the page of an executed notebook beside it. The command that runs it again is in the status.json there. The
    page of a run lists its members, each at the anchor of its name."""
    import nbformat

    page, folder, source = notebook.with_suffix(".html"), notebook.resolve().parent, nbformat.read(notebook, 4)
    links, status, name, method = [], read_json(folder / "status.json", {}), "", ""
    if root := next((p for p in folder.parents if p.name.split(",")[0] in FOLDERS), None):
        name = f"{folder.relative_to(root)} ({root.name})"
        links.append(("All studies", _href(folder, root.parent / "index.html")))
        method = _href(folder, root.parent / "method" / f"{status.get('study')}.html")
    members = members_of(folder) if page.name == "run.html" else []
    about = {"command": status.get("command", ""), "links": [*links, ("This notebook", quote(notebook.name))]}
    text = render(source, title=page.stem, name=name, files=partial(_links, folder), members=members, **about)
    made_in = Path(source.metadata.get("papermill", {}).get("parameters", {}).get("results_dir") or "results").parents
    write_text(page, anonymous(text.replace('href="METHOD.md"', f'href="{method}"'), *made_in[2:3]))
    return page


def anonymous(text: str, *folders: Path) -> str:
    """Without secrets and without paths of the machine: what lies in `folders`, in the repository or at home is named
    from there."""
    for folder in (*folders, ROOT, Path.home()):
        text = text.replace(f"{folder}/", "~/" if folder == Path.home() else "") if len(folder.parts) > 1 else text

    def without_folder(found: re.Match[str]) -> str:  # of data and models elsewhere on this machine
        return "" if os.path.isdir(found[0]) else found[0]

    return redact(re.sub(r"(?<![\w.~/])/(?:[^\s/\"'<>&\\]+/)+", without_folder, text))


def method_html(root: Path, study: str) -> tuple[str, list[tuple[str, str]]]:
    """Write <root>/method/<study>.html, what was published and what is done instead. Returns the study's name, with which
    that page begins, and (text, href) of it and of the papers that it names, as seen from `root`."""
    from nbformat import v4

    source, page = ROOT / "notebooks" / study / "METHOD.md", root / "method" / f"{study}.html"
    if not source.exists():
        return study, []
    text = source.read_text(encoding="utf-8")
    if not page.exists() or page.stat().st_mtime < source.stat().st_mtime:
        cell = v4.new_markdown_cell(re.sub(r"\[([^]]*)\]\((?!http|#)[^)]*\)", r"\1", text))  # files that are not here
        write_text(page, render(v4.new_notebook(cells=[cell]), title=study, links=[("All studies", "../index.html")]))
    papers = re.findall(r"\[([^]]*)\]\((https://arxiv\.org/[^)]*)\)", text)
    links = [("What was published, what is done instead", quote(f"method/{page.name}")), *papers]
    return text.partition(":")[0].lstrip("# "), links


def render(notebook, *, title: str, **about) -> str:
    """The page as text: notebook text open, code folded, images embedded, formulas as MathML. `notebook` is an nbformat
    node; its first level-1 heading, if any, is the page's title. `about`: what the template shows around it."""
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter, TemplateExporter
    from traitlets.config import Config

    from lib.plots import number

    text = "\n\n".join(_markdown(cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
    heads = [(e.name, e.get_text().strip(), e["id"]) for e in BeautifulSoup(text, "html.parser")(["h1", "h2"])]
    page = {
        "title": next((text for tag, text, _ in heads if tag == "h1"), title),
        "contents": [(text, anchor) for tag, text, anchor in heads if tag == "h2"],
        "policy": POLICY,
        **about,
    }
    config = Config({"NbConvertBase": {"display_data_priority": SHOWN}})
    config.CoalesceStreamsPreprocessor.enabled = True  # of a line that a progress bar rewrites, its last state
    filters = {"markdown2html": _markdown, "clean": clean, "number": number}
    templates = {"extra_template_basedirs": [str(ASSETS)], "template_name": "notebook"}
    exporter = HTMLExporter(config=config, filters=filters, **templates)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about outputs of kinds that are not shown: widgets, scripts
        # not HTMLExporter's own, which parses the whole page again, for what JupyterLab's templates lack
        return TemplateExporter.from_notebook_node(exporter, notebook, {"page": page})[0]


def clean(fragment: str) -> str:
    """HTML with only harmless tags and attributes: no script, no event, images only where embedded. Table headers get
    their `scope`, which pandas leaves out."""
    import bleach
    from bleach.css_sanitizer import CSSSanitizer
    from bs4 import BeautifulSoup

    def allow(tag: str, name: str, value: str) -> bool:
        return name in ATTRIBUTES or (name == "src" and value.startswith("data:image/"))

    soup = BeautifulSoup(fragment, "html.parser")
    for element in soup(["style", "script"]):  # with what is inside, which bleach would keep as text
        element.decompose()
    for header in soup("th"):
        header["scope"] = header.get("scope") or ("row" if header.find_parent("tbody") else "col")
    protocols, places = {"http", "https", "mailto", "data"}, CSSSanitizer(PLACE)
    return bleach.clean(str(soup), TAGS.split(), allow, protocols, strip=True, css_sanitizer=places)


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


# ---- the index


def index_html(outputs_root: str | Path) -> Path:
    """Write <outputs_root>/index.html from the records below it; a missing or torn file leaves a gap, never an error.
    The studies' own folders come first, each followed by its variations (`--set`, `--grid`)."""
    root, groups, working = Path(outputs_root), [], []
    for folder in [p for name in FOLDERS for p in (root / name, *sorted(root.glob(f"{name},*"))) if p.is_dir()]:
        studies = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        alive = progress.is_running(folder)
        with_records = [group for study in studies if (group := _group(root, study, alive))]
        groups += sorted(with_records, key=lambda group: not group["claims"])  # what has verdicts before what has none
        if alive:
            working.append({"folder": folder.name, "at": time.time(), **read_json(folder / "progress.json", {})})
    script = (ASSETS / "table.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = _index_template().render(
        groups=groups,
        working=working,
        files=partial(_links, root),
        script=script,
        policy=f"{POLICY}; script-src 'sha256-{digest}'",
    )
    write_text(root / "index.html", anonymous(text, root.absolute().parent))
    return root / "index.html"


@cache
def _index_template():
    """Compiled once: half a second, and a runner writes the index again and again."""
    import jinja2

    from lib.plots import number

    loader = jinja2.FileSystemLoader(ASSETS)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "utc": lambda at: time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))}
    return environment.get_template("index.html.j2")


def _group(root: Path, study: Path, alive: bool) -> dict | None:
    """What is known of one study at one scale and in one mode, where a runner may be `alive`; None where nothing has run."""
    comparison = study / "comparison"
    folders = [p for p in sorted(study.iterdir()) if (p / "status.json").exists() or (p / "members").is_dir()]
    folders = [path for path in folders if path != comparison]
    if not folders and not comparison.is_dir():
        return None
    own, _, variation = study.parent.name.partition(",")
    scale, _, mode = own.partition("-")
    name, method = method_html(root, study.name)
    return {
        "anchor": f"{study.parent.name}-{study.name}",
        "scale": scale,
        "mode": mode,
        "name": name + (f" ({variation})" if variation else ""),
        "folder": comparison,
        "method": method,
        "status": read_json(comparison / "status.json", {}),
        "claims": read_json(comparison / "claims.json", []),
        "prices": read_json(comparison / "prices.json", {}),
        "aggregated": read_json(comparison / "aggregated_metrics.json", {}),
        "figure": _figure(root, comparison) if mode != "trial" else "",
        "figures": sorted((comparison / "figures").glob("*.png")),
        "runs": [_run(path, alive) for path in folders],
        "provenance": next(filter(None, (read_json(p / "provenance.json") for p in (comparison, *folders))), {}),
    }


def _run(folder: Path, alive: bool) -> dict:
    status = read_json(folder / "status.json", {})
    if status.get("status") == "running":  # or its runner is gone
        status |= {"line": progress.line(folder)} if alive else {"status": "interrupted"}
    about = {"folder": folder, "status": status, "members": members_of(folder)}
    return about | {"audit": read_json(folder / "audit.json", {})}


def members_of(run: Path) -> list[dict]:
    """The members of the run in this folder: how each ended (its sentinel says), and its value of the run's key
    metric."""
    metric = (read_json(run / "metrics.json", {}).get("key_metric") or {}).get("name", "")
    members = []
    for path in sorted((run / "members").glob("*/")):
        error, value = read_json(path / "error.json", {}), read_json(path / "metrics.json", {}).get(metric)
        status = read_json(path / "done.json", {}).get("status") or error.get("status", "unfinished")
        about = {"folder": path, "seed": path.name.rpartition("-s")[2], "status": status.replace("_", " ")}
        members.append({**about, "metric": metric, "value": value, "error": error.get("exception", "")})
    return members


def _figure(root: Path, comparison: Path) -> str:
    """The figure that shows the result: the primary metric's, else the claims', else the first; embedded with its
    words, its points linked to their members."""
    from lib.plots import embed  # with matplotlib

    names = ("comparison_primary*", "comparison_seeds", "comparison_claims", "*")
    pictures = (path for name in names for path in sorted((comparison / "figures").glob(f"{name}.png")))
    if (path := next(pictures, None)) is None:
        return ""
    words, here = path.with_suffix(".alt.txt"), quote(os.path.relpath(comparison, root))
    alt = words.read_text(encoding="utf-8").strip() if words.exists() else path.stem.replace("_", " ")
    links = read_json(path.with_suffix(".links.json"), [])
    links = [{**link, "href": os.path.normpath(os.path.join(here, link["href"]))} for link in links]
    return embed(path.read_bytes(), alt, links)


def _links(page_folder: Path, folder: Path, files: dict[str, str]) -> list[tuple[str, str]]:
    """(text, href) of those files of `folder` that are there, as seen from the page's folder."""
    return [(text, _href(page_folder, folder / name)) for text, name in files.items() if (folder / name).exists()]


def _href(page_folder: Path, path: Path) -> str:
    return quote(os.path.relpath(path, page_folder))


# ---- a site


def site(root: Path, target: Path) -> int:
    """Copy into `target` what a reader of <root>/index.html is led to: pages, executed notebooks, figures, tables, without
    the machine's paths. A link to anything else (weights, logs) becomes text. Returns the number of files."""
    root, found = root.resolve(), [Path("index.html")]
    if target.resolve() == root:
        expected, fix = "another folder", "./run_all.sh report --site site"
        raise StudyError("--site", f"{target}, where the record is", expected, fix)
    texts = [path.read_text(encoding="utf-8") for path in root.rglob("*.ipynb")]  # which say where they were executed
    made_in = {folder for text in texts for folder in re.findall(r'"input_path": "(.+)/notebooks/', text)}
    folders = [Path(folder) for folder in sorted({*made_in, str(root.parent)}, key=len, reverse=True)]

    def link(page: Path, match: re.Match) -> str:
        path = Path(os.path.normpath(page.parent / unquote(html.unescape(match[1])).partition("#")[0]))
        if re.match(r"[a-z]+:|#", match[1]) or path in found:
            return match[0]
        if ".." in path.parts or path.suffix not in PUBLISHED or not (root / path).is_file():
            return ""
        found.append(path)
        return match[0]

    for path in found:  # which grows
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".pdf"):
            shutil.copyfile(root / path, target / path)
            continue
        text = anonymous((root / path).read_text(encoding="utf-8"), *folders)
        text = re.sub(r' (?:href|src)="([^"]*)"', partial(link, path), text) if path.suffix == ".html" else text
        write_text(target / path, text)
    return len(found)
