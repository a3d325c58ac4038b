"""One member of the IW-LoRA study: calibrate where the method asks for it, train one cell with one seed, score
validation."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path

import torch
from transformers import set_seed

from lib import config, models, record
from lib.iw_lora import adapters, inputs, sensitivity, trainer
from lib.iw_lora.config import NOT_NUMBERS, warmup
from lib.iw_lora.penalty import delta_norms
from lib.training import SeededOrder

COST_PAIRS = 60  # interleaved rounds of steps
COST_WARM_UP = 3
ADALORA_DELTA_T = {"laptop": 5, "paper": 100}  # steps between two allocations, as in the AdaLoRA YAMLs


def build(run, given: inputs.Inputs, seed: int, steps: int) -> torch.nn.Module:
    """Base model, new head and adapters; the same seed gives methods the same head and the same A."""
    set_seed(seed)
    return adapters.wrap(inputs.load_base(run, given).to(models.device()), run.model.adapter, steps)


def calibration_batches(run, given: inputs.Inputs, seed: int, device) -> list[dict]:
    """The first batches of the seed's order: 2 at most in a trial."""
    count = run.loss.sensitivity_warmup_steps if run.mode == "full" else min(2, run.loss.sensitivity_warmup_steps)
    rows, size = given.rows["train"], run.training.batch_size
    order = SeededOrder(len(rows), seed)
    indices: list[int] = []
    while len(indices) < count * size:
        indices += list(order)
        order.set_epoch(order.epoch + 1)
    pad = given.tokenizer.pad_token_id
    return [
        {
            k: v.to(device)
            for k, v in trainer.collate([rows[i] for i in indices[b * size : (b + 1) * size]], pad).items()
        }
        for b in range(count)
    ]


def calibrated(run, model, given: inputs.Inputs, seed: int) -> tuple[torch.Tensor, int]:
    """(s (K,), skipped batches): the sensitivities before any training."""
    batches = calibration_batches(run, given, seed, next(model.parameters()).device)
    with warmed_head(run, model, batches):
        norms, skipped = sensitivity.gradient_norms(model, batches, trainer.task_loss)
    return sensitivity.sensitivities(norms, run.loss.sensitivity_buffer_size), skipped


@contextlib.contextmanager
def warmed_head(run, model, batches: list[dict]):
    """The ablation head_warmup_steps: pooler and classifier trained alone for so many steps, and put back afterwards,
    so that nothing but s is different."""
    head = [p for n, p in model.named_parameters() if p.requires_grad and ("pooler" in n or "classifier" in n)]
    before = [p.detach().clone() for p in head]
    optimizer = torch.optim.AdamW(head, lr=run.training.learning_rate, weight_decay=0.0)
    for step in record.batches("head warm-up", range(run.loss.head_warmup_steps)):
        gradients = torch.autograd.grad(trainer.task_loss(model, batches[step % len(batches)]), head)
        for parameter, gradient in zip(head, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(head, before, strict=True):
                parameter.copy_(old)


def identity(run) -> list:
    """What a checkpoint must have been made under for this run to go on from it."""
    made = config.dump(run)
    training = {key: value for key, value in made["training"].items() if f"training.{key}" not in NOT_NUMBERS}
    return [made["model"], made["loss"], training]


def penalty_term(run, s: torch.Tensor, seed: int) -> trainer.Term:
    loss = run.loss
    return trainer.Term(
        loss.alpha, sensitivity.coefficients(loss.penalty, s, loss.beta, seed), loss.penalty == "factor_l2"
    )


@torch.no_grad()
def predictions(model, rows: list[dict], pad: int, batch_size: int) -> tuple[list[int], float]:
    """(predicted labels, mean cross-entropy in nats) from logits, in evaluation mode."""
    model.eval()
    device, found, total = next(model.parameters()).device, [], 0.0
    for start in record.batches("evaluation", range(0, len(rows), batch_size)):
        batch = {k: v.to(device) for k, v in trainer.collate(rows[start : start + batch_size], pad).items()}
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
        total += float(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        found += logits.argmax(-1).tolist()
    return found, total / max(1, len(rows))


def scores(labels: list[int], predicted: list[int], task: str) -> dict:
    """accuracy; F1 on entailment (label 0) for the two-way entailment tasks, null elsewhere; macro F1."""
    from sklearn.metrics import f1_score

    known = sorted({*labels, *predicted})
    return {
        "accuracy": sum(a == b for a, b in zip(labels, predicted, strict=True)) / len(labels),
        "f1": float(f1_score(labels, predicted, pos_label=0, average="binary", zero_division=0.0))
        if task in ("rte", "generated") and set(known) <= {0, 1}
        else None,
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
    }


def train(member, folder: Path, shared: Path) -> dict:
    """Train the member in `folder` on the inputs in `shared`; returns its metrics, null where nothing was measured."""
    run, given = member.run, inputs.load(shared)
    trial = run.mode == "trial"
    steps = trainer.total_steps(len(given.rows["train"]), run.training, trial)
    model = build(run, given, member.seed, steps)
    if run.model.adapter.init == "eva":
        adapters.initialise_eva(model, calibration_batches(run, given, member.seed, models.device()))
    history, timing = record.recorder(folder)
    pad, size = given.tokenizer.pad_token_id, run.evaluation.batch_size
    names = [name.removeprefix("base_model.model.") for name in sensitivity.adapted(model)]
    s, skipped, term, started = None, 0, None, time.perf_counter()
    if run.loss.penalty != "none":
        s, skipped = calibrated(run, model, given, member.seed)
        term = penalty_term(run, s, member.seed)
    calibration = time.perf_counter() - started

    def at_evaluation(now) -> dict:
        tuning = given.rows["tuning"][: 2 * size] if trial else given.rows["tuning"]
        found, loss = predictions(now, tuning, pad, size)
        return {
            "tuning_accuracy": scores([r["label"] for r in tuning], found, given.report["task"])["accuracy"],
            "tuning_loss": loss,
        }

    per_epoch = -(-len(given.rows["train"]) // (run.training.batch_size * run.training.gradient_accumulation_steps))
    every = {"epoch": per_epoch, "steps": run.training.eval_steps, "no": None}[run.training.evaluation_strategy]
    outcome = trainer.train_rows(
        model,
        given.rows["train"],
        run.training,
        steps=steps,
        warmup=warmup(run, steps),
        every=every,
        pad=pad,
        term=term,
        seed=member.seed,
        folder=folder,
        identity=identity(run),
        on_record=history,
        on_timing=timing,
        on_evaluate=at_evaluation,
    )
    metrics = {
        "status": outcome.status,
        "steps": outcome.step,
        "calibration_seconds": calibration if term else None,
        "diverged_at": outcome.step if outcome.status == "diverged" else None,
        "skipped_batches": skipped,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bag_of_words_baseline": given.report["bag_of_words_baseline"],
        "majority_baseline": given.report["majority_baseline"],
    }
    if outcome.status == "diverged":
        record.write_jsonl(folder / "predictions.jsonl", [])
        return metrics
    rows = given.rows["validation"]
    found, loss = predictions(model, rows, pad, size)
    labels = [row["label"] for row in rows]
    record.write_jsonl(
        folder / "predictions.jsonl",
        [
            {"kind": "example", "example": i, "label": label, "prediction": guess, "correct": label == guess}
            for i, (label, guess) in enumerate(zip(labels, found, strict=True))
        ],
    )
    _record_adapters(run, folder, model, names, s, term)
    seconds = [row["seconds"] for row in record.read_jsonl(folder / "timing.jsonl")]
    return {
        **metrics,
        **at_evaluation(model),
        "validation_loss": loss,
        **{f"validation_{k}": v for k, v in scores(labels, found, given.report["task"]).items()},
        "step_seconds": statistics.median(seconds) if seconds else None,
    }


def _record_adapters(run, folder: Path, model, names: list[str], s, term) -> None:
    """adapters.json: s_k, w_k, coefficients, || Delta_k || at the end, AdaLoRA's ranks, and a rank_pattern for PEFT."""
    if not names:
        return
    made = {"matrices": names, "delta_norm": delta_norms(model), "ranks": adapters.ranks_used(model)}
    if s is not None:
        made |= {
            "s": s.tolist(),
            "w": (s / s.sum()).tolist(),
            "coefficient": term.coefficients.tolist(),
            "rank_pattern": sensitivity.rank_pattern(names, s, run.model.adapter.rank),
        }
    record.write_json(folder / "adapters.json", made)


def step_cost(run, folder: Path, shared: Path) -> None:
    """Step times of IW-LoRA, LoRA and AdaLoRA, in turns on the same batches in one process; writes step_cost.jsonl and
    calibration.json. A step is what repeats: calibration is done once and counted apart, in passes and in seconds."""
    given, first = inputs.load(shared), config.members(run)[0]
    rounds, warm_up = (1, 1) if run.mode == "trial" else (COST_PAIRS, COST_WARM_UP)
    steps = trainer.total_steps(len(given.rows["train"]), run.training)
    total = rounds + warm_up
    plain = config.apply(first.run, {"loss.penalty": "none"})
    schedule = {
        "type": "adalora",
        "init_r": run.model.adapter.rank * 3 // 2,
        "target_r": run.model.adapter.rank,
        "tinit": 0,
        "tfinal": 1,
        "delta_t": ADALORA_DELTA_T[run.scale],
    }
    ada = config.apply(plain, {"model.adapter": {**config.dump(plain)["model"]["adapter"], **schedule}})
    made = [build(each, given, first.seed, max(total, 3)) for each in (first.run, plain, ada)]
    batches = calibration_batches(first.run, given, first.seed, next(made[0].parameters()).device)
    began = time.perf_counter()
    s, _ = calibrated(first.run, made[0], given, first.seed)
    seconds_of_calibration = time.perf_counter() - began
    steppers = [
        trainer.stepper(model, first.run.training, penalty_term(first.run, s, first.seed) if i == 0 else None)
        for i, model in enumerate(made)
    ]
    rows = []
    for place in record.batches("measuring steps", range(total)):
        seconds = [0.0] * 3
        for which in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1))[place % 4]:
            seconds[which] = steppers[which](batches[place % len(batches)])
        if place >= warm_up:
            rows.append(
                {
                    "pair": place - warm_up,
                    "seconds": seconds[0],
                    "seconds_baseline": seconds[1],
                    "step_seconds": seconds[0],
                    "step_seconds_baseline": seconds[2],
                }
            )
    record.write_jsonl(folder / "step_cost.jsonl", rows)
    micro = steps * run.training.gradient_accumulation_steps
    record.write_json(
        folder / "calibration.json",
        {
            "passes": len(batches),
            "training_passes": micro,
            "share_of_passes": len(batches) / micro,
            "seconds": seconds_of_calibration,
        },
    )
