"""`check`: each fault that published experiment code failed review for is planted into a copy of a study, found and
named."""

import json
import os
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("scale", config.SCALES)
def test_the_shipped_studies_give_no_static_error(scale, capsys):
    code = cli.main(["check", "--json", "--static", "--scale", scale])
    answer = json.loads(capsys.readouterr().out)
    assert (code, answer["is_code_ready"], answer["code_issue"]) == (0, True, "")
    assert [f for f in answer["findings"] if f["severity"] == "error"] == []
    assert answer["cost"]["wall_seconds"]


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
