"""The typed sections of a GRAFF run YAML. Names and checks are in lib/graff/config.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

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
    fault,
)

VALIDATION_METRIC = "dev_exact_match"  # strict, on the dev split at the budget
SCHEDULERS = (
    "graff",
    "fixed",
    "cosine",
    "reactor",
    "hypergradient",
    "salelr_reconstructed",
    "bats_reconstructed",
    "schedulefree",
    "prodigy",
)
READ_BY = {  # scheduler keys and the schedulers that read them; the others refuse them
    "outer_lr": ("graff", "hypergradient"),
    "stability_guard": ("graff",),
    "guard": ("graff",),
    "warm_start_ckpt": ("graff",),
    "cold": ("graff",),
    "norm": ("graff", "hypergradient"),
    "regret": ("graff",),
    "graph": ("graff",),
    "budget_feature": ("graff",),
    "frozen": ("graff",),
    "token_weights": ("graff",),
    "controller_lr": ("reactor",),
    "baseline_decay": ("reactor",),
    "entropy_bonus": ("reactor",),
}


class Lora(Section):
    r: Count = 64
    alpha: Count = 16
    dropout: Fraction = 0.0
    target_modules: Name | list[Name] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Recipe(Section):
    """Of a model that is made here (name: made)."""

    hidden_size: Count = 96
    layers: Count = 3
    pretrain_steps: Count = 1500
    pretrain_batch_size: Count = 32
    pretrain_learning_rate: Positive = 3e-3
    seed: int = 0


class Model(Section):
    name: Name
    recipe: Recipe | None = None
    revision: str | None = None
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    lora: Lora = Lora()
    parameter_count: Annotated[str, Field(pattern=r"^\d+(\.\d+)?[KMB]$")] | None = (
        None  # compared with the loaded model
    )
    trust_remote_code: Flag = False


class Dataset(Section):
    name: Name
    revision: str | None = None
    train_split: Literal["train"] = "train"
    eval_split: Literal["dev", "test"] = "dev"
    dev_size: Count = 512  # training examples, by a seeded hash
    max_tokens: Count = 2048
    streaming: Flag = False
    shuffle_buffer: Count | None = None
    limit: Count | None = None
    train_examples: Count | None = None  # of generated problems
    test_examples: Count | None = None
    split_seed: int = 0
    real: dict[str, Any] | None = None  # other keys, set along where --set dataset.name names real problems
    gsm1k: Name | None = None  # a file or hub id in GSM8K's form; null: no result


class Optimizer(Section):
    type: Literal["adamw"] = "adamw"
    lr_init: Positive
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    weight_decay: NonNegative = 0.0


class Scheduler(Section):
    type: Literal[SCHEDULERS]
    outer_lr: Positive | None = None
    stability_guard: Positive | None = None
    guard: Literal["adam", "literal", "off"] | None = None
    warm_start_ckpt: Name | None = None
    cold: Flag | None = None
    graph: Flag | None = None  # false: self-loops only
    budget_feature: Flag | None = None
    frozen: Flag | None = None  # no outer step
    token_weights: Flag | None = None
    norm: Literal["cos", "raw"] | None = None
    regret: Literal["area", "literal"] | None = None
    controller_lr: Positive | None = None
    baseline_decay: Fraction | None = None
    entropy_bonus: NonNegative | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw):
        if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
            return raw
        defaults = {
            "outer_lr": 1e-3,
            "guard": "adam",
            "cold": False,
            "norm": "cos",
            "regret": "area",
            "controller_lr": 1e-4,
            "baseline_decay": 0.9,
            "entropy_bonus": 0.01,
            "graph": True,
            "budget_feature": True,
            "frozen": False,
            "token_weights": True,
        }
        own = {key: value for key, value in defaults.items() if raw["type"] in READ_BY[key]}
        return {**raw, **{key: value for key, value in own.items() if raw.get(key) is None}}

    @model_validator(mode="after")
    def _read(self):
        for key, readers in READ_BY.items():
            if getattr(self, key) is not None and self.type not in readers:
                raise fault(
                    str(getattr(self, key)),
                    f"no such key: {self.type} does not read it",
                    f"remove it, or type: {readers[0]}",
                    key,
                )
        return self


class Training(Section):
    budget_minutes: Positive
    clock: Literal["monotonic", "virtual"] = "monotonic"
    global_batch_size: Count
    micro_batch_size: Count
    gradient_accumulation_steps: Count | None = None  # derived; a stated value is only checked
    total_steps: Count | None = None  # a cap beside the budget
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: Flag = False
    clip_grad_norm: Positive = 1.0
    optimizer: Optimizer
    scheduler: Scheduler


class Loss(Section):
    """Cross-entropy of the answer's tokens; what weights them belongs to the scheduler."""


class Evaluation(Section):
    interval_steps: Count | None = None
    metrics: list[Literal["exact_match", "flexible_match"]] = ["exact_match"]
    dev_subset: Count = 200
    max_new_tokens: Count = 320
    batch_size: Count | None = None  # of generation; null: four micro-batches
    energy_level: Annotated[Positive, Field(le=1)] | None = (
        None  # exact match that energy is counted to; null: the analysis
    )
    # chooses it, half-way from the base model's to the tuned fixed rate's


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
