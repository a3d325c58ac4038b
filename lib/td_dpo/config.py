"""The run YAML of the TD-DPO study: short names, metrics, published names, steps, trial form and contradictions."""

from __future__ import annotations

import math
from typing import Any

from lib.config import Finding, split_role
from lib.errors import MissingError, StudyError
from lib.td_dpo import mt_bench
from lib.td_dpo.sections import OWN_LOSSES, TRL_LOSSES, VALIDATION_METRIC, WITH_TAU, Run

__all__ = [
    "ALIASES",
    "METRICS",
    "OWN_LOSSES",
    "PATHS",
    "PRIMARY_METRIC",
    "TRL_LOSSES",
    "VALIDATION_METRIC",
    "WITH_TAU",
    "Run",
    "accumulation",
    "check",
    "devices",
    "normalise",
    "recognises",
    "search_changes",
    "steps",
    "train_pairs",
    "trial_changes",
    "warmup",
]

PRIMARY_METRIC = {"laptop": "oracle_score", "paper": "mt_bench_score"}
JUDGED = {"oracle": "oracle_score", "mt_bench": "mt_bench_score"}  # the metric of each evaluation.judge
SECOND_METRIC = "implicit_accuracy"  # where no answer has been judged
CLAIM_METRICS = ("score", "seconds")  # columns that the analysis gives to claims.evaluate
DIVERGED = {  # what a diverged member counts as: the lowest score on every question, guessing on every pair
    "oracle_score": 1.0,
    "mt_bench_score": 1.0,
    "mt_bench_score_corrected": 1.0,
    "implicit_accuracy": 0.5,
    "raw_accuracy": 0.5,
    "validation_implicit_accuracy": 0.5,
    "validation_raw_accuracy": 0.5,
}
MEMBER_KEYS = ("model.peft",)  # what members of one preparation may differ in: the base model is the same
METRICS = {
    "oracle_score": "maximize",
    "mt_bench_score": "maximize",
    "mt_bench_score_corrected": "maximize",
    "implicit_accuracy": "maximize",
    "raw_accuracy": "maximize",
    "validation_implicit_accuracy": "maximize",
    "validation_raw_accuracy": "maximize",
    "validation_loss": "minimize",
    "sampled_kl": "minimize",
}
UNREAD = {  # keys and metrics that a trial may leave alone: {name: why nothing is lost}
    "model.torch_dtype": "a made model is float32; check refuses another",
    "mt_bench_score": "graded by a judge, whom a trial does not ask",
    "mt_bench_score_corrected": "graded by a judge, whom a trial does not ask",
    "evaluation.mt_bench": "where its questions are not there, a trial goes without them",
    "evaluation.questions": "how many of them: read where they are there, and by the oracle",
    "dataset.on_bad_row": "generated rows are never bad",
    "training.epochs": "max_steps decides where it is given",
    "training.warmup_ratio": "warmup_steps decides where it is given",
    "training.gradient_accumulation_steps": "derived, as check says",
}
ALIASES = {  # the order is the order in a cell's name
    "loss": "loss.name",
    "beta": "loss.beta",
    "tau": "loss.tau",
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "global_batch_size": "training.global_batch_size",
    "epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "lora_r": "model.peft.lora_r",
    "lora_alpha": "model.peft.lora_alpha",
    "lora_dropout": "model.peft.lora_dropout",
    "max_length": "dataset.preprocessing.max_length",
}
PATHS = ("model.name", "dataset.name")
NOT_NUMBERS = (
    "training.logging_steps",
    "training.save_steps",
)  # lines of the log; what a resume goes on from (a new best is
# saved whenever it is found): a member is not trained again for them
BY_NAME = {"LOSSES": "loss.name", "TRL_LOSSES": "loss.name", "TEMPERED": "loss.name"}  # see lib/run/reach.py
KNOWN_PAIRS = {"argilla/dpo-mix-7k": 6750}  # rows of the train split, before the validation part is taken


def recognises(raw: dict) -> bool:
    return isinstance(raw.get("loss"), dict) and "name" in raw["loss"]


def normalise(raw: dict) -> dict:
    """Published names -> ours. Every published key is carried over, or refused with the reason."""

    def refuse(key: str, found: Any, expected: str, mend: str):
        raise StudyError(key, str(found), expected, mend)

    model, dataset, training, loss = (
        {**raw[key]} if isinstance(raw.get(key), dict) else {} for key in ("model", "dataset", "training", "loss")
    )
    if "name" in loss:
        short = {"dpo_loss": "dpo", "td_dpo_loss": "td_dpo", "sigmoid": "dpo"}
        loss["name"] = short.get(loss["name"], loss["name"]) if isinstance(loss["name"], str) else loss["name"]
    if loss.pop("kl_reference_model", True) is not True:
        refuse("loss.kl_reference_model", "not true", "true: every loss here reads a frozen reference", "remove it")
    if "quantization" in model and model["quantization"] in (None, "qlora-4bit"):
        model["quantization"] = "nf4" if model["quantization"] else "none"
    if "load_in_4bit" in model:
        four_bit = model.pop("load_in_4bit")
        if "quantization" in model and (model["quantization"] == "nf4") is not four_bit:
            refuse("model.load_in_4bit", four_bit, f"agreement with quantization: {model['quantization']}", "remove it")
        model["quantization"] = "nf4" if four_bit else "none"
    if isinstance(dataset.get("split"), dict):
        split = dict(dataset.pop("split"))
        part = split.pop("val", split.pop("validation", None))
        train = split.pop("train", None)
        numbers = all(isinstance(x, float) for x in (part, train))
        if split or not numbers or abs(part + train - 1) > 1e-9:
            refuse(
                "dataset.split",
                {"train": train, "val": part, **split},
                "train and val fractions that sum to 1",
                "validation_fraction: 0.1",
            )
        dataset["validation_fraction"] = part
    _intervals(raw, training, refuse)
    if "seed_list" in training:
        seeds = training.pop("seed_list")
        if raw.get("seed_list", seeds) != seeds:
            refuse("training.seed_list", seeds, f"agreement with seed_list: {raw['seed_list']}", "remove it")
        raw["seed_list"] = seeds
    for key, section in (("model", model), ("dataset", dataset), ("training", training), ("loss", loss)):
        if isinstance(raw.get(key), dict):
            raw[key] = section
    optuna = raw.get("optuna")
    if isinstance(optuna, dict) and optuna.get("objective_metric") in ("val_pairwise_accuracy", "pairwise_accuracy"):
        raw["optuna"] = {**optuna, "objective_metric": "validation_implicit_accuracy"}
    return _roles(raw, loss.get("name"))


def _intervals(raw: dict, training: dict, refuse) -> None:
    """Strategies become the intervals that they name; what is never done otherwise is refused."""
    evaluation, saving = training.pop("evaluation_strategy", None), training.pop("save_strategy", None)
    if evaluation == "no":
        training["eval_steps"] = None
    elif evaluation == "steps" and training.get("eval_steps") is None:
        refuse("training.eval_steps", "missing", "an interval, as evaluation_strategy is steps", "eval_steps: 15")
    elif evaluation not in (None, "steps"):
        refuse("training.evaluation_strategy", evaluation, "steps or no", "eval_steps: the steps of one epoch")
    if saving == "steps" and training.get("save_steps") is None:
        refuse("training.save_steps", "missing", "an interval, as save_strategy is steps", "save_strategy: best")
    if saving not in (None, "best", "steps"):
        refuse(
            "training.save_strategy",
            saving,
            "best or steps: the best and the last checkpoint are always kept",
            "remove it",
        )
    if training.pop("save_total_limit", 1) not in (1, 2):
        refuse(
            "training.save_total_limit", "more than 2", "1 or 2: the best and the last checkpoint are kept", "remove it"
        )
    reported = training.pop("report_to", "wandb")
    if reported == "none":
        raw["wandb"] = {**(raw["wandb"] if isinstance(raw.get("wandb"), dict) else {}), "mode": "disabled"}
    elif reported not in ("wandb", ["wandb"]):
        refuse("training.report_to", reported, "wandb or none: there is no other tracker", "report_to: wandb")


def _roles(raw: dict, loss: Any) -> dict:
    """Published files write the role, or the method in capitals, under `method`."""
    role, method = split_role(raw.get("method"))
    written = method.lower().replace("-", "_") if isinstance(method, str) else method
    if written is not None or isinstance(loss, str):
        raw["method"] = loss if written is None else written
    by_loss = {"td_dpo": "proposed", "td_dpo_anchored": "ablation"}
    raw.setdefault("role", role or (by_loss.get(loss, "comparative") if isinstance(loss, str) else "comparative"))
    return raw


def devices(run: Run) -> int:
    return run.compute.devices


def accumulation(run: Run) -> int:
    """Micro-batches per optimiser step on each device: what makes the global batch. A stated value never overrides
    it."""
    return max(1, run.training.global_batch_size // (run.training.per_device_train_batch_size * devices(run)))


def train_pairs(run: Run) -> int | None:
    """Pairs trained on, where that is known before the data is read; of other data `limit` of them at most."""
    if run.dataset.name == "generated":
        pairs = run.dataset.train_pairs
    elif run.dataset.name in KNOWN_PAIRS:
        pairs = KNOWN_PAIRS[run.dataset.name]
        pairs -= round(pairs * run.dataset.validation_fraction)
    else:
        return run.dataset.limit
    return min(pairs, run.dataset.limit or pairs)


def steps(run: Run, pairs: int | None = None) -> int | None:
    """Optimiser steps of one member; None where neither max_steps nor the data's size is known."""
    if run.training.max_steps is not None:
        return run.training.max_steps
    pairs = pairs or train_pairs(run)
    return pairs and max(1, math.ceil(run.training.epochs * math.ceil(pairs / run.training.global_batch_size)))


def warmup(run: Run, total_steps: int) -> int:
    """Warm-up steps of a run of `total_steps` steps."""
    if run.training.warmup_steps is not None:
        return run.training.warmup_steps
    return math.ceil(run.training.warmup_ratio * total_steps)


def trial_changes(run: Run) -> dict[str, Any]:
    """At most 2 batches in training, reference, evaluation and, for a made model, SFT."""
    batch = min(run.training.per_device_train_batch_size, run.training.global_batch_size, 4)
    pairs = min(2 * batch, run.dataset.limit or 2 * batch)
    changes = {
        "training.epochs": 1,
        "training.max_steps": run.training.max_steps and min(2, run.training.max_steps),  # else one epoch
        "training.global_batch_size": batch,
        "training.per_device_train_batch_size": batch,
        "training.gradient_accumulation_steps": None,
        "training.logging_steps": 1,
        "dataset.limit": pairs,
        "compute.strategy": "none",
        "compute.processes": None,
        "compute.gpus": min(1, run.compute.gpus),
        "evaluation.questions": min(2, run.evaluation.questions),
        "evaluation.kl_prompts": min(2, run.evaluation.kl_prompts),
        "evaluation.max_new_tokens": min(8, run.evaluation.max_new_tokens),
        "evaluation.judge": "none" if needs(run) else run.evaluation.judge,
    }
    if run.training.warmup_steps is not None:
        changes["training.warmup_steps"] = min(1, run.training.warmup_steps)
    for interval in ("eval_steps", "save_steps"):
        if getattr(run.training, interval) is not None:
            changes[f"training.{interval}"] = min(2, getattr(run.training, interval))
    if run.model.recipe is not None:
        changes |= {
            "model.recipe.sft_steps": min(2, run.model.recipe.sft_steps),
            "model.recipe.sft_batch_size": min(4, run.model.recipe.sft_batch_size),
        }
    if run.dataset.name == "generated":
        changes |= {
            f"dataset.{split}_pairs": min(getattr(run.dataset, f"{split}_pairs"), 2 * batch)
            for split in ("train", "validation", "test")
        }
    return changes


def search_changes(run: Run) -> dict[str, Any]:
    """What a trial of the search leaves out; it reads validation only."""
    return {"evaluation.judge": "none", "evaluation.kl_prompts": 0}


def check(run: Run) -> list[Finding]:
    """Contradictions of one run: arithmetic of batches, intervals beyond the run, keys that nothing would read."""
    return [*_batch_findings(run), *_interval_findings(run), *_other_findings(run)]


def _batch_findings(run: Run) -> list[Finding]:
    training, count = run.training, devices(run)
    per_step = training.per_device_train_batch_size * count
    if training.global_batch_size % per_step:
        return [
            Finding(
                "error",
                "training.global_batch_size",
                f"{training.global_batch_size} is not a multiple of "
                f"{training.per_device_train_batch_size} per device x {count} devices",
                f"global_batch_size: {max(1, round(training.global_batch_size / per_step)) * per_step}",
            )
        ]
    stated = training.gradient_accumulation_steps
    if stated and stated * per_step != training.global_batch_size:
        return [
            Finding(
                "warning",
                "training.gradient_accumulation_steps",
                f"{training.per_device_train_batch_size} per device x {stated} accumulated x {count} devices is "
                f"{stated * per_step}, not the global batch of {training.global_batch_size}; the global batch "
                f"decides and {accumulation(run)} are accumulated",
                "remove the key, it is derived",
            )
        ]
    return []


def _interval_findings(run: Run) -> list[Finding]:
    total, training, found = steps(run), run.training, []
    if total is None:
        return []
    if training.eval_steps is not None and training.eval_steps > total:
        found.append(
            Finding(
                "warning",
                "training.eval_steps",
                f"evaluation every {training.eval_steps} steps never "
                f"happens in a run of {total}: no checkpoint is chosen before the last step",
                f"eval_steps: {max(1, total // 10)}",
            )
        )
    if warmup(run, total) > total / 2:
        found.append(
            Finding(
                "warning",
                "training.warmup_steps",
                f"a warm-up of {warmup(run, total)} covers most of a run "
                f"of {total} steps: the full rate is {'never' if warmup(run, total) >= total else 'hardly'} "
                "reached",
                "warmup_ratio: 0.1 instead of warmup_steps",
            )
        )
    return found


def _other_findings(run: Run) -> list[Finding]:
    found = []
    if run.training.bf16 and run.model.torch_dtype == "float32":
        found.append(Finding("error", "training.bf16", "true with model.torch_dtype float32", "torch_dtype: bfloat16"))
    if run.method != run.loss.name:
        found.append(
            Finding("error", "method", f"{run.method}, but the loss is {run.loss.name}", f"method: {run.loss.name}")
        )
    if run.model.recipe is not None and run.model.name != "made" and "model.name" not in run.overrides:
        found.append(Finding("warning", "model.recipe", f"not read: the model is {run.model.name}", "recipe: null"))
    sized = [
        f"dataset.{split}_pairs"
        for split in ("train", "validation", "test")
        if getattr(run.dataset, f"{split}_pairs") is not None
    ]
    if sized and run.dataset.name != "generated" and "dataset.name" not in run.overrides:
        found.append(
            Finding(
                "warning",
                sized[0],
                f"sizes are read for generated data only, not for {run.dataset.name}",
                "dataset.limit: n for the first n pairs of each split",
            )
        )
    if run.evaluation.judge == "oracle" and run.dataset.name != "generated":
        found.append(
            Finding(
                "warning",
                "evaluation.judge",
                f"no oracle reward is known for {run.dataset.name}: answers are not scored, accuracies are",
                "judge: none",
            )
        )
    if run.evaluation.judge == "mt_bench" and not run.evaluation.mt_bench:
        found.append(
            Finding(
                "error",
                "evaluation.mt_bench",
                "none, with judge: mt_bench: no answers would be saved to grade",
                "mt_bench: .cache/mt_bench (the folder of MT-Bench's questions), or judge: none",
            )
        )
    if fault := _mt_bench_fault(run, StudyError):
        found.append(fault)
    if run.loss.average_log_probs:
        found.append(
            Finding(
                "warning",
                "loss.average_log_probs",
                "an ablation: log-probabilities are averaged, not summed",
                "false for the study's own definition",
            )
        )
    return found


def primary_metric(run: Run) -> str:
    """What the run's own judge gives; no other score stands in for it."""
    return JUDGED.get(run.evaluation.judge, SECOND_METRIC)


def needs(run: Run) -> list[Finding]:
    """What must be on this machine before a full run: the questions that its members are to answer."""
    fault = _mt_bench_fault(run, MissingError)
    return [fault] if fault else []


def _mt_bench_fault(run: Run, kind: type[StudyError]) -> Finding | None:
    """What is wrong with the folder of MT-Bench: StudyError, its files do not hold what they should; MissingError, it
    is not there."""
    if run.evaluation.judge != "mt_bench" or not run.evaluation.mt_bench:
        return None
    try:
        mt_bench.read(run.evaluation.mt_bench)
    except StudyError as error:
        if type(error) is kind:
            return Finding("error", "evaluation.mt_bench", f"{error.where}: {error.found}", error.fix or error.expected)
    return None
