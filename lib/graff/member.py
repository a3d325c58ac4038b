"""One member of the GRAFF study: train one cell with one seed until its budget is used up, score dev inside and test
after."""

from pathlib import Path

from transformers import set_seed

from lib import models, record
from lib.graff import data, trainer


def train(member, folder: Path, shared: Path, planner: dict | None = None) -> dict:
    """Train the member in `folder` on the inputs in `shared`; returns its metrics, null where nothing was measured. A
    `planner` given (the warm start) is trained whole and updated in place."""
    run, given = member.run, data.load(shared)
    set_seed(member.seed)
    model = data.load_model(run, given, member.seed).to(models.current_device())
    scheduler = trainer.build_scheduler(run, model.config.num_hidden_layers, shared, planner)
    budgeted = trainer.BudgetTrainer(run, member.seed, Path(folder), given, model, scheduler)
    outcome = budgeted.fit()
    if planner is not None:
        planner.update(scheduler.planner.state_dict())
    if outcome.status == "diverged":
        return {"status": "diverged", "steps": outcome.step, "diverged_at": outcome.step}
    return evaluate(budgeted)


def evaluate(budgeted: trainer.BudgetTrainer) -> dict:
    """Metrics and predictions.jsonl. Test is scored here, once, after the budget: what the model writes, and the loss
    of the right answers, which tells models apart that answer next to nothing."""
    run, given, folder, model = budgeted.run, budgeted.given, budgeted.folder, budgeted.model
    history = record.read_jsonl(folder / "history.jsonl")
    rows, last = [r for r in history if "exact_match_subset" in r], [r for r in history if "eta" in r][-1]
    seconds, how = budgeted.clock.budget, (run.evaluation.max_new_tokens, budgeted.answers_at_once)
    in_budget = rows[-1]["used"] <= seconds  # else nothing counts as reached by the end of the budget
    is_asked = in_budget and run.evaluation.test
    problems = {name: given.problems[name] if is_asked else [] for name in ("test", "gsm1k")}
    scored = {name: data.score(model, given.tokenizer, each, *how)[0] for name, each in problems.items()}
    tests = [data.encode(given.tokenizer, row, run.dataset.max_tokens) for row in problems["test"]]
    losses = data.answer_losses(model, given.tokenizer, tests, 4 * run.training.micro_batch_size)[0]
    final = record.read_json(folder / "final.json") if in_budget else []
    times, predictions = [row["used"] for row in rows], []
    for i, (row, (total, tokens)) in enumerate(zip(scored["test"], losses, strict=True)):
        answer = {"text": row["text"], "reference": row["reference"], "flexible_match": float(row["flexible"])}
        head = {"kind": "example", "example": f"test-{i}", "exact_match": float(row["strict"])}
        predictions.append({**head, **answer, "test_loss": total / tokens if tokens else None})
    for i, row in enumerate(scored["gsm1k"]):
        predictions.append({"kind": "gsm1k", "example": f"gsm1k-{i}", "exact_match": float(row["strict"])})
    record.write_jsonl(folder / "predictions.jsonl", predictions)
    curve, joules = [row["exact_match_subset"] for row in rows], [row["joules"] for row in rows]
    test, gsm1k = (record.mean(row["strict"] for row in scored[name]) for name in ("test", "gsm1k"))
    return {
        "status": "completed",
        "steps": last["step"],
        "exact_match": test,
        "dev_exact_match": record.mean(row["strict"] for row in final),
        "flexible_match": record.mean(row["flexible"] for row in scored["test"]),
        "dev_flexible_match": record.mean(row["flexible"] for row in final),
        "base_exact_match": curve[0],
        "dev_loss": rows[-1]["dev_loss"],
        "test_loss": data.mean_loss(losses) if losses else None,
        "auc": trainer.area(times, curve, seconds),
        "used": rows[-1]["used"],
        "budget": seconds,
        "in_budget": in_budget,
        "capped": budgeted.capped,
        "energy": budgeted.energy.joules,
        "energy_source": budgeted.energy.source,
        "energy_reason": budgeted.energy.reason,
        "energy_to_level": trainer.energy_to_level(joules, curve, run.evaluation.energy_level),
        "gsm1k_gap": None if gsm1k is None or test is None else test - gsm1k,
        "r_t": last["r_t"],
    }
