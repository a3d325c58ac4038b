"""`check`: each fault that published experiment code failed review for is planted into a copy of a study, found and
named."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from lib import config, hub, record
from lib.run import check as checks, cli
from lib.run.check import load_folder
from lib.run.cli import parser
from tests.conftest import ROOT

COPIED = ("lib", "notebooks", "params")


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository and a way to plant faults into it: plant(file, old, new)."""
    for name in COPIED:
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )

    def plant(file: str, old: str, new: str) -> None:
        path = tmp_path / file
        text = path.read_text()
        assert old in text, f"{file} has changed: {old!r} is not there to be broken"
        path.write_text(text.replace(old, new, 1))

    plant.root = tmp_path
    return plant


def check(root: Path, *arguments: str) -> tuple[int, dict]:
    """(exit code, the JSON object) of `check` in a copy."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lib", "check", "--json", *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "STUDY_OUTPUTS": str(root / "outputs"),
            "STUDY_CACHE": str(root / ".cache"),
            "STUDY_POOL": "",
        },
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def named(answer: dict, *words: str) -> bool:
    """Whether one finding holds all of these words."""
    return any(all(word in json.dumps(f, ensure_ascii=False) for word in words) for f in answer["findings"])


def test_a_study_without_a_static_fault_is_ready(capsys):
    """.ci/run asks the same of every study at every scale."""
    code = cli.main(["check", "--json", "--static", "--study", "iw_lora", "--run", "lora"])
    answer = json.loads(capsys.readouterr().out)
    assert (code, answer["is_code_ready"], answer["code_issue"]) == (0, True, "")
    assert [f for f in answer["findings"] if f["severity"] == "error"] == []


def test_static_faults_are_each_named(copy):
    copy("params/td_dpo/laptop/dpo.yaml", "direction: maximize", "direction: minimize")
    copy("params/td_dpo/laptop/discopop.yaml", "global_batch_size: 16", "global_batch_size: 15")
    copy("params/td_dpo/laptop/td_dpo_anchored.yaml", "warmup_ratio: 0.1", "warmup_steps: 119")
    copy("params/td_dpo/claims.yaml", "metric: seconds", "metric: minutes")
    copy("params/td_dpo/claims.yaml", "baseline: {method: dpo, beta: 0.05}", "baseline: {method: dpo, beta: 0.02}")
    copy("lib/td_dpo/study.py", "    logging_steps: Count", "    gradient_noise: float = 0.0\n    logging_steps: Count")
    notebook = copy.root / "notebooks/td_dpo/train.ipynb"
    whole = json.loads(notebook.read_text())
    cells = [c for c in whole["cells"] if c["cell_type"] == "code"]
    cells[1]["execution_count"] = 3
    cells[2]["source"] = "def half("
    notebook.write_text(json.dumps(whole))
    (copy.root / "notebooks/td_dpo/analysis.ipynb").write_text('{"cells": [')

    code, answer = check(copy.root, "--study", "td_dpo")
    assert code == 2
    assert not answer["is_code_ready"]
    assert answer["code_issue"]
    assert named(answer, "dpo.yaml", "optuna.direction", "would minimize validation_implicit_accuracy")
    assert named(answer, "discopop.yaml", "training.global_batch_size", "15 is not a multiple of 16")
    assert named(answer, "td_dpo_anchored.yaml", "warm-up of 119 covers most of a run")
    assert named(answer, "claims.yaml", "C5.metric", "minutes is in no table")
    assert named(answer, "claims.yaml", "C1.baseline", "no run at laptop scale trains")
    assert named(answer, "lib/td_dpo", "training.gradient_noise", "no code reads it")
    assert named(answer, "train.ipynb", "holds outputs")
    assert named(answer, "train.ipynb", "does not parse")
    assert named(answer, "analysis.ipynb", "not a notebook")


def test_what_only_a_trial_shows_is_named(copy):
    """One trial of two runs with: a calibration that is not shortened, a result written elsewhere,
    a column left empty, a metric logged under another name, a connection, and in one of them a batch key that is never
    collated."""
    copy("lib/iw_lora/study.py", '"loss.sensitivity_warmup_steps", ', "")
    copy("lib/iw_lora/trainer.py", '"label": label,', '"label": label, "answer": None,')
    copy("lib/iw_lora/trainer.py", 'return {"tuning_accuracy":', 'return {"tune_accuracy":')
    copy(
        "lib/iw_lora/trainer.py",
        "    outcome = trainer.fit()\n",
        "    outcome = trainer.fit()\n"
        "    import socket\n    Path(__file__).with_name('best.json').write_text('{}')\n"
        "    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))\n",
    )
    copy("lib/iw_lora/trainer.py", 'inputs["labels"])', 'inputs["labels" if self.term else "label_ids"])')

    code, answer = check(copy.root, "--study", "iw_lora", "--run", "iw_lora", "--run", "lora")
    assert code == 2
    assert named(answer, "calibration", "more than 2 batches in a trial")
    assert named(answer, "lib/iw_lora/best.json", "outside its results_dir")
    assert named(answer, "predictions.jsonl: answer", "empty in all rows")
    assert named(answer, "tuning_accuracy", "logged by none of the members")
    assert named(answer, "192.0.2.1", "touches no network")
    assert named(answer, "notebooks of iw_lora/lora", "the trial failed", "KeyError", "label_ids")
    assert not named(answer, "notebooks of iw_lora/iw_lora")


@pytest.mark.slow  # .ci/run asks the same of all studies
def test_a_clean_study_gives_no_finding_and_is_not_tried_twice(copy):
    code, answer = check(copy.root, "--study", "iw_lora", "--run", "iw_uniform")
    assert (code, answer["findings"]) == (0, [])
    assert list((copy.root / "outputs").glob("*/.check.json")), "what `full` looks for before it tries again"


def test_data_of_several_tasks_is_refused_before_a_trial_starts_until_one_is_named(tmp_path):
    def faults(**values: str) -> set[str]:
        told = {"dataset.name": str(tmp_path), **values}
        loaded = load_folder(ROOT / "params/iw_lora/laptop", "laptop", "trial", told)
        return {finding.key for _, _, found in loaded for finding in found}

    assert faults() == {"dataset.subset"}
    assert not faults(**{"dataset.subset": "rte"})


def test_the_trial_is_told_which_runs_and_how_many_members_at_a_time():
    options = parser().parse_args(["check", "--jobs", "3", "--study", "graff", "--set", "x=1"])
    answer = checks.trial_arguments(options, ["fixed", "b"])
    assert answer == ["--study", "graff", "--run", "fixed", "--run", "b", "--jobs", "3", "--set", "x=1"]
    again = parser().parse_args(["trial", *answer])
    assert (again.jobs, again.run, again.sets) == (3, ["fixed", "b"], ["x=1"])
    assert "--jobs" not in checks.trial_arguments(parser().parse_args(["check"]), [])


def test_one_run_of_each_method_is_tried_and_the_output_says_for_which():
    found = load_folder(ROOT / "params/iw_lora/paper", "paper", "full")
    tried = checks.choose_tried(checks.runs_of(found))
    assert len(tried) == len({run.method for run in checks.runs_of(found)})
    assert len(tried) + sum(map(len, tried.values())) == len(found)


@pytest.mark.parametrize("status", [None, "failed", "succeeded"])
def test_a_trial_under_other_settings_is_judged_by_its_record_and_what_failed_is_all_that_is_said(monkeypatch, status):
    """Its folder's name says what --set changed. What a trial did not do is news only where it came to its end."""
    run = config.load_run(ROOT / "params/td_dpo/laptop/dpo.yaml", study="td_dpo", scale="laptop", mode="full")

    def tried(command, *, env, **_):
        if status:
            answer = {
                "run_id": "dpo",
                "study": "td_dpo",
                "status": status,
                "error": {"cell": 3, "exception": "KeyError: 'x'"},
            }
            record.write_json(Path(env["STUDY_OUTPUTS"]) / "laptop-trial,a=1/td_dpo/dpo/status.json", answer)
        return subprocess.CompletedProcess(command, int(status != "succeeded"), "", "no such thing")

    monkeypatch.setattr(checks.subprocess, "run", tried)
    answer = [str(finding) for finding in checks.trial_findings([run], "laptop", [])]
    if status == "succeeded":
        assert any("no phase counts" in line for line in answer)
    else:
        assert len(answer) == 1
        assert ("no such thing" if status is None else "KeyError: 'x'") in answer[0]


def test_what_a_trial_downloads_lies_where_downloads_lie_and_is_no_stray_file(monkeypatch, tmp_path):
    """Where the hub can be reached, the trial of a paper's run fetches its model."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path))
    hub.keep_downloads_here()
    seen = {}

    def tried(command, *, env, **_):
        seen.update(env)
        program = (
            "import os;[open(p, 'w') for p in (os.environ['HF_HUB_CACHE'] + '/blob', os.environ['HERE'] + '/stray')]"
        )
        Path(env["HF_HUB_CACHE"]).mkdir()
        return real([sys.executable, "-c", program], env={**env, "HERE": str(tmp_path)}, check=True, cwd=ROOT)

    real = subprocess.run
    monkeypatch.setattr(checks.subprocess, "run", tried)
    answer = [
        finding.file for finding in checks.trial_findings([], "laptop", []) if "outside its results_dir" in finding.what
    ]
    assert seen["HF_HUB_CACHE"] == str(tmp_path / "hub")
    assert answer == [str(tmp_path / "stray")]


def _of(place):
    study, name = place.split("/")
    return config.load_run(
        ROOT / f"params/{place.replace('/', '/laptop/')}.yaml", study=study, scale="laptop", mode="full"
    )


BROKEN = {  # what may be wrong with a registered function: (its run, table, what stands there, what is said)
    "not there": ("td_dpo/dpo", "losses.LOSSES", None, "dpo raises LookupError: not in LOSSES"),
    "one number": ("td_dpo/dpo", "losses.LOSSES", lambda *, rho, **_: (rho.mean(), None), "a value of shape ()"),
    "a number for each but one": ("td_dpo/dpo", "losses.LOSSES", lambda *, rho, **_: (rho[1:], None), "of shape (3,)"),
    "an anchor of another shape": ("td_dpo/dpo", "losses.LOSSES", lambda *, rho, **_: (rho, rho[:1]), "of shape (1,)"),
    "no anchor": ("td_dpo/dpo", "losses.LOSSES", lambda *, rho, **_: rho, "dpo returns a Tensor; expected its two terms"),
    "no tensor": ("td_dpo/dpo", "losses.LOSSES", lambda *, rho, **_: (rho.tolist(), None), "dpo raises"),
    "another signature": ("td_dpo/dpo", "losses.LOSSES", lambda *, gamma, **_: gamma, "dpo raises TypeError: "),
    "not finite": ("td_dpo/dpo", "losses.LOSSES", lambda *, rho, **_: ((-rho * rho).log(), None), "dpo returns [nan"),
    "infinite where it is steep": (
        "td_dpo/dpo", "losses.LOSSES", lambda *, rho, **_: ((rho - rho).sqrt() + rho, None), "dpo returns [nan"),
    "no gradient": ("td_dpo/dpo", "losses.LOSSES", lambda *, rho, **_: (rho.detach(), None), "dpo raises RuntimeError"),
    "a penalty of one number": ("iw_lora/iw_lora", "penalty.COEFFICIENTS", lambda s, beta, seed: s.sum(), "of shape ()"),
    "a penalty that is not there": ("iw_lora/iw_lora", "penalty.COEFFICIENTS", None, "importance raises KeyError"),
    "a scheduler that is not there": ("graff/cosine", "schedulers.SCHEDULERS", None, "cosine raises KeyError"),
    "a scheduler of another signature": ("graff/cosine", "schedulers.SCHEDULERS", lambda: None, "cosine raises TypeErr"),
}  # fmt: skip


@pytest.mark.parametrize(("place", "table", "function", "said"), BROKEN.values(), ids=BROKEN)
def test_what_a_dry_call_shows_is_checked(monkeypatch, place, table, function, said):
    run, (module, name) = _of(place), table.split(".")
    entries = getattr(importlib.import_module(f"lib.{run.study}.{module}"), name)
    assert list(checks.dry_findings([run])) == []
    ((key,),) = [config.study_module(run.study).BY_NAME.values()]
    own = config.get(config.dump(run), key)
    if function:
        monkeypatch.setitem(entries, own, function)
    else:
        monkeypatch.delitem(entries, own)
    (found,) = checks.dry_findings([run, run])
    assert (found.level, found.key, found.file) == ("error", key, f"lib/{run.study}")
    assert said in found.what


def test_every_entry_that_a_study_names_passes_its_dry_call():
    for place, key in {"td_dpo/dpo": "loss.name", "iw_lora/iw_lora": "loss.penalty"}.items():
        run = _of(place)
        section = type(run.loss).model_fields[key.partition(".")[2]]
        for name in typing.get_args(section.annotation):
            more = {"loss.tau": 1.0 if name.startswith("td_dpo") else None} if run.study == "td_dpo" else {}
            more |= {"loss.label_smoothing": 0.1} if name == "exo_pair" else {}
            assert list(checks.dry_findings([config.apply(run, {key: name, **more})])) == [], name
    exo = config.apply(_of("td_dpo/dpo"), {"loss.name": "exo_pair"})
    assert ["inf" in found.what for found in checks.dry_findings([exo])] == [True]  # TRL's own asks for some smoothing


def test_a_study_with_a_wrong_loss_is_not_ready(monkeypatch, capsys):
    monkeypatch.delitem(importlib.import_module("lib.td_dpo.losses").LOSSES, "dpo")
    assert cli.main(["check", "--json", "--static", "--study", "td_dpo", "--run", "dpo"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert not answer["is_code_ready"]
    assert named(answer, "lib/td_dpo", "loss.name", "dpo raises LookupError: not in LOSSES of lib.td_dpo.losses")
