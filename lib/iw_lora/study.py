"""The IW-LoRA study: the sections of its run YAML, the names others know it by, its checks, and its entries, `prepare`
(what all members share), `train` (one member) and `step_cost`. Imports no torch until one of these is called."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lib import config
from lib.config import Count, Finding, Flag, Fraction, Name, NonNegative, Number, Positive, Section, Seed, Whole, fault
from lib.errors import StudyError

# ---- sections of the YAML

SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "delta_t")  # AdaLoRA's


class Adapter(Section):
    """`rank` is LoRA's; AdaLoRA begins at init_r and prunes to target_r (its scale is lora_alpha / init_r)."""

    type: Literal["lora", "adalora", "none"] = "lora"
    rank: Count = 8
    lora_alpha: Count = 16
    lora_dropout: Fraction = 0.0
    target_modules: Name | list[Name] | None = None  # null: what PEFT adapts of the architecture (query and value)
    init_r: Count | None = None
    target_r: Count | None = None
    tinit: Whole | None = None
    tfinal: Count | None = None
    delta_t: Count | None = None
    use_rslora: Flag = False
    use_dora: Flag = False

    @model_validator(mode="after")
    def _schedule(self):
        given = [key for key in SCHEDULE if getattr(self, key) is not None]
        absent = [key for key in SCHEDULE if key not in given]
        if self.type != "adalora" and given:
            found, expected = str(getattr(self, given[0])), f"no such key: type {self.type} does not read it"
            raise fault(found, expected, "type: adalora", given[0])
        if self.type == "adalora" and absent:
            raise fault("missing", "AdaLoRA's whole schedule", ", ".join(SCHEDULE), absent[0])
        if self.type == "adalora" and self.target_r >= self.init_r:
            found, expected = f"{self.target_r}, init_r {self.init_r}", "below init_r: else nothing is pruned"
            raise fault(found, expected, "init_r: 12, target_r: 8", "target_r")
        return self


class Recipe(Section):
    """The small base model that is made here (name: made)."""

    vocab_size: Count = 64  # for generated text; real text takes up to 8,192 of its own words
    hidden_size: Count = 64
    layers: Count = 2
    heads: Count = 4
    pretrain_steps: Count = 1000
    pretrain_batch_size: Count = 64
    pretrain_learning_rate: Positive = 1e-3
    seed: Seed | None = None  # null: the member's own


class Model(config.Model):
    recipe: Recipe | None = None
    adapter: Adapter = Adapter()


class Splits(Section):
    train: Name = "train"
    validation: Name = "validation"


class Preprocessing(Section):
    truncation: Flag = True
    padding: Literal["max_length", "longest"] = "longest"


class Dataset(config.Data):
    KNOWN = ("premise", "hypothesis", "sentence", "sentence1", "sentence2", "label")
    name: Annotated[Name, config.renamed({"glue": "nyu-mll/glue"})]
    subset: Literal["mnli", "sst2", "rte"] | None = None
    splits: Splits = Splits()
    max_seq_length: Count = 256
    preprocessing: Preprocessing = Preprocessing()
    about: Literal["roles", "kinds"] = "roles"  # these four are for generated data
    train_examples: Count | None = None
    validation_examples: Count | None = None
    label_noise: Fraction = 0.0  # share of train's rows, tuning's too, that get the other label
    tuning_fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.1  # of train: choices are made on it
    real: dict[str, Any] | None = None  # other keys, set along where --set dataset.name names real data

    @property
    def task(self) -> str:
        """mnli, sst2, rte or generated; a local folder of the task's name needs no `subset`. StudyError where neither
        tells."""
        task = re.sub(r"\W", "", Path(self.name).name).lower()  # 'SST-2' is sst2
        task = task if task == "generated" else self.subset or task
        if task not in ("generated", "mnli", "sst2", "rte"):
            found = f"none, and {self.name} does not tell the task"
            raise StudyError("dataset.subset", found, "mnli, sst2 or rte", "--set dataset.subset=rte")
        return task


class Training(config.Schedule):
    batch_size: Count  # of one micro-batch
    gradient_accumulation_steps: Count = 1
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field("linear", validation_alias="lr_scheduler")
    fp16: Flag = False
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"  # transformers' words, SeededOrder's order
    logging_steps: Count = Field(50, validation_alias="log_every_n_steps")
    save_strategy: Literal["epoch", "steps", "no"] = "epoch"  # not best: the last state is what is reported
    evaluation_strategy: Literal["epoch", "steps", "no"] = "epoch"

    def steps_per_epoch(self, rows: int) -> int:
        return math.ceil(rows / (self.batch_size * self.gradient_accumulation_steps))

    def optimizer_steps(self, rows: int | None) -> int | None:
        """Of the epochs over `rows` examples, at most max_steps; None where neither is known."""
        known = [self.max_steps] if self.max_steps else []
        if rows is not None and self.epochs is not None:
            known.append(max(1, math.ceil(self.epochs * self.steps_per_epoch(rows))))
        return min(known, default=None)


class Loss(Section):
    """Task loss + alpha * penalty. `importance` is the study's formula, the others its alternatives and controls."""

    penalty: Literal["none", "importance", "max", "inv_mean", "uniform", "shuffled", "factor_l2"] = "none"
    alpha: NonNegative = Field(default=1e-4, validation_alias="reg_alpha")
    beta: NonNegative = 1.0
    sensitivity_warmup_steps: Count = 150  # calibration batches: N of s_k
    sensitivity_buffer_size: Count | None = None  # batches kept for the running average; null: all of them
    freeze_lora_during_warmup: Literal[True] = True  # s is the base model's, read before any adapter moves
    head_warmup_steps: Whole = 0  # an ablation: before s is measured


class Evaluation(Section):
    batch_size: Count = 64


class Search(config.Optuna):
    objective_metric: Name = Field(default="validation_accuracy", validation_alias="metric_name")


class Run(config.Run):
    model: Model
    dataset: Dataset
    training: Training
    loss: Loss = Loss()
    evaluation: Evaluation = Evaluation()
    optuna: Search = Search()

    @model_validator(mode="before")
    @classmethod
    def _published(cls, raw: dict):
        """The penalty under `model` becomes the loss, the seed under `training` the seeds."""
        published = config.get(raw, "model.importance_weighted_regularisation")
        if isinstance(published, dict) and "loss" not in raw:
            del raw["model"]["importance_weighted_regularisation"]
            penalty = "importance" if published.pop("enabled", True) else "none"
            raw["loss"] = {"penalty": penalty, **published}
        if "seed_list" not in raw and config.get(raw, "training.seed") is not None:
            raw["seed_list"] = [raw["training"].pop("seed")]
        return raw

    @classmethod
    def usual(cls, raw: dict) -> tuple[Any, str]:
        kind, penalty = (config.get(raw, key) for key in ("model.adapter.type", "loss.penalty"))
        method = "full" if kind == "none" else "iw_lora" if penalty not in (None, "none") else kind or "lora"
        role = {"importance": "proposed", "none": "comparative", "None": "comparative"}.get(str(penalty), "control")
        return method, role


# ---- names: what the runner, the analysis and `check` know of the study

MEMBER_KEYS = ("model.adapter",)  # what members of one preparation may differ in: the base model is the same
SEED_KEYS = ("dataset.split_seed", "model.recipe.seed")
SCORES = ("validation_accuracy", "tuning_accuracy", "validation_f1", "validation_macro_f1")
METRICS = {**dict.fromkeys(SCORES, "maximize"), "tuning_loss": "minimize", "validation_loss": "minimize"}
METRICS["mismatched_accuracy"] = "maximize"  # MNLI's second validation split
GROUP = ("model.name", "dataset.name", "dataset.subset")
LEADS = "mnli"  # what was published first
# What a diverged member counts as, as in claims.yaml: nothing right. Guessing would be more than some get on MNLI.
DIVERGED = dict.fromkeys(SCORES, 0.0)
# columns that the analysis gives to claims.evaluate
CLAIM_METRICS = ("accuracy", "f1", "score", "seconds", "step_seconds", "training_seconds")
ALIASES = dict.fromkeys(("alpha", "iw_reg_alpha"), "loss.alpha") | {"beta": "loss.beta", "penalty": "loss.penalty"}
ALIASES |= {key: f"training.{key}" for key in ("learning_rate", "batch_size", "weight_decay", "epochs", "max_steps")}
ALIASES |= {"lora_r": "model.adapter.rank", "lora_alpha": "model.adapter.lora_alpha"}
NOT_NUMBERS = ("training.logging_steps",)  # lines of the log: a member is not trained again for them
# keys with one choice; a metric that is null but on MNLI
UNREAD = ("training.optimizer", "loss.freeze_lora_during_warmup", "mismatched_accuracy")
OWN_KEYS = ("model.adapter", "model.importance_weighted_regularisation")
BY_NAME = {"COEFFICIENTS": "loss.penalty"}  # tables of which a member uses the entry that this key names
GLUE_ROWS = {"mnli": 392_702, "sst2": 67_349, "rte": 2_490}  # of the train split


def primary_metric(run: Run) -> str:
    """Published for RTE was F1 on entailment."""
    return "validation_f1" if run.dataset.subset == "rte" else "validation_accuracy"


def train_rows(run: Run) -> int | None:
    """Training examples, where they are known without reading the dataset."""
    dataset = run.dataset
    if dataset.name == "generated" and dataset.train_examples:
        rows = dataset.train_examples - max(1, round(dataset.tuning_fraction * dataset.train_examples))
    else:
        rows = GLUE_ROWS.get(dataset.subset) if dataset.name == "nyu-mll/glue" else None
    return min(rows, dataset.limit or rows) if rows else dataset.limit


def steps(run: Run) -> int | None:
    return run.training.optimizer_steps(train_rows(run))


def unread(run: Run) -> dict[str, str]:
    """{key: why} of what this run does not read."""
    own = ("about", "train_examples", "validation_examples", "label_noise")
    penalized = [key for key in config.keys(Loss) if key != "penalty"] if run.loss.penalty == "none" else ()
    found = {f"dataset.{key}": "it is of generated data" for key in own if run.dataset.name != "generated"}
    return found | {f"loss.{key}": "it has no penalty" for key in penalized}


def trial_changes(run: Run) -> dict[str, Any]:
    """At most 2 batches in training, calibration and evaluation, all of which read these values."""
    batch = min(run.training.batch_size, 4)
    two = ("training.eval_steps", "loss.sensitivity_warmup_steps", "loss.head_warmup_steps")
    limits = dict.fromkeys((*two, "model.recipe.pretrain_steps"), 2)
    limits |= {"training.warmup_steps": 1, "model.recipe.pretrain_batch_size": 4}
    limits |= {"dataset.train_examples": 4 * batch, "dataset.validation_examples": 2 * batch}
    changes = {
        **config.at_most(run, limits),
        **dict.fromkeys(("training.epochs", "training.gradient_accumulation_steps", "training.logging_steps"), 1),
        **{"training.batch_size": batch, "evaluation.batch_size": batch},
        "training.max_steps": min(2, run.training.max_steps or 2),
        "dataset.limit": min(2 * batch, run.dataset.limit or 2 * batch),
    }
    if run.model.adapter.type == "adalora":  # two steps leave no room for the schedule
        changes |= {"model.adapter.tinit": 0, "model.adapter.tfinal": 1, "model.adapter.delta_t": 1}
    return changes


# ---- checks: what a person should know before a run starts


def check(run: Run) -> Iterator[Finding]:
    training, total = run.training, steps(run)
    yield from config.check_schedule(training, total, training.evaluation_strategy == "steps" and training.eval_steps)
    yield from _check_penalty(run, total)
    if run.optuna.search_space and run.optuna.objective_metric.startswith("validation"):
        what = f"{run.optuna.objective_metric}: the search would choose on what is reported"
        yield Finding("warning", "optuna.objective_metric", what, "objective_metric: tuning_accuracy")
    if training.fp16:
        yield Finding("error", "training.fp16", "not offered: DeBERTa-v3 overflows in float16", "bf16: true on a GPU")
    if training.bf16 and not run.compute.gpus:
        what = "on a CPU slower than float32, unless it multiplies bfloat16 itself (avx512_bf16, AMX)"
        yield Finding("warning", "training.bf16", what, "bf16: false, or compute.gpus: 1")
    if run.compute.strategy == "fsdp":
        yield Finding("error", "compute.strategy", "sharded gradients hide the sensitivities", "strategy: none")
    dataset, task, splits = run.dataset, run.dataset.task, (run.dataset.splits.train, run.dataset.splits.validation)
    if dataset.name == "nyu-mll/glue" and any("test" in split for split in splits):
        yield Finding("error", "dataset.splits", f"{task}'s test split has no labels", "validation: validation")
    if dataset.preprocessing.padding == "max_length":
        yield Finding("warning", "dataset.preprocessing.padding", "padded to its batch's longest", "padding: longest")


def _check_penalty(run: Run, total: int | None) -> Iterator[Finding]:
    loss, kind = run.loss, run.model.adapter.type
    space = {ALIASES.get(key, key): entry for key, entry in run.optuna.search_space.items()}
    if loss.penalty == "none":
        if searched := sorted({"loss.alpha", "loss.beta"} & space.keys()):
            yield Finding("error", "optuna.search_space", f"no penalty reads {searched[0]}", "loss.penalty: importance")
        return
    if kind != "lora":
        yield Finding("error", "loss.penalty", f"{loss.penalty} needs LoRA pairs", "penalty: none, or type: lora")
    batches, buffer = loss.sensitivity_warmup_steps, loss.sensitivity_buffer_size or 0
    if total is not None and batches > total:
        what, fix = f"{batches} calibration batches for a run of {total} steps", max(1, total // 10)
        yield Finding("warning", "loss.sensitivity_warmup_steps", what, f"sensitivity_warmup_steps: {fix}")
    if buffer > batches:
        what, fix = f"room for {buffer} batches, of which {batches} are filled", f"sensitivity_buffer_size: {batches}"
        yield Finding("warning", "loss.sensitivity_buffer_size", what, fix)
    if (entry := space.get("loss.alpha")) and (entry.high or 1) < 1e-2:
        what = f"the penalty hardly acts at {entry.high:g}"
        yield Finding("warning", "optuna.search_space.alpha", what, "high: 1e-1")


def dry_call(run: Run) -> tuple:
    """What the penalty puts on four matrices, (4,)."""
    import torch

    from lib.iw_lora.penalty import COEFFICIENTS  # the table alone: see lib/run/keys.py

    name, s = run.loss.penalty, torch.tensor([0.1, 0.4, 0.2, 0.3])
    return () if name == "none" else (COEFFICIENTS[name](s, run.loss.beta, 0),)


# ---- the entries


def prepare(run: Run, folder: Path) -> None:
    """What all members of the run share, into `folder`."""
    from lib.iw_lora import data

    data.prepare(run, folder)


def audit(run: Run) -> dict:
    """What is in the run's data, before anything is made of it."""
    from lib.iw_lora import data

    return data.audit(run)


def train(member, folder: Path, shared: Path) -> dict:
    """Train one member in `folder` on what `prepare` put into `shared`; returns its metrics."""
    from lib.iw_lora import trainer

    return trainer.train(member, folder, shared)


def step_cost(run: Run, folder: Path, shared: Path) -> list[dict]:
    """Step times of IW-LoRA, LoRA and AdaLoRA, measured interleaved."""
    from lib.iw_lora import trainer

    return trainer.step_cost(run, folder, shared)


# ---- an adapter of the user's own (`./run_all.sh try`)

IDEA = "adapter(model)"
IDEA_RUN = {"model.adapter": {"type": "lora"}, "loss.penalty": "none"}  # whose own function it takes the place of


def adopt(idea) -> None:
    """Have the configuration that `idea` returns in the place of LoRA's in this process."""
    from lib.iw_lora import trainer

    trainer.add_adapters = lambda model, *_: trainer.add_own(model, idea(model))


def try_out(idea, run: Run) -> None:
    """Adapters on a model of the run's architecture, without its weights. Raises ValueError with what is wrong."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from lib import hub
    from lib.iw_lora import data, trainer

    recipe, place = run.model.recipe, hub.fetched(run.model.name) or run.model.name
    if place == "made":
        kind: Any = data.tiny_deberta(recipe.model_dump(), recipe.vocab_size, 0).config
    else:
        kind = AutoConfig.from_pretrained(place, trust_remote_code=run.model.trust_remote_code)
    model = AutoModelForSequenceClassification.from_config(kind)
    adapted = trainer.add_own(model, idea(model))  # PEFT's own words say what is wrong
    ids = torch.arange(1, 8)[None]
    adapted(input_ids=ids, attention_mask=torch.ones_like(ids))
