"""lib/run/reach.py: whatever a member executes is in its key, and what only stands beside it is not."""

import ast
import shutil
import sys
from pathlib import Path

import pytest

from lib import config
from lib.run import keys, reach, work
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
    monkeypatch.setattr(reach, "ROOT", tmp_path)

    class Copy:
        @staticmethod
        def edit(path, old, new):
            text = (tmp_path / path).read_text()
            assert old in text, (path, old)
            (tmp_path / path).write_text(text.replace(old, new, 1))

        @staticmethod
        def code(study, name=None):
            member = config.members(run_of(study, name))[0]
            return keys.member_code(study, config.dump(member.run))

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
    prepare, train = work.study_module(study, "inputs").prepare, work.study_module(study).train
    sys.setprofile(note)
    try:
        prepare(run, folder / "inputs")
        train(member, folder / "member", folder / "inputs")
    finally:
        sys.setprofile(None)
    return {(Path(name).relative_to(ROOT), line) for name, line in seen}


def functions(tree):
    """{first line, a decorator's included: (its node, its top-level definition)} of a module's functions."""
    found = {}
    for top in tree.body:
        for node in ast.walk(top):
            if isinstance(node, ast.FunctionDef):
                found[min([node.lineno, *(d.lineno for d in node.decorator_list)])] = node, top.lineno
    return found


@pytest.mark.parametrize("study", sorted(RUNS))
def test_editing_any_function_that_a_member_executes_changes_its_key(study, copy, tmp_path):
    before = copy.code(study)
    ran, missed, tried = executed(study, tmp_path), [], 0
    for file in sorted({file for file, _ in ran}):
        text, done = (ROOT / file).read_text(), set()
        for line in sorted(line for name, line in ran if name == file):
            tree = ast.parse(text)
            node, top = functions(tree).get(line, (None, None))
            if node is None or top in done:  # a lambda is part of a function; a function inside one of what is around
                continue
            done.add(top)
            node.body.append(ast.parse("edited = 1").body[0])
            (copy.root / file).write_text(ast.unparse(tree))
            tried += 1
            if copy.code(study) == before:
                missed.append(f"{file}:{line} {node.name}")
            (copy.root / file).write_text(text)
    assert tried > 50
    assert not missed
