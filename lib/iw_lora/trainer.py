"""One member of the study: adapters by PEFT, calibration where the method asks for it, training with the penalty, and
the scores on validation."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

from lib import config, models, record
from lib.errors import StudyError
from lib.iw_lora import penalty
from lib.training import StudyTrainer, make_stepper, seeded_batches, time_interleaved, to_device

# PEFT's own, and what it does not list yet; of AdaLoRA too, so that methods adapt the same matrices
TARGETS = {**TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "modernbert": ["Wqkv"]}
HEADS = {"pooler", "head"}  # the task type adds the classifier; without these, where there are, it would stay random
COST_ROUNDS, COST_WARM_UP = 20, 3  # interleaved rounds of steps in a process
ADALORA_DELTA_T = {"laptop": 5, "small": 5, "paper": 100}  # steps between two allocations; paper: MNLI's


# ---- adapters


def add_adapters(model: nn.Module, adapter, total_steps: int) -> nn.Module:
    """`model` with the configured adapters. Raises StudyError for an AdaLoRA schedule that never prunes, and for an
    architecture of which nobody says what to adapt."""
    if adapter.type == "none":
        return model
    kind, common = model.config.model_type, {name: getattr(adapter, name) for name in ("lora_alpha", "lora_dropout")}
    if not (targets := adapter.target_modules or TARGETS.get(kind)):
        fix = "model.adapter.target_modules: [...], names of its linear layers"
        raise StudyError("model.adapter.target_modules", "null", f"a list: {kind} has no default", fix)
    head = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS]
    common |= {"target_modules": targets, "task_type": TaskType.SEQ_CLS, "modules_to_save": head}
    if adapter.type == "lora":
        own = {"r": adapter.rank, "use_rslora": adapter.use_rslora, "use_dora": adapter.use_dora}
        return get_peft_model(model, LoraConfig(**own, **common))
    if adapter.tinit + adapter.tfinal >= total_steps:
        found = f"tinit {adapter.tinit} + tfinal {adapter.tfinal} in a run of {total_steps} steps"
        raise StudyError("model.adapter.tfinal", found, "a schedule that leaves steps to prune in", "lower both")
    schedule = {key: getattr(adapter, key) for key in ("init_r", "target_r", "tinit", "tfinal")}
    total = max(total_steps, 3)  # a trial has 2: one to weigh in
    return get_peft_model(model, AdaLoraConfig(**schedule, deltaT=adapter.delta_t, total_step=total, **common))


def add_own(model: nn.Module, own: Any) -> nn.Module:
    """`model` with adapters of a configuration of the user's own; the head is trained as it is with the study's."""
    if not hasattr(own, "peft_type"):
        raise ValueError(f"returns {type(own).__name__}; expected a configuration of PEFT, LoraConfig(...) say")
    own.task_type = TaskType.SEQ_CLS
    if hasattr(own, "modules_to_save"):
        head = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS]
        own.modules_to_save = list(dict.fromkeys([*(own.modules_to_save or ()), *head]))
    return get_peft_model(model, own)


def allocator_of(model: nn.Module):
    """AdaLoRA's rank allocator; None for other methods."""
    return getattr(getattr(model, "base_model", None), "rankallocator", None)


def ranks_used(model: nn.Module) -> dict[str, int]:
    """{matrix: triplets that are not pruned} of AdaLoRA."""
    layers = {name: layer for name, layer in penalty.lora_layers(model).items() if hasattr(layer, "lora_E")}
    return {name: int((layer.lora_E["default"] != 0).sum()) for name, layer in layers.items()}


# ---- training


class Term(NamedTuple):
    """The penalty of a run: alpha, coefficients (K,), and whether the factors are penalized in place of Delta."""

    alpha: float
    coefficients: Tensor
    factors: bool = False


def task_loss(model: nn.Module, batch: dict) -> Tensor:
    """Batch-mean cross-entropy (nats) from the logits: AdaLoRA's own `loss` adds its orthogonality."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return nn.functional.cross_entropy(model(**inputs).logits.float(), batch["labels"])


class ImportanceTrainer(StudyTrainer):
    """Task loss + alpha R while training; both parts are recorded apart.

    The gradient of R is added once per optimizer step: every micro-batch carries R and is divided by their number, and
    data parallelism averages.
    """

    loss_is_scaled_for_ga = False  # DeBERTa accepts num_items_in_batch and ignores it

    def __init__(self, run, given, model: nn.Module, seed: int, folder: Path, term: Term | None = None):
        self.run, self.given, self.term, self.parts = run, given, term, []
        training, rows = run.training, given.rows["train"]
        self.lengths = lengths_of(run, rows)
        steps, identity = training.optimizer_steps(len(rows)), config.dump(run)
        identity["training"].pop("logging_steps")  # changes the log alone
        every = {"epoch": training.steps_per_epoch(len(rows)), "steps": training.eval_steps, "no": None}
        alike = ("learning_rate", "weight_decay", "lr_scheduler_type", "max_grad_norm", "bf16")
        alike += ("gradient_accumulation_steps",)
        super().__init__(
            model,
            rows,
            DataCollatorWithPadding(given.tokenizer),
            folder=folder,
            fingerprint=record.digest([*(identity[name] for name in ("model", "loss", "training")), seed, steps]),
            max_steps=steps,
            seed=seed,
            eval_steps=every[training.evaluation_strategy],
            save_steps=every[training.save_strategy],
            log_every=training.logging_steps,
            optim="adamw_torch",
            per_device_train_batch_size=training.batch_size,
            warmup_steps=training.warmup(steps),
            **{name: getattr(training, name) for name in alike},
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        task = nn.functional.cross_entropy(outputs.logits.float(), inputs["labels"])
        loss, extra = (task if allocator_of(model) is None else outputs.loss), None
        if self.term is not None and self.term.alpha > 0:
            bare = self.accelerator.unwrap_model(model)
            extra = self.term.alpha * penalty.penalty(bare, self.term.coefficients, self.term.factors)
            loss = loss + extra
        self.parts.append((float(task.detach()), 0.0 if extra is None else float(extra.detach())))
        return loss

    def measure(self) -> dict:
        task, extra = np.mean(self.parts, axis=0).tolist()
        self.parts = []
        return {"steps": self.state.max_steps, "loss": task + extra, "task_loss": task, "penalty": extra}

    def validate(self) -> dict:
        """Accuracy and loss on the tuning split."""
        values = self.score("tuning")[1]
        return {"tuning_accuracy": values["accuracy"], "tuning_loss": values["loss"]}

    @torch.no_grad()
    def score(self, split: str) -> tuple[list[int], dict]:
        """(predicted labels, {"loss" (nats), "accuracy", "f1", "macro_f1"}) on a split, in evaluation mode."""
        rows, size, total = self.given.rows[split], self.run.evaluation.batch_size, 0.0
        order, guesses = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])), []  # less to pad
        self.model.eval()
        for start in record.batches("evaluation", range(0, len(rows), size)):
            batch = to_device(self.data_collator([rows[i] for i in order[start : start + size]]), self.model.device)
            logits = self.model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
            total += float(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
            guesses += logits.argmax(-1).tolist()
        predicted = [guess for _, guess in sorted(zip(order, guesses, strict=True))]
        labels = [row["label"] for row in rows]
        return predicted, {"loss": total / max(1, len(rows)), **scores(labels, predicted, self.given.report["task"])}

    def on_optimizer_step(self, args, state, control, **_):
        """AdaLoRA's budget after each optimizer step, before gradients are cleared; not where the step was skipped."""
        if allocator_of(self.model) is not None and not self.accelerator.optimizer_step_was_skipped:
            self.model.base_model.update_and_allocate(state.global_step + 1)

    def extra_state(self) -> dict:
        """What AdaLoRA remembers besides its weights."""
        allocator = allocator_of(self.model)
        if allocator is None:
            return {}
        state = {name: getattr(allocator, name) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        return {**state, "rank_pattern": self.model.peft_config["default"].rank_pattern}

    def load_extra_state(self, state: dict) -> None:
        if state:
            self.model.peft_config["default"].rank_pattern = state.pop("rank_pattern")
            allocator_of(self.model).__dict__.update(state)


def load(folder: Path) -> SimpleNamespace:
    """What all members share, which data.prepare wrote into `folder`: besides models.load_inputs' own, `rows` by split,
    {"input_ids", "label": int}, and `texts`, the same rows as text."""
    return models.load_inputs(Path(folder), "rows", "texts")


def build(run, given: SimpleNamespace, seed: int, steps: int) -> nn.Module:
    """Base model, new head and adapters; the same seed gives methods the same head and the same A."""
    set_seed(seed)
    head = {"num_labels": len(given.report["labels"]), "ignore_mismatched_sizes": True, "use_safetensors": None}
    model = models.load_base(run, given.base, auto_class=AutoModelForSequenceClassification, **head)
    return models.float32_trainables(add_adapters(model, run.model.adapter, steps))


def lengths_of(run, rows: list[dict]) -> list[int] | None:
    """Tokens of each row, where batches are bucketed by them."""
    grouped = run.training.train_sampling_strategy == "group_by_length"
    return [len(row["input_ids"]) for row in rows] if grouped else None


# ---- calibration


def calibration_batches(run, given: SimpleNamespace, seed: int) -> list[dict]:
    """The first `sensitivity_warmup_steps` batches of the seed's order."""
    batches = seeded_batches(given.rows["train"], run.training.batch_size, seed, lengths_of(run, given.rows["train"]))
    collate, count = DataCollatorWithPadding(given.tokenizer), run.loss.sensitivity_warmup_steps
    return [to_device(collate(batch), models.current_device()) for batch in itertools.islice(batches, count)]


def calibrate(run, model: nn.Module, batches: list[dict]) -> tuple[Tensor, int]:
    """(s (K,), number of batches left out): the sensitivities before any training."""
    if run.loss.head_warmup_steps:
        model = warm_up_head(run, model, batches)
    norms, skipped = penalty.gradient_norms(model, batches, task_loss)
    return penalty.sensitivities(norms, run.loss.sensitivity_buffer_size), skipped


def warm_up_head(run, model: nn.Module, batches: list[dict]) -> nn.Module:
    """The ablation head_warmup_steps: a copy of `model` whose head, all that learns but the adapters, was trained alone
    for so many steps. The model itself is left alone, so that nothing but s is different."""
    model = copy.deepcopy(model)
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    optimizer = torch.optim.AdamW(head, lr=run.training.learning_rate, weight_decay=0.0)
    for step in record.batches("head warm-up", range(run.loss.head_warmup_steps)):
        task_loss(model, batches[step % len(batches)]).backward(inputs=head)
        optimizer.step()
        optimizer.zero_grad()
    return model


def penalty_term(run, s: Tensor, seed: int) -> Term:
    loss = run.loss
    return Term(loss.alpha, penalty.COEFFICIENTS[loss.penalty](s, loss.beta, seed), loss.penalty == "factor_l2")


# ---- a member


def scores(labels: list[int], predicted: list[int], task: str) -> dict:
    """accuracy; F1 on entailment (label 0) for the two-way entailment tasks, null elsewhere; macro F1."""
    from sklearn.metrics import f1_score

    two_way = task in ("rte", "generated") and {*labels, *predicted} <= {0, 1}
    f1 = float(f1_score(labels, predicted, pos_label=0, average="binary", zero_division=0.0)) if two_way else None
    return {
        "accuracy": sum(a == b for a, b in zip(labels, predicted, strict=True)) / len(labels),
        "f1": f1,
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
    }


def train(member, folder: Path, shared: Path) -> dict:
    """Train the member in `folder` on the inputs in `shared`; returns its metrics, null where nothing was measured."""
    run, seed, given = member.run, member.seed, load(shared)
    model = build(run, given, seed, run.training.optimizer_steps(len(given.rows["train"])))
    s, term, skipped = None, None, 0
    if run.loss.penalty != "none":
        s, skipped = calibrate(run, model, calibration_batches(run, given, seed))
        term = penalty_term(run, s, seed)
    trainer = ImportanceTrainer(run, given, model, seed, folder, term)
    outcome = trainer.fit()
    metrics = {
        "status": outcome.status,
        "steps": outcome.step,
        "diverged_at": outcome.step if outcome.status == "diverged" else None,
        "skipped_batches": skipped,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bag_of_words_baseline": given.report["bag_of_words_baseline"],
        "majority_baseline": given.report["majority_baseline"],
    }
    if outcome.status == "diverged":
        return metrics
    guesses, values = trainer.score("validation")
    labels = [row["label"] for row in given.rows["validation"]]
    examples = [
        {"kind": "example", "example": i, "label": label, "prediction": guess, "correct": label == guess}
        for i, (label, guess) in enumerate(zip(labels, guesses, strict=True))
    ]
    record.write_jsonl(folder / "predictions.jsonl", examples)
    record_adapters(folder, model, s, term)
    return {
        **metrics,
        **trainer.validate(),
        **{f"validation_{name}": value for name, value in values.items()},
        "mismatched_accuracy": trainer.score("mismatched")[1]["accuracy"] if "mismatched" in given.rows else None,
        "step_seconds": statistics.median(row["seconds"] for row in record.read_jsonl(folder / "timing.jsonl")),
    }


def record_adapters(folder: Path, model: nn.Module, s: Tensor | None, term: Term | None) -> None:
    """adapters.json: s_k, w_k, coefficients, || Delta_k || at the end, and AdaLoRA's ranks."""
    names = [name.removeprefix("base_model.model.") for name in penalty.lora_layers(model)]
    if not names:
        return
    row = {"matrices": names, "delta_norm": penalty.delta_norms(model), "ranks": ranks_used(model)}
    if s is not None:
        row |= {"s": s.tolist(), "w": (s / s.sum()).tolist(), "coefficient": term.coefficients.tolist()}
    record.write_json(folder / "adapters.json", row)


# ---- the cost of a step


def stepper(model: nn.Module, training, term: Term | None) -> Callable[[dict], float]:
    """Takes one optimizer step on a batch, AdaLoRA's allocation included, and returns its seconds."""
    taken = itertools.count(1)

    def loss(batch: dict) -> Tensor:
        task = model(**batch).loss
        return task if term is None else task + term.alpha * penalty.penalty(model, term.coefficients, term.factors)

    def allocate() -> None:
        if allocator_of(model) is not None:
            model.base_model.update_and_allocate(next(taken))

    return make_stepper(model, training, loss, allocate)


def step_cost(run, folder: Path, shared: Path) -> list[dict]:
    """Step times of IW-LoRA, LoRA and AdaLoRA, interleaved on the same batches; writes calibration.json. A step is what
    repeats: calibration is done once and counted apart, in passes and in seconds."""
    given, first = load(shared), config.members(run)[0]
    rounds, warm_up = (1, 1) if run.mode == "trial" else (COST_ROUNDS, COST_WARM_UP)
    plain, r = config.apply(first.run, {"loss.penalty": "none"}), run.model.adapter.rank
    schedule = {"type": "adalora", "init_r": r * 3 // 2, "target_r": r, "tinit": 0, "tfinal": 1}
    adapter = config.dump(plain)["model"]["adapter"] | schedule | {"delta_t": ADALORA_DELTA_T[run.scale]}
    runs = (first.run, plain, config.apply(plain, {"model.adapter": adapter}))
    built = [build(each, given, first.seed, max(rounds + warm_up, 3)) for each in runs]
    batches, began = calibration_batches(first.run, given, first.seed), time.perf_counter()
    s, _ = calibrate(first.run, built[0], batches)
    calibration_seconds = time.perf_counter() - began
    terms = (penalty_term(first.run, s, first.seed), None, None)
    steppers = [stepper(model, first.run.training, term) for model, term in zip(built, terms, strict=True)]
    rows = [
        {"pair": i, "seconds": own, "seconds_baseline": lora, "step_seconds": own, "step_seconds_baseline": adalora}
        for i, (own, lora, adalora) in enumerate(time_interleaved(steppers, itertools.cycle(batches), rounds, warm_up))
    ]
    passes = run.training.optimizer_steps(len(given.rows["train"])) * run.training.gradient_accumulation_steps
    counts = {"passes": len(batches), "training_passes": passes, "share_of_passes": len(batches) / passes}
    record.write_json(folder / "calibration.json", {**counts, "seconds": calibration_seconds})
    return rows
