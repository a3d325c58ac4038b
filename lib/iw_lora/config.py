"""The run YAML of the IW-LoRA study: short names, published names, steps, trial form and contradictions."""

from __future__ import annotations

import math
from typing import Any

from lib.config import Finding, rename, split_role
from lib.iw_lora.sections import VALIDATION_METRIC, Run

__all__ = [
    "ALIASES",
    "MEMBER_KEYS",
    "METRICS",
    "PATHS",
    "PRIMARY_METRIC",
    "SECOND_METRIC",
    "VALIDATION_METRIC",
    "Run",
    "check",
    "normalise",
    "recognises",
    "search_changes",
    "steps",
    "train_rows",
    "trial_changes",
    "warmup",
]

PRIMARY_METRIC = {"laptop": "validation_accuracy", "paper": "validation_accuracy"}
SECOND_METRIC = "validation_accuracy"  # the primary one needs no judge, so there is no other to fall back on
MEMBER_KEYS = ("model.adapter",)  # what members of one preparation may differ in: the base model is the same
METRICS = {
    "tuning_accuracy": "maximize",
    "tuning_loss": "minimize",
    "validation_accuracy": "maximize",
    "validation_f1": "maximize",
    "validation_macro_f1": "maximize",
    "validation_loss": "minimize",
}
# What a diverged member counts as, as in claims.yaml: nothing right. Guessing would be more than some members get on
# MNLI.
DIVERGED = {"validation_accuracy": 0.0, "tuning_accuracy": 0.0, "validation_f1": 0.0, "validation_macro_f1": 0.0}
CLAIM_METRICS = ("accuracy", "seconds", "step_seconds")  # columns that the analysis gives to claims.evaluate
UNREAD = {  # keys and metrics that a trial may leave alone: {name: why nothing is lost}
    "model.adapter.eva_rho": "read where init is eva, as in a YAML of the paper's scale",
    "dataset.splits": "generated data has its own; read with data from the hub or a folder",
    "dataset.preprocessing.padding": "rows are padded to the longest of their batch either way, as check says",
    "training.optimizer": "adamw is the only choice",
    "training.warmup_ratio": "warmup_steps decides where it is given",
    "training.fp16": "true is refused",
    "training.save_strategy": "checkpoints follow evaluations; what would differ is refused",
    "loss.freeze_lora_during_warmup": "false is refused",
    "compute.strategy": "another than none is refused",
}
ALIASES = {
    "alpha": "loss.alpha",
    "iw_reg_alpha": "loss.alpha",
    "beta": "loss.beta",
    "penalty": "loss.penalty",
    "learning_rate": "training.learning_rate",
    "batch_size": "training.batch_size",
    "weight_decay": "training.weight_decay",
    "epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "lora_r": "model.adapter.rank",
    "lora_alpha": "model.adapter.lora_alpha",
}
PATHS = ("model.name", "dataset.name")
NOT_NUMBERS = ("training.logging_steps",)  # lines of the log: a member is not trained again for them
PUBLISHED = {
    "training": {"lr_scheduler": "lr_scheduler_type", "log_every_n_steps": "logging_steps"},
    "optuna": {"metric_name": "objective_metric"},
}
GLUE_ROWS = {"mnli": 392_702, "sst2": 67_349, "rte": 2_490}  # of the train split


def recognises(raw: dict) -> bool:
    model = raw.get("model")
    return isinstance(model, dict) and ("adapter" in model or "importance_weighted_regularisation" in model)


def normalise(raw: dict) -> dict:
    """Published names -> ours: the penalty under `model` becomes the loss, the role under `method` the role."""
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("importance_weighted_regularisation"), dict):
        published = rename(model["importance_weighted_regularisation"], {"reg_alpha": "alpha"})
        enabled = published.pop("enabled", True)
        raw["model"] = {key: value for key, value in model.items() if key != "importance_weighted_regularisation"}
        own = raw.get("loss") if isinstance(raw.get("loss"), dict) else {}
        raw["loss"] = {"penalty": "importance" if enabled else "none", **published, **own}
    for section, names in PUBLISHED.items():
        if section in raw:
            raw[section] = rename(raw[section], names)
    if isinstance(raw.get("training"), dict) and "seed" in raw["training"] and "seed_list" not in raw:
        raw["seed_list"] = [raw["training"].pop("seed")]
    return _roles(raw)


def _roles(raw: dict) -> dict:
    loss, model = raw.get("loss"), raw.get("model")
    adapter = model.get("adapter") if isinstance(model, dict) else None
    kind = adapter.get("type", "lora") if isinstance(adapter, dict) else "lora"
    penalty = loss.get("penalty", "none") if isinstance(loss, dict) else "none"
    own = "full" if kind == "none" else kind if penalty == "none" else "iw_lora"
    role, method = split_role(raw.get("method"))
    raw["method"] = own if method is None else method
    by_penalty = {"importance": "proposed", "none": "comparative"}
    raw.setdefault("role", role or (by_penalty.get(penalty, "control") if isinstance(penalty, str) else "control"))
    return raw


def train_rows(run: Run) -> int | None:
    if run.dataset.name == "generated" and run.dataset.train_examples:
        rows = run.dataset.train_examples - max(1, round(run.dataset.tuning_fraction * run.dataset.train_examples))
        return min(rows, run.dataset.limit or rows)
    rows = GLUE_ROWS.get(run.dataset.subset) if run.dataset.name in ("glue", "nyu-mll/glue") else None
    return min(rows, run.dataset.limit or rows) if rows else run.dataset.limit


def steps(run: Run) -> int | None:
    rows, by_epochs = train_rows(run), None
    if rows is not None and run.training.epochs is not None:
        batch = run.training.batch_size * run.training.gradient_accumulation_steps
        by_epochs = max(1, math.ceil(run.training.epochs * math.ceil(rows / batch)))
    known = [n for n in (by_epochs, run.training.max_steps) if n is not None]
    return min(known) if known else None


def warmup(run: Run, total_steps: int) -> int:
    """Warm-up steps; the ratio (0.1 where none is given) where the configured steps exceed the run's."""
    if run.training.warmup_steps is not None and run.training.warmup_steps < total_steps:
        return run.training.warmup_steps
    ratio = run.training.warmup_ratio or (0.1 if run.training.warmup_steps else 0.0)
    return math.ceil(ratio * total_steps)


def trial_changes(run: Run) -> dict[str, Any]:
    """At most 2 batches in training, calibration and evaluation."""
    batch = min(run.training.batch_size, 4)
    changes = {
        "training.epochs": 1,
        "training.max_steps": min(2, run.training.max_steps or 2),
        "training.batch_size": batch,
        "training.gradient_accumulation_steps": 1,
        "training.logging_steps": 1,
        "evaluation.batch_size": batch,
        "dataset.limit": min(2 * batch, run.dataset.limit or 2 * batch),
        "loss.sensitivity_warmup_steps": min(2, run.loss.sensitivity_warmup_steps),
        "loss.head_warmup_steps": min(2, run.loss.head_warmup_steps),
        "compute.strategy": "none",
        "compute.gpus": min(1, run.compute.gpus),
    }
    if run.model.adapter.type == "adalora":  # two steps leave no room for the schedule
        changes |= {"model.adapter.tinit": 0, "model.adapter.tfinal": 1, "model.adapter.delta_t": 1}
    if run.model.recipe is not None:
        changes |= {"model.recipe.pretrain_steps": 2, "model.recipe.pretrain_batch_size": 4}
    if run.dataset.name == "generated":
        changes |= {"dataset.train_examples": 4 * batch, "dataset.validation_examples": 2 * batch}
    if run.training.warmup_steps is not None:
        changes["training.warmup_steps"] = min(1, run.training.warmup_steps)
    if run.training.eval_steps is not None:
        changes["training.eval_steps"] = min(2, run.training.eval_steps)
    return changes


def search_changes(run: Run) -> dict[str, Any]:
    """What a trial of the search leaves out; it reads validation only."""
    return {}


def check(run: Run) -> list[Finding]:
    found, training, total = [], run.training, steps(run)
    if training.fp16 and "deberta" in run.model.name.lower():
        found.append(
            Finding(
                "error",
                "training.fp16",
                "DeBERTa-v3's attention scores overflow in float16: the loss is NaN",
                "fp16: false, bf16: true where the GPU has it",
            )
        )
    if training.bf16 and not run.compute.gpus:
        found.append(
            Finding("warning", "training.bf16", "bfloat16 without a GPU is slow", "bf16: false, or compute.gpus: 1")
        )
    if run.training.save_strategy == "best":
        found.append(
            Finding(
                "error", "training.save_strategy", "best: the last state is what is reported", "save_strategy: epoch"
            )
        )
    if run.training.loraplus_lr_ratio is not None and run.model.adapter.type != "lora":
        found.append(
            Finding(
                "error",
                "training.loraplus_lr_ratio",
                f"type {run.model.adapter.type} has no B",
                "remove it, or type: lora",
            )
        )
    if run.compute.strategy == "fsdp":
        found.append(
            Finding(
                "error", "compute.strategy", "sensitivities cannot be read from sharded gradients", "strategy: none"
            )
        )
    if total is not None and (training.warmup_steps or 0) >= total:
        found.append(
            Finding(
                "warning",
                "training.warmup_steps",
                f"a warm-up of {training.warmup_steps} steps is beyond the "
                f"run's {total}: {warmup(run, total)} are used instead",
                "warmup_ratio: 0.1",
            )
        )
    if total is not None and training.evaluation_strategy == "steps" and training.eval_steps > total:
        found.append(
            Finding(
                "warning",
                "training.eval_steps",
                f"evaluation every {training.eval_steps} steps never happens in a run of {total}",
                f"eval_steps: {max(1, total // 10)}",
            )
        )
    return found + _penalty_findings(run, total) + _data_findings(run)


def _penalty_findings(run: Run, total: int | None) -> list[Finding]:
    loss, found = run.loss, []
    searched = {ALIASES.get(key, key) for key in run.optuna.search_space}
    if loss.penalty == "none":
        idle = sorted(searched & {"loss.alpha", "loss.beta"})
        return (
            [
                Finding(
                    "error",
                    "optuna.search_space",
                    f"{idle[0]} is searched, but there is no penalty that reads it",
                    "loss.penalty: importance, or remove it",
                )
            ]
            if idle
            else []
        )
    if run.model.adapter.type != "lora":
        found.append(
            Finding(
                "error",
                "loss.penalty",
                f"{loss.penalty} with adapter type {run.model.adapter.type}: the term is defined on LoRA pairs",
                "penalty: none, or type: lora",
            )
        )
    if not loss.freeze_lora_during_warmup:
        found.append(
            Finding(
                "error",
                "loss.freeze_lora_during_warmup",
                "false: the sensitivities are those of the base model, read before any adapter moves",
                "freeze_lora_during_warmup: true",
            )
        )
    if total is not None and loss.sensitivity_warmup_steps > total:
        found.append(
            Finding(
                "warning",
                "loss.sensitivity_warmup_steps",
                f"{loss.sensitivity_warmup_steps} calibration batches for a run of {total} steps",
                f"sensitivity_warmup_steps: {max(1, total // 10)}",
            )
        )
    if (loss.sensitivity_buffer_size or 0) > loss.sensitivity_warmup_steps:
        found.append(
            Finding(
                "warning",
                "loss.sensitivity_buffer_size",
                f"room for {loss.sensitivity_buffer_size} batches, "
                f"of which only {loss.sensitivity_warmup_steps} are ever filled: the average is over all of "
                "them",
                f"sensitivity_buffer_size: {loss.sensitivity_warmup_steps}",
            )
        )
    entry = next(
        (run.optuna.search_space[key] for key in run.optuna.search_space if ALIASES.get(key, key) == "loss.alpha"), None
    )
    if entry is not None and entry.high is not None and entry.high < 1e-2:
        found.append(
            Finding(
                "warning",
                "optuna.search_space.alpha",
                f"ends at {entry.high:g}, where the penalty hardly acts yet",
                "low: 1e-5, high: 1e-1",
            )
        )
    return found


def _data_findings(run: Run) -> list[Finding]:
    found = []
    if run.dataset.name in ("glue", "nyu-mll/glue"):
        if run.dataset.subset is None:
            found.append(Finding("error", "dataset.subset", "missing for GLUE", "subset: mnli, sst2 or rte"))
        if "test" in run.dataset.splits.validation or "test" in run.dataset.splits.train:
            found.append(
                Finding(
                    "error",
                    "dataset.splits",
                    "GLUE's test labels are all -1",
                    "validation: validation_matched for mnli, else validation",
                )
            )
        if run.dataset.subset == "mnli" and run.dataset.splits.validation == "validation":
            found.append(
                Finding(
                    "error",
                    "dataset.splits.validation",
                    "MNLI has no split of that name",
                    "validation: validation_matched",
                )
            )
    if run.dataset.preprocessing.padding == "max_length":
        found.append(
            Finding(
                "warning",
                "dataset.preprocessing.padding",
                f"rows are padded to the longest of "
                f"their batch, not to {run.dataset.max_seq_length} tokens: the same numbers, several times faster",
                "padding: longest says the same",
            )
        )
    return found
