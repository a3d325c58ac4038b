"""What a loss costs beside DPO: optimizer steps of both on the same batches, taken in turns in one process (claim
C5)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lib.td_dpo.logprobs import batch_logprobs, collator, completion_head, on_device
from lib.td_dpo.objective import objective, reference_columns, with_reference
from lib.td_dpo.trainer import steps_and_accumulation
from lib.training import SeededOrder

WARM_UP = 3  # pairs of steps run before the clock counts: allocation, caches, lazy initialisation


def _stepper(model: torch.nn.Module, loss: dict, training: dict) -> Callable[[dict], float]:
    """A function that takes one optimizer step on a batch and returns its seconds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=training["learning_rate"], weight_decay=training.get("weight_decay") or 0.0
    )
    model.train()

    def step(batch: dict) -> float:
        start = time.perf_counter()
        with completion_head(model):
            values, *_ = objective(loss, *batch_logprobs(model, batch), batch)
        values.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, training.get("max_grad_norm") or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def _batches(rows: list[dict], size: int, steps: int, seed: int, collate: Callable, device: torch.device):
    order = SeededOrder(len(rows), seed)
    indices: list[int] = []
    for _ in range(steps):
        while len(indices) < size:
            indices += list(order)
            order.set_epoch(order.epoch + 1)
        chosen, indices = [rows[i] for i in indices[:size]], indices[size:]
        batch = {**collate(chosen), **reference_columns(chosen)}
        yield on_device(batch, device)


def step_cost(
    model: Callable[[], torch.nn.Module] | str | os.PathLike,
    rows: list[dict],
    reference: Tensor,
    loss: dict,
    baseline_loss: dict,
    training: dict,
    steps: int,
    seed: int,
    *,
    pad: int = 0,
) -> list[dict]:
    """Paired step times: one {"pair", "seconds", "seconds_baseline"} per batch, `steps` of them.

    `model` makes a fresh model, or names the folder of one. Each loss trains its own copy on the same batches; which of
    the two goes first alternates, so that neither profits from warm caches or suffers from a clock that slows down.
    """

    def make() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(model) if isinstance(model, (str, Path, os.PathLike)) else model()

    models = make(), make()
    device_batch = steps_and_accumulation(len(rows), {**training, "max_steps": steps})[1]
    steppers = [_stepper(m, section, training) for m, section in zip(models, (loss, baseline_loss), strict=True)]
    collate = collator(models[0], pad)
    pairs = []
    table = with_reference(rows, reference)
    for pair, batch in enumerate(_batches(table, device_batch, steps + WARM_UP, seed, collate, models[0].device)):
        seconds = [0.0, 0.0]
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[which] = steppers[which](batch)
        if pair >= WARM_UP:
            pairs.append({"pair": pair - WARM_UP, "seconds": seconds[0], "seconds_baseline": seconds[1]})
    return pairs
