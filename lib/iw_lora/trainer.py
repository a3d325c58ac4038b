"""Classification training on tokenised rows: transformers.Trainer with the penalty, the record and the schedule of
saves.

transformers keeps the loop, the optimiser, accumulation, saving and loading. The gradient of R is added once per
optimiser step: every micro-batch carries R and is divided by their number, and data parallelism averages.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from lib import training as checkpoints
from lib.iw_lora import adapters
from lib.iw_lora.penalty import penalty
from lib.training import Intervals, SeededOrder, told


@dataclass
class Term:
    """The penalty of a run: alpha, coefficients (K,), and whether the factors are penalised in place of Delta."""

    alpha: float
    coefficients: Tensor
    factors: bool = False


@dataclass
class Outcome:
    status: str  # completed | diverged
    step: int


def collate(rows: list[dict], pad: int) -> dict[str, Tensor]:
    """Rows as padded input_ids and attention_mask (B, L) and labels (B,)."""
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([row["ids"] + [pad] * (longest - len(row["ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["ids"]) + [0] * (longest - len(row["ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["label"] for row in rows])}


def task_loss(model: nn.Module, batch: dict) -> Tensor:
    """Batch-mean cross-entropy (nats) from the logits: AdaLoRA's own `loss` adds its orthogonality."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return nn.functional.cross_entropy(model(**inputs).logits.float(), batch["labels"])


class ImportanceTrainer(Trainer):
    """Task loss + alpha R while training; both parts are recorded apart."""

    loss_is_scaled_for_ga = False  # DeBERTa accepts num_items_in_batch and ignores it

    def __init__(
        self,
        model,
        rows: list[dict],
        args: TrainingArguments,
        *,
        pad: int,
        term: Term | None,
        every: int | None,
        fingerprint: str,
        on_record: Callable,
        on_timing: Callable,
        on_evaluate: Callable,
    ):
        self.term, self.fingerprint = term, fingerprint
        self.on_record, self.on_timing, self.on_evaluate = on_record, on_timing, on_evaluate
        self.parts: list[tuple[float, float]] = []
        self.started, self.diverged_at = 0.0, None
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Intervals(every, every)],
            data_collator=lambda batch: collate(batch, pad),
        )
        self.remove_callback(PrinterCallback)
        if adapters.allocator_state(model) is not None:
            self.add_callback(adapters.Allocate(self))

    def _get_train_sampler(self, train_dataset=None):
        return SeededOrder(len(train_dataset or self.train_dataset), self.args.seed)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["ids", "label"]

    def floating_point_ops(self, inputs):
        return 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.started, self.parts = time.perf_counter(), []
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        task = nn.functional.cross_entropy(outputs.logits.float(), inputs["labels"])
        loss, extra = (outputs.loss if adapters.allocator_state(model) is not None else task), None
        if self.term is not None and self.term.alpha > 0:
            extra = self.term.alpha * penalty(
                self.accelerator.unwrap_model(model), self.term.coefficients, self.term.factors
            )
            loss = loss + extra
        self.parts.append((float(task.detach()), 0.0 if extra is None else float(extra.detach())))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "grad_norm" not in logs:  # transformers' closing summary
            return
        task, extra = np.mean(self.parts, axis=0).tolist()
        seconds = time.perf_counter() - self.started
        self.on_record(
            {
                "step": self.state.global_step,
                "epoch": self.state.epoch,
                "steps": self.state.max_steps,
                "loss": task + extra,
                "task_loss": task,
                "penalty": extra,
                "grad_norm": float(logs["grad_norm"]),
                "learning_rate": logs["learning_rate"],
            }
        )
        self.on_timing({"step": self.state.global_step, "seconds": seconds})
        if not math.isfinite(task + extra) or not math.isfinite(float(logs["grad_norm"])):
            self.diverged_at = self.state.global_step
            self.control.should_training_stop = True
            self.control.should_evaluate = self.control.should_save = False

    def evaluate(self, *_, **__):
        self.control.should_evaluate = False
        self.on_record({"step": self.state.global_step, **self.on_evaluate(self.model)})
        self.model.train()
        return {}

    def _save(self, output_dir=None, state_dict=None):
        """Exactly the trained parameters: PEFT's own form cuts AdaLoRA's matrices, and a resumed run would differ."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: p.contiguous().cpu() for name, p in adapters.trainables(self.model).items()},
            folder / "model.safetensors",
        )
        torch.save(adapters.allocator_state(self.model), folder / "allocator.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        restore(model or self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        place = Path(self.args.output_dir)
        mine = place / f"checkpoint-{self.state.global_step}"
        checkpoints.mark_complete(mine, {"step": self.state.global_step, "fingerprint": self.fingerprint})
        checkpoints.keep_last_and_best(place, mine, None)


def restore(model: nn.Module, checkpoint: Path) -> None:
    """The trained parameters and AdaLoRA's memory as they were saved, bit for bit."""
    saved, mine = load_file(checkpoint / "model.safetensors"), adapters.trainables(model)
    assert set(saved) == set(mine), "a checkpoint of other parameters"
    with torch.no_grad():
        for name, tensor in saved.items():
            mine[name].copy_(tensor)
    adapters.restore_allocator(model, torch.load(checkpoint / "allocator.pt", weights_only=True))


def total_steps(rows: int, training, trial: bool = False) -> int:
    """Optimiser steps: those of the epochs, at most max_steps, 2 in a trial."""
    per_epoch = math.ceil(rows / (training.batch_size * training.gradient_accumulation_steps))
    known = [math.ceil(training.epochs * per_epoch)] if training.epochs else []
    steps = max(1, min([*known, *([training.max_steps] if training.max_steps else [])]))
    return min(2, steps) if trial else steps


def train_rows(
    model: nn.Module,
    rows: list[dict],
    training,
    *,
    steps: int,
    warmup: int,
    every: int | None,
    pad: int,
    term: Term | None,
    seed: int,
    folder: Path,
    identity: object,
    on_record: Callable,
    on_timing: Callable,
    on_evaluate: Callable[[nn.Module], dict],
) -> Outcome:
    """Train `model` in place; resumes from the last complete checkpoint in folder/checkpoints of the same
    `identity`."""
    place = folder / "checkpoints"
    fingerprint = hashlib.sha256(json.dumps([identity, seed, steps], sort_keys=True, default=str).encode()).hexdigest()
    checkpoint = checkpoints.usable_checkpoint(place, fingerprint)
    done = checkpoints.read_marker(checkpoint)["step"] if checkpoint else 0
    for name in ("history.jsonl", "timing.jsonl"):
        checkpoints.truncate_history(folder / name, done)
    if done >= steps:
        restore(model, checkpoint)
        return Outcome("completed", done)
    args = TrainingArguments(
        output_dir=str(place),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        optim="adamw_torch",
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=warmup,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        fp16=False,
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = ImportanceTrainer(
        model,
        rows,
        args,
        pad=pad,
        term=term,
        every=every,
        fingerprint=fingerprint,
        on_record=told(on_record, training.logging_steps, steps),
        on_timing=on_timing,
        on_evaluate=on_evaluate,
    )
    if training.loraplus_lr_ratio is not None:
        from peft.optimizers import create_loraplus_optimizer

        trainer.optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=training.learning_rate, loraplus_lr_ratio=training.loraplus_lr_ratio
        )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.diverged_at is not None:
        return Outcome("diverged", trainer.diverged_at)
    return Outcome("completed", trainer.state.global_step)


def stepper(model: nn.Module, training, term: Term | None) -> Callable[[dict], float]:
    """A function that takes one optimiser step on a batch, AdaLoRA's allocation included, and returns its seconds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    taken, adaptive = iter(range(1, 1_000_000)), adapters.allocator_state(model) is not None
    model.train()

    def step(batch: dict) -> float:
        start = time.perf_counter()
        loss = model(**batch).loss
        if term is not None:
            loss = loss + term.alpha * penalty(model, term.coefficients, term.factors)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        if adaptive:
            model.base_model.update_and_allocate(next(taken))
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step
