"""What IW-LoRA is compared with, as PEFT has it, and the parts of the study that are chosen by YAML alone."""

import json

import numpy as np
import pytest
import torch

from lib import config, record
from lib.errors import StudyError
from lib.iw_lora import data, study, trainer
from lib.run import check
from tests.conftest import ROOT
from tests.notebook import analyze, write_member
from tests.test_iw_lora import ADALORA, BATCH, deberta, fit, trainables

LAPTOP = ROOT / "params" / "iw_lora" / "laptop" / "iw_lora.yaml"


def laptop(**changes):
    run = config.load_run(LAPTOP, scale="laptop", mode="full")
    run = config.apply(run, {"grid": None, "loss.alpha": 0.01, "training.learning_rate": 2e-3, **changes})
    return config.members(run)[0].run  # what is left to the seed is filled in


@pytest.mark.parametrize(
    "variant",
    [{"use_rslora": True}, {"use_dora": True}, ADALORA],
    ids=["rslora", "dora", "adalora"],
)
def test_what_a_practitioner_would_pick_trains_and_moves_its_adapters(tmp_path, variant):
    model = deberta(variant)
    before = {n: p.detach().clone() for n, p in trainables(model).items() if "lora" in n}
    assert fit(tmp_path, model, steps=10)[0].status == "completed"
    after = trainables(model)
    assert any(not torch.equal(p, after[n]) for n, p in before.items())


def test_head_warm_up_changes_s_and_nothing_else():
    model = deberta()
    run = laptop(**{"loss.head_warmup_steps": 5})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    warmed, plain = (trainer.calibrate(each, model, [BATCH])[0] for each in (run, laptop()))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not torch.allclose(warmed, plain)
    moved = {
        n for n, p in trainer.warm_up_head(run, model, [BATCH]).named_parameters() if not torch.equal(p, before[n])
    }
    assert moved
    assert all("pooler" in name or "classifier" in name for name in moved)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("task", "columns", "labels"),
    [
        ("sst2", ("sentence",), (0, 1)),
        ("rte", ("sentence1", "sentence2"), (0, 1)),
        ("mnli", ("premise", "hypothesis"), (0, 1, 2)),
    ],
)
def test_a_glue_folder_needs_no_other_setting(tmp_path, task, columns, labels):
    folder, words = tmp_path / task, [f"word{i}" for i in range(300)]
    folder.mkdir()
    rng = np.random.default_rng(0)
    judged = {"validation_matched": 24, "validation_mismatched": 9} if task == "mnli" else {"validation": 24}
    for split, count in {"train": 80, **judged}.items():
        rows = [
            {c: " ".join(rng.choice(words, 8)) for c in columns} | {"label": int(labels[i % len(labels)])}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = laptop(**{"dataset.name": str(folder), "dataset.tuning_fraction": 0.1, "model.recipe.pretrain_steps": 2})
    assert [f for f in check.findings(run) if f.level == "error"] == []
    made = tmp_path / "inputs"
    made.mkdir()
    data.prepare(run, made)
    given = trainer.load(made)
    assert given.report["task"] == task
    assert len(given.rows.get("mismatched", ())) == (9 if task == "mnli" else 0)
    assert len(given.tokenizer) > 250, "its own words, not the generated task's few dozen"
    assert given.rows["train"][0]["input_ids"].count(given.tokenizer.unk_token_id) == 0
    member = config.members(config.apply(run, {"training.max_steps": 1, "loss.sensitivity_warmup_steps": 1}))[0]
    found = trainer.train(member, tmp_path, made)
    assert (found["mismatched_accuracy"] is not None) == (task == "mnli"), "MNLI's second split is scored too"


def test_the_cost_of_a_step_and_the_calibration_are_counted_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "COST_ROUNDS", 4)
    monkeypatch.setattr(trainer, "COST_WARM_UP", 1)
    run = laptop(
        **{
            "model.recipe.pretrain_steps": 2,
            "dataset.train_examples": 128,
            "dataset.validation_examples": 16,
            "training.batch_size": 8,
        }
    )
    (tmp_path / "inputs").mkdir()
    data.prepare(run, tmp_path / "inputs")
    rows = study.step_cost(run, tmp_path, tmp_path / "inputs")
    assert len(rows) == 4
    assert all(min(r["seconds"], r["seconds_baseline"], r["step_seconds_baseline"]) > 0 for r in rows)
    calibration = record.read_json(tmp_path / "calibration.json")
    assert calibration["passes"] == 16
    assert calibration["share_of_passes"] == pytest.approx(16 / 120)


@pytest.mark.parametrize("task", ["mnli", "sst2", "rte"])
def test_calibration_takes_the_published_batches_and_says_what_they_cost_of_a_paper_scale_run(task):
    """In forward and backward passes: under two percent but for RTE."""
    path = ROOT / "params" / "iw_lora" / "paper" / f"proposed-{task}_iw_lora.yaml"
    run = config.load_run(path, scale="paper", mode="full")
    assert 100 <= run.loss.sensitivity_warmup_steps <= 200
    assert run.training.gradient_accumulation_steps == 1
    if task != "rte":
        assert run.loss.sensitivity_warmup_steps < 0.02 * config.steps(run)
        return
    steps = run.training.optimizer_steps(2490 - round(run.dataset.tuning_fraction * 2490))
    assert f"{steps} steps of 32" in path.read_text()
    assert f"{run.loss.sensitivity_warmup_steps / steps:.0%} of the run's passes".replace("%", " %") in path.read_text()


def test_the_figures_say_their_numbers(tmp_path):
    names = [
        f"deberta.encoder.layer.{layer}.attention.self.{name}_proj" for layer in (0, 1) for name in ("query", "value")
    ]
    planned = [
        config.load_run(LAPTOP.with_name(f"{name}.yaml"), study="iw_lora", scale="laptop", mode="full")
        for name in ("iw_lora", "lora", "adalora")
    ]
    grids = [[{**block, "pilot": False} for block in config.dump(run)["grid"]] for run in planned]
    planned = [config.apply(run, {"grid": grid}) for run, grid in zip(planned, grids, strict=True)]
    for run in planned:
        for seed, member in zip((1, 2), config.members(run), strict=False):
            values = {"matrices": names, "delta_norm": [1.0, 2.0, 2.0, 3.0], "ranks": {}}
            if run.run_id == "iw_lora":
                values |= {"s": [1, 2, 3, 4], "w": [0.1, 0.12, 0.15, 0.17], "coefficient": [0.9, 0.9, 0.85, 0.85]}
            if run.run_id == "adalora":
                values["ranks"] = {
                    f"base_model.model.{name}": rank for name, rank in zip(names, (4, 5, 7, 8), strict=True)
                }
            rows = [{"kind": "example", "example": i, "label": i // 2, "prediction": min(i, 1)} for i in range(4)]
            rows = [{**row, "correct": int(row["label"] == row["prediction"])} for row in rows]
            steps = [{"step": 1, "task_loss": 1.0}, {"step": 2, "task_loss": 0.5}]
            metrics = {"validation_accuracy": 0.7 + seed / 100, "tuning_accuracy": 0.7}
            write_member(tmp_path, member, metrics, rows=rows, history=steps, adapters=values)
    times = {"seconds": 3.0, "seconds_baseline": 2.0, "step_seconds": 2.0, "step_seconds_baseline": 4.0}
    rows = [{**times, "process": process} for process in (0, 1)]
    record.write_jsonl(tmp_path / "iw_lora" / "step_cost.jsonl", rows)
    alt, _ = analyze(tmp_path, planned)
    assert "query of layer 0 0.4; query of layer 1 0.6" in alt["sensitivities"]
    assert "iw_lora 0.971 to 1.03" in alt["coefficients"]
    assert "lora 1 to 3, mean 2" in alt["update_norms"]
    assert "rank correlation 1 over 4 matrices" in alt["rank_against_sensitivity"]
    assert "right 0.5" in alt["confusions"]
    assert "over LoRA median 1.5 of 2 rounds; over AdaLoRA median 0.5" in alt["times"]
    assert {"seeds", "learning_curves"} <= set(alt)
    assert len(record.read_json(tmp_path / "comparison" / "sensitivities.json")) == 2


def test_the_analysis_of_nothing_runs_to_its_end(tmp_path):
    planned = config.load_run(LAPTOP, study="iw_lora", scale="laptop", mode="trial")
    assert analyze(tmp_path, [planned])[0] == {}
    assert (tmp_path / "comparison" / "done.json").exists()


def test_a_bad_label_in_a_folder_names_file_and_row(tmp_path):
    folder = tmp_path / "rte"
    folder.mkdir()
    row = {"sentence1": "a", "sentence2": "b", "label": 0}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"label": -1}) + "\n")
    (folder / "validation.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "inputs").mkdir()
    with pytest.raises(StudyError, match=r"rte/train.jsonl: 1 row: unknown label .*row 1: int -1"):
        data.prepare(laptop(**{"dataset.name": str(folder)}), tmp_path / "inputs")


def test_a_text_of_unknown_words_does_not_stop_pretraining():
    ids = torch.tensor([[1, 5, 6, 7], [1, 1, 1, 1]])
    corrupted, replaced = data.replace_tokens(ids, ids == 1, torch.Generator().manual_seed(0))
    assert torch.equal(corrupted[1], ids[1])
    assert not replaced[1].any()


def test_label_noise_moves_a_share_of_labels_of_train_and_tuning_and_none_of_validation():
    dataset = {"dataset.train_examples": 2000, "dataset.validation_examples": 20, "dataset.split_seed": 3}
    runs = [laptop(**dataset, **{"dataset.label_noise": share}) for share in (0.2, 0.0)]
    noisy, right = (data.load_splits(run.dataset, "generated")[0] for run in runs)
    assert noisy["validation"] == right["validation"]
    for split in ("train", "tuning"):
        assert [row["text_b"] for row in noisy[split]] == [row["text_b"] for row in right[split]]
        moved = [a["label"] != b["label"] for a, b in zip(noisy[split], right[split], strict=True)]
        assert np.mean(moved) == pytest.approx(0.2, abs=0.04)
