"""What decides TD-DPO's claims: which score, of which rows. The analysis notebook makes the tables and figures."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib import claims, record, tables
from lib.td_dpo.study import GRADED_BY, SECOND_METRIC

ABLATIONS = ("td_dpo_anchored", "discopop_card")  # trained where one claim looks, not over beta


class Judged(NamedTuple):
    """What judged the answers: the runs' own `evaluation.judge` and nothing else; where that is none, as on pairs of the
    user's own, how test pairs are ranked is the score.

    `metric` of a member, None where the scores of several judges would be mixed; `label` for people; `fix` what is
    missing of the scores, with the command that gets it.
    """

    metric: str | None
    label: str
    fix: str = ""


def judged(planned: list, loaded: tables.Records) -> Judged:
    """What judged the answers of these runs (config.Run objects)."""
    kinds = sorted({run.evaluation.judge for run in planned})
    if len(kinds) > 1:
        fix = f"The runs name different judges ({', '.join(kinds)}): one evaluation.judge for all"
        return Judged(None, "", fix)
    if kinds in (["oracle"], ["verifier"]):
        return Judged(f"{kinds[0]}_score", f"{kinds[0]} score")
    if kinds != ["mt_bench"]:
        return Judged(SECOND_METRIC, "implicit accuracy on test pairs, from 1 (none ranked as labeled) to 10 (all)")
    completed = [] if loaded.members.empty else loaded.members.query("status == 'completed'")["folder"]
    models = Counter(record.read_json(Path(folder) / "judged.json", {}).get("model") for folder in completed)
    ungraded, command = models.pop(None, 0), GRADED_BY["mt_bench_score"]
    if len(models) > 1:
        counted = ", ".join(f"{model}: {count} members" for model, count in sorted(models.items()))
        fix = f"Graded by several judges ({counted}): {command} --model {min(models)} has all graded by one"
        return Judged(None, "MT-Bench", fix)
    unsaved = sum(not (Path(folder) / "answers.jsonl").exists() for folder in completed)
    missing = {
        f"have answers that are not graded: {command}": ungraded - unsaved,
        "saved no answers: train them again with evaluation.mt_bench": unsaved,
    }
    fix = "; ".join(f"{count} of {len(completed)} members {what}" for what, count in missing.items() if count)
    return Judged("mt_bench_score", f"MT-Bench score, judge {min(models)}" if models else "MT-Bench", fix)


def primary(loaded: tables.Records, by: Judged) -> str:
    """The judge's metric, or the study's second one where no answer has been judged."""
    scored = by.metric in loaded.members and loaded.members[by.metric].notna().any()
    return str(by.metric) if scored else SECOND_METRIC


def as_score(accuracy):
    """An accuracy on the scale of a judge, from 1 to 10, so that the claims' thresholds hold for it."""
    return 1 + 9 * accuracy


def judged_on(published: claims.Claims, by: Judged) -> claims.Claims:
    """The claims as they are judged on: by accuracy, where that is the score, a diverged run guesses, and runs of which
    none is shown to rank better than by guessing are at chance."""
    if by.metric != SECOND_METRIC:
        return published
    guess = as_score(published.diverged["accuracy"])
    chance = claims.Chance(metric="score", what="guessing", no_better_than=(guess,))
    return published.model_copy(update={"diverged": {**published.diverged, "score": guess}, "chance": chance})


def question_scores(loaded: tables.Records, by: Judged, leave_out: Iterable[int] = ()) -> pd.DataFrame:
    """One row per member and question, without those in `leave_out`: the mean score over its turns, as
    `claims.evaluate` wants it. Where accuracy is the score a test pair is a question, and has 1 or 10."""
    keys, answers = ["method", "beta", "tau", "seed", "question"], loaded.answers
    if by.metric == SECOND_METRIC and len(loaded.pairs):
        answers = loaded.pairs.rename(columns={"pair": "question"}).assign(score=as_score(loaded.pairs["rho"] > 0))
    if answers.empty or not by.metric:
        return pd.DataFrame(columns=[*keys, "score", "status"])
    kept = answers[~answers["question"].isin(list(leave_out))]
    scores = kept.groupby(keys, dropna=False, as_index=False)["score"].agg(lambda turns: turns.mean(skipna=False))
    return scores.assign(status="completed")


def add_corrected(verdicts: list[claims.Verdict], corrected: list[claims.Verdict]) -> None:
    """Note with each verdict what the same rules say without the questions whose reference is wrong; it decides
    nothing."""
    for verdict, other in zip(verdicts, corrected, strict=True):
        fewer = verdict.n_questions - other.n_questions
        if fewer > 0 and other.estimate is not None:
            name = f"without the {fewer} questions whose reference answer is wrong"
            same = {key: getattr(other, key) for key in ("reason", "estimate", "interval95", "n_questions")}
            verdict.beside.append({"name": name, "decides": False, "by_the_same_rule": other.verdict, **same})


def claim_arms(table: pd.DataFrame, fixed_tau: Mapping[float, float]) -> pd.DataFrame:
    """The rows of the methods that are compared over beta, added ones included: one cell per method and beta, with the
    tau fixed in advance for each beta (params/td_dpo/claims.yaml) where the method has one. Runs of one method (of
    several models, say) stand under their own names."""
    if table.empty:
        return table
    if "run_id" in table:
        several = table.groupby("method")["run_id"].transform("nunique") > 1
        table = table.assign(method=table["method"].where(~several, table["run_id"]))
    fixed = table["beta"].map({float(beta): tau for beta, tau in fixed_tau.items()})
    tau = table["tau"].astype(float)
    return table[~table["method"].isin(ABLATIONS) & (tau.isna() | np.isclose(tau, fixed.astype(float)))]


def loss_curve(name: str, margin: np.ndarray, *, beta: float, tau: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(loss, slope) of a loss of lib.td_dpo.losses over margins (n,) in nats (rho; Delta for td_dpo), without the
    anchor, which is not a function of the margin. A positive slope pushes the margin down."""
    import torch

    from lib.td_dpo.losses import preference_loss

    x = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(x)
    loss = preference_loss(name, x / 2, -x / 2, zero, zero, beta=beta, tau=tau)[1]
    (slope,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach().numpy(), slope.numpy()
