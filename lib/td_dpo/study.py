"""The TD-DPO study: the sections of its run YAML, the names others know it by, its checks, and its entries: `prepare`
(what all members share), `train` (one member) and what the runner measures. Imports no torch until one is called."""

import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, AliasPath, Field, model_validator

from lib import config
from lib.config import Count, Finding, Flag, Fraction, Name, NonNegative, Positive, Section, Seed, Whole, fault, renamed
from lib.errors import MissingError, StudyError
from lib.td_dpo import mt_bench
from lib.td_dpo.generated import JUDGE_OF, requests

# ---- sections of the YAML

OWN_LOSSES = ("dpo", "discopop", "discopop_card", "td_dpo", "td_dpo_anchored")
# TRL's loss types by their own names; sigmoid and discopop are `dpo` and `discopop` here.
TRL_LOSSES = ("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
TRL_LOSSES += ("apo_zero", "apo_down", "sft", "sigmoid_norm")
WITH_TAU = ("td_dpo", "td_dpo_anchored")
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # read label_smoothing
AVERAGED = ("ipo", "sigmoid_norm", "sft")  # divide by the answers' lengths by themselves
VALIDATION_METRIC = "validation_implicit_accuracy"  # chooses the best checkpoint, cells and the sweep's best
PUBLISHED = {"dpo_loss": "dpo", "td_dpo_loss": "td_dpo", "sigmoid": "dpo", "qlora-4bit": "nf4", None: "none"}
PUBLISHED_ACCURACY = ("val_pairwise_accuracy", "pairwise_accuracy")
PUBLISHED |= dict.fromkeys(PUBLISHED_ACCURACY, VALIDATION_METRIC)
GENERATED_PAIRS = {"train_pairs": 640, "validation_pairs": 400, "test_pairs": 400}


class Recipe(Section):
    """How the small Llama of `model.name: made` is made: SFT on the data set's own training answers."""

    vocab_size: Count = 2048
    hidden_size: Count = 96
    layers: Count = 3
    heads: Count = 4
    sft_steps: Count = 450
    sft_batch_size: Count = 32
    sft_learning_rate: Positive = 6e-3
    seed: Seed | None = None  # null: the member's own

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise fault(str(self.heads), "heads of an even size", "hidden_size: a multiple of 2 x heads", "heads")
        return self


class Peft(Section):
    lora_r: Count
    lora_alpha: Count = 16
    lora_dropout: Fraction = 0.0
    target_modules: Name | list[Name] = "all-linear"
    last_layers: Count | None = None  # only so many of the last have adapters; null: all

    @model_validator(mode="after")
    def _layers_of_a_list(self):
        if self.last_layers and isinstance(self.target_modules, str):
            found, fix = self.target_modules, "target_modules: [q_proj, v_proj]"
            raise fault(found, "a list with last_layers: PEFT takes layers of no other", fix, "target_modules")
        return self


class Model(config.Model):
    recipe: Recipe | None = None
    quantization: Annotated[Literal["none", "nf4"], renamed(PUBLISHED)] = "none"
    load_in_4bit: Flag | None = Field(None, exclude=True)
    peft: Peft | None = None

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, raw: Any):
        if not isinstance(raw, dict):
            return raw
        recipe = {"recipe": {}} if raw.get("name") == "made" and raw.get("recipe") is None else {}
        return {"quantization": "nf4" if raw.get("load_in_4bit") else "none", **raw, **recipe}

    @model_validator(mode="after")
    def _quantized_needs_adapters(self):
        nf4 = self.quantization == "nf4"
        if self.load_in_4bit not in (None, nf4):
            raise fault(str(self.load_in_4bit), f"agreement with quantization: {self.quantization}", "", "load_in_4bit")
        if nf4 and (self.name == "made" or self.peft is None):
            expected = "a model of the hub or a local one, with adapters"
            raise fault("nf4", expected, "peft: {lora_r: 64}, or quantization: none", "quantization")
        return self


class Preprocessing(Section):
    max_length: Annotated[Count, Field(ge=8)] = 512
    max_prompt_length: Count | None = None

    @model_validator(mode="after")
    def _prompt_leaves_room(self):
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise fault(str(self.max_prompt_length), f"less than {self.max_length}", "", "max_prompt_length")
        return self


class Dataset(config.Data):
    KNOWN = (
        *("prompt", "instruction", "question", "messages", "conversations", "system", "history", "input", "tools"),
        *("chosen", "rejected", "completion_a", "completion_b", "choice", "completions"),
        *("output_1", "output_2", "preference", "human_ref_A", "human_ref_B", "labels"),
    )
    train_pairs: Count | None = None
    validation_pairs: Count | None = None
    test_pairs: Count | None = None
    validation_fraction: Annotated[Fraction, Field(gt=0)] = Field(
        0.1, validation_alias=AliasChoices("validation_fraction", AliasPath("split", "val"))
    )
    split: dict[Literal["train", "val"], Fraction] | None = Field(None, exclude=True)
    flipped: Fraction = 0.0  # share of the labels of verifiable training pairs that are turned round
    real: dict[str, Any] | None = None  # other keys, set along where --set dataset.name names real pairs
    preprocessing: Preprocessing = Preprocessing()

    @model_validator(mode="before")
    @classmethod
    def _generated_sizes(cls, raw: Any):
        if isinstance(raw, dict) and raw.get("name") in JUDGE_OF:
            return raw | {key: size for key, size in GENERATED_PAIRS.items() if raw.get(key) is None}
        return raw

    @model_validator(mode="after")
    def _whole(self):
        if self.split and abs(sum(self.split.values()) - 1) > 1e-9:
            raise fault(str(self.split), "train and val fractions that sum to 1", "validation_fraction: 0.1", "split")
        return self


class Training(config.Schedule):
    """The last checkpoint, which is judged, and the best one on validation are kept, whatever the intervals. Where
    max_steps is given it decides, not the epochs."""

    global_batch_size: Count
    per_device_train_batch_size: Count
    # Of a forward pass (rows x longest row): a step's pairs, by length, in such passes.
    token_budget: Count | None = None
    gradient_accumulation_steps: Count | None = None  # derived from the global batch; a stated value is only checked
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    save_steps: Count | None = None  # null: when validation is best and at the end
    evaluation_strategy: Literal["steps"] | None = Field(None, exclude=True)
    save_strategy: Literal["best"] | None = Field(None, exclude=True)
    save_total_limit: Literal[1, 2] | None = Field(None, exclude=True)
    report_to: Literal["wandb"] | None = Field(None, exclude=True)
    seed_list: config.Seeds | None = Field(None, exclude=True)
    gradient_checkpointing: Flag = False
    fp16: Literal[False] = False  # log-probabilities need the range of bfloat16: bf16, torch_dtype: bfloat16
    logging_steps: Count = 20  # interval of console lines; the record has every step

    def steps(self, pairs: int) -> int:
        """Optimizer steps of a training on so many pairs."""
        return self.max_steps or max(1, math.ceil(self.epochs * math.ceil(pairs / self.global_batch_size)))

    def numbers(self) -> dict:
        """The section without what changes no number of a training."""
        return self.model_dump(exclude={key.removeprefix("training.") for key in NOT_NUMBERS})


class Loss(Section):
    name: Annotated[Literal[OWN_LOSSES + TRL_LOSSES], renamed(PUBLISHED)]  # pyright: ignore[reportInvalidTypeForm]
    kl_reference_model: Literal[True] = Field(True, exclude=True)  # every loss reads a frozen reference
    beta: NonNegative = 0.1
    tau: Positive | None = None
    average_log_probs: Flag = False
    label_smoothing: Annotated[NonNegative, Field(lt=0.5)] = 0.0

    @model_validator(mode="after")
    def _options_that_are_read(self):
        if (self.tau is None) == (self.name in WITH_TAU):
            expected = f"a temperature for {self.name}" if self.tau is None else f"none: {self.name} does not read it"
            raise fault(str(self.tau), expected, "tau: 1.0, or null; with --set add --run '*td_dpo*'", "tau")
        if self.label_smoothing and self.name not in SMOOTHED:
            raise fault(str(self.label_smoothing), f"0 for {self.name}", f"name: {SMOOTHED[0]}", "label_smoothing")
        if self.average_log_probs and self.name in AVERAGED:
            expected = f"false: {self.name} averages over tokens by itself"
            raise fault("true", expected, "average_log_probs: false", "average_log_probs")
        return self


class Evaluation(Section):
    questions: Count = 80
    max_new_tokens: Count = 48
    temperature: NonNegative = 0.7
    kl_prompts: Whole = 16
    judge: Literal["oracle", "verifier", "mt_bench", "none"] = "none"
    mt_bench: Name | None = None  # folder of MT-Bench's files: its questions are answered and saved, and graded later


class Search(config.Optuna):
    objective_metric: Annotated[Name, renamed(PUBLISHED)] = VALIDATION_METRIC


class Run(config.Run):
    method: Annotated[Name, AfterValidator(lambda name: name.lower().replace("-", "_"))]
    model: Model
    dataset: Dataset
    training: Training
    loss: Loss
    evaluation: Evaluation = Evaluation()
    optuna: Search = Search()
    seed_list: config.Seeds = Field(validation_alias=AliasChoices("seed_list", AliasPath("training", "seed_list")))

    @classmethod
    def usual(cls, raw: dict) -> tuple[Any, str]:
        loss = str(config.get(raw, "loss.name"))
        loss = PUBLISHED.get(loss, loss)
        return loss, {"td_dpo": "proposed", "td_dpo_anchored": "ablation"}.get(loss, "comparative")

    @model_validator(mode="after")
    def _seeds_agree(self):
        if self.training.seed_list not in (None, self.seed_list):
            raise fault(str(self.training.seed_list), f"seed_list: {self.seed_list}", "remove it", "training.seed_list")
        return self


# ---- names

OWN_KEYS = ("loss.name",)
BY_NAME = {"LOSSES": "loss.name"}
JUDGED = {judge: f"{judge}_score" for judge in ("oracle", "verifier", "mt_bench")}  # the metric of evaluation.judge
SECOND_METRIC = "implicit_accuracy"  # where no answers are judged
GRADED_BY = {"mt_bench_score": "./run_all.sh judge --study td_dpo"}
CLAIM_METRICS = ("score", "seconds")  # columns that the analysis gives to claims.evaluate
MEMBER_KEYS = ("model.peft",)  # what members of one preparation may differ in: the base model is the same
SEED_KEYS = ("dataset.split_seed", "model.recipe.seed")
SCORES = (*JUDGED.values(), "mt_bench_score_corrected", *(f"best_{judge}_score" for judge in JUDGE_OF.values()))
ACCURACIES = ("implicit_accuracy", "raw_accuracy", "validation_implicit_accuracy", "validation_raw_accuracy")
METRICS = dict.fromkeys(SCORES + ACCURACIES, "maximize") | dict.fromkeys(("validation_loss", "sampled_kl"), "minimize")
# What a diverged member counts as: the lowest score on every question, guessing on every pair.
DIVERGED = dict.fromkeys(SCORES, 1.0) | dict.fromkeys(ACCURACIES, 0.5)
UNREAD = (
    *SCORES,  # of judged answers, which a trial may not have
    *("dataset.validation_pairs", "dataset.test_pairs"),  # read by a composed name
    *("training.optimizer", "training.fp16"),  # with one choice
)
# The order is the order in a cell's name.
ALIASES = {"loss": "loss.name", "beta": "loss.beta", "tau": "loss.tau"}
_TRAINING = ("learning_rate", "weight_decay", "global_batch_size", "epochs", "max_steps")
ALIASES |= {key: f"training.{key}" for key in _TRAINING}
ALIASES |= {key: f"model.peft.{key}" for key in ("lora_r", "lora_alpha", "lora_dropout")}
ALIASES["max_length"] = "dataset.preprocessing.max_length"
# Lines of the log, and where a resume begins (a new best is saved whenever there is one): a member is not trained
# again for them.
NOT_NUMBERS = ("training.logging_steps", "training.save_steps")
KNOWN_PAIRS = {"argilla/dpo-mix-7k": 6750}  # rows of the train split, before the validation part is taken


def train_pairs(run: Run) -> int | None:
    """Pairs trained on, where that is known before the data is read; of other data `limit` of them at most."""
    section = run.dataset
    known = KNOWN_PAIRS.get(section.name, 0)
    pairs = section.train_pairs if section.name in JUDGE_OF else known - round(known * section.validation_fraction)
    return min(pairs, section.limit or pairs) if pairs else section.limit


def steps(run: Run) -> int | None:
    """Optimizer steps of one member; None where neither max_steps nor the data's size is known."""
    pairs = train_pairs(run)
    return run.training.steps(pairs) if pairs else run.training.max_steps


def primary_metric(run: Run) -> str:
    """What the run's own judge gives; no other score stands in for it."""
    return JUDGED.get(run.evaluation.judge, SECOND_METRIC)


def unread(run: Run) -> dict[str, str]:
    """{key: why} of what this run does not read."""
    most = run.training.max_steps
    found = {"training.epochs": f"max_steps is {most}; --set training.max_steps=null too"} if most else {}
    found |= {"loss.beta": "sft has none"} if run.loss.name == "sft" else {}
    sizes = GENERATED_PAIRS if run.dataset.name not in JUDGE_OF else ()
    return found | {f"dataset.{key}": "it sizes generated data" for key in sizes}


def trial_changes(run: Run) -> dict[str, Any]:
    """At most 2 batches in training, reference, evaluation and, for a made model, SFT."""
    batch = min(run.training.per_device_train_batch_size, run.training.global_batch_size, 4)
    two = ("training.max_steps", "training.eval_steps", "training.save_steps", "model.recipe.sft_steps")
    limits = dict.fromkeys((*two, "evaluation.questions", "evaluation.kl_prompts"), 2)
    limits |= {"training.warmup_steps": 1, "evaluation.max_new_tokens": 8, "model.recipe.sft_batch_size": 4}
    if run.dataset.name in JUDGE_OF:
        limits |= {f"dataset.{key}": 2 * batch for key in GENERATED_PAIRS}
    return {
        **config.at_most(run, limits),
        **dict.fromkeys(("training.global_batch_size", "training.per_device_train_batch_size"), batch),
        **{"training.epochs": 1, "training.logging_steps": 1, "training.gradient_accumulation_steps": None},
        "dataset.limit": min(2 * batch, run.dataset.limit or 2 * batch),
        "evaluation.judge": "none" if any(_mt_bench(run, MissingError)) else run.evaluation.judge,
    }


def search_changes(run: Run) -> dict[str, Any]:
    """What a trial of the search leaves out; it reads validation only."""
    return {"evaluation.judge": "none", "evaluation.kl_prompts": 0}


# ---- checks: what a person should know before a run starts


def check(run: Run) -> Iterator[Finding]:
    training, loss, dataset, model = run.training, run.loss, run.dataset, run.model
    yield from config.check_batch(training, training.per_device_train_batch_size * run.compute.devices)
    yield from config.check_schedule(training, steps(run), training.eval_steps)
    if training.bf16 and model.torch_dtype == "float32":
        yield Finding("error", "training.bf16", "true with model.torch_dtype float32", "torch_dtype: bfloat16")
    if model.torch_dtype != "float32" and not model.peft:
        what = "without adapters the policy is trained in float32, and its reference would not be"
        yield Finding("error", "model.torch_dtype", what, "float32 and training.bf16: false, or model.peft")
    if not run.idea and run.method != loss.name and run.method in OWN_LOSSES + TRL_LOSSES:
        fix = f"method: {loss.name} (--set method={loss.name}), or a name that no other loss has"
        yield Finding("error", "method", f"{run.method}, but the loss is {loss.name}", fix)
    if model.recipe is not None and model.name != "made" and "model.name" not in run.overrides:
        yield Finding("warning", "model.recipe", f"not read: the model is {model.name}", "recipe: null")
    sized = [f"dataset.{key}" for key in GENERATED_PAIRS if getattr(dataset, key) is not None]
    if sized and dataset.name not in JUDGE_OF and "dataset.name" not in run.overrides:
        yield Finding("warning", sized[0], f"read for generated data only, not {dataset.name}", "dataset.limit")
    if loss.average_log_probs and run.method == loss.name:
        what = f"an ablation: {loss.name} sums log-probabilities"
        yield Finding("warning", "loss.average_log_probs", what, "average_log_probs: false, or another method's name")
    if dataset.name == "verifiable" and model.name == "made":
        what = "made, and verifiable pairs are the answers of a pretrained model"
        yield Finding("error", "model.name", what, "a chat model of the hub, or dataset.name: generated")
    yield from _meant_otherwise(run)
    judge = run.evaluation.judge
    if judge == "verifier" and run.evaluation.questions > (there := len(requests("questions", 0))):
        yield Finding("error", "evaluation.questions", f"{run.evaluation.questions}, of {there}", f"questions: {there}")
    if judge in JUDGE_OF.values() and JUDGE_OF.get(dataset.name) != judge:
        level, fix = ("error", "leave it out") if run.idea else ("warning", "judge: none")  # an idea's claim needs it
        yield Finding(level, "evaluation.judge", f"no {judge} score is known for dataset.name={dataset.name}", fix)
    if run.evaluation.judge == "mt_bench" and not run.evaluation.mt_bench:
        fix = "mt_bench: .cache/mt_bench (the folder of MT-Bench's questions), or judge: none"
        yield Finding("error", "evaluation.mt_bench", "none: no answers would be saved to grade", fix)
    yield from _mt_bench(run, StudyError)


def _meant_otherwise(run: Run) -> Iterator[Finding]:
    """Published names in the YAML whose own code meant something else by them (notebooks/td_dpo/METHOD.md)."""
    written = config.load_yaml(run.source) if run.source else {}
    keys = ("loss.name", "loss.average_log_probs", "optuna.objective_metric")
    name, averaged, metric = (config.get(written, key) for key in keys)
    if name == "dpo_loss" and run.loss.name == "dpo":
        what = "dpo_loss is read as DPO; the published code's dpo_loss is TD-DPO at tau 1"
        yield Finding("warning", keys[0], what, "name: dpo, or name: td_dpo with tau: 1.0")
    if name in ("dpo_loss", "td_dpo_loss") and averaged is None:
        what = f"log-probabilities are summed over tokens; the published code's {name} averages them"
        yield Finding("warning", keys[1], what, "average_log_probs: false, or true for an ablation")
    if metric in PUBLISHED_ACCURACY and run.optuna.objective_metric == VALIDATION_METRIC:
        what = f"{metric} is read as implicit accuracy (rho > 0); the published code's is raw (Delta > 0)"
        yield Finding("warning", keys[2], what, f"objective_metric: {VALIDATION_METRIC}, or validation_raw_accuracy")


def needs(run: Run) -> Iterator[Finding]:
    """What must be on this machine before a full run: the questions that its members are to answer and, but that is
    only a warning, a judge of the answers."""
    yield from _mt_bench(run, MissingError)
    key, judged, pending = "evaluation.judge", run.evaluation.judge == "mt_bench", "judging stays pending"
    if judged and importlib.util.find_spec("openai") is None:
        fix = ".venv/bin/pip install -c constraints.txt -e '.[judge]', then ./run_all.sh judge"
        yield Finding("warning", key, f"openai is not installed: {pending}", fix)
    if judged and not any(os.environ.get(name, "").strip() for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL")):
        fix = "set OPENAI_API_KEY, or OPENAI_BASE_URL of any compatible server, then ./run_all.sh judge"
        yield Finding("warning", key, f"no judge endpoint: {pending}", fix)


def _mt_bench(run: Run, kind: type[StudyError]) -> Iterator[Finding]:
    """What is wrong with the folder of MT-Bench: StudyError, its files do not hold what they should; MissingError, it
    is not there."""
    try:
        if run.evaluation.judge == "mt_bench" and run.evaluation.mt_bench:
            mt_bench.read(run.evaluation.mt_bench)
    except StudyError as error:
        if type(error) is kind:
            yield Finding("error", "evaluation.mt_bench", f"{error.where}: {error.found}", error.fix or error.expected)


def dry_call(run: Run) -> tuple:
    """(the loss of four pairs, its two terms, its gradient by the chosen answers' log-probabilities), each (4,)."""
    import torch

    from lib.td_dpo import losses

    if run.loss.name in OWN_LOSSES and run.loss.name not in losses.LOSSES:
        raise LookupError(f"not in LOSSES of {losses.__name__}")
    chosen = torch.tensor([-9.0, -20.0, -7.0, -12.0], requires_grad=True)
    four = chosen, chosen.flip(0), chosen.detach() + 0.5, chosen.detach() - 1.0
    options = run.loss.model_dump(include={"beta", "tau", "label_smoothing"})
    terms = losses.preference_loss(run.loss.name, *four, **options, lengths=(torch.tensor([5, 9, 4, 6]),) * 2)
    return *terms, *torch.autograd.grad(terms[0].sum(), chosen)


# ---- the entries


def prepare(run: Run, folder: Path) -> None:
    """What all members of the run share, into `folder`."""
    from lib.td_dpo import data

    data.prepare(run, folder)


def audit(run: Run, shared: Path | None = None) -> dict:
    """What is in the run's data, before anything is made of it, or in what `prepare` sampled into `shared`."""
    from lib.td_dpo import data

    return data.audit(run, shared)


def train(member, folder: Path, shared: Path, outcome=None) -> dict:
    """Train one member in `folder` on what `prepare` made in `shared` (where no sharded training's `outcome` is there
    to go on from); returns its metrics."""
    from lib.td_dpo import member as one

    return one.train(member, folder, shared, outcome)


def fit(member, folder: Path, shared: Path, kind):
    """The training alone, by a trainer of another `kind` (lib/run/sharding.py); returns its outcome."""
    from lib.td_dpo import member as one

    return one.fit(member, folder, one.load(member.run, shared), kind)[0]


def step_cost(run: Run, folder: Path, shared: Path) -> list[dict]:
    """What a step costs against one of DPO, into `folder`."""
    from lib.td_dpo import member as one

    return one.step_cost(run, folder, shared)


# ---- a loss of the user's own (`./run_all.sh try`)

IDEA = "loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta)"
IDEA_RUN = {"loss.name": "dpo", "loss.tau": None}  # whose own function it takes the place of


def adopt(idea) -> None:
    """Have `idea` in the place of DPO's loss in this process."""
    from lib.td_dpo import losses

    def loss(*, chosen, rejected, ref_chosen, ref_rejected, beta, **_) -> losses.Terms:
        return idea(chosen, rejected, ref_chosen, ref_rejected, beta=beta), None

    losses.LOSSES["dpo"] = loss


def try_out(idea, run: Run) -> None:
    """A dry call on four pairs. Raises ValueError with what is wrong."""
    import torch

    policy = torch.tensor([[-40.0, -35.0, -60.0, -20.0], [-45.0, -30.0, -60.5, -25.0]], requires_grad=True)
    found = idea(*policy, *policy.detach() - 0.5, beta=run.loss.beta)
    shape = tuple(getattr(found, "shape", ()))
    if shape != (4,) or not isinstance(found, torch.Tensor):
        raise ValueError(f"returns a {type(found).__name__} of shape {shape}; expected a tensor (4,): 4 pairs' losses")
    found.sum().backward()
    if not (found.isfinite().all() and policy.grad.isfinite().all()):
        raise ValueError(f"returns {found.tolist()}, gradient {policy.grad.tolist()}; expected finite numbers")
