"""A run's `training` section as TRL's arguments: the global batch is stated, the accumulation follows from it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from trl import DPOConfig

from lib.errors import StudyError

OPTIMIZERS = {"adamw": "adamw_torch_fused"}


def steps_and_accumulation(
    pairs: int, training: dict, world_size: int = 1, max_batches: int | None = None
) -> tuple[int, int, int]:
    """Optimizer steps, per-device batch and accumulation. The global batch is what is stated; accumulation follows.

    With a token budget the trainer is handed the whole global batch and cuts it by itself (trainer.cut_by_length).
    """
    batch = training["global_batch_size"]
    device_batch = training.get("per_device_train_batch_size") or batch
    if batch % (device_batch * world_size):
        raise StudyError(
            "training.global_batch_size",
            f"{batch} with {device_batch} per device on {world_size} devices",
            "a multiple of per_device_train_batch_size x devices",
        )
    if training.get("token_budget"):
        device_batch = batch // world_size
    steps = training.get("max_steps") or math.ceil(training["epochs"] * math.ceil(pairs / batch))
    return (min(steps, max_batches) if max_batches else steps), device_batch, batch // (device_batch * world_size)


def training_arguments(
    model: torch.nn.Module, training: dict, steps: int, device_batch: int, accumulation: int, seed: int, folder: Path
) -> DPOConfig:
    """The run's training section as TRL's arguments; everything that prints or saves by itself is off: the record
    is what is mirrored to W&B."""
    adapters = hasattr(model, "peft_config")
    warmup = training.get("warmup_steps")
    optimizer = training.get("optimizer") or "adamw"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames an argument that TRL still sets
        return DPOConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=device_batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=training["learning_rate"],
            weight_decay=training.get("weight_decay") or 0.0,
            optim=OPTIMIZERS.get(optimizer.lower(), optimizer),
            lr_scheduler_type=training.get("lr_scheduler_type") or "cosine",
            warmup_steps=math.ceil((training.get("warmup_ratio") or 0.0) * steps) if warmup is None else warmup,
            max_grad_norm=training.get("max_grad_norm") or 0.0,
            bf16=bool(training.get("bf16")),
            fp16=bool(training.get("fp16")),
            gradient_checkpointing=bool(training.get("gradient_checkpointing")),
            seed=seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_length=None,
            use_cpu=model.device.type == "cpu",
            disable_dropout=not adapters,  # TRL's default, save for an adapter's own configured dropout
            precompute_ref_log_probs=not adapters,
        )  # only so that TRL loads no reference model
