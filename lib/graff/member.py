"""One member of the GRAFF study: train one cell with one seed until its budget is used up, score dev inside and test
after."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainingArguments, set_seed

from lib import config, models, record, training as checkpoints
from lib.errors import MissingError, StudyError
from lib.graff import base_model, clock, curves, generate, inputs, methods, planner as planner_maths, trainer
from lib.graff.block_adam import BlockAdam
from lib.graff.config import MADE_BY, accumulation
from lib.graff.probes import Probes

ENCODER_LR = 3e-4  # of the warm start


def build_optimizer(run, probes: Probes):
    """One Adam for all schedulers; those from packages bring their own."""
    made, lr = run.training.optimizer, run.training.optimizer.lr_init
    if run.training.scheduler.type == "schedulefree":
        from schedulefree import AdamWScheduleFree

        warm = max(1, round(methods.WARM_UP * (config.steps(run) or 1)))
        return AdamWScheduleFree(
            probes.parameters, lr=lr, betas=tuple(made.betas), weight_decay=made.weight_decay, warmup_steps=warm
        )
    if run.training.scheduler.type == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(probes.parameters, lr=1.0, betas=tuple(made.betas), weight_decay=made.weight_decay)
    return BlockAdam(
        probes.parameters,
        lr,
        tuple(made.betas),
        made.weight_decay,
        probes.blocks,
        2 * probes.layers,
        run.training.clip_grad_norm,
    )


def warm_start(path: str) -> dict:
    """The planner's tensors. Raises MissingError with the command that makes the file."""
    file = Path(path)
    if not file.exists():
        raise MissingError(
            f"training.scheduler.warm_start_ckpt = {path}",
            "no such file",
            "a planner's warm start",
            MADE_BY["training.scheduler.warm_start_ckpt"].replace("FILE.safetensors", path),
        )
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def build_method(run, layers: int, shared: Path, planner: dict | None = None):
    """The scheduler's object; `planner`: tensors that the warm start goes on from, learning the encoder too."""
    scheduler = run.training.scheduler
    if planner is not None:
        method = methods.Graff(scheduler, layers, encoder_lr=ENCODER_LR)
        if planner:
            method.planner.load_state_dict(planner)
        return method
    method, path = methods.make(scheduler, layers), scheduler.warm_start_ckpt
    made = Path(shared) / "warm_start.safetensors"
    if path:
        method.planner.load_state_dict(warm_start(str(made) if path == "made" else path))
    if isinstance(method, methods.Hypergradient) and made.exists():
        like = planner_maths.Planner()
        like.load_state_dict(load_file(made))
        method.gain = planner_maths.gain(like, layers)
    return method


def train(member, folder: Path, shared: Path, planner: dict | None = None) -> dict:
    """Train the member in `folder` on the inputs in `shared`; returns its metrics, null where nothing was measured. A
    `planner` given (the warm start) is trained whole and updated in place."""
    run, given = member.run, inputs.load(shared)
    set_seed(member.seed)
    model = inputs.load_model(run, given, member.seed).to(models.device())
    evaluation, size = run.evaluation, run.training.micro_batch_size
    dev, subset = given.problems["dev"], given.problems["dev"][: evaluation.dev_subset]
    probes = Probes(model, given.frequent, len(subset) / len(dev))
    method, optimizer = build_method(run, probes.layers, shared, planner), build_optimizer(run, probes)
    budget = clock.Clock(run.training.clock, 60 * run.training.budget_minutes)
    history, _ = record.recorder(folder)

    def evaluate_now(now, whole: bool):
        mode = getattr(optimizer, "eval", None)  # schedule-free keeps two sets of weights
        if mode:
            mode()
        batch = evaluation.batch_size or 4 * size
        rows, units = generate.scored(now, given.tokenizer, dev if whole else subset, evaluation.max_new_tokens, batch)
        losses, more = token_losses(now, given.tokenizer, given.rows["dev"][: len(subset)], batch)
        loss = sum(total for total, _ in losses) / max(1, sum(tokens for _, tokens in losses))
        if mode:
            optimizer.train()
        if whole:
            record.write_json(folder / "final.json", rows)
        hits = [r["strict"] for r in rows]
        return (
            {
                "exact_match_subset": sum(hits[: len(subset)]) / len(subset),
                "dev_loss": loss,
                "hits": [int(h) for h in hits[: len(subset)]],
            },
            units + more,
            len(dev) / len(rows),
        )

    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=run.training.total_steps or trainer.NO_CAP,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation(run),
        max_grad_norm=0.0,
        bf16=run.training.mixed_precision == "bf16" and torch.cuda.is_available(),
        seed=member.seed,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    identity = [config.dump(run)[part] for part in ("model", "dataset", "training", "evaluation")]
    mark = hashlib.sha256(json.dumps([identity, member.seed], sort_keys=True, default=str).encode()).hexdigest()
    checkpoint = checkpoints.usable_checkpoint(folder / "checkpoints", mark)
    marker = checkpoints.read_marker(checkpoint) if checkpoint else {"step": -1, "done": False}
    checkpoints.truncate_history(folder / "history.jsonl", marker["step"])
    its = trainer.BudgetTrainer(
        model,
        given.rows["train"],
        args,
        run=run,
        probes=probes,
        method=method,
        clock=budget,
        pad=given.tokenizer.pad_token_id,
        optimizer=optimizer,
        fingerprint=mark,
        on_record=history,
        evaluate_now=evaluate_now,
        energy=clock.Energy(),
    )
    if not marker["done"]:
        if hasattr(optimizer, "train"):
            optimizer.train()
        if checkpoint is None:
            begin(its, evaluate_now, history, model, len(dev) / len(subset))
        budget.start()
        its.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    else:
        its._load_from_checkpoint(str(checkpoint), model)
    if planner is not None:
        planner.update(method.planner.state_dict())
    if its.diverged_at is not None:
        record.write_jsonl(folder / "predictions.jsonl", [])
        return {"status": "diverged", "steps": its.diverged_at, "diverged_at": its.diverged_at}
    if hasattr(optimizer, "eval") and optimizer.param_groups[0].get("train_mode"):
        optimizer.eval()
    return measured(run, folder, given, model, its, len(subset))


def begin(its, evaluate_now, history, model, dev_per_subset: float) -> None:
    """The base model's exact match at t = 0, uncharged; it tells what the last evaluation may cost at most."""
    import time

    started = time.monotonic()
    row, units, _ = evaluate_now(model, False)
    seconds = units * clock.UNIT_SECONDS if its.clock.kind == "virtual" else time.monotonic() - started
    its.eval_seconds = seconds * dev_per_subset
    history({"step": 0, "used": 0.0, "joules": 0.0, "final": False, **row})


@torch.no_grad()
def token_losses(model, tokenizer, rows: list[dict], batch: int) -> tuple[list[tuple[float, int]], float]:
    """([(summed loss in nats, label tokens)] of each of `rows`, units). Logits only where some row has its answer."""
    model.eval()
    device, found, units = next(model.parameters()).device, [], 0
    for start in range(0, len(rows), batch):
        made = base_model.collate(rows[start : start + batch], tokenizer.pad_token_id)
        made = {k: v.to(device) for k, v in made.items()}
        labels = made["labels"][:, 1:]
        first = int((labels != -100).any(0).int().argmax())
        logits = model(
            input_ids=made["input_ids"],
            attention_mask=made["attention_mask"],
            logits_to_keep=labels.shape[1] + 1 - first,
        ).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.mT.float(), labels[:, first:], reduction="none")
        counts = (labels != -100).sum(1)
        found += list(zip(losses.sum(1).tolist(), counts.tolist(), strict=True))
        units += made["input_ids"].numel()
    return found, units


def measured(run, folder: Path, given: inputs.Inputs, model, its, subset: int) -> dict:
    """Metrics and predictions.jsonl; test is scored here, once, after the budget: what the model writes, and the loss
    of the right answers, which tells models apart that answer next to nothing."""
    rows = [r for r in record.read_jsonl(folder / "history.jsonl") if "exact_match_subset" in r]
    steps = [r for r in record.read_jsonl(folder / "history.jsonl") if "eta" in r]
    final, budget = record.read_json(folder / "final.json"), its.clock.budget
    if not final or not rows[-1]["final"]:
        raise StudyError(str(folder), "no evaluation at the end of the budget", "one", "run it again")
    batch = run.evaluation.batch_size or 4 * run.training.micro_batch_size
    found = {
        name: generate.scored(model, given.tokenizer, given.problems[name], run.evaluation.max_new_tokens, batch)[0]
        for name in ("test", "gsm1k")
    }
    tests = [base_model.encode(given.tokenizer, r, run.dataset.max_tokens) for r in given.problems["test"]]
    losses = token_losses(model, given.tokenizer, tests, 4 * run.training.micro_batch_size)[0]
    if rows[-1]["used"] > budget:  # the last evaluation ended after the budget: nothing counts as reached by then
        found, final, losses = dict.fromkeys(found, []), [], []
    times = [r["used"] for r in rows]
    areas = [curves.auc(times, [float(r["hits"][i]) for r in rows], budget) for i in range(subset)]
    record.write_jsonl(
        folder / "predictions.jsonl",
        [
            *(
                {
                    "kind": "example",
                    "example": f"test-{i}",
                    "exact_match": float(r["strict"]),
                    "text": r["text"],
                    "reference": r["reference"],
                    "flexible_match": float(r["flexible"]),
                    "test_loss": total / tokens if tokens else None,
                }
                for i, (r, (total, tokens)) in enumerate(zip(found["test"], losses, strict=True))
            ),
            *(
                {"kind": "gsm1k", "example": f"gsm1k-{i}", "exact_match": float(r["strict"])}
                for i, r in enumerate(found["gsm1k"])
            ),
            *({"kind": "area", "example": f"dev-{i}", "auc": area} for i, area in enumerate(areas)),
        ],
    )

    def share(mine: list[dict], kind: str) -> float | None:
        return sum(r[kind] for r in mine) / len(mine) if mine else None

    extra = share(found["gsm1k"], "strict")
    test = share(found["test"], "strict")
    return {
        "status": "completed",
        "steps": steps[-1]["step"],
        "exact_match": test,
        "dev_exact_match": share(final, "strict"),
        "flexible_match": share(found["test"], "flexible"),
        "dev_flexible_match": share(final, "flexible"),
        "base_exact_match": rows[0]["exact_match_subset"],
        "dev_loss": rows[-1]["dev_loss"],
        "test_loss": sum(t for t, _ in losses) / max(1, sum(n for _, n in losses)) if losses else None,
        "auc": curves.auc(times, [r["exact_match_subset"] for r in rows], budget),
        "used": rows[-1]["used"],
        "budget": budget,
        "in_budget": rows[-1]["used"] <= budget,
        "energy": its.energy.joules,
        "energy_source": its.energy.source,
        "energy_reason": its.energy.reason,
        "energy_to_level": curves.to_level(
            [r["joules"] for r in rows], [r["exact_match_subset"] for r in rows], run.evaluation.energy_level
        ),
        "gsm1k_gap": None if extra is None or test is None else test - extra,
        "regret": steps[-1]["regret"],
    }
