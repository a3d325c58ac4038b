"""Energy to reach a level of exact match: of a run from its evaluations, and of all runs as rows that a claim is judged
by.

A run has one such figure, log E. The crossed bootstrap wants one value per seed and problem whose mean it is: what
leaving one problem of the dev subset out does to log E (the jackknife's influence values), so that the interval holds
the chance of the problems as well as the seeds'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.claims import Claims, choose, select
from lib.graff.curves import to_level

KEYS = ["run_id", "method", "learning_rate", "seed"]
FACTOR = 0.83  # of REACTOR's energy, as was claimed
METRIC = "energy_reactor_83"


class Level(NamedTuple):
    """The exact match that energy is counted to, or None, and why."""

    value: float | None
    why: str


def choose_level(evaluations: pd.DataFrame, stated: float | None) -> Level:
    """The stated level; where none is, half-way from the base model's exact match to what the tuned fixed rate ends at
    (mean over seeds; `evaluations` are of the runs at their chosen rates), which neither side of the claim has a say
    in. A level that the base model has already is refused: no energy is spent on reaching it."""
    first = evaluations.sort_values("used").groupby(["run_id", "cell", "seed"])["exact_match_subset"]
    base = float(first.first().max()) if len(evaluations) else math.nan
    if stated is not None:
        if base >= stated:
            return Level(None, f"the base model's exact match is {base:.3f} already, the level {stated:g}")
        return Level(stated, f"{stated:g}, as evaluation.energy_level states")
    fixed = evaluations[evaluations["method"] == "fixed"]
    if fixed.empty:
        return Level(
            None, "no level is stated (evaluation.energy_level), and no fixed rate's record is there to choose one by"
        )
    end = float(fixed.sort_values("used").groupby(["run_id", "cell", "seed"])["exact_match_subset"].last().mean())
    if end - base < 1e-9:  # means are not exact
        return Level(
            None, f"the fixed rate ends at {end:.3f}, not above the base model's {base:.3f}: no level lies between"
        )
    half = (base + end) / 2
    return Level(
        half, f"{half:.3f}, half-way from the base model's {base:.3f} to the {end:.3f} the tuned fixed rate ends at"
    )


def rows(evaluations: pd.DataFrame, level: float, reference: str = "reactor") -> pd.DataFrame:
    """One row per member and dev problem: METRIC is -log of the energy to the level, of `reference` of FACTOR times it,
    in units of `reference`'s mean whole run: larger is better, and 0 is the claimed ratio in a difference. And
    `reached`: a run that never got there counts with its whole energy, the least that it can have taken."""
    found, whole = [], evaluations.groupby(["run_id", "cell", "seed"])["joules"].transform("max").astype(float)
    its = evaluations["method"] == reference
    unit = float(whole[its].mean() if its.any() else whole.mean())
    for _, mine in evaluations.groupby(["run_id", "cell", "seed"], sort=False):
        mine = mine.sort_values("used")
        joules, hits = mine["joules"].astype(float).tolist(), np.array(mine["hits"].tolist(), dtype=float)
        without = (hits.sum(1, keepdims=True) - hits) / (hits.shape[1] - 1)
        every = to_level(joules, hits.mean(1).tolist(), level)
        log_e = math.log((joules[-1] if every is None else every) / unit)
        left = np.log([(to_level(joules, column.tolist(), level) or joules[-1]) / unit for column in without.T])
        influence = (hits.shape[1] - 1) * (left.mean() - left)
        factor = math.log(FACTOR) if mine["method"].iloc[0] == reference else 0.0
        keys = {key: mine[key].iloc[0] for key in KEYS}
        found += [
            {**keys, "example": f"dev-{i}", METRIC: -(log_e + value) - factor, "reached": every is not None}
            for i, value in enumerate(influence)
        ]
    return pd.DataFrame(found, columns=[*KEYS, "example", METRIC, "reached"])


def unread(members: pd.DataFrame) -> str:
    """Why no energy can be compared, '' where every member's was read from one source."""
    done = members[members["status"] == "completed"]
    if done.empty:
        return "no run has finished"
    sources = done["energy_source"].map(lambda s: s if isinstance(s, str) else None)
    if sources.isna().any():
        reasons = sorted({str(r) for r in done.loc[sources.isna(), "energy_reason"].dropna()}) or ["no reason recorded"]
        return f"energy could not be read ({'; '.join(reasons)})"
    if not (pd.to_numeric(done["energy"], errors="coerce") > 0).all():
        return "the energy that was read is 0 in some run: the counter did not move"
    if sources.nunique() > 1:
        return f"energy comes from different sources ({', '.join(sorted(set(sources)))})"
    return ""


def judge(
    members: pd.DataFrame, evaluations: pd.DataFrame, stated: float | None
) -> tuple[pd.DataFrame | None, dict[str, str], Level]:
    """(rows for the claims about energy or None, {METRIC: why it has no values}, the level). `evaluations` are of the
    runs that the claims compare; the level is chosen on those at their chosen rates, `at_chosen` a column of it."""
    why = unread(members)
    level = choose_level(evaluations[evaluations["at_chosen"]], stated)
    if why or level.value is None:
        return None, {METRIC: why or f"no level to count energy to: {level.why}"}, level
    return rows(evaluations, level.value), {}, level


def heed(verdicts: list, study: Claims, members: pd.DataFrame, energies: pd.DataFrame | None) -> None:
    """What never reached the level stands with the least it can have taken: a verdict that rests on that becomes
    inconclusive, and vacuous where neither side got there in any seed. Changes the verdicts on METRIC."""
    of = {claim.id: claim for claim in study.claims if claim.metric == METRIC}
    for verdict in verdicts:
        if verdict.id in of and verdict.estimate is not None and energies is not None:
            cells = [choose(study, cell, members) for cell in (of[verdict.id].treatment, of[verdict.id].baseline)]
            sides = [select(energies, cell) for cell in cells]
            _heed(verdict, tuple(study.label(cell) for cell in cells), *sides)


def _heed(verdict, names: tuple[str, str], treatment: pd.DataFrame, baseline: pd.DataFrame) -> None:
    lost = [
        sorted(int(s) for s in side.loc[~side["reached"].astype(bool), "seed"].unique())
        for side in (treatment, baseline)
    ]
    told = "; ".join(
        f"{name} did not reach the level with seed {', '.join(map(str, seeds))}"
        for name, seeds in zip(names, lost, strict=True)
        if seeds
    )
    if not told:
        return
    if not treatment["reached"].any() and not baseline["reached"].any():
        verdict.verdict = "vacuous"
    elif (verdict.verdict == "supported" and lost[0]) or (verdict.verdict == "refuted" and lost[1]):
        verdict.verdict = "inconclusive"
    verdict.reason += f" {told}: counted with all its energy, the least it can be."
