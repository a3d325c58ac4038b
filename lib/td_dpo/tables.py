"""The study's records as the tables that its notebooks show and its claims are judged by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from lib import comparison, power, record
from lib.claim_types import Claims
from lib.td_dpo.config import METRICS, PRIMARY_METRIC, SECOND_METRIC

TITLES = {
    "oracle_score": "Oracle score (1-10)",
    "mt_bench_score": "MT-Bench score",
    "implicit_accuracy": "Implicit accuracy on test pairs",
    "raw_accuracy": "Raw accuracy on test pairs",
    "sampled_kl": "Sampled KL (nats)",
    "answer_length": "Answer length (tokens)",
}


def question_scores(loaded: record.Records) -> pd.DataFrame:
    """One row per member and question: the mean score over its turns, as `claims.evaluate` wants it."""
    if loaded.answers.empty:
        return pd.DataFrame(columns=["method", "beta", "tau", "seed", "status", "question", "score"])
    keys = ["method", "beta", "tau", "seed", "question"]
    scores = loaded.answers.groupby(keys, dropna=False, as_index=False)["score"].agg(lambda turns: turns.mean(skipna=False))
    return scores.assign(status="completed")


def all_members(loaded: record.Records) -> pd.DataFrame:
    """Finished members and, without metrics, the missing ones: coverage names both."""
    return pd.concat([loaded.members, pd.DataFrame([{**m, **m.get("cell", {})} for m in loaded.missing])], ignore_index=True)


def counts(loaded: record.Records, expected: list) -> str:
    by_status = all_members(loaded)["status"].value_counts() if expected else {}
    return ", ".join(f"{n} {status}" for status, n in by_status.items())


def present(loaded: record.Records, metrics: list[str]) -> list[str]:
    """Those of `metrics` that any member has a value of."""
    return [m for m in metrics if m in loaded.members and loaded.members[m].notna().any()]


def primary(loaded: record.Records, scale: str) -> str:
    """The study's primary metric, or the second where no answer has been judged."""
    return (present(loaded, [PRIMARY_METRIC[scale]]) or [SECOND_METRIC])[0]


def base_score(results: Path) -> float | None:
    """The oracle score of the base model, which every member started from."""
    made = [record.read_json(path, {}).get("base_oracle_score") for path in sorted(Path(results).glob("*/metrics.json"))]
    return next((score for score in made if score is not None), None)


def accuracies(loaded: record.Records) -> pd.DataFrame:
    """Implicit and raw accuracy of every cell beside the baselines that need no model, mean over seeds."""
    names = present(
        loaded,
        ["implicit_accuracy", "raw_accuracy", "validation_implicit_accuracy", "length_baseline", "bag_of_words_baseline"],
    )
    table = loaded.members.groupby(["run_id", "cell"], sort=False)
    return table[names].mean().join(table["seed"].count().rename("seeds")).reset_index()


def noise(study: Claims, rows: pd.DataFrame, loaded: record.Records) -> pd.DataFrame:
    """Standard deviations per arm behind each claim about a difference of scores, beside those that the power table assumes."""
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
            comparison.choose(study, c, loaded.members) for side in ("treatment", "baseline") for c in study.levels(claim, side)
        ]
        paired = comparison.pair_up(study, rows, loaded.members, cells, claim.metric)
        if isinstance(paired, comparison.Paired) and len(paired.seeds) > 1:
            seen = power.noise_seen(paired.values[0] - paired.values[1])
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
