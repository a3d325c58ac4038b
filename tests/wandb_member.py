"""A member that trains nothing and writes the record of one that did, step by step, so that it can be killed for real.

    python -m tests.wandb_member FOLDER STEPS PAUSE [STOP [NOISE]]

PAUSE: seconds between two steps; STOP: wait there forever; NOISE: added to each loss, as another run on a GPU would.
"""

import functools
import math
import sys
import time
from pathlib import Path

from lib import record

CHECKPOINT = 300  # steps


def row(seed: int, step: int) -> dict:
    """Numbers of every kind that a history holds: tiny, huge, negative, whole."""
    return {
        "step": step,
        "epoch": step / 100,
        "loss": math.exp(-step / 300) + seed / 7,
        "learning_rate": 1e-5 * (1 - step / 2000),
        "tiny": 1e-300 * step,
        "huge": 1e22 * step,
        "margin": -0.1 * step,
        "tokens": 10_000_019 * step,
    }


def train(folder: Path, steps: int, pause: float = 0.0, stop: int | None = None, noise: float = 0.0) -> None:
    """Write history.jsonl to `steps`, from the last checkpoint where there is one, then predictions, metrics and
    sentinel."""
    spec = record.read_json(folder / "member.json")
    done = record.read_json(folder / "checkpoint.json", {}).get("step", 0)
    kept = [row for row in record.read_jsonl(folder / "history.jsonl") if row["step"] <= done]
    record.write_jsonl(folder / "history.jsonl", kept)  # as lib.training does, without its torch
    history = functools.partial(record.append_jsonl, folder / "history.jsonl")
    for step in range(done + 1, steps + 1):
        made = row(spec["seed"], step)
        history({**made, "loss": made["loss"] + noise})
        if step % 50 == 0:
            history({"step": step, "validation_loss": 1 / step})
        if step % CHECKPOINT == 0:
            record.write_json(folder / "checkpoint.json", {"step": step})
        while step == stop:
            time.sleep(1)
        time.sleep(pause)
    finish(folder, spec)


def finish(folder: Path, spec: dict, metrics: dict | None = None, predictions: list | None = None) -> None:
    (folder / "checkpoint.json").unlink(missing_ok=True)
    record.write_jsonl(
        folder / "predictions.jsonl",
        predictions
        or [
            {
                "kind": "answer",
                "question": q,
                "category": "c",
                "turn": 1,
                "score": 5 + 0.1 * q + spec["seed"] / 3,
                "text": "ü < >",
            }
            for q in range(4)
        ],
    )
    record.write_json(
        folder / "metrics.json",
        metrics
        or {
            "status": "completed",
            "oracle_score": 6.1 + spec["seed"] / 3,
            "validation_implicit_accuracy": 0.5,
            "diverged_at": None,
        },
    )
    record.write_json(
        folder / "done.json",
        {"run_id": spec["run_id"], "member": spec["member"], "status": "completed", "key": spec["key"], "nonce": "n"},
    )


if __name__ == "__main__":
    folder, steps, pause, *more = sys.argv[1:]
    train(Path(folder), int(steps), float(pause), int(more[0]) if more else None, float(more[1]) if more[1:] else 0.0)
