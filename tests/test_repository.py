"""The house rules that a machine can hold: where code lives, what imports what, and notebooks that stay sources."""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml

from lib import config
from tests.conftest import ROOT

STUDIES = config.studies()
MODULES = sorted((ROOT / "lib").rglob("*.py"))
NOTEBOOKS = [p for p in sorted((ROOT / "notebooks").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


# ---- how much a reader has to know, and which way imports go

# Limits only go down; one is raised with its reason beside it. Lines are code lines: no blanks, comments, docstrings.
# Beyond the design's 11,200: an idea judged by one command 270, settings that take effect or are refused 160, the cell
# `tuned` and published figures 118, what is shown while it runs 100, the installer 66, the site 34, a generated question
# that a pretrained encoder learns 11, a best at the end of what was tried 9, quicker plans 1, forecasts put right by
# what other studies' preparation took 3, and what four readers of the code found on 2026-11-30 96: options that a command
# does not read, GPUs that nobody asked for, times in the precision of a training, words that a study takes back; and 96
# for data that was misread silently.
LIB = {"lines": 11_791, "files": 75}
# Of a member of any study; the design has 2,700. Layouts by name and the audit took 140, a function of one's own 45, settings
# that take effect 36, the cell `tuned` 15, a generated question that a pretrained encoder learns 11, seeds as repetitions 10,
# weights (not only a tokenizer) in a cache 6, processes that nothing shards over 5, where outputs are 3, precision 2,
# data that was misread silently 47, rows of like length in one batch 17, pilots without test 1.
REACH = {"files": 12, "lines": 2_612}
OWN = {"td_dpo": 10, "iw_lora": 5, "graff": 8}  # modules of a study's own
BASE = {"config", "errors", "record", "stats"}  # what all others may import, and that import nothing else


def code_lines(path: Path) -> int:
    source, skip = path.read_text(), {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    documented = set()
    for node in ast.walk(ast.parse(source)):
        first = node.body[0] if isinstance(getattr(node, "body", None), list) and node.body else None
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
        ):
            documented |= set(range(first.lineno, first.end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    held = {
        n
        for token in tokens
        if token.type not in skip and token.string
        for n in range(token.start[0], token.end[0] + 1)
    }
    return len(held - documented)


def module(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Modules of lib that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & SIZES.keys()


SIZES = {module(path): code_lines(path) for path in MODULES}
IMPORTS = {module(path): imported(path) - {module(path), "lib"} for path in MODULES}


def reach(start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += IMPORTS[name]
    return {name for name in seen if SIZES[name]}


def test_lib_is_small():
    assert sum(SIZES.values()) <= LIB["lines"]
    assert sum(1 for lines in SIZES.values() if lines) <= LIB["files"]


@pytest.mark.parametrize("study", STUDIES)
def test_training_a_member_takes_little_to_know(study):
    start = next(m for m in (f"lib.{study}.member", f"lib.{study}.study") if m in SIZES)
    known = reach(start)
    assert len(known) <= REACH["files"], sorted(known)
    assert sum(SIZES[name] for name in known) <= REACH["lines"]
    assert sum(1 for name, lines in SIZES.items() if name.startswith(f"lib.{study}.") and lines) <= OWN.get(study, 10)


def test_imports_go_down_and_never_round():
    """run imports studies, studies what they share, that the base of all; a study never imports another."""
    room = {name: (name.split(".") + [""])[1] for name in SIZES}
    wrong = []
    for name, others in IMPORTS.items():
        wrong += [f"{name} and {other} import each other" for other in others if name in reach(other)]
        for other in others:
            own, its = room[name], room[other]
            above = its in (*STUDIES, "run") if own not in ("run", "__main__") else False
            if own != its and (above or (own in BASE and its not in BASE)):
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_notebook(path):
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    parameters = [c for c in code if "parameters" in c["metadata"].get("tags", ())]
    assert len(parameters) == 1, "one parameters cell"
    names = {
        t.id
        for n in ast.walk(ast.parse("".join(parameters[0]["source"])))
        if isinstance(n, ast.Assign)
        for t in n.targets
    }
    assert {"study", "scale", "mode", "results_dir", "nonce"} <= names
    for cell in code:
        source = "".join(cell["source"])
        assert cell["execution_count"] is None, "output-free"
        assert not cell["outputs"], "output-free"
        assert not re.search(r"""["'](/|~|[A-Z]:\\)""", source), "no absolute path"
        assert "!python" not in source
    assert cells[0]["cell_type"] == "markdown"


def test_the_runner_starts_without_torch():
    modules = "lib.run.cli, lib.run.plan, lib.run.runner, lib.run.pages, lib.claims, lib.plots, lib.run.preflight"
    code = f"import {modules}, sys; assert not {{'torch', 'transformers', 'optuna'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_plan_of_the_studies_imports_no_torch(tmp_path):
    code = (
        "import sys; from lib.run import cli; assert cli.main(['plan']) == 0; "
        "assert 'torch' not in sys.modules and 'optuna' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        env={**__import__("os").environ, "STUDY_OUTPUTS": str(tmp_path)},
    )


def test_every_shipped_yaml_is_named_after_its_run():
    for path in sorted((ROOT / "params").glob("*/*/*.yaml")):
        assert config.load_yaml(path)["run_id"] == path.stem
        assert path.parent.name in config.SCALES
        assert path.parent.parent.name in STUDIES


@pytest.mark.parametrize("study", STUDIES)
def test_a_page_of_each_study_says_what_was_published(study):
    """It is linked from where readers come from, has every reported figure, and cites files that are there."""
    folder = ROOT / "notebooks" / study
    text = (folder / "METHOD.md").read_text()
    assert f"(notebooks/{study}/METHOD.md)" in (ROOT / "README.md").read_text()
    assert "(METHOD.md)" in (folder / "README.md").read_text()
    for name in ("train", "analysis"):
        first = json.loads((folder / f"{name}.ipynb").read_text())["cells"][0]
        assert "(METHOD.md)" in "".join(first["source"]), name
    for claim in config.load_yaml(ROOT / "params" / study / "claims.yaml")["claims"]:
        if (figure := claim.get("reported")) is not None:
            figures = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)}
            assert {figure, round(100 * figure, 6)} & figures, f"{claim['id']}: {figure}, or in percent"
    for cited in re.findall(r"`((?:lib|params|notebooks)/[^`\s]+)`", text):
        assert list(ROOT.glob(cited)), cited


def test_nothing_heavy_is_tracked():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        assert not name.startswith(("outputs/", ".cache/", ".venv/")), name
        assert not path.exists() or path.stat().st_size < 400_000, f"{name} is large"


TOP = {
    "notebooks",
    "lib",
    "params",
    "outputs",
    "tests",
    "benchmarks",
    "docs",
    ".github",
    ".ci",
    "pyproject.toml",
    "run_all.sh",
}
TOP |= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "constraints.txt"}
TOP |= {".gitignore", ".pre-commit-config.yaml"}


def test_the_top_level_stays_as_it_is():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in filter(None, tracked.stdout.split("\0"))} <= TOP
    assert {path.name for path in (ROOT / "docs").iterdir()} == {"log.md"}


def test_the_citation_says_what_the_package_says():
    """Valid by cffconvert 2.0.0; what may drift is compared here."""
    cited, package = (
        yaml.safe_load((ROOT / "CITATION.cff").read_text()),
        tomllib.loads((ROOT / "pyproject.toml").read_text()),
    )
    assert {"cff-version", "message", "title", "authors"} <= cited.keys(), "what the schema requires"
    assert cited["version"] == package["project"]["version"]
    assert cited["license"] == package["project"]["license"]


def test_the_log_of_what_did_not_pay_can_be_traced():
    """Each paragraph has a figure, and each commit that it names is there."""
    text = (ROOT / "docs" / "log.md").read_text()
    entries = re.findall(r"^- \*\*.+?(?=^- \*\*|^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert 12 <= len(entries) <= 25
    assert [entry for entry in entries if not re.search(r"\d", entry)] == []
    named = set(re.findall(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{7}\b", text))
    assert len(named) > 8
    if (ROOT / ".git").exists() and not (ROOT / ".git" / "shallow").exists():
        for commit in named:
            assert not subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT).returncode, commit


@pytest.mark.parametrize("path", sorted((ROOT / "lib").rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_a_package_is_no_more_than_its_docstring(path):
    """Code there would run without being part of a member's key (lib/run/keys.py), and unseen by the pool's
    server."""
    (only,) = ast.parse(path.read_text()).body or [ast.Expr(ast.Constant(""))]
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)
