"""lib/run/keys.py: whatever a member executes is in its key, and what only stands beside it is not."""

import ast
import shutil
import sys
from pathlib import Path

import pytest

from lib import config
from lib.errors import StudyError
from lib.run import keys
from tests.conftest import ROOT

# of GRAFF a run that needs no planner trained before
RUNS = {"td_dpo": "td_dpo.yaml", "iw_lora": "iw_lora.yaml", "graff": "graff_cold.yaml"}


def run_of(study, name=None, results=Path("results")):
    folder = ROOT / "params" / study / "laptop"
    path = folder / (name or RUNS[study])
    return config.load_run(path, study=study, scale="laptop", mode="trial", results_dir=results)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """`lib` in a folder of its own, which keys are made of. edit(path, old, new); code(study, yaml) is a member's."""
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(keys, "ROOT", tmp_path)

    class Copy:
        @staticmethod
        def edit(path, old, new):
            text = (tmp_path / path).read_text()
            assert old in text, (path, old)
            (tmp_path / path).write_text(text.replace(old, new, 1))

        @staticmethod
        def code(study, name=None):
            member = config.members(run_of(study, name))[0]
            return keys.member_code(member)

    Copy.root = tmp_path
    return Copy


def executed(study, folder):
    """{(file, first line)} of the functions of `lib` that preparing and training one member execute, but for those that
    pydantic calls to check values: the values are in the key."""
    run, seen = run_of(study, results=folder / "results"), set()
    member = config.members(run)[0]

    def note(frame, event, _):
        called_by = frame.f_back.f_code.co_filename if frame.f_back else ""
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT / "lib")) and "pydantic" not in called_by:
            seen.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    for name in ("inputs", "member"):
        (folder / name).mkdir()
    prepare, train = config.study_module(study).prepare, config.study_module(study).train
    sys.settrace(note)  # returns None: no line is traced, and no function in C
    try:
        prepare(member.run, folder / "inputs")
        train(member, folder / "member", folder / "inputs")
    finally:
        sys.settrace(None)
    return {(Path(name).relative_to(ROOT), line) for name, line in seen}


def edited(text, lines):
    """(the module with every function edited that begins at one of these lines, {(line, its top-level definition)})."""
    tree, names = ast.parse(text), set()
    for top in tree.body:
        for node in ast.walk(top):
            if isinstance(node, ast.FunctionDef):
                line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if line in lines and isinstance(top, ast.FunctionDef | ast.ClassDef):
                    node.body.append(ast.parse("edited = 1").body[0])
                    names.add((line, top.name))
    return ast.unparse(tree), names


@pytest.mark.parametrize("study", ["td_dpo", "iw_lora", pytest.param("graff", marks=pytest.mark.slow)])
def test_editing_any_function_that_a_member_executes_changes_its_key(study, copy, tmp_path):
    """All are edited at once: each definition has a hash of its own in what the key is made of."""
    before, ran, tried = copy.code(study), executed(study, tmp_path), set()
    for file in {file for file, _ in ran}:
        text, names = edited((ROOT / file).read_text(), {line for name, line in ran if name == file})
        (copy.root / file).write_text(text)
        tried |= {(file, line, name) for line, name in names}
    after = copy.code(study)
    assert len(tried) > 50
    for file, line, name in sorted(tried):
        module = str(file.with_suffix("")).replace("/", ".")
        then, now = before.get(module, {}).get(name), after.get(module, {}).get(name)
        assert then != now, f"{file}:{line}: an edit of {name} is not seen"


def test_checks_figures_and_claims_wording_make_no_member_stale(copy):
    before = {study: copy.code(study) for study in RUNS}
    appended = "\n\ndef drawn_later(values):\n    return 'some words'\n"
    for path in ("lib/claims.py", "lib/plots.py", "lib/run/check.py", *(f"lib/{study}/report.py" for study in RUNS)):
        if (copy.root / path).exists():
            (copy.root / path).write_text((copy.root / path).read_text() + appended)
    for path in sorted(copy.root.glob("lib/**/*.py")):  # the words of every error
        tree = ast.parse(path.read_text())
        for raised in (node for node in ast.walk(tree) if isinstance(node, ast.Raise)):
            for part in ast.walk(raised):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    part.value += " in other words"
        path.write_text(ast.unparse(tree))
    assert {study: copy.code(study) for study in RUNS} == before


def test_editing_a_loss_retrains_the_members_that_use_it_and_adding_one_retrains_none(copy):
    path = "lib/td_dpo/losses.py"
    before = {name: copy.code("td_dpo", f"{name}.yaml") for name in ("dpo", "td_dpo", "discopop")}
    text = (copy.root / path).read_text()
    added = text.replace('    "dpo": dpo,', '    "dpo": dpo,\n    "another": another,', 1)
    assert added != text
    (copy.root / path).write_text(added + "\n\ndef another(log_ratios, beta):\n    return log_ratios * beta\n")
    assert {name: copy.code("td_dpo", f"{name}.yaml") for name in before} == before

    copy.edit(path, "def discopop(", "def discopop(  # edited\n    ")
    assert copy.code("td_dpo", "discopop.yaml") == before["discopop"], "a comment"
    tree = ast.parse((copy.root / path).read_text())
    (edited,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "discopop"]
    edited.body.append(ast.parse("edited = 1").body[0])
    (copy.root / path).write_text(ast.unparse(tree))
    assert copy.code("td_dpo", "dpo.yaml") == before["dpo"]
    after = copy.code("td_dpo", "discopop.yaml")
    assert keys.changed(before["discopop"], after) == ["lib/td_dpo/losses.py discopop"]
    code = (before["discopop"], after)
    assert "code changed: lib/td_dpo/losses.py discopop" in keys.difference({"code": "a"}, KEY | {"code": "b"}, *code)


KEY = {"all": "x", "config": {}, "versions": {}}


@pytest.mark.parametrize(
    ("code", "counted"),
    [
        ("LOSSES[name](1)", ["LOSSES[dpo]", "dpo"]),
        ("inner.LOSSES[name](1) if name in inner.LOSSES else 0", ["LOSSES[dpo]", "dpo"]),
        ("[loss(1) for loss in LOSSES.values()]", ["LOSSES", "dpo", "ipo"]),
        ("inner.dpo(1)", ["dpo"]),
        ("getattr(inner, name)(1)", ["LOSSES", "UNUSED", "dpo", "ipo"]),
        ("importlib.import_module('lib.inner')", ["LOSSES", "UNUSED", "dpo", "ipo"]),
    ],
)
def test_a_table_counts_by_its_entry_and_what_is_not_certain_as_a_whole(tmp_path, monkeypatch, code, counted):
    monkeypatch.setattr(keys, "ROOT", tmp_path)
    (tmp_path / "lib" / "td_dpo").mkdir(parents=True)
    losses = "def dpo(x): ...\n\ndef ipo(x): ...\n\nLOSSES = {'dpo': dpo, 'ipo': ipo}\nUNUSED = 1\n"
    (tmp_path / "lib" / "inner.py").write_text(losses)
    imported = "import importlib\nfrom lib import inner\nfrom lib.inner import LOSSES\n"
    study = f"{imported}\nclass Run: ...\n\ndef train(name: inner.ipo):\n    return {code}\n"
    (tmp_path / "lib" / "td_dpo" / "study.py").write_text(study)
    found = keys.reach("td_dpo", "train", values={"loss.name": "dpo"})
    assert list(found["lib.inner"]) == counted
    assert list(found["lib.td_dpo.study"]) == ["Run", "train"]


def test_hidden_files_are_no_data_and_a_broken_notebook_is_one_line(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    before = keys.source(str(tmp_path / "data"), None)
    (tmp_path / "data" / ".DS_Store").write_text("x")
    assert keys.source(str(tmp_path / "data"), None) == before
    (tmp_path / "a.ipynb").write_text("<<<<<<< HEAD")
    with pytest.raises(StudyError, match=r"(?s)no notebook: JSONDecodeError.*fix: git checkout -- "):
        keys.notebook_code(tmp_path / "a.ipynb")
