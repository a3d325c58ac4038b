"""The typed sections of an IW-LoRA run YAML. Names, published names and checks are in lib/iw_lora/config.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from lib.config import (
    Compute,
    Count,
    Flag,
    Fraction,
    Name,
    NonNegative,
    Optuna,
    Positive,
    Run as BaseRun,
    Section,
    Whole,
    fault,
    not_bool,
)

VALIDATION_METRIC = "validation_accuracy"


class Adapter(Section):
    """`rank` is LoRA's; AdaLoRA begins at init_r and prunes to target_r (its scale is lora_alpha / init_r)."""

    type: Literal["lora", "adalora", "none"] = "lora"
    rank: Count = 8
    lora_alpha: Count = 16
    lora_dropout: Fraction = 0.0
    target_modules: Name | list[Name] = ["query_proj", "value_proj"]
    init_r: Count | None = None
    target_r: Count | None = None
    tinit: Whole | None = None
    tfinal: Count | None = None
    delta_t: Count | None = None
    use_rslora: Flag = False
    use_dora: Flag = False
    init: Literal["default", "eva"] = "default"  # eva: A from the principal directions of the inputs of a few batches
    eva_rho: Annotated[float, BeforeValidator(not_bool), Field(ge=1)] = (
        2.0  # largest rank over `rank`; 1: all stay alike
    )

    @model_validator(mode="after")
    def _schedule(self):
        schedule = {key: getattr(self, key) for key in ("init_r", "target_r", "tinit", "tfinal", "delta_t")}
        if self.type != "lora" and self.init != "default":
            raise fault(f"init {self.init} with type {self.type}", "type: lora", "init: default", "init")
        if self.type != "adalora":
            stray = [key for key, value in schedule.items() if value is not None]
            if stray:
                raise fault(
                    str(schedule[stray[0]]),
                    f"no such key: type {self.type} does not read it",
                    "type: adalora",
                    stray[0],
                )
            return self
        absent = [key for key, value in schedule.items() if value is None]
        if absent:
            raise fault(
                "missing", "AdaLoRA's whole schedule", "init_r: 12, target_r: 8, tinit, tfinal, delta_t", absent[0]
            )
        if self.target_r >= self.init_r:
            raise fault(
                f"target_r {self.target_r}, init_r {self.init_r}",
                "target_r below init_r: else nothing is pruned",
                "init_r: 12, target_r: 8",
                "target_r",
            )
        return self


class Recipe(Section):
    """The small base model that is made: name: made."""

    vocab_size: Count = 64  # for generated text; real text takes up to OTHER_VOCABULARY of its own words
    hidden_size: Count = 64
    layers: Count = 2
    heads: Count = 4
    pretrain_steps: Count = 1000
    pretrain_batch_size: Count = 64
    pretrain_learning_rate: Positive = 1e-3
    seed: Whole = 0


class Model(Section):
    name: Name
    recipe: Recipe | None = None
    revision: str | None = None
    adapter: Adapter = Adapter()
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: Flag = False


class Splits(Section):
    train: Name = "train"
    validation: Name = "validation"


class Preprocessing(Section):
    truncation: Flag = True
    padding: Literal["max_length", "longest"] = "longest"


class Dataset(Section):
    name: Name
    subset: Literal["mnli", "sst2", "rte"] | None = None
    revision: str | None = None
    splits: Splits = Splits()
    max_seq_length: Count = 256
    preprocessing: Preprocessing = Preprocessing()
    train_examples: Count | None = None  # these two are for generated data
    validation_examples: Count | None = None
    tuning_fraction: Annotated[float, BeforeValidator(not_bool), Field(gt=0, lt=1)] = (
        0.1  # of train: choices are made on it
    )
    split_seed: Whole = 0
    limit: Count | None = None


class Training(Section):
    epochs: Positive | None = None
    max_steps: Count | None = None
    batch_size: Count  # of one micro-batch
    gradient_accumulation_steps: Count = 1
    learning_rate: Positive
    loraplus_lr_ratio: Positive | None = None  # LoRA+: the rate of B over that of A
    optimizer: Literal["adamw"] = "adamw"
    weight_decay: NonNegative = 0.0
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.0
    warmup_steps: Whole | None = None
    max_grad_norm: Positive = 1.0
    fp16: Flag = False
    bf16: Flag = False
    logging_steps: Count = 50
    save_strategy: Literal["epoch", "steps", "best", "no"] = "epoch"
    evaluation_strategy: Literal["epoch", "steps", "no"] = "epoch"
    eval_steps: Count | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if self.epochs is None and self.max_steps is None:
            raise fault("neither epochs nor max_steps", "one of them", "epochs: 3", "epochs")
        if self.warmup_ratio and self.warmup_steps:
            raise fault(
                f"warmup_ratio {self.warmup_ratio} and warmup_steps {self.warmup_steps}",
                "one of them",
                "remove warmup_steps",
                "warmup_steps",
            )
        if self.fp16 and self.bf16:
            raise fault("fp16 and bf16", "one of them", "fp16: false", "fp16")
        if self.evaluation_strategy == "steps" and self.eval_steps is None:
            raise fault("missing", "an interval, as evaluation_strategy is steps", "eval_steps: 100", "eval_steps")
        return self


class Loss(Section):
    """Task loss + alpha * penalty. `importance` is the study's formula, the others its alternatives and controls."""

    penalty: Literal["none", "importance", "max", "inv_mean", "uniform", "shuffled", "factor_l2"] = "none"
    alpha: NonNegative = 1e-4
    beta: NonNegative = 1.0
    sensitivity_warmup_steps: Count = 150  # calibration batches: N of s_k
    sensitivity_buffer_size: Count | None = None  # batches kept for the running average; null: all of them
    freeze_lora_during_warmup: Flag = True
    head_warmup_steps: Whole = 0  # an ablation: before s is measured


class Evaluation(Section):
    batch_size: Count = 64


class Search(Optuna):
    objective_metric: Name = VALIDATION_METRIC


class Run(BaseRun):
    model: Model
    dataset: Dataset
    training: Training
    loss: Loss = Loss()
    compute: Compute = Compute()
    evaluation: Evaluation = Evaluation()
    optuna: Search = Search()
