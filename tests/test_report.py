"""Pages: what a reader wants is there, text of data sets is inert, and nothing is asked of the network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import zlib
from html.parser import HTMLParser

import nbformat
import nbformat.v4 as v4
import numpy as np
import pytest

from lib import plots
from lib.run import pages, runner
from lib.run.pages import ASSETS, mathml, render
from tests.conftest import ROOT

TABLE = (ASSETS / "table.js").read_text()
EVIL = "<script>alert('data')</script><img src=http://evil.example/p.png onerror=alert(1)>"


def png() -> bytes:
    """A 1 x 1 picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


class Page(HTMLParser):
    """The elements of a page: [(tag, attributes)], and its visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def assert_inert(text: str, script: str = "") -> Page:
    """No script (but `script`, by its hash), no event handler, no request: images are embedded, only <a> may point
    elsewhere."""
    found = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert found == ([script] if script else [])
    text = text.replace(f"<script>{script}</script>", "") if script else text
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "data", "action", "poster", "background"):
                assert not re.match(r"\s*javascript:", value or "", re.I)
                assert (value or "").startswith("data:image/") or (tag == "a" and name == "href"), (tag, name, value)
    assert not re.search(r"@import|url\(", "".join(re.findall(r"<style>.*?</style>", text, re.S)))
    policies = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall(r"script-src ([^;]*)", policies[0]) == ([f"'sha256-{allowed}'"] if script else [])
    return page


def notebook(*cells):
    return v4.new_notebook(cells=list(cells))


def code(source: str, *outputs, tags=()):
    cell = v4.new_code_cell(source, execution_count=1, outputs=list(outputs))
    cell.metadata["tags"] = list(tags)
    return cell


def html_output(text: str):
    return v4.new_output("display_data", {"text/html": text, "text/plain": "plain"})


def test_a_notebook_page_folds_code_and_keeps_alt_text():
    picture = base64.b64encode(png()).decode()
    shown = v4.new_output("display_data", {"image/png": picture}, metadata={"image/png": {"alt": "score 7.95"}})
    figure = html_output(f'<figure><img src="data:image/png;base64,{picture}" alt="bars: DPO 2.5 &lt; 6.1"></figure>')
    text = render(
        notebook(
            v4.new_markdown_cell("# The title\n\n## Results\n\nOpen text."),
            code("run(1)", shown, figure),
            code("shown()", tags=["show-code"]),
        ),
        title="x",
        command="./run_all.sh --run '<a>'",
        links=[("All studies", "../index.html")],
    )
    page = assert_inert(text)
    assert [a["alt"] for a in page.all("img")] == ["score 7.95", "bars: DPO 2.5 < 6.1"]
    assert ["open" in a for a in page.all("details")] == [False, True]
    assert "<title>The title</title>" in text
    assert {"href": "#results"} in page.all("a")
    assert {"id": "results"} in page.all("h2")
    assert "./run_all.sh --run '<a>'" in page.text
    assert page.all("html") == [{"lang": "en"}]
    assert any(a.get("name") == "viewport" for a in page.all("meta"))


@pytest.mark.parametrize(
    "output",
    [
        html_output(
            f"<p onclick='x()'>{EVIL}<style>@import 'http://evil.example'</style><a href='javascript:x()'>kept</a></p>"
        ),
        html_output("<svg onload=alert(1)><a xlink:href='javascript:x()'>kept</a></svg>"),
        html_output("<iframe srcdoc='<script>alert(1)</script>'></iframe>kept"),
        v4.new_output("stream", name="stdout", text=EVIL + "kept"),
        v4.new_output(
            "display_data", {"text/markdown": f"{EVIL} ![x](http://evil.example/p.png) [a](javascript:x()) kept"}
        ),
        v4.new_output("display_data", {"text/latex": f"$x$ {EVIL} kept"}),
        v4.new_output("error", ename="E", evalue=EVIL, traceback=[f"\x1b[31m{EVIL}\x1b[0m kept"]),
        v4.new_output("display_data", {"application/javascript": "alert(1)", "text/plain": EVIL + "kept"}),
        v4.new_output(
            "display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "kept"}
        ),
    ],
)
def test_script_in_an_output_is_inert(output):
    page = assert_inert(render(notebook(code("show(rows)", output)), title="t"))
    assert "kept" in page.text


def test_a_point_of_a_figure_keeps_its_place_and_no_other_style():
    shown = html_output(plots.embed(png(), "a", [{"left": 0.25, "top": 0.5, "href": "#x", "words": "dpo"}]))
    styled = html_output("<p style='position:fixed;left:1%;background:url(http://evil.example)'>kept</p>")
    text = render(notebook(code("x", shown), code("x", styled)), title="t")
    styles = [a["style"].replace(" ", "").rstrip(";") for _, a in assert_inert(text).elements if "style" in a]
    assert styles == ["left:25.0%;top:50.0%", "left:1%"]


def test_script_in_source_title_and_text_is_inert():
    cells = v4.new_markdown_cell(f"# {EVIL}\n\n{EVIL}"), code(f"x = '''{EVIL}'''"), v4.new_raw_cell(EVIL)
    assert_inert(render(notebook(*cells), title=EVIL))


def test_outputs_that_need_a_script_are_left_out():
    text = render(
        notebook(code("widget", v4.new_output("display_data", {"application/javascript": "alert(77)"}))), title="t"
    )
    assert "alert(77)" not in text


def test_formulas_are_mathml_and_a_broken_one_is_its_source():
    text = render(notebook(v4.new_markdown_cell(r"Inline $\frac{\beta}{2} r_+^2$ and $$\rho = r_+ - r_-$$")), title="t")
    assert text.count("<math") == 2
    assert 'display="block"' in text
    assert "mathjax" not in text.lower()
    assert mathml(r"\frac{<b>", "inline").count("<b>") == 0


def test_table_headers_have_a_scope_and_long_lines_keep_the_page_narrow():
    pandas_table = (
        "<table><thead><tr><th></th><th>a</th></tr></thead><tbody><tr><th>0</th><td>1</td></tr></tbody></table>"
    )
    text = render(
        notebook(code("x", html_output(pandas_table)), v4.new_markdown_cell("|a|b|\n|-|-|\n|1|2|")), title="t"
    )
    assert [a.get("scope") for a in Page(text).all("th")] == ["col", "col", "row", "col", "col"]


def test_a_progress_bar_is_its_last_state():
    printed = [v4.new_output("stream", name="stdout", text=text) for text in ("step 1\rstep 2", "\rstep 3\ndone\r\n")]
    page = render(notebook(code("run()", *printed)), title="t")
    assert "step 3\ndone" in page
    assert "step 1" not in page
    assert "step 2" not in page


def test_a_secret_never_reaches_a_page(tmp_path, monkeypatch):

    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef-secret")
    printed = v4.new_output("stream", name="stdout", text="key 0123456789abcdef-secret")
    nbformat.write(notebook(code("x", printed)), tmp_path / "run.ipynb")
    page = pages.notebook_html(tmp_path / "run.ipynb")
    assert "0123456789abcdef-secret" not in page.read_text()
    assert "[WANDB_API_KEY]" in page.read_text()


def test_a_page_in_the_outputs_folder_leads_to_the_index(tmp_path):

    folder = tmp_path / "outputs" / "laptop-full" / "td_dpo" / "dpo"
    folder.mkdir(parents=True)
    nbformat.write(notebook(v4.new_markdown_cell("# Run\n\n[METHOD.md](METHOD.md)")), folder / "run.ipynb")
    write(folder / "status.json", {"command": "./run_all.sh full --study td_dpo --run dpo", "study": "td_dpo"})
    page = Page(pages.notebook_html(folder / "run.ipynb").read_text())
    *_, method = hrefs = [a["href"] for a in page.all("a")]
    assert hrefs[1:3] == ["../../../index.html", "run.ipynb"]
    assert (folder / method).resolve() == (tmp_path / "outputs" / "method" / "td_dpo.html").resolve()
    assert "To do again what has changed: ./run_all.sh full --study td_dpo --run dpo" in page.text
    assert "--force" not in page.text, "without members there is nothing to train again"
    write(folder / "members" / "beta0.05-s42" / "done.json", {"status": "completed"})
    page = Page(pages.notebook_html(folder / "run.ipynb").read_text())
    assert "./run_all.sh full --study td_dpo --run dpo --force" in page.text
    assert not re.search(r"\brm\b", page.text)


def test_no_two_pages_have_one_title(outputs):
    study = outputs / "laptop-full" / "td_dpo"
    shared = notebook(v4.new_markdown_cell("# Does it work?"))
    for path in (
        study / "dpo" / "run",
        study / "dpo" / "sweep" / "sweep",
        study / "td_dpo" / "run",
        study / "comparison" / "analysis",
    ):
        path.parent.mkdir(exist_ok=True)
        nbformat.write(shared, path.with_suffix(".ipynb"))
        pages.notebook_html(path.with_suffix(".ipynb"))
    pages.index_html(outputs)
    titles = [
        re.findall("<title>(.*?)</title>", page.read_text())[0]
        for page in outputs.rglob("*.html")
        if "analysis" not in page.name
    ]
    assert len(titles) == len(set(titles)) > 4
    assert "td_dpo/dpo (laptop-full): Does it work?" in titles


def test_no_page_has_a_path_of_this_machine(tmp_path, monkeypatch):
    """Of the record's own folder, wherever it was made, of the repository, and of who ran it."""
    monkeypatch.setenv("HOME", "/home/somebody")
    folder = tmp_path / "outputs" / "laptop-full" / "td_dpo" / "dpo"
    folder.mkdir(parents=True)
    made_in = "/data/elsewhere/outputs/laptop-full/td_dpo"
    printed = f"{ROOT}/lib/training.py line 3, /home/somebody/pairs.jsonl"
    cells = code(f'results_dir = "{made_in}"'), code("x", v4.new_output("stream", name="stdout", text=printed))
    nb = notebook(*cells)
    nb.metadata["papermill"] = {"parameters": {"results_dir": made_in}}
    nbformat.write(nb, folder / "run.ipynb")
    write(folder / "status.json", {"status": "failed", "error": {"exception": f"StudyError: {printed}"}})
    write(folder / "audit.json", {"warnings": [f"{tmp_path}/outputs/laptop-full/x has a duplicate"]})
    for page in (pages.notebook_html(folder / "run.ipynb"), pages.index_html(tmp_path / "outputs")):
        text = page.read_text()
        for path in (str(ROOT), "/home/somebody", "/data/elsewhere", str(tmp_path)):
            assert path not in text, path
        assert "lib/training.py line 3, ~/pairs.jsonl" in text
    assert "outputs/laptop-full/td_dpo" in Page((folder / "run.html").read_text()).text


def test_a_path_to_data_elsewhere_on_this_machine_is_its_name(tmp_path):
    (tmp_path / "secret").mkdir()
    said = f"dataset.name = {tmp_path}/secret/pairs.jsonl; https://arxiv.org/abs/2305.18290, 3/4, /nowhere/at/all.txt"
    kept = "dataset.name = pairs.jsonl; https://arxiv.org/abs/2305.18290, 3/4, /nowhere/at/all.txt"
    assert pages.anonymous(said) == kept


# --- the index ---


def write(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def outputs(tmp_path):
    """Two studies at laptop scale and a trial, with a failed run, a torn status and text that would act if it could."""
    study = tmp_path / "laptop-full" / "td_dpo"
    for i, run_id in enumerate(("dpo", "td_dpo")):
        write(
            study / run_id / "status.json",
            {
                "run_id": run_id,
                "status": "succeeded",
                "minutes": 2.04 + i,
                "actual_member_seconds": 180,
                "ended": 1795221190.0,
                "key_metric": {"name": "oracle_score", "value": 7.25 + i},
            },
        )
        write(study / run_id / "metrics.json", {"key_metric": {"name": "oracle_score", "value": 7.25 + i}})
        page = v4.new_notebook(cells=[v4.new_markdown_cell(f"# {run_id}")])
        write(study / run_id / "run.ipynb", nbformat.writes(page))
        write(study / run_id / "members" / "beta0.05-s42" / "done.json", {"status": "completed"})
        write(study / run_id / "members" / "beta2.5-s42" / "done.json", {"status": "diverged"})
        write(
            study / run_id / "members" / "beta0.05-s42" / "metrics.json",
            {"status": "completed", "oracle_score": 7.25 + i},
        )
        write(study / run_id / "members" / "beta0.05-s42" / "history.jsonl", '{"step": 30, "lo')
        write(study / run_id / "members" / "beta2.5-s42" / "error.json", {"exception": EVIL})
        pages.notebook_html(study / run_id / "run.ipynb")
        write(study / run_id / "provenance.json", {"python": "3.11.7", "packages": {"torch": "2.13.0"}, "note": EVIL})
    write(
        study / "discopop" / "status.json",
        {
            "status": "failed",
            "error": {
                "cell": 7,
                "exception": f"StudyError: {EVIL}",
                "again": "./run_all.sh full --run 'discopop'",
                "log": "x",
            },
        },
    )
    write(
        study / "comparison" / "claims.json",
        [
            {
                "id": "C1",
                "sentence": f"TD-DPO matches {EVIL}",
                "verdict": "refuted",
                "estimate": -0.4712,
                "interval95": [-0.62, -0.33],
                "holm_p": 1.0,
                "reason": "it scores below",
                "n_seeds": 5,
                "minutes": 1.93,
                "scored_by": "oracle score",
            },
            {"id": "C2", "verdict": "not_evaluated"},
            {"id": "C4", "verdict": "vacuous", "estimate": None, "interval95": [None, None]},
        ],
    )
    write(
        study / "comparison" / "aggregated_metrics.json",
        {
            "primary_metric": "Exact-match accuracy at 30 min wall-clock.",
            "metrics": {},
            "best_proposed": {"run_id": "td_dpo", "value": 7.02},
            "best_baseline": {"run_id": "dpo", "value": 7.95},
            "gap": -11.7,
            "members": {"td_dpo": {"cell": "beta0.05-tau1", "chosen_on": "validation_accuracy"}},
        },
    )
    write(study / "comparison" / "analysis.html", "page")
    write(
        study / "comparison" / "figures" / "comparison_primary_metric.links.json",
        [{"left": 0.25, "top": 0.5, "href": "../dpo/run.html#beta0.05-s42", "words": "dpo, seed 42: 7.25"}],
    )
    for name in ("comparison_a_first", "comparison_primary_metric"):
        (study / "comparison" / "figures").mkdir(exist_ok=True)
        (study / "comparison" / "figures" / f"{name}.png").write_bytes(png())
    write(study / "comparison" / "figures" / "comparison_primary_metric.alt.txt", 'DPO 7.95 "at" <beta> 0.5')
    write(tmp_path / "laptop-full" / "graff" / "a run & more" / "status.json", {"status": "running", "minutes": None})
    write(tmp_path / "laptop-trial" / "td_dpo" / "dpo" / "status.json", '{"run_id": "dpo", "stat')
    write(
        tmp_path / "laptop-trial" / "td_dpo" / "comparison" / "claims.json", [{"id": "C1", "verdict": "not evaluated"}]
    )
    return tmp_path


def test_the_index_lists_every_run_with_what_it_came_to(outputs):
    page = assert_inert(pages.index_html(outputs).read_text(), TABLE)
    for said in (
        "TD-DPO, laptop scale",
        "Exact-match accuracy at 30 min wall-clock of the cell that each run chose on validation accuracy, not on this",
        "GRAFF, laptop scale",
        "TD-DPO, laptop scale, trial",
        "✓ succeeded",
        "✗ failed",
        "7.25",
        "8.25",
        "2.0",
        "3.0",
        "1 completed, 1 diverged",
        "2026-11-",
        "StudyError: <script>",
        "./run_all.sh full --run 'discopop'",
        "? no status",
        "a run & more",
        "torch 2.13.0",
    ):
        assert said in page.text, said
    links = [a["href"] for a in page.all("a")]
    assert "laptop-full/td_dpo/dpo/run.html" in links
    assert "laptop-full/td_dpo/comparison/analysis.html" in links
    papers = [href for href in links if href.startswith("https://arxiv.org/abs/")]
    assert len(papers) > 4, "what it is compared with can be read"
    assert "method/td_dpo.html" in links
    for href in {*links} - {*papers}:
        assert href.startswith("#") or (outputs / href.replace("%20", " ").partition("#")[0]).exists(), href


def test_claims_come_first_with_verdict_and_interval(outputs):
    text = pages.index_html(outputs).read_text()
    page = Page(text)
    places = ('class="card refuted"', "<figure>", "<caption>Runs.", "<summary>Provenance")
    assert sorted(places, key=text.index) == list(places)
    assert "−0.620 to −0.330" in page.text
    assert "5 seeds · 1.9 core-minutes · laptop scale · oracle score" in page.text
    assert "−0.471" in page.text
    assert "it scores below" in page.text
    assert "1 claim not evaluated here" in page.text
    assert len(page.all("details")) > 1
    shown = [a.get("class") for a in page.all("span")]
    assert shown.count("verdict not-evaluated") == 1  # a trial's claims are not shown
    assert "best proposed td_dpo 7.02 (beta0.05-tau1), best baseline dpo 7.95, gap −11.7 %." in page.text
    assert "A trial shows that every run starts" in page.text


def test_words_are_defined_before_they_are_used(outputs):
    text = pages.index_html(outputs).read_text()
    defined = ", ".join(re.findall("<dt>(.*?)</dt>", text)).split(", ")
    before = Page(text.split("<dl>")[0].split("<body>")[1]).text
    for word in ("supported", "inconclusive", "vacuous", "oracle score", "verifier score", "member", "trial"):
        assert word in defined, word
        assert word == "supported" or word not in before, word  # that one is said of the drawing


@pytest.mark.parametrize(
    ("test", "estimate", "ends", "tested", "shaded"),
    [
        ("superiority", 2.0, [1.0, 3.0], 1.5, (1.5, None)),
        ("non_inferiority", -0.1, [-0.4, 0.2], 0.3, (-0.3, None)),
        ("equivalence", 0.1, [-0.1, 0.3], 0.5, (-0.5, 0.5)),
        ("cost_ratio", 1.1, [1.05, 1.15], 1.02, (None, 1.02)),
        ("superiority", 2.0, [None, 3.0], 1.5, (1.5, None)),
        ("superiority", 0.0, [0.0, 0.0], 0.0, (0.0, None)),
    ],
)
def test_an_interval_is_drawn_to_scale_with_what_supports_the_claim(tmp_path, test, estimate, ends, tested, shaded):
    claim = {
        "id": "C1",
        "verdict": "supported",
        "test": test,
        "estimate": estimate,
        "interval95": ends,
        "tested": tested,
    }
    write(tmp_path / "laptop-full" / "td_dpo" / "comparison" / "claims.json", [claim])
    page = Page(pages.index_html(tmp_path).read_text())
    (bar,) = [a for a in page.all("line") if a["class"] == "bar"]
    (nothing,) = [a for a in page.all("line") if a["class"] == "nothing"]
    (region,) = [a for a in page.all("rect") if a["class"] == "claimed"]
    (dot,) = [a for a in page.all("rect") if a["class"] == "dot"]
    none = 1.0 if "ratio" in test else 0.0
    known = [v for v in (estimate, *ends, none, *shaded) if v is not None]

    def place(value, otherwise=None):
        return otherwise if value is None else 20 + 260 * (value - min(known)) / ((max(known) - min(known)) or 1)

    assert (float(bar["x1"]), float(bar["x2"])) == pytest.approx((place(ends[0], 0), place(ends[1], 300)), abs=0.1)
    assert float(nothing["x1"]) == pytest.approx(place(none), abs=0.1)
    assert float(dot["x"]) + 4.5 == pytest.approx(place(estimate), abs=0.1)
    left, right = float(region["x"]), float(region["x"]) + float(region["width"])
    assert (left, right) == pytest.approx((place(shaded[0], 0), place(shaded[1], 300)), abs=0.1)
    assert all(0 <= x <= 300 for x in (left, right, float(bar["x1"]), float(bar["x2"])))


def test_the_index_is_there_from_the_first_minute_with_what_runs(tmp_path):
    """Before anything has left a record, and while it runs."""
    from lib.run import progress

    root = tmp_path / "laptop-full"
    with progress.lock(root):
        page = assert_inert(pages.index_html(tmp_path).read_text(), TABLE)
        assert "Running now, laptop-full: it has just begun" in page.text
        assert '<meta http-equiv="refresh"' in (tmp_path / "index.html").read_text()
        write(
            root / "progress.json",
            {"text": "[1m00s] first looks: 3 of 14 notebooks done", "lines": ["graff/graff: step 3"]},
        )
        write(root / "td_dpo" / "dpo" / "status.json", {"run_id": "dpo", "status": "running"})
        write(root / "td_dpo" / "dpo" / "progress.json", {"phase": "preparing", "step": 3, "steps": 9})
        page = assert_inert(pages.index_html(tmp_path).read_text(), TABLE)
        for said in (
            "3 of 14 notebooks done",
            "graff/graff: step 3",
            "… running",
            "base model step 3/9",
            "No verdict yet",
        ):
            assert said in page.text, said
    page = Page(pages.index_html(tmp_path).read_text())
    assert "Running now" not in page.text
    assert "refresh" not in (tmp_path / "index.html").read_text()
    assert "interrupted" in page.text


def test_a_run_writes_the_index_and_survives_one_that_cannot_be_written(tmp_path, monkeypatch):
    mine = runner.Runner([], 1, root=tmp_path / "laptop-full")
    mine.publish({"text": "[0m00s] 0 of 1 notebooks done"})
    assert "<h1>" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "laptop-full" / "progress.json").exists()

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr(pages, "index_html", fails)
    mine.publish({})


def test_the_main_figure_is_the_primary_metrics_with_its_words(outputs):
    pictures = Page(pages.index_html(outputs).read_text()).all("img")
    assert [p["alt"] for p in pictures] == ['DPO 7.95 "at" <beta> 0.5']
    assert pictures[0]["src"].startswith("data:image/png;base64,")


def test_a_point_leads_to_its_member_on_the_page_of_its_run(outputs):
    (point,) = [a for a in Page(pages.index_html(outputs).read_text()).all("a") if a.get("class") == "point"]
    assert point["href"] == "laptop-full/td_dpo/dpo/run.html#beta0.05-s42"
    assert point["style"].rstrip(";") == "left:25.0%;top:50.0%"


def test_the_page_of_a_run_lists_its_members(outputs):
    folder = outputs / "laptop-full" / "td_dpo" / "dpo"
    page = assert_inert((folder / "run.html").read_text())
    assert [row["id"] for row in page.all("tr") if "id" in row] == ["beta0.05-s42", "beta2.5-s42"]
    for said in ("oracle score", "7.25", "completed", "diverged", EVIL):
        assert said in page.text, said
    for link in page.all("a"):
        assert link["href"].startswith("#") or (folder / link["href"]).exists() or "index.html" in link["href"]


def test_every_table_has_a_caption_and_scoped_headers(outputs):
    page = Page(pages.index_html(outputs).read_text().split("<script>")[0])
    assert len(page.all("caption")) == len(page.all("table")) > 3
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))


def test_an_empty_outputs_folder_says_how_to_begin(tmp_path):
    page = assert_inert(pages.index_html(tmp_path).read_text(), TABLE)
    assert "./run_all.sh" in page.text


def test_the_index_twice_is_the_same(outputs):
    assert pages.index_html(outputs).read_bytes() == pages.index_html(outputs).read_bytes()


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_text_has_aa_contrast_in_light_and_dark():
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", (ASSETS / "notebook" / "style.css").read_text(), re.S)
    )
    assert set(light) == set(dark)
    for theme in (light, dark):
        for name in set(theme) - {"ground", "panel", "line"}:
            for ground in ("ground", "panel"):
                low, high = sorted((luminance(theme[name]), luminance(theme[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)
