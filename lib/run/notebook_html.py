"""An executed notebook as one page: text open, code folded, images embedded, formulas as MathML; no script, no request.

What a cell printed or displayed may hold text of a data set. It is escaped, or cleaned to an allow-list of tags, and
the page's Content-Security-Policy forbids scripts and every request, so that nothing in it can act.
"""

from __future__ import annotations

import copy
import html
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from lib.record import redact, write_text

PAGES = Path(__file__).parent / "assets"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TAGS = frozenset(
    re.findall(
        r"\w+",
        """
    a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img
    ins kbd li ol p pre s small span strong sub summary sup table tbody td tfoot th thead tr ul""",
    )
)
ATTRIBUTES = {
    "*": ["class", "id", "title", "lang"],
    "a": ["href"],
    "img": ["src", "alt", "width", "height"],
    "details": ["open"],
    "td": ["colspan", "rowspan", "headers"],
    "th": ["colspan", "rowspan", "scope"],
    "col": ["span"],
    "ol": ["start"],
}
POINT = re.compile(r'<a class="point x(\d{1,4}) y(\d{1,4})"')
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain"]


def notebook_html(
    ipynb_path: str | Path,
    html_path: str | Path,
    *,
    title: str = "",
    command: str = "",
    links: Sequence[tuple[str, str]] | None = None,
) -> Path:
    """Write the page of a notebook. `command` runs exactly it again and `links` are (text, href) shown above it; a page
    in an outputs folder finds both by itself."""
    import nbformat

    ipynb_path, html_path = Path(ipynb_path), Path(html_path)
    notebook = nbformat.read(ipynb_path, as_version=4)
    again, found = _place(ipynb_path.resolve(), html_path.resolve())
    write_text(
        html_path,
        redact(
            render(
                notebook,
                title=title or ipynb_path.stem,
                command=command or again,
                links=found if links is None else links,
            )
        ),
    )
    return html_path


def _place(ipynb: Path, page: Path) -> tuple[str, list[tuple[str, str]]]:
    """What <outputs>/<scale>-<mode>/<study>/<run_id>/ tells of a page: its command, and links to index and notebook."""
    here = page.parent
    notebook = ("This notebook", quote(os.path.relpath(ipynb, here)))
    root = next((p for p in here.parents if re.match(r"(laptop|paper)-(trial|full)\b", p.name)), None)
    if root is None:
        return "", [notebook]
    (scale, mode), (study, run_id, *_) = root.name.split(",")[0].split("-"), (*here.relative_to(root).parts, "")
    command = f"./run_all.sh {mode} --scale {scale} --study {study}"
    command += f" --run {shlex.quote(run_id)}" if run_id not in ("", "comparison") else ""
    return f"{command} --force", [("All studies", quote(os.path.relpath(root.parent / "index.html", here))), notebook]


def render(notebook, *, title: str, command: str = "", links: Sequence[tuple[str, str]] = ()) -> str:
    """The page as text. `notebook` is an nbformat node; its first level-1 heading, if any, is the page's title."""
    from traitlets.config import Config

    notebook = _only_shown(notebook)
    heads = _headings(notebook)
    title = next((text for level, text, _ in heads if level == 1), title)
    config = Config({"NbConvertBase": {"display_data_priority": SHOWN}})
    exporter = _exporter()(config=config, extra_template_basedirs=[str(PAGES)], template_name="notebook")
    page = {
        "title": title,
        "command": command,
        "links": list(links),
        "css": (PAGES / "style.css").read_text(encoding="utf-8"),
        "policy": POLICY,
        "contents": [(text, anchor) for level, text, anchor in heads if level == 2],
    }
    return exporter.from_notebook_node(notebook, {"page": page})[0]


def _only_shown(notebook):
    """A copy without what the page does not show: script outputs, widgets and their state."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "data" in output:
                output["data"] = {kind: value for kind, value in output["data"].items() if kind in SHOWN}
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if output.get("data", True)]
    return notebook


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
    return placed(
        bleach.clean(
            str(soup), tags=TAGS, attributes=ATTRIBUTES, protocols={"http", "https", "mailto", "data"}, strip=True
        )
    )


def placed(fragment: str) -> str:
    """The links over a figure's points (`embedded`) at their places: `x123 y456` becomes 12.3 % and 45.6 %."""
    return POINT.sub(lambda m: f'<a class="point" style="left:{int(m[1]) / 10}%;top:{int(m[2]) / 10}%"', fragment)


def _headings(notebook) -> list[tuple[int, str, str]]:
    """(level, text, anchor) of the headings in the notebook's text, with the anchors that nbconvert gives them."""
    from bs4 import BeautifulSoup

    text = "\n\n".join(_markdown(cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
    return [(int(e.name[1]), e.get_text().strip(), e["id"]) for e in BeautifulSoup(text, "html.parser")(["h1", "h2"])]


def _markdown(source: str) -> str:
    """Markdown as HTML: tags in it are shown as text, formulas are MathML, table headers have their scope."""
    from nbconvert.filters.markdown_mistune import MarkdownWithMath

    text = MarkdownWithMath(renderer=_renderer()(escape=True, allow_harmful_protocols=False)).render(source)
    return re.sub(r"<th(?=[ >])", '<th scope="col"', text)


def _renderer() -> type:
    from nbconvert.filters.markdown_mistune import IPythonRenderer

    class Renderer(IPythonRenderer):
        """Markdown with formulas as MathML and with images only where they are embedded."""

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
            if not url.startswith("data:image/"):
                return f"[{html.escape(text)}]"
            return f'<img src="{html.escape(url)}" alt="{html.escape(text)}">'

        def block_code(self, code: str, info: str | None = None) -> str:
            return super().block_code(code, None if (info or "").startswith("mermaid") else info)

    return Renderer


def mathml(latex: str, display: str) -> str:
    """A formula as MathML, which browsers draw without a script; source that does not parse is shown as it is."""
    from latex2mathml.converter import convert

    try:
        return convert(latex, display=display)
    except Exception:  # the converter raises many kinds on malformed input; the reader still sees the formula's source
        return f"<code>{html.escape(latex)}</code>"


def _exporter() -> type:
    from nbconvert import HTMLExporter
    from nbconvert.filters import get_metadata, text_base64

    class Exporter(HTMLExporter):
        """nbconvert's HTML exporter with this module's Markdown and without what needs a script."""

        def default_filters(self):
            yield from super().default_filters()
            yield "markdown2html", _markdown
            yield "safe_html", clean
            yield "last_line_of_carriage_returns", last_line_of_carriage_returns
            yield "get_metadata", get_metadata
            yield "text_base64", text_base64

    return Exporter


def last_line_of_carriage_returns(text: str) -> str:
    """What a terminal would show: of a line rewritten by carriage returns only the last state (progress bars)."""
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
