"""`compose`: the shipped YAMLs are what the shipped designs write; comments survive; what is wrong is refused before
anything is written; and CONTRIBUTING.md's walk-through of adding a method works as it is printed there."""

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
from lib.run import cli, compose as command
from lib.td_dpo import report
from tests.conftest import ROOT

DESIGNS = sorted((ROOT / "params").glob("*/design.yaml"))


@pytest.mark.parametrize("design", DESIGNS, ids=lambda path: path.parent.name)
def test_a_shipped_design_writes_the_shipped_files_byte_for_byte(design):
    folder = design.parent
    there = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.yaml") if p != design}
    assert {d.parent.name for d in DESIGNS} == set(config.studies())
    assert command.render(design) == there
    assert 2 * design.read_text().count("\n") < sum(text.count("\n") for text in there.values())


# ---- a design of its own: TD-DPO's laptop runs on two data sets


@pytest.fixture
def design(tmp_path):
    """The path of a small design and its text, to be changed: design.change(old, new)."""
    base = (ROOT / "params/td_dpo/laptop/td_dpo.yaml").read_text()
    base = base[base.index("model:") :].replace("  limit: null", "\n  # how much of it\n  limit: null")
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
              training.learning_rate: 4e-4   # its own
              optuna.n_trials: 0
              grid:
                - product: {beta: [0.01, 0.05]}   # two of them
                  # and one seed
                  seeds: [42]
            drop: [loss.tau, optuna.search_space.tau]
          ipo:
            like: dpo
            set: {loss.name: ipo}
            when:
              small: {set: {training.max_steps: 60}}
        scales:
          laptop:
            models: {made: }
            datasets:
              generated: {label: made up}
              small:
                set:
                  dataset.train_pairs: 320   # a half
                add: {model.recipe.vocab_size_of_nothing: 1}
                drop: [training.logging_steps]
            base:
        """).replace("        add: {model.recipe.vocab_size_of_nothing: 1}\n", "")
    text += textwrap.indent(base, "      ") + textwrap.dedent("""
        claims:
          about: What is claimed.
          keys: [beta, tau]   # as in the study
          choose_on: validation_implicit_accuracy
          claims:
            - each: {generated: C1, small: C2}
              sentence: On <dataset> it matches DPO.
              estimand: mean score of TD-DPO less that of DPO
              test: superiority
              treatment: {run_id: "proposed-made-<dataset>"}
              baseline: {run_id: "comparative-1-made-<dataset>", beta: 0.05}
              margin: 0.3   # points
        """)
    path = tmp_path / "study" / "design.yaml"
    path.parent.mkdir()

    def change(old: str, new: str) -> None:
        assert old in path.read_text(), old
        path.write_text(path.read_text().replace(old, new, 1))

    path.write_text(text)
    change.path, change.folder = path, path.parent
    return change


def compose(*arguments) -> int:
    return command.main([str(a) for a in arguments])


def written(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.yaml") if p.name != "design.yaml"}


def test_runs_are_named_commented_and_complete(design, capsys):
    assert compose(design.path) == 0
    made = written(design.folder)
    roles, data = ("comparative-1", "comparative-2", "proposed"), ("generated", "small")
    assert sorted(made) == ["claims.yaml", *(f"laptop/{role}-made-{name}.yaml" for role in roles for name in data)]
    lines = made["laptop/comparative-1-made-small.yaml"].splitlines()
    assert lines[:2] == ["# The baseline,", "# as published."]
    assert lines[2] == "# Written by ./run_all.sh compose from ../design.yaml: change it there."
    assert lines[3:7] == ["run_id: comparative-1-made-small", "method: dpo", "role: comparative", ""]
    for line in (
        "  learning_rate: 4e-4   # its own",
        "  train_pairs: 320   # a half",
        "  # how much of it",
        "  name: dpo",
        "  - product: {beta: [0.01, 0.05]}   # two of them",
        "    # and one seed",
        "    seeds: [42]",
    ):
        assert line in lines, line
    assert any(line.startswith("  n_trials: 0   # the same for dpo, ") for line in lines), "with the base's comment"
    assert not any(line.strip().startswith(("tau:", "logging_steps:")) for line in lines), (
        "what method and data set drop"
    )
    steps = {
        name: config.load_run(design.folder / name, study="td_dpo", scale="laptop", mode="full").training.max_steps
        for name in made
        if "/" in name
    }
    assert steps["laptop/comparative-2-made-small.yaml"] == 60, "where method and data set meet"
    assert set(steps.values()) == {60, 120}
    claims = made["claims.yaml"]
    assert claims.startswith("# What is claimed.\n# Written by")
    assert "names: {td_dpo: TD-DPO, dpo: DPO}\nkeys: [beta, tau]   # as in the study\n" in claims
    assert [c["id"] + c["sentence"] for c in yaml.safe_load(claims)["claims"]] == [
        "C1On generated it matches DPO.",
        "C2On small it matches DPO.",
    ]
    assert claims.count("margin: 0.3   # points") == 2
    assert capsys.readouterr().out.endswith("written: 7\n")

    before = {p: p.stat().st_mtime_ns for p in design.folder.rglob("*.yaml")}
    assert compose(design.path) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in design.folder.rglob("*.yaml")} == before


def test_like_takes_over_what_the_method_does_not_write_itself(design):
    design(
        "        scales:\n".strip(" "),
        textwrap.indent(
            textwrap.dedent("""\
        hinge:
          like: ipo
          set: {loss.name: hinge, training.max_steps: 30}
    """),
            "  ",
        )
        + "scales:\n",
    )
    made = {name: yaml.safe_load(text) for name, text in command.render(design.path).items() if "comparative-3" in name}
    assert {run["training"]["max_steps"] for run in made.values()} == {30}, "also where ipo has a `when` for it"
    assert {run["training"]["learning_rate"] for run in made.values()} == {"4e-4"}, "dpo's, by way of ipo"
    assert {run["role"] for run in made.values()} == {"comparative"}


def test_a_name_that_yaml_would_read_as_a_number_is_quoted(design):
    design("  ipo:\n", '  "30":\n')
    made = command.render(design.path)["laptop/comparative-2-made-small.yaml"]
    assert 'run_id: comparative-2-made-small\nmethod: "30"\n' in made


REFUSED = {
    "a key that no design has": (
        "    label: DPO\n", "    lable: DPO\n",
        ["methods.dpo", "lable", "unknown key", "did you mean methods.dpo.label"],
    ),
    "a key that no scale has": (
        "    models: {made: }", "    modles: {made: }",
        ["scales.laptop", "modles", "did you mean scales.laptop.models"],
    ),
    "a key that the base has not": (
        "training.learning_rate: 4e-4", "training.learning_rat: 4e-4",
        ["methods.dpo.set.training.learning_rat", "has no such key", "did you mean training.learning_rate"],
    ),
    "a key that is dropped twice over": (
        "drop: [training.logging_steps]", "drop: [training.loging_steps]",
        ["datasets.small.drop", "did you mean training.logging_steps"],
    ),
    "an added key that is there": (
        "    set: {loss.name: ipo}", "    add: {training.max_steps: 5}",
        ["methods.ipo.add.training.max_steps", "has this key", "under set:"],
    ),
    "a key that the study does not know": (
        "    set: {loss.name: ipo}", "    add: {training.momentum: 5}",
        ["comparative-2-made-generated.yaml", "training.momentum", "unknown key"],
    ),
    "a value out of its range": (
        "training.max_steps: 60", "training.max_steps: -60",
        ["comparative-2-made-small.yaml", "max_steps"],
    ),
    "a loss that nobody has": (
        "set: {loss.name: ipo}", "set: {loss.name: ipoo}",
        ["comparative-2-made", "loss.name", "ipoo"],
    ),
    "two runs of one name": (
        "    models: {made: }", "    models: {made: }\n    name: <method>",
        ["td_dpo is the name of td_dpo x made x generated and of td_dpo x made x small"],
    ),
    "a part of a name that is not there": (
        "    models: {made: }", "    models: {made: }\n    name: <method>-<datset>",
        ["<datset>", "did you mean dataset"],
    ),
    "a name that is no file name": (
        "    models: {made: }", "    models: {made: }\n    name: ../<method>-<dataset>",
        ["run_id", "../"],
    ),
    "like nothing": (
        "like: dpo", "like: dppo",
        ["methods.ipo.like", "did you mean dpo"],
    ),
    "like itself": (
        "like: dpo", "like: ipo",
        ["methods.ipo.like", "one of td_dpo, dpo\n"],
    ),
    "like in a circle": (
        "  dpo:\n    role", "  dpo:\n    like: ipo\n    role",
        ["methods.ipo.like", "one of td_dpo"],
    ),
    "a method without a role": (
        "role: proposed, ", "",
        ["role: ''", "'proposed', 'comparative'"],
    ),
    "when nothing": (
        "      small: {set", "      smal: {set",
        ["ipo.when", "'smal'", "did you mean small"],
    ),
    "only a method of no name": (
        "set: {loss.name: ipo}", "set: {loss.name: ipo}\n    only: [papre]",
        ["ipo.only", "did you mean paper"],
    ),
    "nothing left": (
        "td_dpo: {role: proposed,", "td_dpo: {only: [paper], role: proposed,",
        ["C1.treatment", "no run at laptop scale"],
    ),
    "two that set one key": (
        "dataset.train_pairs: 320", "training.learning_rate: 1e-3",
        ["set by methods.dpo.set", "when:"],
    ),
    "a level named like another": (
        "models: {made: }", "models: {dpo: }",
        ["dpo", "a model and a method"],
    ),
    "what compose writes": (
        "      model:\n", "      run_id: x\n      model:\n",
        ["'run_id' is written twice"],
    ),
    "a claim that is a word": (
        "    - each:", "    - C0\n    - each:",
        ["claims.0", "'C0'"],
    ),
    "a claim's metric": (
        "margin: 0.3", "metric: scores\n      margin: 0.3",
        ["C1.metric", "scores is in no table"],
    ),
    "a claim about a run that is not there": (
        "comparative-1-made-<dataset>", "comparative-9-made-<dataset>",
        ["C1.baseline", "no run"],
    ),
    "a claim's key": (
        "      margin: 0.3", "      margn: 0.3",
        ["claims.0.margn", "did you mean claims.0.margin"],
    ),
    "a claim for what is no level": (
        "small: C2}", "smal: C2}",
        ["claims.each", "did you mean small"],
    ),
    "a claim about another kind": (
        "On <dataset> it", "On <model> it",
        ["<model>", "<dataset>"],
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
    told = str(refused.value)
    for word in words:
        assert word in told, told
    assert "expected:" in told
    assert written(design.folder) == {}


def test_a_file_that_differs_is_kept_without_force(design, capsys):
    compose(design.path)
    by_hand, other = (
        design.folder / "laptop/proposed-made-small.yaml",
        design.folder / "laptop/proposed-made-generated.yaml",
    )
    by_hand.write_text(by_hand.read_text().replace("epochs: null", "epochs: 1").replace("seed: 0\n", "seed: 1\n", 1))
    other.write_text(other.read_text().replace("# The proposed one.", "# Mine."))
    design("The baseline,", "A baseline,")
    before = written(design.folder)
    capsys.readouterr()
    assert cli.main(["compose", str(design.path)]) == 2
    told = capsys.readouterr().err
    assert "proposed-made-small.yaml: - split_seed: 1 | + split_seed: 0 | - epochs: 1 | + epochs: null" in told
    assert "proposed-made-generated.yaml: - # Mine. | + # The proposed one." in told
    assert "comparative-1-made-small.yaml: - # The baseline, | + # A baseline," in told
    assert "--force" in told
    assert written(design.folder) == before

    assert compose(design.path, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "-  epochs: 1\n+  epochs: null\n" in shown
    assert "-# Mine.\n+# The proposed one.\n" in shown
    assert written(design.folder) == before

    stranger = design.folder / "laptop" / "mine.yaml"
    stranger.write_text("run_id: mine\n")
    assert compose(design.path, "--force") == 0
    told = capsys.readouterr().out
    assert "4 differ, 3 as they are" in told
    assert f"left alone: {stranger}" in told
    stranger.unlink()
    assert written(design.folder) == command.render(design.path)


@pytest.mark.parametrize("there", [False, True], ids=["new files", "overwritten files"])
def test_all_files_or_none(design, there, monkeypatch):
    if there:
        compose(design.path)
        design("about: What is claimed.", "about: Claimed.")
        design("validation_pairs: 400", "validation_pairs: 300")
    before, write, done = written(design.folder), record.write_text, []

    def full_disk(path, text):
        if len(done) == 6:
            raise OSError(28, "No space left on device", str(path))
        done.append(path)
        write(path, text)

    monkeypatch.setattr(record, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        compose(design.path, "--force")
    assert len(done) == 6, "all but the last were written"
    assert written(design.folder) == before
    assert (design.folder / "laptop").exists() is there


def test_into_a_folder_of_its_own_which_plan_and_check_take(design, tmp_path, capsys):
    out = tmp_path / "own"
    assert compose(design.path, "--out", out) == 0
    assert written(out) == command.render(design.path)
    assert written(design.folder) == {}
    with pytest.raises(StudyError, match="share a folder"):
        compose(design.path, design.path, "--out", out)
    assert cli.main(["plan", "--params", str(out)]) == 0
    told = capsys.readouterr().out
    assert "td_dpo/comparative-2-made-small" in told
    assert "error" not in told


def test_check_tells_where_a_yaml_is_not_what_its_design_writes(design, capsys):
    compose(design.path)
    folder = design.folder / "laptop"
    (folder / "proposed-made-small.yaml").unlink()
    changed = folder / "proposed-made-generated.yaml"
    changed.write_text(changed.read_text().replace("max_steps: 120", "max_steps: 110"))
    shutil.copy(ROOT / "params/td_dpo/laptop/discopop.yaml", folder)
    capsys.readouterr()
    assert cli.main(["check", "--static", "--json", "--params", str(design.folder)]) == 0
    told = {Path(f["file"]).name: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert {f["severity"] for f in told.values()} == {"warning"}
    assert "- max_steps: 110 | + max_steps: 120" in told["proposed-made-generated.yaml"]["what"]
    assert "compose" in told["proposed-made-generated.yaml"]["fix"]
    assert "is not there" in told["proposed-made-small.yaml"]["what"]
    assert "not in the design" in told["discopop.yaml"]["what"]
    assert told["claims.yaml"]["place"] == "C4", "a claim about betas that these runs do not train"

    design("loss.name: ipo", "loss.nam: ipo")
    (fault,) = command.findings([(changed, None, [])])
    assert (fault.level, Path(fault.file).name, fault.key) == ("error", "design.yaml", "methods.ipo.set.loss.nam")


# ---- comments


def test_comments_and_blank_lines_belong_to_the_key_that_follows(design):
    """Where a key goes, its own comment and the lines above it go; those of its neighbours stay."""
    design("              training.learning_rate: 4e-4   # its own\n".lstrip(" "), "training.learning_rate: 4e-4 #\n")
    design("training.max_steps: 60", "training.max_steps: 60, dataset.preprocessing.max_length: 64")
    design(
        "drop: [training.logging_steps]", "drop: [training.logging_steps, dataset.split_seed, dataset.limit, loss.beta]"
    )
    base = command.render(design.path)["laptop/proposed-made-generated.yaml"]
    made = command.render(design.path)["laptop/comparative-2-made-small.yaml"]
    assert "  learning_rate: 4e-4\n" in made, "an empty comment takes the base's away"
    assert "  max_steps: 60\n" in made
    assert "  preprocessing: {max_length: 64, max_prompt_length: null}\n" in made, "inside braces"
    assert "# how much of it" in base
    assert "# how much of it" not in made, "with the key that it was above"
    between = "eval_steps: 40   # the best checkpoint"
    assert between in base
    assert between in made
    assert made.count("\n\n") == base.count("\n\n") - 1, "limit's own; those between sections stay"


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
    assert "4 new, 0 differ, 11 as they are" in composed
    assert "td_dpo/ipo " in planned
    assert json.loads(checked)["findings"] == []


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
    zero = torch.zeros(3, dtype=torch.float64)
    pairs = losses.Pairs(margin, zero, zero, zero)
    loss, anchor = names[re.search(r"def (\w+)\(", function)[1]](pairs, beta=0.1)
    assert loss.tolist() == pytest.approx([1.21, 1.0, 0.0])
    assert anchor is None
