"""What every study's trainer (a subclass of transformers.Trainer) shares: batch order, intervals, random state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import TrainerCallback

from lib import record, witness


class SeededOrder(torch.utils.data.Sampler):
    """A new permutation each epoch that depends on the seed, the epoch and the number of rows, and on nothing else."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist())


class Intervals(TrainerCallback):
    """Evaluate and save every so many optimiser steps (None: not in between) and always at the last one. A member that
    is asked to stop (lib.record.stopping) saves after the step it is in and ends."""

    def __init__(self, eval_steps: int | None, save_steps: int | None):
        self.eval_steps, self.save_steps = eval_steps, save_steps

    def on_step_begin(self, args, state, control, **_):
        if witness.FOLDER:
            number = (state.global_step + 1) * args.gradient_accumulation_steps
            witness.tell("batch", phase="training", number=number)

    def on_step_end(self, args, state, control, **_):
        last = state.global_step >= state.max_steps
        control.should_evaluate = last or bool(self.eval_steps and state.global_step % self.eval_steps == 0)
        control.should_save = (
            last or record.stopping() or bool(self.save_steps and state.global_step % self.save_steps == 0)
        )

    def on_save(self, args, state, control, **_):
        if record.stopping() and state.global_step < state.max_steps:
            print(f"asked to stop: step {state.global_step} is saved", flush=True)
            record.stop()


def told(on_record: Callable[[dict], None], every: int | None, steps: int) -> Callable[[dict], None]:
    """`on_record` that also prints a plain line to the member's log every so many steps (`training.logging_steps`)."""

    def tell(row: dict) -> None:
        on_record(row)
        if every and row.get("loss") is not None and row["step"] % every == 0:
            print(f"step {row['step']}/{steps} loss {row['loss']:.4f}", flush=True)

    return tell


@contextlib.contextmanager
def untouched_rng(device: torch.device) -> Iterator[None]:
    """What runs inside (sampling at an evaluation) leaves the training's random numbers as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
