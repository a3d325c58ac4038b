"""The run YAML of the GRAFF study: published names, steps, trial form and contradictions. Types:
lib/graff/sections.py."""

from __future__ import annotations

from typing import Any

from lib.config import Finding, rename, split_role
from lib.graff.sections import READ_BY, VALIDATION_METRIC, Run

__all__ = [
    "ALIASES",
    "CLAIM_METRICS",
    "DIVERGED",
    "MADE_BY",
    "MEMBER_KEYS",
    "METRICS",
    "PATHS",
    "PRIMARY_METRIC",
    "SECOND_METRIC",
    "UNREAD",
    "VALIDATION_METRIC",
    "Run",
    "accumulation",
    "check",
    "implied",
    "normalise",
    "recognises",
    "search_changes",
    "steps",
    "train_rows",
    "trial_changes",
]

PRIMARY_METRIC = {"laptop": "exact_match", "paper": "exact_match"}
SECOND_METRIC = "dev_exact_match"  # where the test split has not been scored
MEMBER_KEYS = ("model.lora", "model.torch_dtype", "model.parameter_count")  # the base model and the data are the same
METRICS = {
    "exact_match": "maximize",
    "dev_exact_match": "maximize",
    "flexible_match": "maximize",
    "auc": "maximize",
    "energy_to_level": "minimize",
    "dev_loss": "minimize",
    "test_loss": "minimize",
    "gsm1k_gap": "minimize",
}
DIVERGED = {
    "exact_match": 0.0,
    "dev_exact_match": 0.0,
    "flexible_match": 0.0,
    "auc": 0.0,
}  # what a diverged member counts as
CLAIM_METRICS = ("exact_match", "auc", "auc_reactor_22", "energy_reactor_83")  # columns that claims.evaluate is given
UNREAD = {  # keys and metrics that a trial may leave alone: {name: why nothing is lost}
    "training.scheduler.cold": "read by check: a full run without a warm start must say so",
    "training.scheduler.baseline_decay": "read where REACTOR's window of 5 steps ends, which a trial of 2 does not reach",
    "training.scheduler.entropy_bonus": "read where REACTOR's window of 5 steps ends",
    "dataset.train_split": "train is the only choice",
    "dataset.shuffle_buffer": "read when streaming; a buffer larger than the data is a full shuffle, as check says",
    "dataset.eval_split": "test is refused for a search; it is scored once, at the end, in every run",
    "dataset.gsm1k": "read in full mode only",
    "dataset.real": "read where --set dataset.name names real problems",
    "model.parameter_count": "checked against the model's name",
    "model.recipe": "read for a made model only",
    "training.gradient_accumulation_steps": "derived, as check says",
    "training.optimizer.type": "adamw is the only choice; a scheduler from a package brings its own",
    "evaluation.interval_steps": "replaced by every 10 % of the budget, as check says",
    "evaluation.metrics": "both are always recorded",
    "evaluation.energy_level": "where it is null, the analysis chooses the level from the record",
    "energy_to_level": "null where no energy can be read, no level is stated, or it is not reached",
    "gsm1k_gap": "null without a GSM1k file",
}
ALIASES = {
    "learning_rate": "training.optimizer.lr_init",
    "adapter_lr_init": "training.optimizer.lr_init",
    "outer_lr": "training.scheduler.outer_lr",
    "graff_outer_lr": "training.scheduler.outer_lr",
    "controller_lr": "training.scheduler.controller_lr",
    "budget_minutes": "training.budget_minutes",
    "method": "training.scheduler.type",
    "lora_r": "model.lora.r",
}
PATHS = ("model.name", "dataset.name", "dataset.gsm1k", "training.scheduler.warm_start_ckpt")
MADE_BY = {
    "training.scheduler.warm_start_ckpt": ".venv/bin/python -m lib.graff.warm_start FILE.safetensors makes one, then "
    "--set training.scheduler.warm_start_ckpt=FILE.safetensors; or null with "
    "--set training.scheduler.cold=true for an untrained planner"
}
GSM8K_ROWS = 7_473  # of the train split; the dev rows are taken from it


def recognises(raw: dict) -> bool:
    training = raw.get("training")
    return isinstance(training, dict) and ("budget_minutes" in training or "scheduler" in training)


def normalise(raw: dict) -> dict:
    """Published names -> ours: dtype, seed, and the role under `method` (the method is the scheduler's type)."""
    training = raw.get("training")
    if "model" in raw:
        raw["model"] = rename(raw["model"], {"dtype": "torch_dtype"})
    scheduler = training.get("scheduler") if isinstance(training, dict) else None
    kind = scheduler.get("type") if isinstance(scheduler, dict) else None
    role, method = split_role(raw.get("method"))
    if kind is not None or method is not None:
        raw["method"] = kind if method is None else method
    raw.setdefault("role", role or ("proposed" if kind == "graff" else "comparative"))
    raw.setdefault("seed_list", [42])  # the published files name no seed
    return raw


def implied(run: Run, values: dict[str, Any]) -> dict[str, Any]:
    """Where --set names real problems in place of generated ones: what the run's `dataset.real` says of them. The sizes
    of the YAML are those of generated problems, of which an answer has 20 tokens."""
    name = values.get("dataset.name")
    return dict(run.dataset.real or {}) if name is not None and name != "generated" else {}


def train_rows(run: Run) -> int | None:
    rows = GSM8K_ROWS - run.dataset.dev_size if run.dataset.name == "openai/gsm8k" else None
    return min(rows, run.dataset.limit or rows) if rows else None


def steps(run: Run) -> int | None:
    """The cap beside the budget, or what `seconds_per_step` fits into it: how many it allows shows only when it
    runs."""
    if run.training.total_steps is not None:
        return run.training.total_steps
    return max(1, round(60 * run.training.budget_minutes / (run.compute.seconds_per_step or 1.0)))


def accumulation(run: Run) -> int:
    return max(1, run.training.global_batch_size // run.training.micro_batch_size)


def trial_changes(run: Run) -> dict[str, Any]:
    """At most 2 batches in warm start, training and evaluation; no warm-start file is asked for."""
    batch = min(run.training.micro_batch_size, 4)
    made = {"dataset.train_examples": 4 * batch, "dataset.test_examples": batch} if run.dataset.train_examples else {}
    if run.training.scheduler.warm_start_ckpt not in (None, "made"):
        made["training.scheduler.warm_start_ckpt"] = None
    if run.model.recipe is not None:
        made |= {"model.recipe.pretrain_steps": 2, "model.recipe.pretrain_batch_size": 4}
    return {
        **made,
        "evaluation.dev_subset": batch,
        "training.clock": "virtual",
        "training.budget_minutes": 1e4,
        "training.total_steps": min(2, run.training.total_steps or 2),
        "training.global_batch_size": batch,
        "training.micro_batch_size": batch,
        "training.gradient_accumulation_steps": None,
        "dataset.limit": min(2 * batch, run.dataset.limit or 2 * batch),
        "dataset.dev_size": min(batch, run.dataset.dev_size),
        "evaluation.max_new_tokens": min(8, run.evaluation.max_new_tokens),
        "evaluation.interval_steps": None,
        "compute.strategy": "none",
        "compute.gpus": min(1, run.compute.gpus),
    }


def search_changes(run: Run) -> dict[str, Any]:
    """What a trial of the search leaves out; it reads validation only."""
    return {}


def check(run: Run) -> list[Finding]:
    return [*_batch_findings(run), *_data_findings(run), *_scheduler_findings(run), *_evaluation_findings(run)]


def _batch_findings(run: Run) -> list[Finding]:
    training = run.training
    if training.global_batch_size % training.micro_batch_size:
        return [
            Finding(
                "error",
                "training.global_batch_size",
                f"{training.global_batch_size} is not a multiple of the micro-batch of {training.micro_batch_size}",
                f"global_batch_size: {accumulation(run) * training.micro_batch_size}",
            )
        ]
    stated = training.gradient_accumulation_steps
    if stated and stated * training.micro_batch_size != training.global_batch_size:
        return [
            Finding(
                "warning",
                "training.gradient_accumulation_steps",
                f"{training.micro_batch_size} x {stated} is "
                f"{stated * training.micro_batch_size}, not the global batch of {training.global_batch_size}; the "
                f"global batch decides and {accumulation(run)} are accumulated",
                "remove the key, it is derived",
            )
        ]
    return []


def _data_findings(run: Run) -> list[Finding]:
    data, rows, found = run.dataset, train_rows(run), []
    if data.eval_split == "test" and run.optuna.search_space:
        found.append(
            Finding(
                "error",
                "dataset.eval_split",
                "the search would choose on the test split, which is reported once",
                f"eval_split: dev ({data.dev_size} training examples are held out for it)",
            )
        )
    if rows is not None and data.shuffle_buffer is not None and data.shuffle_buffer > rows:
        found.append(
            Finding(
                "warning",
                "dataset.shuffle_buffer",
                f"{data.shuffle_buffer} for {rows} training rows: a full shuffle",
                "shuffle_buffer: null says the same",
            )
        )
    if data.real and data.name != "generated" and "dataset.name" not in run.overrides:
        found.append(
            Finding(
                "warning",
                "dataset.real",
                f"not read: the YAML itself names {data.name}; sizes are of generated "
                "problems, unless it has these values",
                "--set dataset.name=..., or write them in their sections",
            )
        )
    if data.shuffle_buffer is not None and not data.streaming:
        found.append(
            Finding(
                "warning",
                "dataset.shuffle_buffer",
                "read when streaming only: without it every epoch is shuffled whole",
                "shuffle_buffer: null",
            )
        )
    if run.model.parameter_count is not None and run.model.parameter_count.lower() not in run.model.name.lower():
        found.append(
            Finding(
                "warning",
                "model.parameter_count",
                f"{run.model.parameter_count}, which {run.model.name} does "
                "not say of itself; it is compared with the loaded model",
                "remove the key",
            )
        )
    return found


def _scheduler_findings(run: Run) -> list[Finding]:
    scheduler, found = run.training.scheduler, []
    for name in run.optuna.search_space:
        dotted = ALIASES.get(name, name)
        key = dotted.rpartition(".")[2]
        if dotted.startswith("training.scheduler.") and key in READ_BY and scheduler.type not in READ_BY[key]:
            found.append(
                Finding(
                    "error",
                    f"optuna.search_space.{name}",
                    f"the scheduler {scheduler.type} does not read {key}",
                    "remove it from the search",
                )
            )
    if run.method != scheduler.type and not run.method.startswith(
        "graff_" if scheduler.type == "graff" else scheduler.type
    ):
        found.append(
            Finding(
                "error", "method", f"{run.method}, but the scheduler is {scheduler.type}", f"method: {scheduler.type}"
            )
        )
    if scheduler.type == "graff" and run.mode == "full" and scheduler.warm_start_ckpt is None and not scheduler.cold:
        found.append(
            Finding(
                "error",
                "training.scheduler.warm_start_ckpt",
                "missing: the planner's encoder is learnt in the warm start",
                MADE_BY["training.scheduler.warm_start_ckpt"],
            )
        )
    if scheduler.baseline_decay is not None and scheduler.baseline_decay > 0.95:
        found.append(
            Finding(
                "warning",
                "training.scheduler.baseline_decay",
                f"{scheduler.baseline_decay} is per window of 5 "
                f"steps: the baseline remembers about {5 / (1 - scheduler.baseline_decay):.0f} steps",
                "baseline_decay: 0.9",
            )
        )
    if scheduler.stability_guard is not None and scheduler.guard == "adam":
        beta1 = run.training.optimizer.betas[0]
        found.append(
            Finding(
                "warning",
                "training.scheduler.stability_guard",
                f"{scheduler.stability_guard} is multiplied by "
                f"(1 + b1)/(1 - b1) = {(1 + beta1) / (1 - beta1):.3g}, Adam's edge of stability",
                "guard: literal for the bare figure (it hurts), guard: off for none",
            )
        )
    return found


def _evaluation_findings(run: Run) -> list[Finding]:
    found, training = [], run.training
    if run.evaluation.interval_steps is not None:
        found.append(
            Finding(
                "warning",
                "evaluation.interval_steps",
                f"every {run.evaluation.interval_steps} steps is replaced by every 10 % of the budget",
                "remove the key",
            )
        )
    if training.mixed_precision == "fp16":
        found.append(
            Finding(
                "error",
                "training.mixed_precision",
                "differences of float16 gradients are lost to rounding",
                "mixed_precision: bf16",
            )
        )
    rows = train_rows(run)
    if training.total_steps is not None and rows is not None:
        epochs = training.total_steps * training.global_batch_size / rows
        if epochs > 10:
            found.append(
                Finding(
                    "warning",
                    "training.total_steps",
                    f"the cap of {training.total_steps} steps is {epochs:.0f} "
                    f"passes over {rows} rows; the budget of {training.budget_minutes:g} minutes ends the run "
                    "before, unless the GPU is fast",
                    "total_steps: null",
                )
            )
    return found
