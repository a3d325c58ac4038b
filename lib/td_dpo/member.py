"""One member of the TD-DPO study: train one cell with one seed, then score its test pairs and its sampled answers."""

import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file
from torch import Tensor

from lib import models, record, training
from lib.td_dpo import engine, generated, mt_bench
from lib.td_dpo.losses import objective
from lib.td_dpo.trainer import PreferenceTrainer, sampling
from lib.training import Outcome

COST_ROUNDS = 24, 3  # interleaved pairs of steps in a process, after those to warm up


def load(run, folder: Path) -> SimpleNamespace:
    """What all members of a grid share, which data.prepare wrote into `folder`: besides models.load_inputs' own, `rows`
    (token ids and, where no layer of it is trained, the trunk), `pairs` (texts) and `reference` (log-probabilities), each
    by split."""
    given = models.load_inputs(Path(folder), "rows", "pairs")
    given.reference = load_file(Path(folder) / "reference.safetensors")
    trunk, last = given.report["trunk"], run.model.peft and run.model.peft.last_layers
    if trunk["depth"] and last and last <= trunk["last_layers"] and training.world() == 1:
        hidden = load_file(Path(folder) / "trunk.safetensors")
        given.rows = {s: engine.with_trunk(rows, trunk["depth"], hidden[s]) for s, rows in given.rows.items()}
    return given


def train(member, folder: Path, shared: Path, outcome: Outcome | None = None) -> dict:
    """Train the member in `folder` on the inputs in `shared`; returns its metrics, null where nothing was measured.
    `outcome`: of a training that is over (lib/run/sharding.py) and whose checkpoints are in `folder`."""
    run, given = member.run, load(member.run, shared)
    if outcome is None:
        outcome, model = fit(member, folder, given)
    else:
        model = policy(run, given.base, member.seed)
        if outcome.status == "completed":  # what diverges at once has none
            training.load_checkpoint(model, training.last_complete_checkpoint(folder / "checkpoints"))
    metrics = {
        "status": outcome.status,
        "diverged_at": outcome.step if outcome.status == "diverged" else None,
        "steps": outcome.step,
        "best_step": outcome.best_step,
        "pairs": len(given.rows["train"]),
        "length_baseline": given.report["length_baseline"],
        "bag_of_words_baseline": given.report["bag_of_words_baseline"],
        **{f"{name}_pairs": sum(c[name] for c in given.report["tokens"].values()) for name in ("dropped", "truncated")},
    }
    metrics["dropped_pairs"] += given.report.get("dropped", {}).get("count", 0)  # by the reader
    if outcome.status == "diverged":  # its weights are not a model any more: nothing to score
        return metrics
    metrics |= _validation(folder, outcome.step) | evaluate(run, model, given, member.seed, folder)
    metrics["step_seconds"] = statistics.median(row["seconds"] for row in record.read_jsonl(folder / "timing.jsonl"))
    if (best := metrics.get(score := f"{run.evaluation.judge}_score")) is not None:
        if outcome.best_step not in (None, outcome.step):
            training.load_checkpoint(model, folder / f"checkpoints/checkpoint-{outcome.best_step}")
            best = record.mean([a["score"] for a in judged_answers(run, model, given.tokenizer, member.seed)])
        metrics[f"best_{score}"] = best  # of the best checkpoint on validation, beside the last, which is judged
    return metrics


def policy(run, base: str, seed: int):
    """The model that is trained: all parameters, or the adapters that the run's `peft` section describes."""
    # FSDP shards floating types only: 4-bit weights are then stored in that of the computation.
    storage = run.model.torch_dtype if training.world() > 1 and run.model.quantization == "nf4" else None
    model = models.load_base(run, base, quant_storage=storage)
    return models.add_lora(model, run.model.peft.model_dump(), seed) if run.model.peft else model


def fit(member, folder: Path, given: SimpleNamespace, kind: Callable[[type], type] = lambda trainer: trainer) -> tuple:
    """The training itself: (outcome, trained model). `kind` turns the trainer's class into another
    (for a sharded model: lib/run/sharding.py)."""
    run, seed = member.run, member.seed
    model = policy(run, given.base, seed)
    frozen = None if run.model.peft else models.load_base(run, given.base)  # else the policy with its adapters off
    return kind(PreferenceTrainer)(run, seed, folder, given, model, frozen).fit(), model


def evaluate(run, model, given: SimpleNamespace, seed: int, folder: Path) -> dict:
    """Score the test pairs and, where a judge is at hand, the answers to the questions; writes predictions.jsonl."""
    model.eval()
    rows = given.rows["test"]
    scores = engine.pair_scores(model, rows, given.reference["test"])
    about = {"kind": "pair", "split": "test"}
    predictions = [{**about, "pair": row["pair"], **score} for row, score in zip(rows, scores, strict=True)]
    metrics = {
        "implicit_accuracy": record.mean([float((s["rho"] or 0) > 0) for s in scores]),
        "raw_accuracy": record.mean([float((s["delta"] or 0) > 0) for s in scores]),
        "margin": record.mean([s["rho"] for s in scores]),
    }
    metrics |= {name: record.mean([s[name] for s in scores]) for name in ("chosen_log_ratio", "rejected_log_ratio")}
    judge, answers = run.evaluation.judge, []
    if generated.JUDGE_OF.get(given.report["source"]) == judge:
        answers = judged_answers(run, model, given.tokenizer, seed)
        kept = ("question", "category", "turn", "score", "length", "text")
        predictions += [{"kind": "answer", **{key: answer[key] for key in kept}} for answer in answers]
        metrics[f"{judge}_score"] = record.mean([a["score"] for a in answers])
    record.write_jsonl(folder / "predictions.jsonl", predictions)
    if judge == "mt_bench" and run.evaluation.mt_bench:  # graded later: ./run_all.sh judge
        bench, file = mt_bench.read(run.evaluation.mt_bench), folder / "answers.jsonl"
        options = {"max_new_tokens": run.evaluation.max_new_tokens, "count": run.evaluation.questions}
        options["batch_size"] = sampling(run)["batch_size"]
        answers = mt_bench.answer(model, given.tokenizer, bench, file, seed=seed, **options)
    if answers:
        metrics["answer_length"] = record.mean([a["length"] for a in answers])
    return metrics


def judged_answers(run, model, tokenizer, seed: int) -> list[dict]:
    """Sampled answers to the judge's questions, each with its score (1-10)."""
    make, score = generated.JUDGES[run.evaluation.judge]
    questions = make(run.evaluation.questions)
    answers = engine.answer_questions(model, tokenizer, questions, seed=seed, **sampling(run))
    return [{**a, "score": score(a["prompt"], a["text"])} for a in answers]


def base_answers(member, given: SimpleNamespace) -> list[dict]:
    """The untrained reference's own judged answers, for the notebook: what every method started from with this seed."""
    return judged_answers(member.run, models.load_base(member.run, given.base), given.tokenizer, member.seed)


def _validation(folder: Path, step: int) -> dict:
    """Validation metrics at the last step, from the member's own history; the sampled KL is that of answers to validation
    prompts."""
    rows = [r for r in record.read_jsonl(folder / "history.jsonl") if "validation_loss" in r and r["step"] == step]
    names = ("validation_implicit_accuracy", "validation_raw_accuracy", "validation_loss", "sampled_kl")
    return {name: rows[-1][name] for name in names if name in rows[-1]} if rows else {}


def step_cost(run, folder: Path, shared: Path) -> list[dict]:
    """Step times of this run's loss and of DPO at the same beta (claim C5), interleaved. With a token budget a step is
    one pass: the first that a batch is cut into, of its shortest rows, in which a loss weighs most."""
    given, seed, own = load(run, shared), run.seed_list[0], run.loss.model_dump()
    rounds, warm_up = (1, 1) if run.mode == "trial" else COST_ROUNDS
    policies = {name: policy(run, given.base, seed) for name in ("own", "dpo")}
    for model in policies.values() if run.training.gradient_checkpointing else ():
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def stepper(model, section: dict) -> Callable[[dict], float]:
        def loss(batch: dict) -> Tensor:
            return objective(section, *engine.batch_logprobs(model, batch), batch)[0].mean()

        return training.make_stepper(model, run.training, loss)

    steppers = [stepper(policies["own"], own), stepper(policies["dpo"], own | {"name": "dpo", "tau": None})]
    collate, device = engine.layout(policies["own"]), policies["own"].device
    rows = engine.with_reference(given.rows["train"], given.reference["train"])
    budget, most = run.training.token_budget, run.training.per_device_train_batch_size
    passes = training.seeded_batches(rows, run.training.global_batch_size if budget else most, seed)
    if budget:
        passes = (engine.cut_into_passes(batch, budget, most)[0] for batch in passes)
    batches = (training.to_device({**collate(one), **engine.reference_columns(one)}, device) for one in passes)
    with engine.completion_head(policies["own"]), engine.completion_head(policies["dpo"]):  # a backward recomputes
        seconds = training.time_interleaved(steppers, batches, rounds, warm_up)
    return [{"pair": i, "seconds": mine, "seconds_baseline": dpo} for i, (mine, dpo) in enumerate(seconds)]
