"""The house rules that a machine can hold: where code lives, what imports what, and notebooks that stay sources."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib import config
from tests.conftest import ROOT

STUDIES = config.studies()
MODULES = sorted((ROOT / "lib").rglob("*.py"))
NOTEBOOKS = [p for p in sorted((ROOT / "notebooks").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    return names | {
        f"{node.module}.{a.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for a in node.names
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_study_imports_another(path):
    home = path.relative_to(ROOT / "lib").parts
    own = home[0] if len(home) > 1 else None
    for name in imported(path):
        study = next((s for s in STUDIES if name.startswith(f"lib.{s}.") or name == f"lib.{s}"), None)
        assert study in (None, own), f"{path.name} imports {name}"


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


@pytest.mark.parametrize(
    "module",
    ["lib.run.cli", "lib.run.plan", "lib.run.runner", "lib.run.pages", "lib.claims", "lib.plots", "lib.run.preflight"],
)
def test_the_runner_starts_without_torch(module):
    code = f"import {module}, sys; assert not {{'torch', 'transformers', 'optuna'}} & set(sys.modules)"
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
        assert path.parent.name in ("laptop", "paper")
        assert path.parent.parent.name in STUDIES


def test_nothing_heavy_is_tracked():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        assert not name.startswith(("outputs/", ".cache/", ".venv/")), name
        assert not path.exists() or path.stat().st_size < 400_000, f"{name} is large"


@pytest.mark.parametrize("path", sorted((ROOT / "lib").rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_a_package_is_no_more_than_its_docstring(path):
    """Code there would run without being part of a member's key (lib/run/keys.py), and unseen by the pool's
    server."""
    (only,) = ast.parse(path.read_text()).body or [ast.Expr(ast.Constant(""))]
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)
