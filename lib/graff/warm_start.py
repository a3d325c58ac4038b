"""The planner's warm start, by one command: 300 steps as three episodes with different budgets on a small made model.

    .venv/bin/python -m lib.graff.warm_start FILE.safetensors

Encoder and decoder both learn here; online W alone does. The file's tensors do not depend on the number of blocks.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from lib import config
from lib.errors import StudyError
from lib.graff import inputs, member
from lib.run.parent import end_with_parent

STEPS, BATCHES = (
    100,
    (4, 8, 16),
)  # an episode each; half the batch is half the time on the virtual clock, so half the budget
BUDGET_MINUTES = 0.16  # per problem of the batch: room for the steps and the last evaluation
SIZES = {"laptop": (64, 2), "paper": (384, 8)}


def recipe(scale: str, steps: int, batch: int, place: Path):
    hidden, layers = SIZES[scale]
    raw = {
        "run_id": "warm_start",
        "method": "graff",
        "role": "proposed",
        "seed_list": [7],
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
    made, planner = [], {}
    torch.manual_seed(7)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "inputs").mkdir()
        for number, batch in enumerate(BATCHES):
            run = recipe(scale, 2 if trial else STEPS, batch, place)
            if number == 0:
                if trial:
                    run = config.apply(run, {"model.recipe.pretrain_steps": 2})
                inputs.prepare(run, place / "inputs", warm=False)
            folder = place / f"episode-{number}"
            folder.mkdir()
            made.append(
                member.train(
                    config.Member(run=run, cell={}, cell_name="warm", seed=7 + number),
                    folder,
                    place / "inputs",
                    planner,
                )
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in planner.items()}, out)
    return made


@contextlib.contextmanager
def beside(out: Path, scale: str) -> Iterator[None]:
    """The command above in a process of its own while the body does something else, and no longer: with as many
    threads, so that the file is the same. Raises StudyError where it ended without one."""
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(config.ROOT), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    going = subprocess.Popen(
        [sys.executable, "-m", "lib.graff.warm_start", str(out), scale, str(os.getpid())],
        cwd=config.ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
        if going.wait() or not out.exists():
            raise StudyError(
                "the planner's warm start",
                f"its process ended with {going.returncode}",
                f"the file {out.name}",
                "what it said stands above this in the log",
            )
    finally:
        if going.poll() is None:
            going.kill()
            going.wait()


if __name__ == "__main__":
    if sys.argv[3:]:  # the process that started this one, without which nobody waits for the file
        if os.getppid() != int(sys.argv[3]):
            sys.exit("who started this is gone")
        end_with_parent()
    target = Path(sys.argv[1])
    for row in make(target, *sys.argv[2:3]):
        print({k: row.get(k) for k in ("status", "steps", "used", "budget", "dev_loss")})
    print(f"saved {target}, {target.stat().st_size} bytes")
