"""The study's records as the tables that its notebooks show and its claims are judged by."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib import claims, record, stats
from lib.td_dpo.config import METRICS, SECOND_METRIC

TITLES = {
    "oracle_score": "Oracle score (1-10)",
    "mt_bench_score": "MT-Bench score",
    "mt_bench_score_corrected": "MT-Bench score without wrong references",
    "implicit_accuracy": "Implicit accuracy on test pairs",
    "raw_accuracy": "Raw accuracy on test pairs",
    "sampled_kl": "Sampled KL (nats)",
    "answer_length": "Answer length (tokens)",
}

BESIDE = ("mt_bench_score_corrected", "implicit_accuracy", "raw_accuracy")  # drawn beside the judge's own score


class Judged(NamedTuple):
    """What judged the answers: the runs' own `evaluation.judge` and nothing else.

    `metric` of a member; `label` for people; `mend` what is missing of the scores, with the command that gets it;
    `known` False where the scores of several judges would be mixed, so that none can be used.
    """

    metric: str | None
    label: str
    mend: str = ""
    known: bool = True


def judged(planned: list, loaded: record.Records) -> Judged:
    """What judged the answers of these runs (config.Run objects)."""
    kinds = sorted({run.evaluation.judge for run in planned})
    if len(kinds) > 1:
        return Judged(
            None, "", f"The runs name different judges ({', '.join(kinds)}): one evaluation.judge for all", False
        )
    if kinds == ["oracle"]:
        return Judged("oracle_score", "oracle score")
    if kinds != ["mt_bench"]:
        return Judged(None, "", "No answers are judged: evaluation.judge is none")
    study, done = planned[0].study, loaded.members
    done = [] if done.empty else [Path(folder) for folder in done.loc[done["status"] == "completed", "folder"]]
    graders = {folder: record.read_json(folder / "judged.json", {}).get("model") for folder in done}
    models = sorted({model for model in graders.values() if model})
    if len(models) > 1:
        counted = ", ".join(f"{model}: {list(graders.values()).count(model)} members" for model in models)
        return Judged(
            "mt_bench_score",
            "MT-Bench",
            f"Graded by several judges ({counted}): ./run_all.sh judge --study {study} "
            f"--model {models[0]} has all graded by one",
            False,
        )
    label = f"MT-Bench score, judge {models[0]}" if models else "MT-Bench"
    unsaved = sum(not (folder / "answers.jsonl").exists() for folder in done)
    left = sum(not model for model in graders.values()) - unsaved
    mends = [
        *(
            [f"{left} of {len(done)} members have answers that are not graded: ./run_all.sh judge --study {study}"]
            if left
            else []
        ),
        *(
            [f"{unsaved} of {len(done)} members saved no answers: train them again with evaluation.mt_bench"]
            if unsaved
            else []
        ),
    ]
    return Judged("mt_bench_score", label, "; ".join(mends))


def question_scores(loaded: record.Records, by: Judged, leave_out: Container[int] = ()) -> pd.DataFrame:
    """One row per member and question: the mean score over its turns, as `claims.evaluate` wants it. `leave_out`:
    questions."""
    if loaded.answers.empty or not by.metric or not by.known:
        return pd.DataFrame(columns=["method", "beta", "tau", "seed", "status", "question", "score"])
    keys = ["method", "beta", "tau", "seed", "question"]
    kept = loaded.answers[~loaded.answers["question"].isin(list(leave_out))]
    scores = kept.groupby(keys, dropna=False, as_index=False)["score"].agg(lambda turns: turns.mean(skipna=False))
    return scores.assign(status="completed")


def beside_corrected(found: list[claims.Verdict], corrected: list[claims.Verdict]) -> None:
    """Put what the same rules say without the questions whose reference is wrong beside each verdict; it decides
    nothing."""
    for verdict, other in zip(found, corrected, strict=True):
        fewer = verdict.n_questions - other.n_questions
        if fewer > 0 and other.estimate is not None:
            verdict.beside.append(
                {
                    "name": f"without the {fewer} questions whose reference answer is wrong",
                    "decides": False,
                    "by_the_same_rule": other.verdict,
                    "reason": other.reason,
                    "estimate": other.estimate,
                    "interval95": other.interval95,
                    "n_questions": other.n_questions,
                }
            )


def all_members(loaded: record.Records) -> pd.DataFrame:
    """Finished members and, without metrics, the missing ones: coverage names both."""
    return pd.concat(
        [loaded.members, pd.DataFrame([{**m, **m.get("cell", {})} for m in loaded.missing])], ignore_index=True
    )


def counts(loaded: record.Records, expected: list) -> str:
    by_status = all_members(loaded)["status"].value_counts() if expected else {}
    return ", ".join(f"{n} {status}" for status, n in by_status.items())


def present(loaded: record.Records, metrics: list[str]) -> list[str]:
    """Those of `metrics` that any member has a value of."""
    return [m for m in metrics if m in loaded.members and loaded.members[m].notna().any()]


def primary(loaded: record.Records, by: Judged) -> str:
    """The judge's metric, or the study's second one where no answer has been judged."""
    return (present(loaded, [by.metric] if by.metric and by.known else []) or [SECOND_METRIC])[0]


def base_score(results: Path) -> float | None:
    """The oracle score of the base model, which every member started from."""
    made = [
        record.read_json(path, {}).get("base_oracle_score") for path in sorted(Path(results).glob("*/metrics.json"))
    ]
    return next((score for score in made if score is not None), None)


def accuracies(loaded: record.Records) -> pd.DataFrame:
    """Implicit and raw accuracy of every cell beside the baselines that need no model, mean over seeds."""
    if loaded.members.empty:
        return loaded.members
    names = present(
        loaded,
        [
            "implicit_accuracy",
            "raw_accuracy",
            "validation_implicit_accuracy",
            "length_baseline",
            "bag_of_words_baseline",
        ],
    )
    table = loaded.members.groupby(["run_id", "cell"], sort=False)
    return table[names].mean().join(table["seed"].count().rename("seeds")).reset_index()


def noise(study: claims.Claims, rows: pd.DataFrame, loaded: record.Records) -> pd.DataFrame:
    """Standard deviations per arm behind each claim about a difference of scores, beside those that the power table
    assumes."""
    found = [
        {
            "claim": "assumed",
            "seed": " or ".join(f"{sd:g}" for sd in study.noise.seed_sds),
            "question": study.noise.interaction_sd,
            "answer": study.noise.answer_sd,
        }
    ]
    for claim in study.claims:
        if claim.across or claim.test == "cost_ratio":
            continue
        cells = [
            claims.choose(study, c, loaded.members)
            for side in ("treatment", "baseline")
            for c in study.levels(claim, side)
        ]
        paired = claims.pair_up(study, rows, loaded.members, cells, claim.metric)
        if isinstance(paired, claims.Paired) and len(paired.seeds) > 1:
            seen = stats.noise_sds(paired.values[0] - paired.values[1])
            found.append({"claim": claim.id, **{k: round(v / np.sqrt(2), 3) for k, v in seen.items()}})
    return pd.DataFrame(found)


def tuned(results: Path) -> pd.DataFrame:
    """Each search's best configuration with its mean over seeds; empty where no search has run."""
    found = []
    for path in sorted(Path(results).glob("*/sweep/metrics.json")):
        made = record.read_json(path, {})
        if made.get("final"):
            final = {name: made["final"].get(name) for name in METRICS if made["final"].get(name) is not None}
            found.append(
                {
                    "run": path.parent.parent.name,
                    **(made["best"] or {}),
                    "trials": made["trials"],
                    "seeds": made["final"]["seeds"],
                    **final,
                }
            )
    return pd.DataFrame(found)


def one_member(history: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """A member's columns as rows (step, seed, term, value), for a figure with one line per term."""
    kept = history.dropna(subset=list(columns), how="all")[["step", "seed", *columns]].rename(columns=columns)
    return kept.melt(["step", "seed"], var_name="term", value_name="value").dropna()
