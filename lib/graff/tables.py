"""The study's records as the tables that its notebooks show and its claims are judged by."""

from __future__ import annotations

import pandas as pd

from lib import record

KEYS = ["run_id", "method", "learning_rate", "seed"]


def _keyed(rows: pd.DataFrame) -> pd.DataFrame:
    """With `learning_rate`, under whichever of its names the grid set it."""
    names = ["learning_rate", "adapter_lr_init", "lr_init", "training.optimizer.lr_init"]
    found = [rows[name] for name in names if name in rows and rows[name].notna().any()]
    return rows.assign(learning_rate=found[0] if found else None)


def of_kind(loaded: record.Records, kind: str, metric: str) -> pd.DataFrame:
    """One row per member and problem: `example` (test problems' exact_match) or `area` (dev problems' area over time)."""
    columns = [*KEYS, "example", metric]
    if loaded.pairs.empty or metric not in loaded.pairs:
        return pd.DataFrame(columns=[*columns, "status"])
    rows = _keyed(loaded.pairs[loaded.pairs["kind"] == kind])
    return rows.reindex(columns=columns).assign(status="completed")


def areas(loaded: record.Records) -> pd.DataFrame:
    """Areas per problem; `auc_reactor_22` is the same with REACTOR's raised by 22 %, which makes the relative claim a
    difference."""
    rows = of_kind(loaded, "area", "auc")
    factor = rows["method"].map(lambda name: 1.22 if name == "reactor" else 1.0)
    return rows.assign(auc_reactor_22=rows["auc"].astype(float) * factor.astype(float))


def all_members(loaded: record.Records) -> pd.DataFrame:
    """Finished members and, without metrics, the missing ones: coverage names both."""
    return _keyed(pd.concat([loaded.members, pd.DataFrame(loaded.missing)], ignore_index=True))


def grid(loaded: record.Records) -> pd.DataFrame:
    """Every run at every base rate: mean over seeds."""
    names = ["exact_match", "dev_exact_match", "flexible_match", "auc", "dev_loss", "steps", "energy"]
    members = _keyed(loaded.members).reindex(columns=["run_id", "learning_rate", *names])
    members[names] = members[names].apply(pd.to_numeric, errors="coerce")
    return members.groupby(["run_id", "learning_rate"], sort=False)[names].mean().reset_index()


def steps(loaded: record.Records) -> pd.DataFrame:
    """The history's rows that are steps (learning rate, multipliers, loss), with the base rate."""
    return _keyed(loaded.history.dropna(subset=["eta"])) if "eta" in loaded.history else loaded.history


def evaluations(loaded: record.Records) -> pd.DataFrame:
    """The history's rows that are evaluations (exact match over consumed time)."""
    rows = loaded.history
    return _keyed(rows.dropna(subset=["exact_match_subset"])) if "exact_match_subset" in rows else rows
