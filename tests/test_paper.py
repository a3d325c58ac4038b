"""The paper's scale for real, but for the model, which is a tiny stand-in, and the GPU."""

import random

import pytest

from lib import config, record, tables
from lib.made import write_stand_in
from lib.run import runs, wandb
from tests.conftest import PATIENCE
from tests.judge_endpoint import write_bench
from tests.test_engine import make_pairs
from tests.test_judging_path import run


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
def test_full_at_the_papers_scale_goes_from_its_own_check_to_the_analysis(tmp_path):
    """The shipped YAML: NF4, three epochs over data of a size that nobody stated, MT-Bench's answers, search. `full`
    has what
    `check` finds in a trial keep it from starting, so that a check that errs would keep everybody from starting."""
    pairs = make_pairs(90)
    random.Random(0).shuffle(pairs)
    for split, rows in (("train", pairs[:60]), ("test", pairs[60:])):
        record.write_jsonl(
            tmp_path / "pairs" / f"{split}.jsonl",
            [
                {"chosen": [*row["prompt"], *row["chosen"]], "rejected": [*row["prompt"], *row["rejected"]]}
                for row in rows
            ],
        )
    words = [turn["content"] for pair in pairs for side in ("prompt", "chosen") for turn in pair[side]]
    write_stand_in("meta-llama/Llama-2-7b-chat-hf", tmp_path / "llama", words, vocab_size=384)
    settings = {
        "model.name": tmp_path / "llama", "model.revision": "null",
        "dataset.name": tmp_path / "pairs", "dataset.revision": "null", "dataset.limit": "null",
        "dataset.preprocessing.max_length": 128, "training.global_batch_size": 16, "compute.gpus": 0, "compute.threads": 1,
        "compute.min_gpu_memory_gb": "null", "evaluation.mt_bench": write_bench(tmp_path / "bench"), "wandb.mode": "disabled",
        "evaluation.max_new_tokens": 4, "evaluation.kl_prompts": 2, "optuna.n_trials": 5, "seed_list": "[42]",
    }  # fmt: skip
    chosen = (
        "full",
        "--scale",
        "paper",
        "--study",
        "td_dpo",
        "--run",
        "comparative-1-dpo",
        "--jobs",
        "2",
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
    )
    said = run(tmp_path, *chosen)
    assert "more than" in said, "how long three epochs take was not known before the data was read"
    (results,) = (tmp_path / "outputs").glob("paper-full*/td_dpo")
    passed = results.parent / ".check.json"
    tried = passed.stat().st_mtime_ns
    members = [record.read_json(path) for path in (results / "comparative-1-dpo" / "members").glob("*/metrics.json")]
    assert [member["status"] for member in members] == ["completed"] * 5, "four cells and a trial of the search"
    assert {member["steps"] for member in members} == {3 * -(-54 // 16)}, "three epochs over nine tenths of the pairs"
    answers = record.read_jsonl(next((results / "comparative-1-dpo" / "members").glob("*/answers.jsonl")))
    assert len(answers) == 4 * 2, "two turns"
    claims = record.read_json(results / "comparison" / "claims.json")
    assert {claim["verdict"] for claim in claims} == {"not evaluated"}
    # its claims are about the published cells: what the search found is a table beside them, and no run's chosen cell
    (planned,) = (each for each in runs.planned(results) if each.run_id == "comparative-1-dpo")
    (tuned,) = tables.tuned_runs([planned]).to_dict("records")
    assert (tuned["run"], tuned["trials"], tuned["seeds"]) == ("comparative-1-dpo", 5, 1)
    assert f"{tuned['validation_loss']:.6f}".rstrip("0") in (results / "comparison" / "analysis.ipynb").read_text()
    own, total = (
        record.read_json(results / name)
        for name in ("comparative-1-dpo/metrics.json", "comparison/aggregated_metrics.json")
    )
    *_, final = wandb.entries(results / "comparative-1-dpo")
    cell = total["members"]["comparative-1-dpo"]["cell"]
    assert own["chosen_cell"] == cell == final.config["record"]["chosen"].rsplit("-s", 1)[0]
    assert cell in config.cells(planned)
    assert final.summary == own["metrics"]
    for metric in ("implicit_accuracy", "validation_loss"):
        (metrics,) = [
            record.read_json(p) for p in (results / "comparative-1-dpo" / "members").glob(f"{cell}-s42/metrics.json")
        ]
        assert metrics[metric] == own["metrics"][metric] == total["metrics"][metric]["comparative-1-dpo"]
        (card,) = (results / "comparative-1-dpo" / "members" / f"{cell}-s42" / "checkpoints").glob(
            f"checkpoint-{metrics['steps']}/README.md"
        )
        assert f"| {metric} | {metrics[metric]:.6g} |" in card.read_text()
    again = run(tmp_path, *chosen)
    assert "nothing to do" in again
    assert passed.stat().st_mtime_ns == tried, "the trial has passed: it is not made again"
