"""Preference training on tokenised pairs: trl.DPOTrainer with its loss, record and schedule replaced.

TRL, transformers and accelerate keep the loop, the optimizer, mixed precision, adapters, saving and loading. What is
ours: rows come tokenised with their reference log-probabilities (no second tokenisation, no reference model), the
objective is a function of four (B,) tensors (losses.py), batches depend on the seed alone, and every step is recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, Trainer
from trl import DPOConfig, DPOTrainer

from lib.errors import OutOfMemory, StudyError
from lib.td_dpo.arguments import steps_and_accumulation, training_arguments
from lib.td_dpo.config import NOT_NUMBERS
from lib.td_dpo.logprobs import (
    batch_logprobs,
    collator,
    completion_head,
    keep_4bit_differentiable,
    row_tokens,
    sequence_logprobs,
    token_budget_batches,
)
from lib.td_dpo.objective import finite_or_none, objective, pair_scores, reference_columns, summary, with_reference
from lib.td_dpo.tokens import pad_token, rows_digest
from lib.training import Intervals, SeededOrder, told, untouched_rng
from lib.weights import checkpoints, distributed
from lib.weights.checkpoints import last_complete_checkpoint, load_checkpoint
from lib.weights.sharded_trainer import ShardedTrainer, load_sharded

__all__ = ["Outcome", "PreferenceTrainer", "last_complete_checkpoint", "load_checkpoint", "pair_scores", "train_pairs"]


@dataclass
class Outcome:
    """How a training ended. `step`: steps done, or the step that diverged. `best`: checkpoint with the highest
    validation implicit accuracy (the earliest of equals), None without validation."""

    status: str  # completed | diverged
    step: int
    model: torch.nn.Module
    best_step: int | None = None
    best: Path | None = None


class PreferenceTrainer(ShardedTrainer, DPOTrainer):
    """trl.DPOTrainer on tokenised rows with reference columns; `compute_loss` and `log` are the points of extension."""

    loss_is_scaled_for_ga = (
        True  # compute_loss divides by the optimizer step's pairs, so uneven micro-batches are exact
    )

    def __init__(
        self,
        model,
        tokenizer,
        rows: list[dict],
        validation: list[dict],
        loss: dict,
        args: DPOConfig,
        *,
        training: dict,
        layout: str | None,
        fingerprint: str,
        on_record: Callable,
        on_timing: Callable,
        on_evaluate: Callable | None,
    ):
        self.loss_section, self.validation, self.layout, self.fingerprint = loss, validation, layout, fingerprint
        self.on_record, self.on_timing = (on_record, on_timing) if distributed.rank() == 0 else (lambda row: None,) * 2
        self.on_evaluate = on_evaluate
        self.columns: list[Tensor] = []
        self.tokens, self.started, self.diverged_at = 0, 0.0, None
        self.best_step, self.best_accuracy = None, None
        self.pad = pad_token(tokenizer)
        self.limits = {key: training.get(key) for key in ("token_budget", "per_device_train_batch_size")}
        self.wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        collate = collator(model, self.pad, layout)

        def collate_pass(rows: list[dict]) -> dict:
            mine = distributed.share(rows)
            rows = mine or rows[:1]  # a process without a row still takes part, with nothing
            return {
                **collate(rows),
                **reference_columns(rows, self.wide),
                "pairs": len(mine),
                "tokens": sum(map(row_tokens, rows)),
            }

        def collate_rows(rows: list[dict]) -> dict:
            passes = [collate_pass(part) for part in cut_by_length(rows, *self.limits.values())]
            return {"passes": passes, "pairs": sum(part["pairs"] for part in passes)}

        intervals = Intervals(training.get("eval_steps"), training.get("save_steps"))
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            data_collator=collate_rows,
            callbacks=[intervals],
        )
        self.remove_callback(PrinterCallback)
        self.processing_class = None  # the tokenizer is the base model's: not saved again with every checkpoint
        if hasattr(self.model, "peft_config") and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")  # TRL's copy of the adapter; the reference columns replace it
        _float32_trainables(self.model)
        self.shard()

    # What TRL would do to data and reference has been done once for the whole grid.
    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _precompute_ref_logps(self, dataset, *_):
        return dataset

    def _send_telemetry(self):
        """A run at laptop scale touches no network."""

    def _get_train_sampler(self, train_dataset=None):
        return SeededOrder(len(train_dataset or self.train_dataset), self.args.seed)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]

    def floating_point_ops(self, inputs):
        return 0  # transformers counts all parameters at every step for a figure nobody reads

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.started, self.columns, self.tokens = time.perf_counter(), [], 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples, device):
        return distributed.total(sum(batch["pairs"] for batch in batch_samples))  # pairs of this optimizer step

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of a batch, in one pass or, with a token budget, in several."""
        *first, last = inputs["passes"]
        losses = []
        for part in first:
            with distributed.deferred(self.model) if distributed.world() > 1 else contextlib.nullcontext():
                losses.append(self._one_pass(model, part, num_items_in_batch))
        return sum(losses, self._one_pass(model, last, num_items_in_batch))

    def _one_pass(self, model, inputs, num_items_in_batch):
        tokens, pairs = inputs["tokens"], inputs["pairs"]
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            limit = "token_budget" if self.limits["token_budget"] else "per_device_train_batch_size"
            raise OutOfMemory(
                f"step {self.state.global_step + 1}",
                f"no memory for a batch of {pairs} pairs with {tokens} tokens",
                "a batch that fits the device",
                f"lower training.{limit} ({self.limits[limit]}) or dataset.preprocessing.max_length",
            ) from error

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen, rejected = batch_logprobs(model, inputs)
        values, _, columns = objective(self.loss_section, chosen, rejected, inputs)
        self.columns.append(columns[: inputs["pairs"]])
        self.tokens += inputs["tokens"]
        return distributed.world() * values[: inputs["pairs"]].sum() / (num_items_in_batch or len(values))

    def log(self, logs, start_time=None):
        if "grad_norm" not in logs:  # transformers' closing summary, at the end of train()
            return
        columns, gradient_norm = (
            torch.cat(distributed.gathered(torch.cat(self.columns).cpu())),
            float(logs["grad_norm"]),
        )
        record = {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            **summary(columns),
            "grad_norm": finite_or_none(gradient_norm),
            "learning_rate": logs["learning_rate"],
        }
        # `summary` waits for the device, so its work is included. A clock may stand still (coarse, or a suspended
        # machine).
        seconds = max(time.perf_counter() - self.started, 1e-9)
        self.on_record(record)
        self.on_timing(
            {
                "step": self.state.global_step,
                "seconds": seconds,
                "pairs_per_second": len(columns) / seconds,
                "tokens_per_second": distributed.total(self.tokens) / seconds,
            }
        )
        # fp16's loss scaler finds its scale by overflowing and skipping the step: only there is inf no divergence
        skipped = self.args.fp16 and self.accelerator.optimizer_step_was_skipped
        if record["loss"] is None or (record["grad_norm"] is None and not skipped):
            self.diverged_at = self.state.global_step
            self.control.should_training_stop = True
            self.control.should_evaluate = self.control.should_save = False

    def evaluate(self, *_, **__):
        """Validation metrics as one record; a new best (by implicit accuracy) asks for a checkpoint."""
        self.control.should_evaluate = False
        record: dict = {"step": self.state.global_step}
        if self.validation:
            table = sequence_logprobs(self.model, self.validation, pad=self.pad, layout=self.layout)
            columns = objective(self.loss_section, *table.unbind(dim=1), reference_columns(self.validation, self.wide))[
                2
            ]
            measured = summary(columns)
            record |= {
                f"validation_{k}": measured[k]
                for k in (
                    "implicit_accuracy",
                    "raw_accuracy",
                    "loss",
                    "margin",
                    "chosen_log_ratio",
                    "rejected_log_ratio",
                )
            }
            accuracy = measured["implicit_accuracy"]
            if accuracy is not None and (self.best_accuracy is None or accuracy > self.best_accuracy):
                self.best_step, self.best_accuracy = self.state.global_step, accuracy
                self.control.should_save = True
        if self.on_evaluate is not None:
            with untouched_rng(self.model.device):
                record |= self.on_evaluate(self.state.global_step, self.model) or {}
        if len(record) > 1:
            self.on_record(record)
        return {}

    def _save_checkpoint(self, model, trial):
        Trainer._save_checkpoint(self, model, trial)  # without DPOTrainer's model card, which it writes every time
        distributed.gathered(None)  # every process has written its part
        if distributed.rank() == 0:
            self._complete_checkpoint(Path(self.args.output_dir))
        distributed.gathered(None)

    def _complete_checkpoint(self, folder: Path) -> None:
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        checkpoints.mark_complete(
            checkpoint,
            {
                "step": self.state.global_step,
                "fingerprint": self.fingerprint,
                "best_step": self.best_step,
                "best_accuracy": self.best_accuracy,
            },
        )
        checkpoints.keep_last_and_best(folder, checkpoint, self.best_step)


def cut_by_length(rows: list[dict], budget: int | None, largest: int | None) -> list[list[dict]]:
    """An optimiser step's pairs cut into passes of at most `budget` tokens (rows x longest row, the prompt counted for
    both answers) and `largest` pairs per process; uncut without a budget."""
    if not budget:
        return [rows]
    world = distributed.world()
    batches = token_budget_batches([row_tokens(row) for row in rows], budget * world, largest and largest * world)
    return [[rows[index] for index in batch] for batch in batches]


def _float32_trainables(model: torch.nn.Module) -> None:
    """TRL casts QLoRA adapters to bfloat16, where small updates are rounded away: trained weights stay in float32."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    assert trained, "nothing to train"
    assert all(p.dtype in (torch.float32, torch.float64) for p in trained), "trainables must be float32"


def _check_start(model, rows: list[dict], pad: int, layout: str | None) -> None:
    """Before the first step the policy is the reference: the log-ratio is 0 up to rounding."""
    table = sequence_logprobs(model, rows, pad=pad, layout=layout)
    reference = torch.tensor([[r["ref_chosen_logps"], r["ref_rejected_logps"]] for r in rows], dtype=table.dtype)
    low_precision = model.dtype in (torch.bfloat16, torch.float16)
    slack = 0.5 + 5e-3 * reference.abs() if low_precision else 1e-3 + 1e-5 * reference.abs()
    if not ((table - reference).abs() <= slack).all():
        raise StudyError(
            "reference log-probabilities",
            f"a log-ratio of {(table - reference).abs().max():.3g} nats before the first step",
            "0: the reference of this very model, quantisation and tokenised data",
            "remove the cached reference log-probabilities (.cache) and run again",
        )


def _resume_point(folder: Path, fingerprint: str | None) -> tuple[Path | None, dict]:
    """The checkpoint to go on from, with its state; the histories are cut back to it."""
    checkpoint = checkpoints.usable(folder / "checkpoints", fingerprint)
    state = checkpoints.read_marker(checkpoint) if checkpoint else {"step": 0, "best_step": None, "best_accuracy": None}
    for name in ("history.jsonl", "timing.jsonl"):
        checkpoints.truncate_history(folder / name, state["step"])
    return checkpoint, state


def train_pairs(
    model: torch.nn.Module,
    tokenizer,
    rows_train: list[dict],
    rows_validation: list[dict],
    reference: dict[str, Tensor],
    *,
    loss: dict,
    training: dict,
    seed: int,
    folder: str | Path,
    on_record: Callable[[dict], None],
    on_timing: Callable[[dict], None] = lambda timing: None,
    on_evaluate: Callable[[int, torch.nn.Module], dict | None] | None = None,
    max_batches: int | None = None,
    resume: bool = True,
    layout: str | None = None,
) -> Outcome:
    """Train `model` in place on preference pairs.

    `reference`: {"train": (N, 2), "validation": (M, 2)} of reference.reference_logprobs. `folder` is the member's:
    checkpoints go to folder/checkpoints; on resume its history.jsonl and timing.jsonl are cut to the checkpoint's step.
    `max_batches` limits steps and validation batches (trial mode). `layout` forces one layout of pairs (logprobs.py).
    """
    folder, place = Path(folder), Path(folder) / "checkpoints"
    rows, validation = with_reference(rows_train, reference["train"]), []
    if rows_validation:
        validation = with_reference(rows_validation, reference["validation"])
    if not rows:
        raise StudyError("training pairs", "0 rows", "at least one pair left after tokenisation")
    steps, device_batch, accumulation = steps_and_accumulation(len(rows), training, distributed.world(), max_batches)
    if max_batches:
        validation = validation[: max_batches * training["global_batch_size"]]
    counting = {key: value for key, value in training.items() if f"training.{key}" not in NOT_NUMBERS}
    identity = json.dumps([loss, counting, seed, steps, layout, rows_digest(rows_train)], sort_keys=True, default=str)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    args = training_arguments(
        model,
        training,
        steps,
        device_batch * distributed.world(),
        accumulation,
        seed,
        place,
    )

    transformers.utils.logging.disable_progress_bar()  # one bar per saved checkpoint would flood the log
    checkpoint, state = distributed.first(lambda: _resume_point(folder, fingerprint if resume else None))
    keep_4bit_differentiable(model)
    with completion_head(model):
        trainer = PreferenceTrainer(
            model,
            tokenizer,
            rows,
            validation,
            loss,
            args,
            training=training,
            layout=layout,
            fingerprint=fingerprint,
            on_record=told(on_record, training.get("logging_steps"), steps),
            on_timing=on_timing,
            on_evaluate=on_evaluate,
        )
        trainer.best_step, trainer.best_accuracy = state["best_step"], state["best_accuracy"]
        if checkpoint is None:
            _check_start(trainer.model, rows[:device_batch], trainer.pad, layout)
        if state["step"] >= steps:  # transformers would train one step more before it noticed
            (load_sharded if distributed.world() > 1 else load_checkpoint)(model, checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        done = max(trainer.state.global_step, state["step"])
        trainer.model.zero_grad(set_to_none=True)
    best = None if trainer.best_step is None else place / f"checkpoint-{trainer.best_step}"
    if trainer.diverged_at is not None:
        return Outcome("diverged", trainer.diverged_at, model, trainer.best_step, best)
    return Outcome("completed", done, model, trainer.best_step, best)
