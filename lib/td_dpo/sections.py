"""The typed sections of a TD-DPO run YAML. Names, published names and checks are in lib/td_dpo/config.py."""

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
    Seed,
    Whole,
    fault,
)

OWN_LOSSES = ("dpo", "discopop", "discopop_card", "td_dpo", "td_dpo_anchored")
# TRL's loss types by their own names; sigmoid and discopop are `dpo` and `discopop` here.
TRL_LOSSES = (
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "sft",
    "sigmoid_norm",
)
WITH_TAU = ("td_dpo", "td_dpo_anchored")
VALIDATION_METRIC = "validation_implicit_accuracy"  # chooses checkpoints, cells and the sweep's best


class Recipe(Section):
    """How the small Llama of `model.name: made` is made: SFT on the data set's own training answers."""

    vocab_size: Count = 2048
    hidden_size: Count = 96
    layers: Count = 3
    heads: Count = 4
    sft_steps: Count = 450
    sft_batch_size: Count = 32
    sft_learning_rate: Positive = 6e-3
    seed: Seed = 0

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise fault(
                f"hidden_size {self.hidden_size}, heads {self.heads}",
                "heads of an even, equal size",
                "hidden_size: a multiple of 2 x heads",
                "heads",
            )
        return self


class Peft(Section):
    lora_r: Count
    lora_alpha: Count = 16
    lora_dropout: Fraction = 0.0
    target_modules: Name | list[Name] = "all-linear"


class Model(Section):
    name: Name
    revision: str | None = None
    recipe: Recipe | None = None
    quantization: Literal["none", "nf4"] = "none"
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    peft: Peft | None = None
    trust_remote_code: Flag = False

    @model_validator(mode="before")
    @classmethod
    def _made_has_a_recipe(cls, raw: Any):
        if isinstance(raw, dict) and raw.get("name") == "made" and raw.get("recipe") is None:
            return {**raw, "recipe": {}}
        return raw

    @model_validator(mode="after")
    def _quantised_needs_adapters(self):
        if self.quantization == "nf4" and self.peft is None:
            raise fault(
                "nf4 without adapters",
                "LoRA on a 4-bit base: its weights cannot be trained",
                "peft: {lora_r: 64}, or quantization: none",
                "quantization",
            )
        if self.quantization == "nf4" and self.name == "made":
            raise fault(
                "nf4 on the made model", "a model of the hub or a local one", "quantization: none", "quantization"
            )
        return self


class Preprocessing(Section):
    max_length: Annotated[Count, Field(ge=8)] = 512
    max_prompt_length: Count | None = None

    @model_validator(mode="after")
    def _prompt_leaves_room(self):
        if (
            isinstance(self.max_prompt_length, int)
            and isinstance(self.max_length, int)
            and self.max_prompt_length >= self.max_length
        ):
            raise fault(
                str(self.max_prompt_length), f"less than max_length ({self.max_length})", "", "max_prompt_length"
            )
        return self


class Dataset(Section):
    name: Name
    revision: str | None = None
    train_pairs: Count | None = None
    validation_pairs: Count | None = None
    test_pairs: Count | None = None
    validation_fraction: Annotated[Fraction, Field(gt=0)] = 0.1
    split_seed: Seed = 0
    preprocessing: Preprocessing = Preprocessing()
    limit: Count | None = None
    on_bad_row: Literal["refuse", "drop"] = "refuse"

    @model_validator(mode="before")
    @classmethod
    def _generated_sizes(cls, raw: Any):
        if isinstance(raw, dict) and raw.get("name") == "generated":
            sizes = {"train_pairs": 640, "validation_pairs": 400, "test_pairs": 400}
            return {**raw, **{key: raw[key] if raw.get(key) is not None else size for key, size in sizes.items()}}
        return raw


class Training(Section):
    """The best checkpoint on validation and the last one are kept, whatever the intervals."""

    epochs: Positive | None = None
    max_steps: Count | None = None  # where given it decides, not the epochs
    global_batch_size: Count
    per_device_train_batch_size: Count
    token_budget: Count | None = (
        None  # of one forward pass (rows x longest row): a step's pairs, by length, in such passes
    )
    gradient_accumulation_steps: Count | None = None  # derived; a stated value is only checked
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    optimizer: Literal["adamw"] = "adamw"
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.0
    warmup_steps: Whole | None = None
    max_grad_norm: Positive = 1.0
    eval_steps: Count | None = None  # null: at the end only
    save_steps: Count | None = None  # null: when validation is best and at the end
    gradient_checkpointing: Flag = False
    bf16: Flag = False
    fp16: Flag = False
    logging_steps: Count = 20  # interval of console lines; the record has every step

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
        if self.fp16:
            raise fault(
                "true",
                "false: weights are float32 or bfloat16 here, whose range log-probabilities need",
                "bf16: true with torch_dtype: bfloat16",
                "fp16",
            )
        return self


class Loss(Section):
    name: Literal[OWN_LOSSES + TRL_LOSSES]
    beta: NonNegative = 0.1
    tau: Positive | None = None
    average_log_probs: Flag = False
    label_smoothing: Annotated[NonNegative, Field(lt=0.5)] = 0.0

    @model_validator(mode="after")
    def _tau_where_it_is_read(self):
        if self.name in WITH_TAU and self.tau is None:
            raise fault("missing", f"the temperature of {self.name}", "tau: 1.0", "tau")
        if self.name not in WITH_TAU and self.tau is not None:
            raise fault(
                str(self.tau),
                f"no tau: {self.name} does not read it",
                "remove it; with --set add --run 'td_dpo*'",
                "tau",
            )
        if self.label_smoothing and self.name not in ("robust", "exo_pair"):
            raise fault(
                str(self.label_smoothing), f"0: {self.name} does not read it", "name: robust", "label_smoothing"
            )
        return self


class Evaluation(Section):
    questions: Count = 80
    max_new_tokens: Count = 48
    temperature: NonNegative = 0.7
    kl_prompts: Whole = 16
    judge: Literal["oracle", "mt_bench", "none"] = "none"
    mt_bench: Name | None = None  # folder of MT-Bench's files: its questions are answered and saved, and graded later


class Search(Optuna):
    objective_metric: Name = VALIDATION_METRIC


class Run(BaseRun):
    model: Model
    dataset: Dataset
    training: Training
    loss: Loss
    compute: Compute = Compute()
    evaluation: Evaluation = Evaluation()
    optuna: Search = Search()
