"""`compose`: the shipped YAMLs are what the shipped designs write; what is wrong is refused before anything is written;
and CONTRIBUTING.md's walk-through of adding a method works as it is printed there."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import yaml

from lib import config, record
from lib.errors import StudyError
from lib.run import check, cli, compose as command
from lib.td_dpo import report
from tests.conftest import ROOT

DESIGNS = sorted((ROOT / "params").glob("*/design.yaml"))


def rendered(design: Path) -> dict[str, str]:
    return {file.relative_to(design.parent).as_posix(): text for file, text in command.compose(design)[1].items()}


def written(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.yaml") if p.name != "design.yaml"}


def compose(*arguments) -> int:
    return command.main([str(a) for a in arguments])


@pytest.mark.parametrize("design", DESIGNS, ids=lambda path: path.parent.name)
def test_a_shipped_design_writes_the_shipped_files_byte_for_byte(design):
    there = written(design.parent)
    assert {d.parent.name for d in DESIGNS} == set(config.studies())
    assert rendered(design) == there
    assert 2 * design.read_text().count("\n") < sum(text.count("\n") for text in there.values())


# ---- a design of its own: TD-DPO's laptop runs on two data sets


@pytest.fixture
def design(tmp_path):
    """The path of a small design and its text, to be changed: design.change(old, new)."""
    base = (ROOT / "params/td_dpo/laptop/td_dpo.yaml").read_text()
    text = textwrap.dedent("""\
        study: td_dpo
        methods:
          td_dpo: {role: proposed, label: TD-DPO, about: The proposed one.}
          dpo:
            role: comparative
            label: DPO
            about: |
              The baseline,
              as published.
            set:
              loss.name: dpo
              training.learning_rate: 4e-4
              optuna.n_trials: 0
              grid: [{product: {beta: [0.01, 0.05]}, seeds: [42]}]
            drop: [loss.tau, optuna.search_space.tau]
          ipo:
            like: dpo
            set: {loss.name: ipo}
            when:
              small: {set: {training.max_steps: 60}}
        scales:
          laptop:
            name: <method>-<dataset>
            factors:
              dataset:
                generated: {}
                small: {set: {dataset.train_pairs: 320}, drop: [training.logging_steps]}
            notes:
              optuna.n_trials: of the base alone
              evaluation.questions: two turns each
            base:
        """)
    text += textwrap.indent(base[base.index("model:") :], "      ") + textwrap.dedent("""
        claims:
          about: What is claimed.
          notes: {keys: as in the study}
          keys: [beta, tau]
          choose_on: validation_implicit_accuracy
          claims:
            - &first
              id: C1
              sentence: On generated data it matches DPO.
              estimand: mean score of TD-DPO less that of DPO
              test: superiority
              treatment: {run_id: td_dpo-generated}
              baseline: {run_id: dpo-generated, beta: 0.05}
              margin: 0.3
            - <<: *first
              id: C2
              treatment: {run_id: td_dpo-small}
              baseline: {run_id: dpo-small, beta: 0.05}
        """)
    path = tmp_path / "study" / "design.yaml"
    path.parent.mkdir()

    def change(old: str, new: str) -> None:
        assert old in path.read_text(), old
        path.write_text(path.read_text().replace(old, new, 1))

    path.write_text(text)
    change.path, change.folder = path, path.parent
    return change


def test_runs_are_complete_and_say_where_they_come_from(design, capsys):
    assert compose(design.path) == 0
    files = written(design.folder)
    names = [f"{method}-{data}" for method in ("dpo", "ipo", "td_dpo") for data in ("generated", "small")]
    assert sorted(files) == ["claims.yaml", *(f"laptop/{name}.yaml" for name in names)]
    lines = files["laptop/dpo-small.yaml"].splitlines()
    assert lines[:2] == ["# The baseline,", "# as published."]
    assert lines[2].startswith("# Written by ./run_all.sh compose from ../design.yaml, ")
    assert lines[3:8] == ["run_id: dpo-small", "method: dpo", "role: comparative", "", "model:"]
    runs = {
        name: config.load_run(design.folder / f"laptop/{name}.yaml", study="td_dpo", scale="laptop", mode="full")
        for name in names
    }
    assert {name: run.training.max_steps for name, run in runs.items() if name != "ipo-small"} == dict.fromkeys(
        (name for name in names if name != "ipo-small"), 120
    )
    ipo = runs["ipo-small"]
    assert (ipo.training.max_steps, ipo.training.learning_rate, ipo.dataset.train_pairs) == (60, 4e-4, 320)
    assert (ipo.role, ipo.loss.name, list(ipo.optuna.search_space)) == ("comparative", "ipo", ["beta", "learning_rate"])
    assert "logging_steps:" not in files["laptop/ipo-small.yaml"]
    assert "  questions: 320   # two turns each\n" in files["laptop/dpo-small.yaml"]
    assert "  n_trials: 0\n" in files["laptop/dpo-small.yaml"], "the note is about another value"
    assert "  n_trials: 16   # of the base alone\n" in files["laptop/td_dpo-small.yaml"]
    claims = files["claims.yaml"]
    assert claims.startswith("# What is claimed.\n# Written by")
    assert "names:\n  td_dpo: TD-DPO\n  dpo: DPO\nkeys: [beta, tau]   # as in the study\n" in claims
    assert [claim["margin"] for claim in yaml.safe_load(claims)["claims"]] == [0.3, 0.3]
    assert capsys.readouterr().out.endswith("7 files written\n")
    before = {p: p.stat().st_mtime_ns for p in design.folder.rglob("*.yaml")}
    assert compose(design.path) == 0
    assert {p: p.stat().st_mtime_ns for p in design.folder.rglob("*.yaml")} == before


def test_only_rules_out_what_has_none_of_these(design):
    compose(design.path)
    files = written(design.folder)
    of_ones_own = design.folder / "laptop/mine.yaml"
    of_ones_own.write_text("run_id: mine\n")
    design("    like: dpo\n", "    like: dpo\n    only: [paper, small]\n")
    assert compose(design.path) == 0
    assert set(files) - set(written(design.folder)) == {"laptop/ipo-generated.yaml"}, (
        "what it no longer writes is removed"
    )
    assert of_ones_own.exists()
    of_ones_own.unlink()
    assert [name for name in rendered(design.path) if "ipo" in name] == ["laptop/ipo-small.yaml"]


def test_an_option_on_a_loss_is_a_method_of_its_own(design):
    design("set: {loss.name: ipo}", "set: {loss.average_log_probs: true}")
    design("  ipo:\n", "  dpo_averaged:\n")
    assert compose(design.path) == 0
    loaded = check.load_folder(design.folder / "laptop", "laptop", "full")
    assert {run.run_id: found for _, run, found in loaded if run.method == "dpo_averaged"} == {
        "dpo_averaged-generated": [],
        "dpo_averaged-small": [],
    }


CONTENT = {
    "numbers": {"small": 5e-7, "text": "5e-7", "large": 1e22, "whole": 3, "none": None, "flag": "off", "yes": True},
    "names": {"30": "1", "a b": "# no comment", "long": "word: " * 40, "lines": "one\ntwo\n", "umlaut": "ü"},
    "empty": {"list": [], "mapping": {}},
    "several": ["one", 2, {"a": {"b": []}}, ["words " * 20]],
    "deep": {"list": [0.5] * 40},
    "grid": [{"product": {"beta": [0.01, 0.5], "tau": [1.0] * 30}}, {"cells": [{"beta": 1e-5}], "seeds": [1, 2]}],
}


def test_what_is_written_reads_back_as_it_was():
    assert yaml.safe_load(command._yaml(CONTENT, {"numbers.small": "a note", "grid": "another"})) == CONTENT


REFUSED = {
    "a key that no design has": (
        "    label: DPO\n", "    lable: DPO\n",
        ["methods.dpo", "lable", "unknown key", "did you mean methods.dpo.label"],
    ),
    "a key that no scale has": (
        "    factors:\n", "    factor:\n",
        ["scales.laptop", "factor", "did you mean scales.laptop.factors"],
    ),
    "a key that is set and that no study has": (
        "training.learning_rate: 4e-4", "training.learning_rat: 4e-4",
        ["dpo-generated.yaml", "training.learning_rat", "unknown key", "did you mean training.learning_rate"],
    ),
    "a section that is set and that no study has": (
        "training.learning_rate: 4e-4", "trainig.learning_rate: 4e-4",
        ["dpo-generated.yaml", "trainig", "did you mean training"],
    ),
    "a key that is dropped and not there": (
        "drop: [training.logging_steps]", "drop: [training.loging_steps]",
        ["dpo-small", "drop: training.loging_steps", "did you mean logging_steps"],
    ),
    "a value out of its range": (
        "training.max_steps: 60", "training.max_steps: -60",
        ["ipo-small.yaml", "max_steps"],
    ),
    "a loss that nobody has": (
        "set: {loss.name: ipo}", "set: {loss.name: ipoo}",
        ["ipo-generated.yaml", "loss.name", "ipoo"],
    ),
    "two runs of one name": (
        "name: <method>-<dataset>", "name: <method>",
        ["scales.laptop", "two runs named td_dpo", "name: <method>_<dataset>"],
    ),
    "a part of a name that is not there": (
        "name: <method>-<dataset>", "name: <method>-<dataset>-<datset>",
        ["run_id", "<datset>", "run_id: 'dpo-generated-<datset>'"],
    ),
    "a name that is no file name": (
        "name: <method>-<dataset>", "name: ../<method>-<dataset>",
        ["scales.laptop.name", "../"],
    ),
    "like nothing": (
        "like: dpo", "like: dppo",
        ["ipo.like", "did you mean dpo"],
    ),
    "like itself": (
        "like: dpo", "like: ipo",
        ["ipo.like", "one of td_dpo, dpo\n"],
    ),
    "like in a circle": (
        "  dpo:\n    role", "  dpo:\n    like: ipo\n    role",
        ["dpo.like", "one of td_dpo"],
    ),
    "a method without a role": (
        "role: proposed, ", "",
        ["role: None", "'proposed', 'comparative'"],
    ),
    "when nothing": (
        "      small: {set: {training", "      smal: {set: {training",
        ["ipo: only, when", "'smal'", "did you mean small"],
    ),
    "only a method of no name": (
        "set: {loss.name: ipo}", "set: {loss.name: ipo}\n    only: [papre]",
        ["ipo: only, when", "did you mean paper"],
    ),
    "a run that a claim is about is ruled out": (
        "td_dpo: {role: proposed,", "td_dpo: {only: [paper], role: proposed,",
        ["C1.treatment", "no run at laptop scale"],
    ),
    "a claim that is a word": (
        "    - &first", "    - C0\n    - &first",
        ["claims.0", "'C0'"],
    ),
    "a claim's metric": (
        "margin: 0.3", "metric: scores\n      margin: 0.3",
        ["C1.metric", "scores is in no table"],
    ),
    "a claim's key": (
        "      margin: 0.3", "      margn: 0.3",
        ["claims.0.margn", "did you mean claims.0.margin"],
    ),
    "a study of no name": (
        "study: td_dpo", "study: tddpo",
        ["tddpo", "did you mean td_dpo"],
    ),
    "YAML that is none": (
        "  dpo:\n", "  dpo\n",
        ["design.yaml:"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_design_is_refused_before_anything_is_written(design, old, new, words):
    design(old, new)
    with pytest.raises(StudyError) as refused:
        compose(design.path)
    said = str(refused.value)
    for word in words:
        assert word in said, said
    assert "expected:" in said
    assert written(design.folder) == {}


def test_a_file_that_differs_is_kept_without_force(design, capsys):
    compose(design.path)
    by_hand = design.folder / "laptop/td_dpo-small.yaml"
    by_hand.write_text(by_hand.read_text().replace("epochs: null", "epochs: 1"))
    design("The baseline,", "A baseline,")
    before = written(design.folder)
    capsys.readouterr()
    assert cli.main(["compose", str(design.path)]) == 2
    said = capsys.readouterr().err
    assert [name for name in before if name in said] == ["laptop/td_dpo-small.yaml"], (
        "the others are as they were written"
    )
    assert f"./run_all.sh compose {design.path} --force" in said
    assert written(design.folder) == before

    assert compose(design.path, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "-  epochs: 1\n+  epochs: null\n" in shown
    assert "-# The baseline,\n+# A baseline,\n" in shown
    assert written(design.folder) == before

    assert compose(design.path, "--force") == 0
    assert "3 files written" in capsys.readouterr().out
    assert written(design.folder) == rendered(design.path)


def test_an_edit_of_the_design_is_written_without_being_asked_for_force(design, capsys):
    compose(design.path)
    for old, new in (("The baseline,", "A baseline,"), ("A baseline,", "The baseline,")):
        design(old, new)
        capsys.readouterr()
        assert compose(design.path) == 0
        assert capsys.readouterr().out.endswith("2 files written\n")
        assert written(design.folder) == rendered(design.path)
    (design.folder / command.DIGESTS).unlink()
    design("The baseline,", "A baseline,")
    with pytest.raises(StudyError, match="files that somebody changed"):
        compose(design.path)


@pytest.mark.parametrize("design", DESIGNS, ids=lambda path: path.parent.name)
def test_the_digests_of_what_shipped_designs_write_are_shipped(design):
    texts = command.compose(design)[1].values()
    assert record.read_json(design.with_name(command.DIGESTS)) == sorted(map(record.digest, texts)), (
        "./run_all.sh compose"
    )


def test_plan_and_check_take_what_is_written_and_check_names_what_differs(design, capsys):
    compose(design.path)
    capsys.readouterr()
    assert cli.main(["plan", "--params", str(design.folder)]) == 0
    planned = capsys.readouterr().out
    assert "td_dpo/ipo-small" in planned
    assert "error" not in planned
    (design.folder / "laptop/td_dpo-small.yaml").unlink()
    changed = design.folder / "laptop/td_dpo-generated.yaml"
    changed.write_text(changed.read_text().replace("max_steps: 120", "max_steps: 110"))
    assert cli.main(["check", "--static", "--json", "--params", str(design.folder)]) == 0
    rows = {Path(row["file"]).name: row for row in json.loads(capsys.readouterr().out)["findings"]}
    assert {row["severity"] for row in rows.values()} == {"warning"}
    assert "differs" in rows["td_dpo-generated.yaml"]["what"]
    assert "compose" in rows["td_dpo-generated.yaml"]["fix"]
    assert "is missing" in rows["td_dpo-small.yaml"]["what"]

    design("loss.tau", "loss.tua")
    (fault,) = command.findings([(changed, None, [])])
    assert (fault.level, Path(fault.file).name) == ("error", "design.yaml")
    assert "loss.tua" in str(fault)


# ---- the walk-through of CONTRIBUTING.md


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


def test_adding_a_method_as_contributing_says(tmp_path):
    for name in ("lib", "notebooks", "params"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )

    def plant(file: str, old: str, new: str) -> None:
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new, 1))

    (entry,), (function,) = blocks("yaml"), blocks("python")
    own = re.search(r"def (\w+)\(", function)[1]
    both = entry + entry.replace("ipo:", f"{own}:", 1).replace("loss.name: ipo", f"loss.name: {own}")
    plant("params/td_dpo/design.yaml", "\nscales:\n", f"\n{both}\nscales:\n")
    plant("lib/td_dpo/losses.py", "\n\nLOSSES: ", f"\n\n{function}\n\nLOSSES: ")
    plant("lib/td_dpo/losses.py", '_anchored": td_dpo_anchored,', f'_anchored": td_dpo_anchored, "{own}": {own},')
    plant("lib/td_dpo/study.py", "OWN_LOSSES = (", f'OWN_LOSSES = ("{own}", ')

    commands = [
        ["compose", "params/td_dpo/design.yaml"],
        ["plan", "--study", "td_dpo", "--run", "ipo"],
        ["check", "--static", "--json", "--study", "td_dpo"],
    ]
    code = "from lib.run import cli; " + "; print('----'); ".join(f"assert cli.main({each}) == 0" for each in commands)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "STUDY_OUTPUTS": str(tmp_path / "outputs"), "STUDY_POOL": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    composed, planned, checked = done.stdout.split("----\n")
    at = {"laptop": ("ipo", own), "small": ("ipo", own), "paper": ("comparative-4-ipo", f"comparative-5-{own}")}
    paths = [f"params/td_dpo/{scale}/{name}.yaml" for scale, names in at.items() for name in names]
    assert composed == "".join(f"written: {path}\n" for path in paths) + "6 files written\n"
    assert "td_dpo/ipo " in planned
    assert json.loads(checked)["findings"] == []


@pytest.fixture(scope="module")
def with_toy(tmp_path_factory):
    """Runs commands, one after the other in one process, in a copy of the repository with the study of tests/toy."""
    place = tmp_path_factory.mktemp("fourth")
    for name in ("lib", "notebooks", "params"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        (place / name / "toy").mkdir()
    for home, names in {
        "lib": ["study.py"],
        "params": ["design.yaml"],
        "notebooks": ["train.ipynb", "analysis.ipynb"],
    }.items():
        for name in names:
            shutil.copy(ROOT / "tests" / "toy" / name, place / home / "toy" / name)
    (place / "lib" / "toy" / "__init__.py").touch()
    more = {"PYTHONPATH": str(place), "STUDY_OUTPUTS": str(place / "outputs"), "STUDY_CACHE": str(place / "cache")}

    def run(*commands: str) -> str:
        code = f"from lib.run import cli; [print(cli.main(each.split())) for each in {commands}]"
        environ = {**os.environ, **more, "STUDY_POOL": ""}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=place, capture_output=True, text=True, env=environ
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_study_of_ones_own_is_written_and_checked_as_contributing_says(with_toy):
    said = with_toy("compose params/toy/design.yaml", "check --static --study toy")
    assert "3 files written\n0\n" in said
    assert said.count("is missing, and linked") == 2, "its README.md and METHOD.md"
    assert "ready: 0 errors, 2 warnings" in said
    assert said.endswith("\n0\n")


@pytest.mark.slow
def test_a_study_of_ones_own_is_judged(with_toy):
    said = with_toy(
        "compose params/toy/design.yaml", "trial --study toy", "check --study toy", "full --scale laptop --study toy"
    )
    assert re.search(r"toy C1  supported +\+0\.3", said), said
    assert "unknown parameter" not in said
    assert re.findall(r"^(\d)$", said, re.MULTILINE) == ["0"] * 4, said


def test_an_added_method_is_drawn_beside_the_others():
    methods, taus = ["ipo", "dpo", "td_dpo", "td_dpo", "discopop_card"], [None, None, 1.0, 2.0, None]
    table = pd.DataFrame({"method": methods, "beta": 0.05, "tau": taus})
    kept = report.claim_arms(table, {0.05: 1.0})
    assert list(zip(kept["method"], kept["tau"].fillna(0), strict=True)) == [("ipo", 0), ("dpo", 0), ("td_dpo", 1)]


def test_the_loss_of_contributing_is_a_loss():
    import torch

    from lib.td_dpo import losses

    (function,) = blocks("python")
    names = dict(vars(losses))
    exec(function, names)
    margin = torch.tensor([-1.0, 0.0, 30.0], dtype=torch.float64, requires_grad=True)
    loss, anchor = names[re.search(r"def (\w+)\(", function)[1]](rho=margin, delta=margin, beta=0.1)
    assert loss.tolist() == pytest.approx([1.21, 1.0, 0.0])
    assert anchor is None
