"""Other trackers of transformers, named in a YAML: handed to the trainers, or refused before anything starts."""

import pytest

from lib import config
from lib.mirror import trackers
from tests.conftest import TINY

TRACKED = {"wandb": {"mode": "disabled", "report_to": ["tensorboard"]}}


def test_every_tracker_of_transformers_is_known():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert {*trackers.PACKAGES, "wandb"} == set(INTEGRATION_TO_CALLBACK)


def test_tensorboard_gets_every_step(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lib import record
    from lib.run import members, work

    run = tiny(**TRACKED)
    member, folder = config.members(run)[0], tmp_path / "member"
    folder.mkdir()
    shared = members.inputs_folder(run)
    if not (shared / "complete.json").exists():
        partial = shared.with_name(shared.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        work.prepare(
            {
                "config": config.dump(run),
                "study": run.study,
                "scale": run.scale,
                "mode": run.mode,
                "final": str(shared),
                "folder": str(partial),
            }
        )
    work.study_module(run.study).train(member, folder, shared)
    plain = tmp_path / "plain"
    plain.mkdir()
    untracked = config.members(tiny())[0]
    work.study_module(run.study).train(untracked, plain, shared)
    assert (plain / "history.jsonl").read_bytes() == (folder / "history.jsonl").read_bytes()
    assert not (plain / "tensorboard").exists()
    written = EventAccumulator(str(folder / "tensorboard")).Reload()
    rows = record.read_jsonl(folder / "history.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert {e.step: e.value for e in written.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
    assert len([row for row in rows if "validation_loss" in row]) == len(written.Scalars("train/validation_loss")) == 3


def test_tensorboard_gets_every_step_of_iw_lora(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lib.iw_lora import trainer
    from lib.iw_lora.sections import Training
    from tests.test_iw_lora import deberta, rows

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    history = []
    trainer.train_rows(
        deberta(),
        rows(),
        Training(max_steps=4, batch_size=8, learning_rate=1e-3),
        steps=4,
        warmup=0,
        every=2,
        pad=0,
        term=None,
        seed=3,
        folder=tmp_path,
        identity="t",
        on_record=history.append,
        on_timing=lambda _: None,
        on_evaluate=lambda _: {"tuning_accuracy": 0.5},
        report_to=["tensorboard"],
    )
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {row["step"]: row["loss"] for row in history if "loss" in row}
    assert {e.step: e.value for e in written.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
    assert [e.step for e in written.Scalars("train/tuning_accuracy")] == [r["step"] for r in history if "loss" not in r]


def test_a_trial_reports_to_none(tiny, tmp_path):
    assert trackers.names(config.trial(tiny(**TRACKED)), tmp_path) == []


@pytest.mark.parametrize(
    ("name", "what", "mend"),
    [
        ("swanlab", "needs the package swanlab, which is not installed", "pip install swanlab"),
        ("tensorbord", "no tracker of transformers", "did you mean tensorboard?"),
        ("wandb", "mirrored from the record", "wandb.mode: online"),
    ],
)
def test_what_is_refused(tiny, name, what, mend):
    (found,) = [f for f in config.check(tiny(wandb={"report_to": [name]})) if f.key == "wandb.report_to"]
    assert found.level == "error"
    assert what in found.what
    assert mend in found.mend


def test_published_files_name_trackers_under_training(tiny):
    run = tiny(training={**TINY["training"], "report_to": ["tensorboard"]}, wandb=None)
    assert (run.wandb.report_to, run.wandb.mode) == (["tensorboard"], "disabled")
    both = tiny(training={**TINY["training"], "report_to": ["wandb", "mlflow"]}, wandb={"mode": "online"})
    assert (both.wandb.report_to, both.wandb.mode) == (["mlflow"], "online")
