"""`report --site`: what is published has every page that its pages link to, no weights, no log and no path of the machine."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from lib.run import cli, pages
from tests.browser import PROGRAM, browser
from tests.conftest import ROOT
from tests.test_report import outputs, write  # noqa: F401 (a fixture)

MACHINE = "/home/someone/studies"


class Links(HTMLParser):
    """The addresses on a page, and the anchors that it has."""

    def __init__(self, page: Path):
        super().__init__()
        self.found, self.anchors = [], {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src") and value is not None]
        self.anchors |= {value for name, value in attrs if name == "id"}


def dead_links(site: Path) -> list[tuple[str, str]]:
    dead = []
    for page in site.rglob("*.html"):
        for address in Links(page).found:
            if re.match("https?:|data:|mailto:", address):
                continue
            name, _, anchor = unquote(address).partition("#")
            path = Path(os.path.normpath(page.parent / name)) if name else page
            if (
                not path.is_relative_to(site)
                or not path.is_file()
                or path.suffix == ".html"
                and anchor not in Links(path).anchors
            ):
                dead.append((page.name, address))
    return dead


@pytest.fixture
def site(outputs, monkeypatch, capsys):  # noqa: F811
    """The site of a record that was made elsewhere, with what must not be in it."""
    run = outputs / "laptop-full" / "td_dpo" / "dpo"
    notebook = json.loads((run / "run.ipynb").read_text())
    made = {"results_dir": f"{MACHINE}/outputs/laptop-full/td_dpo"}
    about = {"input_path": f"{MACHINE}/notebooks/td_dpo/train.ipynb", "parameters": made}
    notebook["metadata"]["papermill"] = about
    source = f"[log](wandb.log) [weights](members/beta0.05-s42/model.safetensors) [secret](../../../../secret.json) {ROOT}/lib"
    notebook["cells"].append({"cell_type": "markdown", "id": "a", "metadata": {}, "source": source})
    write(run / "run.ipynb", json.dumps(notebook))
    for name in ("wandb.log", "members/beta0.05-s42/model.safetensors", "config.yaml"):
        write(run / name, "x")
    write(outputs.parent / "secret.json", "{}")
    monkeypatch.setattr(cli, "OUTPUTS", outputs)
    target = outputs.parent / "a site"
    assert cli.main(["report", "--results-dir", str(outputs), "--site", str(target)]) == 0
    assert re.search(r"^\d+ files in ", capsys.readouterr().out, re.M)
    return target


def test_every_link_of_the_site_leads_somewhere_in_it(site):
    assert dead_links(site) == []
    assert (site / "laptop-full/td_dpo/dpo/run.html").is_file()
    assert (site / "laptop-full/td_dpo/dpo/run.ipynb").is_file()
    (site / "laptop-full/td_dpo/dpo/run.html").unlink()
    assert dead_links(site), "a page that is missing is found"


def test_the_site_has_pages_notebooks_and_tables_and_nothing_of_the_machine(site):
    files = [path for path in site.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= set(pages.PUBLISHED)
    assert not list(site.rglob("secret.json"))
    for path in files:
        if path.suffix not in (".png", ".pdf"):
            text = path.read_text()
            assert not [folder for folder in (MACHINE, str(ROOT), str(site.parent)) if f"{folder}/" in text], path
    page = (site / "laptop-full/td_dpo/dpo/run.html").read_text()
    assert re.search(r"<a>(log|weights)</a>", page), "what is not published is not linked"


def test_a_site_is_never_the_record_itself(outputs, capsys):  # noqa: F811
    assert cli.main(["report", "--results-dir", str(outputs), "--site", str(outputs)]) == 2
    assert capsys.readouterr().err.startswith("--site: ")


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_in_a_browser_the_site_opens_page_by_page(site):
    with browser() as page:
        for path in sorted(site.rglob("*.html")):
            page.open(path.as_uri())
            assert page.reported == []
            assert [a for a in page.asked if a != path.as_uri() and not a.startswith("data:")] == []


def test_the_workflow_runs_and_publishes_what_the_command_writes():
    steps = yaml.safe_load((ROOT / ".github/workflows/record.yml").read_text())["jobs"]["run"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == ["PYTHON=python ./run_all.sh", "./run_all.sh report --site site"]
    assert [step["with"]["path"] for step in steps if "pages-artifact" in step.get("uses", "")] == ["site"]
