"""The GRAFF study: the sections of its run YAML, the names others know it by, its checks, and its two entries,
`prepare` (what all members share) and `train` (one member). Imports no torch until one of these is called."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lib import config
from lib.config import Count, Finding, Flag, Fraction, Name, Positive, Section, Seed, fault

# ---- sections of the YAML

READS = {  # scheduler: the keys that it reads; of another scheduler's they are null
    "graff": (
        *("outer_lr", "stability_guard", "guard", "warm_start_ckpt", "cold", "norm", "regret"),
        *("graph", "budget_feature", "frozen", "token_weights"),
    ),
    "hypergradient": ("outer_lr", "norm"),
    "reactor": ("controller_lr", "baseline_decay", "entropy_bonus"),
    **dict.fromkeys(("fixed", "cosine", "salelr_reconstructed", "bats_reconstructed"), ()),
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
    two_step_share: Fraction = 0.0  # of the pretraining problems; the rest have one step
    seed: Seed | None = None  # null: the member's own


class Model(config.Model):
    recipe: Recipe | None = None
    lora: Lora = Lora()
    parameter_count: Annotated[str, Field(pattern=r"^\d+(\.\d+)?[KMB]$")] | None = None  # compared with the name


class Dataset(config.Data):
    KNOWN = ("question", "answer")
    train_split: Literal["train"] = "train"
    eval_split: Literal["dev", "test"] = "dev"
    dev_size: Count = 512  # training examples, by a seeded hash, where the data has no validation split
    max_tokens: Count = 2048
    streaming: Flag = False
    shuffle_buffer: Count | None = None
    train_examples: Count | None = None  # of generated problems
    test_examples: Count | None = None
    # of generated problems; the made model's words are numbers to 199, and answers stay below three of these
    numbers_below: Annotated[int, Field(ge=3, le=67)] = 10
    # other keys, set along where --set dataset.name names real problems: of a generated one an answer has 20 tokens
    real: dict[str, Any] | None = None
    gsm1k: Name | None = None  # a file, or a hub id (at @revision), in GSM8K's form; null: no result


class Optimizer(Section):
    type: Literal["adamw"] = "adamw"
    lr_init: Positive
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    weight_decay: config.NonNegative = 0.0


class Scheduler(Section):
    """The defaults are those of a scheduler that READS the key."""

    type: Literal[tuple(READS)]  # pyright: ignore[reportInvalidTypeForm]
    outer_lr: Positive | None = 1e-3
    stability_guard: Positive | None = None
    guard: Literal["adam", "literal", "off"] | None = "adam"
    warm_start_ckpt: Name | None = None
    cold: Flag | None = False
    graph: Flag | None = True  # false: self-loops only
    budget_feature: Flag | None = True
    frozen: Flag | None = False  # no outer step
    token_weights: Flag | None = True
    norm: Literal["cos", "raw"] | None = "cos"
    regret: Literal["area", "literal"] | None = "area"
    controller_lr: Positive | None = 1e-4
    baseline_decay: Fraction | None = 0.9
    entropy_bonus: config.NonNegative | None = 0.01

    @model_validator(mode="before")
    @classmethod
    def _own_keys(cls, raw: Any):
        kind = str(raw.get("type")) if isinstance(raw, dict) else ""
        if kind not in READS:
            return raw
        given = {key: value for key, value in raw.items() if value is not None}
        others = dict.fromkeys(key for key in cls.model_fields if key not in ("type", *READS[kind]))
        for key in others.keys() & given.keys():
            raise fault(str(given[key]), f"no such key: {kind} does not read it", "remove it", key)
        return others | given


class Training(Section):
    budget_minutes: Positive
    clock: Literal["monotonic", "virtual"] = "monotonic"
    global_batch_size: Count
    micro_batch_size: Count
    gradient_accumulation_steps: Count | None = None  # derived; a stated value is only checked
    total_steps: Count | None = None  # a cap, besides the budget
    mixed_precision: Literal["no", "bf16"] = "no"  # not fp16: differences of gradients are lost to its rounding
    gradient_checkpointing: Flag = False
    clip_grad_norm: Positive = 1.0
    optimizer: Optimizer
    scheduler: Scheduler

    @property
    def accumulation(self) -> int:
        return max(1, self.global_batch_size // self.micro_batch_size)


class Evaluation(Section):
    interval_steps: Count | None = None
    metrics: list[Literal["exact_match", "flexible_match"]] = ["exact_match"]
    dev_subset: Count = 200
    max_new_tokens: Count = 320
    batch_size: Count | None = None  # of generation; null: four micro-batches
    test: Flag = True  # false: a trial of the search, which reads dev alone
    # exact match that energy is counted to; null: the analysis chooses it, midway from the base model's to the tuned
    # fixed rate's
    energy_level: Annotated[Positive, Field(le=1)] | None = None


class Search(config.Optuna):
    objective_metric: Name = "dev_exact_match"


class Run(config.Run):
    model: Model
    dataset: Dataset
    training: Training
    loss: Section = Section()  # nothing: cross-entropy of the answer's tokens, whose weights are the scheduler's
    evaluation: Evaluation = Evaluation()
    optuna: Search = Search()
    seed_list: config.Seeds = [42]  # the published files name no seed

    @classmethod
    def usual(cls, raw: dict) -> tuple[Any, str]:
        kind = config.get(raw, "training.scheduler.type")
        return kind, "proposed" if kind == "graff" else "comparative"


# ---- names: what the runner, the analysis and `check` know of the study

OWN_KEYS = ("training.budget_minutes", "training.scheduler")
BY_NAME = {"SCHEDULERS": "training.scheduler.type"}
MEMBER_KEYS = ("model.lora", "model.torch_dtype", "model.parameter_count")  # the base model and the data are the same
SEED_KEYS = ("dataset.split_seed", "model.recipe.seed")
SCORES = ("exact_match", "dev_exact_match", "flexible_match", "auc")
METRICS = dict.fromkeys(SCORES, "maximize")
METRICS |= dict.fromkeys(("energy_to_level", "dev_loss", "test_loss", "gsm1k_gap"), "minimize")
GROUP = ("model.name", "dataset.name", "training.budget_minutes")
LEADS = "Qwen3-0.6B, gsm8k, 30 budget minutes"
DIVERGED = dict.fromkeys(SCORES, 0.0)  # what a diverged run has
CLAIM_METRICS = ("exact_match", "auc", "energy_score", "step_score")  # columns that claims.evaluate is given
# metrics that are null where nothing can be read; a key with one choice
UNREAD = ("energy_to_level", "gsm1k_gap", "dataset.train_split")
ALIASES = dict.fromkeys(("learning_rate", "adapter_lr_init"), "training.optimizer.lr_init")
ALIASES |= dict.fromkeys(("outer_lr", "graff_outer_lr"), "training.scheduler.outer_lr")
ALIASES |= {"controller_lr": "training.scheduler.controller_lr", "budget_minutes": "training.budget_minutes"}
ALIASES |= {"method": "training.scheduler.type", "lora_r": "model.lora.r"}
PATHS = ("model.name", "dataset.name", "dataset.gsm1k", "training.scheduler.warm_start_ckpt")
MADE_BY = {  # a missing file: the command that makes it
    "training.scheduler.warm_start_ckpt": "make one: .venv/bin/python -m lib.graff.prepare FILE.safetensors; then "
    "--set training.scheduler.warm_start_ckpt=FILE.safetensors; or null with "
    "--set training.scheduler.cold=true for an untrained planner"
}
GSM8K_ROWS = 7_473  # of the train split; the dev rows are taken from it


def published_name(run: Run) -> str:
    by_wall = f"Exact-match accuracy at {run.training.budget_minutes:g} min wall-clock."
    return "exact_match" if run.training.clock == "virtual" else by_wall  # of virtual minutes nothing was published


def steps(run: Run) -> int | None:
    """The cap on top of the budget, or what `seconds_per_step` fits into it: how many it allows shows only when it
    runs."""
    if run.training.total_steps is not None:
        return run.training.total_steps
    return max(1, round(60 * run.training.budget_minutes / (run.compute.seconds_per_step or 1.0)))


def unread(run: Run) -> dict[str, str]:
    """{key: why} of what this run does not read."""
    generated = ("train_examples", "test_examples", "numbers_below") if run.dataset.name != "generated" else ()
    return {f"dataset.{key}": "it is of generated problems" for key in generated}


def trial_changes(run: Run) -> dict[str, Any]:
    """At most 2 batches in warm start, training and evaluation; no warm-start file is asked for."""
    batch, warm_start = min(run.training.micro_batch_size, 4), run.training.scheduler.warm_start_ckpt
    limits = {"model.recipe.pretrain_steps": 2, "model.recipe.pretrain_batch_size": 4, "evaluation.max_new_tokens": 8}
    limits |= {"dataset.train_examples": 4 * batch, "dataset.test_examples": batch, "dataset.dev_size": batch}
    return {
        **config.at_most(run, limits),
        **dict.fromkeys(("training.global_batch_size", "training.micro_batch_size", "evaluation.dev_subset"), batch),
        **dict.fromkeys(("training.gradient_accumulation_steps", "evaluation.interval_steps")),
        **{"training.clock": "virtual", "training.budget_minutes": 1e4},
        "training.total_steps": min(2, run.training.total_steps or 2),
        "training.scheduler.warm_start_ckpt": "made" if warm_start == "made" else None,
        "dataset.limit": min(2 * batch, run.dataset.limit or 2 * batch),
    }


def search_changes(run: Run) -> dict[str, Any]:
    """What a trial of the search leaves out: it is chosen on dev."""
    return {"evaluation.test": False}


# ---- checks: what a person should know before a run starts


def check(run: Run) -> Iterator[Finding]:
    dataset, count, name = run.dataset, run.model.parameter_count, run.model.name
    known = GSM8K_ROWS - dataset.dev_size if dataset.name == "openai/gsm8k" else float("inf")
    yield from config.check_batch(run.training, run.training.micro_batch_size)
    yield from _check_scheduler(run)
    if run.training.mixed_precision == "bf16" and not run.compute.gpus:
        what = "bf16 is of a GPU: on a CPU a member trains in float32"
        yield Finding("warning", "training.mixed_precision", what, "mixed_precision: no, or --set compute.gpus=1")
    if run.compute.strategy == "fsdp":
        yield Finding("error", "compute.strategy", "one process trains a member, on its own clock", "strategy: none")
    if dataset.eval_split == "test" and run.optuna.search_space:
        yield Finding("error", "dataset.eval_split", "the search would choose on the test split", "eval_split: dev")
    buffer, key = dataset.shuffle_buffer, "dataset.shuffle_buffer"
    if buffer is not None and not dataset.streaming:
        yield Finding("warning", key, "read when streaming only: every epoch is shuffled whole", "shuffle_buffer: null")
    elif buffer is not None and buffer > (rows := min(known, dataset.limit or known)):
        yield Finding("warning", key, f"{buffer} for {rows} training rows: a full shuffle", "shuffle_buffer: null")
    if count is not None and count.lower() not in name.lower():
        yield Finding("warning", "model.parameter_count", f"{count}, which the name {name} does not say", "remove it")
    if run.evaluation.interval_steps is not None:
        yield Finding("warning", "evaluation.interval_steps", "every 10 % of the budget instead", "remove the key")


def _check_scheduler(run: Run) -> Iterator[Finding]:
    scheduler, kind, at = run.training.scheduler, run.training.scheduler.type, "training.scheduler."
    named = next((name for name in READS if f"{run.method}_".startswith(f"{name}_")), kind)
    if named != kind and not run.idea:
        fix = f"method: {kind} in its YAML, or a name that begins with no other scheduler's"
        yield Finding("error", "method", f"{run.method}, but the scheduler is {kind}", fix)
    if kind == "graff" and run.mode == "full" and scheduler.warm_start_ckpt is None and not scheduler.cold:
        what, key = "missing: the planner's encoder is learned in the warm start", at + "warm_start_ckpt"
        yield Finding("error", key, what, MADE_BY[key])
    decay, bound, beta1 = scheduler.baseline_decay, scheduler.stability_guard, run.training.optimizer.betas[0]
    if decay is not None and decay > 0.95:
        what = f"per window of 5 steps: the baseline remembers about {5 / (1 - decay):.0f} steps"
        yield Finding("warning", at + "baseline_decay", what, "baseline_decay: 0.9")
    if bound is not None and scheduler.guard == "adam":
        what = f"multiplied by (1 + b1)/(1 - b1) = {(1 + beta1) / (1 - beta1):.3g}, Adam's edge of stability"
        yield Finding("warning", at + "stability_guard", what, "guard: literal for the bare figure, off for none")


def dry_call(run: Run) -> tuple:
    """The scheduler's weights of four tokens and the rates of two layers' four blocks, each (4,)."""
    import torch

    from lib.graff import schedulers

    scheduler = schedulers.SCHEDULERS[run.training.scheduler.type](run.training.scheduler, 2)
    plan = scheduler.decide(schedulers.Seen(0.5, 0.5, torch.zeros(4)))
    return scheduler.token_weights(plan, torch.ones(4), torch.zeros(4)), plan.log_eta + plan.log_m


# ---- the two entries


def prepare(run: Run, folder: Path) -> None:
    """What all members of the run share, into `folder`: problems, base model, tokens, and the planner's warm start."""
    from lib.graff import prepare as preparation

    loaded = preparation.prepare(run, folder)
    options = {"trial": run.mode == "trial", "seed": run.dataset.split_seed, "loaded": loaded}
    preparation.warm_start(folder / "warm_start.safetensors", run.scale, **options)


def audit(run: Run) -> dict:
    """What is in the run's data, before anything is made of it."""
    from lib.graff import prepare

    return prepare.audit(run)


def train(member, folder: Path, shared: Path) -> dict:
    """Train one member in `folder` on what `prepare` made in `shared`; returns its metrics."""
    from lib.graff import member as entry

    return entry.train(member, folder, shared)


# ---- a schedule of the user's own (`./run_all.sh try`)

IDEA = "schedule(fraction, state)"
IDEA_RUN = {"training.scheduler": {"type": "fixed"}}  # whose own function it takes the place of


def adopt(idea) -> None:
    """Have `idea` in the place of the fixed rate in this process."""
    from lib.graff import schedulers

    schedulers.SCHEDULERS["fixed"] = lambda section, layers: schedulers.Given(section, layers, idea)


def try_out(idea, run: Run) -> None:
    """At the start, the middle and the end of a budget. Raises ValueError with what is wrong."""
    from lib.graff import schedulers

    given = schedulers.Given(run.training.scheduler, 1, idea)
    for fraction in (0.0, 0.5, 1.0):
        given.multiplier(fraction)
        given.learn(1.0, None, 0.0, 0.0, 0.0)
