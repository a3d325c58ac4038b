"""What decides the claims beyond exact match: areas under it, and energy to a level of it."""

import math

import numpy as np
import pandas as pd

from lib import tables
from lib.claims import Claims, Verdict, choose, select
from lib.graff.trainer import energy_to_level

KEYS = ["run_id", "method", "cell", "learning_rate", "seed"]
MEMBER = ["run_id", "cell", "seed"]
METRIC = "energy_score"


def with_rate(rows: pd.DataFrame) -> pd.DataFrame:
    """With a column `learning_rate`: the grid's training.optimizer.lr_init, None where it sets none."""
    return rows.assign(learning_rate=rows.get("lr_init"))


def scores(loaded: tables.Records) -> pd.DataFrame:
    """One row per member and test problem, `exact_match` 1 or 0."""
    rows = with_rate(loaded.pairs).reindex(columns=["kind", *KEYS, "example", "exact_match"])
    return rows[rows["kind"] == "example"].drop(columns="kind").assign(status="completed")


def areas(loaded: tables.Records) -> pd.DataFrame:
    """One row per member: its area over time, a mean over dev problems, which each seed has its own of; and `step_score`,
    -log of the seconds that a step took on average, evaluations left out: larger is faster."""
    rows = with_rate(loaded.members).reindex(columns=[*KEYS, "pilot", "status", "auc"])
    history = loaded.history.reindex(columns=[*MEMBER, "used", "eta"])
    seconds = history["used"].astype(float).groupby([history[name] for name in MEMBER]).diff()
    mean = history.assign(step_score=seconds)[history["eta"].notna()].groupby(MEMBER)["step_score"].mean()
    rows = rows[rows["status"] == "completed"].astype({"auc": float})
    return rows.merge(-np.log(mean.where(mean > 0)).reset_index().set_index(MEMBER), on=MEMBER, how="left")


# ---- energy to a level of exact match, as scores that a claim is judged by


class NoEnergy(Exception):
    """Why no energy can be compared."""


def check_energy(members: pd.DataFrame) -> None:
    """Raise NoEnergy where not every member's was read, or not from one source."""
    done = members[members["status"] == "completed"]
    if done.empty:
        raise NoEnergy("no run has finished")
    sources = done["energy_source"]
    if sources.isna().any():
        reasons = sorted(set(done.loc[sources.isna(), "energy_reason"].dropna())) or ["no reason recorded"]
        raise NoEnergy(f"energy could not be read ({'; '.join(reasons)})")
    if not (pd.to_numeric(done["energy"], errors="coerce") > 0).all():
        raise NoEnergy("the energy that was read is 0 in some run: the counter did not move")
    if sources.nunique() > 1:
        raise NoEnergy(f"energy comes from different sources ({', '.join(sorted(set(sources)))})")


def choose_level(evaluations: pd.DataFrame, stated: float | None) -> float:
    """The exact match that energy is counted to: the stated one; where none is, halfway from the base model's to what
    the tuned fixed rate ends at (mean over seeds; `evaluations` are of the runs at their chosen rates), which neither
    side of the claim has a say in. Raises NoEnergy where there is none, or the base model has it already: no energy is
    spent on reaching that."""
    curves = evaluations.sort_values("used").groupby(["method", *MEMBER])["exact_match_subset"]
    base, none = float(curves.first().max()), "no level to count energy to: "
    if stated is not None and base >= stated:
        raise NoEnergy(f"{none}the base model's exact match is {base:.3f} already, the level {stated:g}")
    if stated is not None:
        return stated
    if "fixed" not in set(evaluations["method"]):
        unstated = "no level is stated (evaluation.energy_level)"
        raise NoEnergy(f"{none}{unstated}, and no fixed rate's record to choose one by")
    end = float(curves.last()["fixed"].mean())
    if end - base < 1e-9:  # means are not exact
        ends = f"the fixed rate ends at {end:.3f}, not above the base model's {base:.3f}"
        raise NoEnergy(f"{none}{ends}: no level lies between")
    return (base + end) / 2


def energy_scores(evaluations: pd.DataFrame, level: float) -> pd.DataFrame:
    """One row per member: METRIC is -log of the energy to the level, in units of REACTOR's mean whole run: larger is
    better. And `reached`: a run that never got there counts with its whole energy, the least that it can have taken."""
    whole = evaluations.groupby(MEMBER)["joules"].transform("max").astype(float)
    theirs = evaluations["method"] == "reactor"
    unit, out = float(whole[theirs].mean() if theirs.any() else whole.mean()), []
    for _, mine in evaluations.sort_values("used", kind="stable").groupby(MEMBER, sort=False):
        joules, curve = (mine[name].astype(float).tolist() for name in ("joules", "exact_match_subset"))
        reached = energy_to_level(joules, curve, level)
        log_e = math.log((joules[-1] if reached is None else reached) / unit)
        out.append({**mine.iloc[0][KEYS], METRIC: -log_e, "reached": reached is not None})
    return pd.DataFrame(out, columns=[*KEYS, METRIC, "reached"])


def qualify(verdicts: list[Verdict], study: Claims, members: pd.DataFrame, energies: pd.DataFrame) -> None:
    """A run that never reached the level counts with the least energy it can have taken: a verdict that rests on that
    becomes inconclusive, and vacuous where neither side got there in any seed. Changes the verdicts on METRIC."""
    for claim, verdict in zip(study.claims, verdicts, strict=True):
        if claim.metric != METRIC or verdict.estimate is None:
            continue
        cells = [choose(study, cell, members) for cell in (claim.treatment, claim.baseline)]
        reached = [select(energies, cell).groupby("seed")["reached"].first() for cell in cells]
        lost = [", ".join(str(seed) for seed in seeds.index[~seeds]) for seeds in reached]
        text = "{} did not reach the level with seed {}"
        late = [text.format(study.label(cell), seeds) for cell, seeds in zip(cells, lost, strict=True) if seeds]
        if not late:
            continue
        if not any(seeds.any() for seeds in reached):
            verdict.verdict = "vacuous"
        elif (verdict.verdict == "supported" and lost[0]) or (verdict.verdict == "refuted" and lost[1]):
            verdict.verdict = "inconclusive"
            verdict.next_look = verdict.seeds_to_decide = None  # more seeds would not change it
        verdict.reason += f" {'; '.join(late)}: counted with all its energy, the least it can be."
