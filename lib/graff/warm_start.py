"""The planner's warm start, by one command: 300 steps as three episodes with different budgets on a small made model.

    .venv/bin/python -m lib.graff.warm_start FILE.safetensors

Encoder and decoder both learn here; online W alone does. The file's tensors do not depend on the number of blocks.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from lib import config
from lib.graff import data, member

# An episode each; half the batch is half the time on the virtual clock, so half the budget.
STEPS, BATCHES = 100, (4, 8, 16)
BUDGET_MINUTES = 0.16  # per problem of the batch: room for the steps and the last evaluation
SIZES = {"laptop": (64, 2), "paper": (384, 8)}


def recipe(scale: str, steps: int, batch: int, place: Path):
    """The run of one episode."""
    hidden, layers = SIZES[scale]
    raw = {
        "run_id": "warm_start",
        "model": {
            "name": "made",
            "lora": {"r": 8},
            "recipe": {"hidden_size": hidden, "layers": layers, "pretrain_steps": 300},
        },
        "dataset": {"name": "generated", "train_examples": 2000, "test_examples": 8, "dev_size": 8, "split_seed": 11},
        "training": {
            "budget_minutes": BUDGET_MINUTES * batch,
            "clock": "virtual",
            "global_batch_size": batch,
            "micro_batch_size": batch,
            "total_steps": steps,
            "optimizer": {"lr_init": 3e-3, "betas": [0.9, 0.98]},
            "scheduler": {"type": "graff", "cold": True, "outer_lr": 3e-3},
        },
        "evaluation": {"max_new_tokens": 4, "dev_subset": 4},
    }
    return config.restore(raw, study="graff", scale=scale, mode="full", results_dir=place)


def make(out: Path, scale: str = "laptop", trial: bool = False) -> list[dict]:
    """Train the planner over the episodes, each on a fresh copy of the model; writes `out`; returns each one's
    metrics."""
    metrics, planner = [], {}
    torch.manual_seed(7)
    with tempfile.TemporaryDirectory() as scratch:
        shared = Path(scratch) / "inputs"
        shared.mkdir()
        for number, batch in enumerate(BATCHES):
            run = recipe(scale, 2 if trial else STEPS, batch, Path(scratch))
            if number == 0:
                if trial:
                    run = config.apply(run, {"model.recipe.pretrain_steps": 2})
                data.prepare(run, shared)
            folder = Path(scratch) / f"episode-{number}"
            folder.mkdir()
            episode = config.Member(run=run, cell={}, cell_name="warm", seed=7 + number)
            metrics.append(member.train(episode, folder, shared, planner))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in planner.items()}, out)
    return metrics


if __name__ == "__main__":
    file = Path(sys.argv[1])
    for row in make(file, *sys.argv[2:3]):
        print({key: row.get(key) for key in ("status", "steps", "used", "budget", "dev_loss")})
    print(f"saved {file}, {file.stat().st_size} bytes")
