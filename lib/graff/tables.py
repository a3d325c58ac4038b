"""The study's records as the tables that its notebooks show and its claims are judged by."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lib import record
from lib.graff.config import DIVERGED

KEYS = ["run_id", "method", "learning_rate", "seed"]


def _keyed(rows: pd.DataFrame) -> pd.DataFrame:
    """With `learning_rate`, under whichever of its names the grid set it."""
    names = ["learning_rate", "adapter_lr_init", "lr_init", "training.optimizer.lr_init"]
    found = [rows[name] for name in names if name in rows and rows[name].notna().any()]
    return rows.assign(learning_rate=found[0] if found else None)


def of_kind(loaded: record.Records, kind: str, metric: str) -> pd.DataFrame:
    """One row per member and problem: `example` (test problems' exact_match) or `area` (dev problems' area over
    time)."""
    columns = [*KEYS, "example", metric]
    if loaded.pairs.empty or metric not in loaded.pairs:
        return pd.DataFrame(columns=[*columns, "status"])
    rows = _keyed(loaded.pairs[loaded.pairs["kind"] == kind])
    return rows.reindex(columns=columns).assign(status="completed")


def areas(loaded: record.Records, energies: pd.DataFrame | None = None) -> pd.DataFrame:
    """Areas per problem; `auc_reactor_22` is the same with REACTOR's raised by 22 %, which makes the relative claim a
    difference. `energies` (lib/graff/energy.py) are of the same problems and stand beside them."""
    rows = of_kind(loaded, "area", "auc")
    factor = rows["method"].map(lambda name: 1.22 if name == "reactor" else 1.0)
    rows = rows.assign(auc_reactor_22=rows["auc"].astype(float) * factor.astype(float))
    return rows if energies is None else rows.merge(energies, on=[*KEYS, "example"], how="left")


def all_members(loaded: record.Records) -> pd.DataFrame:
    """Finished members and, without metrics, the missing ones: coverage names both."""
    return _keyed(pd.concat([loaded.members, pd.DataFrame(loaded.missing)], ignore_index=True))


def grid(loaded: record.Records) -> pd.DataFrame:
    """Every run at every base rate: mean over seeds, a diverged one with the study's DIVERGED values; what they have
    none of (dev_loss) is null where one diverged."""
    names = ["exact_match", "dev_exact_match", "flexible_match", "auc", "dev_loss", "test_loss", "steps", "energy"]
    members = _keyed(loaded.members).reindex(columns=["run_id", "learning_rate", "budget", "status", *names])
    members[names] = members[names].apply(pd.to_numeric, errors="coerce")
    lost = members["status"] == "diverged"
    members.loc[lost, list(names)] = [DIVERGED.get(name, np.nan) for name in names]
    members["budget"] = members["budget"].fillna(members.groupby("run_id")["budget"].transform("first"))
    groups = members.assign(diverged=lost).groupby(["budget", "run_id", "learning_rate"], sort=False, dropna=False)
    means = groups[names].agg(lambda x: x.mean())
    means.loc[groups["diverged"].any(), ["dev_loss", "test_loss"]] = np.nan
    return means.assign(seeds=groups.size(), diverged=groups["diverged"].sum()).reset_index()


def anytime(evaluations: pd.DataFrame, budgets: dict[str, float], share: float = 0.5) -> pd.DataFrame:
    """What each run had reached at `share` of its OWN budget ({run_id: seconds}): the last evaluation that had ended by
    then, mean over seeds. Not a run of that shorter budget, whose cosine and budget feature end there: hence the
    label."""
    rows = []
    for (run_id, cell), mine in evaluations.groupby(["run_id", "cell"], sort=False):
        at = share * budgets[run_id]
        each = [g[g["used"] <= at].sort_values("used").iloc[-1] for _, g in mine.groupby("seed")]
        rows.append(
            {
                "run_id": run_id,
                "cell": cell,
                "label": f"anytime: {at / 60:g} of {budgets[run_id] / 60:g} minutes",
                "exact_match_subset": float(np.mean([r["exact_match_subset"] for r in each])),
                "dev_loss": float(np.mean([r["dev_loss"] for r in each])),
                "seeds": len(each),
            }
        )
    return pd.DataFrame(rows, columns=["run_id", "cell", "label", "exact_match_subset", "dev_loss", "seeds"])


def gsm1k(loaded: record.Records, draws: int = 2000) -> pd.DataFrame:
    """EM(test) - EM(GSM1k) per run and cell, paired by model (seed): bootstrap over models and over each set's
    problems."""
    rows = []
    pairs = loaded.pairs if "kind" in loaded.pairs else pd.DataFrame(columns=["kind", "run_id", "cell"])
    for (run_id, cell), extra in pairs[pairs["kind"] == "gsm1k"].groupby(["run_id", "cell"], sort=False):
        mine = pairs[(pairs["kind"] == "example") & (pairs["run_id"] == run_id) & (pairs["cell"] == cell)]
        sets = [f.pivot(index="seed", columns="example", values="exact_match").astype(float) for f in (mine, extra)]
        seeds = sorted(set(sets[0].index) & set(sets[1].index))
        test, other = (s.loc[seeds].to_numpy() for s in sets)
        rng, found = np.random.default_rng(0), []
        for _ in range(draws):
            models = rng.integers(len(seeds), size=len(seeds))
            a, b = (x[np.ix_(models, rng.integers(x.shape[1], size=x.shape[1]))].mean() for x in (test, other))
            found.append(a - b)
        low, high = np.quantile(found, [0.025, 0.975])
        rows.append(
            {
                "run_id": run_id,
                "cell": cell,
                "gap": test.mean() - other.mean(),
                "low": low,
                "high": high,
                "models": len(seeds),
                "problems": other.shape[1],
            }
        )
    return pd.DataFrame(rows, columns=["run_id", "cell", "gap", "low", "high", "models", "problems"])


def _rows_with(rows: pd.DataFrame, column: str, columns: list[str]) -> pd.DataFrame:
    """The rows of a history that have `column`; none, with `columns`, where nothing has finished."""
    return _keyed(rows.dropna(subset=[column])) if column in rows else pd.DataFrame(columns=[*KEYS, "cell", *columns])


def steps(loaded: record.Records) -> pd.DataFrame:
    """The history's rows that are steps (learning rate, multipliers, loss), with the base rate."""
    return _rows_with(loaded.history, "eta", ["eta", "fraction", "log_m", "a", "gain", "lambda"])


def evaluations(loaded: record.Records) -> pd.DataFrame:
    """The history's rows that are evaluations (exact match over consumed time)."""
    return _rows_with(loaded.history, "exact_match_subset", ["used", "joules", "exact_match_subset", "dev_loss"])
