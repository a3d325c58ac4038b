"""From rows of scores to arrays of cells x seeds x questions, paired, with every gap named.

A diverged run is a result: it gets the study's worst score on every question. A run that is missing, failed or not yet
graded is a gap: nothing is guessed for it, and what needs it is not evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.verdict.claim_types import BEST, Cell, Claims

UNITS = ("question", "problem", "example", "pair")  # the column that tells what one score is about
FINISHED = ("completed", "diverged")


class Paired(NamedTuple):
    """`values` (cells, S, Q) for the same seeds and questions in every cell; `diverged` lists each cell's diverged
    seeds;
    `dropped` counts questions left out because a score is missing in some run."""

    values: np.ndarray
    seeds: list[int]
    diverged: list[list[int]]
    dropped: int


def select(frame: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """The rows of `frame` that a cell's equalities hold for; none where a column does not exist."""
    keep = np.ones(len(frame), dtype=bool)
    for key, value in cell.items():
        if key not in frame:
            return frame.iloc[:0]
        column = frame[key]
        if isinstance(value, str):
            keep &= (column == value).to_numpy()
        else:
            keep &= np.isclose(pd.to_numeric(column, errors="coerce"), float(value), rtol=1e-9)
    return frame[keep]


def members_of(rows: pd.DataFrame, keys: Iterable[str]) -> pd.DataFrame:
    """One row per run (method, keys, seed, status), read off its scores."""
    columns = [c for c in ("method", *keys, "seed", "status") if c in rows]
    found = rows[columns].drop_duplicates()
    return found if "status" in found else found.assign(status="completed")


def choose(study: Claims, cell: Cell, members: pd.DataFrame) -> Cell | None:
    """`cell` with each `best` replaced by the value whose runs have the best mean of the validation metric `choose_on`;
    None where a run lacks it: which would have been best is then not known. A diverged run counts as guessing."""
    open_keys = [key for key, value in cell.items() if value == BEST]
    if not open_keys:
        return study.filled(cell)
    rest = {key: value for key, value in cell.items() if key not in open_keys}
    found = select(members, rest)
    if study.choose_on not in found or not set(open_keys) <= set(found):
        return None
    metric = pd.to_numeric(found[study.choose_on], errors="coerce")
    metric = metric.mask(found["status"] == "diverged", study.diverged.get("accuracy", 0.5))
    if found.empty or metric[found[open_keys].notna().all(axis=1)].isna().any():
        return None
    means = metric.groupby([found[key] for key in open_keys]).mean()
    if means.empty:
        return None
    best = means.idxmax()
    return study.filled({**rest, **dict(zip(open_keys, best if isinstance(best, tuple) else (best,), strict=True))})


def _scores(rows: pd.DataFrame, cell: Cell, metric: str) -> pd.DataFrame:
    """Seeds x questions; a question's mean over its rows (turns), missing where one of them is."""
    found = select(rows, cell)
    unit = next((name for name in UNITS if name in found), None)
    if unit is None or metric not in found:
        return pd.DataFrame()
    values = pd.to_numeric(found[metric], errors="coerce").groupby([found["seed"], found[unit]])
    table = values.mean().where(values.count() == values.size()).unstack()
    return table.dropna(axis=0, how="all")


def pair_up(
    study: Claims,
    rows: pd.DataFrame,
    members: pd.DataFrame,
    cells: list[Cell],
    metric: str,
    *,
    seeds: Iterable[int] = (),
    all_seeds: bool = True,
) -> Paired | list[str]:
    """The scores of `cells` as one array, or the list of what is missing.

    `all_seeds`: every seed that any of the cells has, and every one in `seeds`, must be there in all of them; otherwise
    the seeds they share are taken.
    """
    tables, states, gaps = [], [], []
    for cell in cells:
        runs = select(members, cell)
        gaps += _mixed(study, cell, runs)
        states.append(dict(zip(runs["seed"].astype(int), runs["status"], strict=True)) if len(runs) else {})
        tables.append(_scores(rows, cell, metric))
    ready = [
        {
            seed
            for seed, status in state.items()
            if status == "diverged" or (status == "completed" and seed in table.index)
        }
        for state, table in zip(states, tables, strict=True)
    ]
    wanted = set().union(*states, seeds) if all_seeds else set.intersection(*ready)
    for cell, state, there in zip(cells, states, ready, strict=True):
        if not there:
            why = f": {_why(next(iter(state.values())))}" if state else ""
            gaps.append(f"{study.label(cell)}{why}" if state else f"{study.label(cell)}: no run")
            continue
        gaps += [f"{study.label(cell)}, seed {seed}: {_why(state.get(seed))}" for seed in sorted(wanted - there)]
    if gaps:
        return gaps
    if not wanted:
        return ["seeds that " + " and ".join(study.label(cell) for cell in cells) + " share"]
    return _stack(study, tables, states, sorted(wanted), metric)


def _mixed(study: Claims, cell: Cell, runs: pd.DataFrame) -> list[str]:
    """What to say where several members of one seed answer to `cell`: their mean would be nobody's score."""
    twice = runs[runs["seed"].duplicated(keep=False)] if len(runs) else runs
    if twice.empty:
        return []
    twice = twice[twice["seed"] == twice["seed"].iloc[0]]
    names = f" ({', '.join(sorted(set(twice['run_id'])))})" if "run_id" in twice else ""
    return [
        f"{study.label(cell)}, seed {twice['seed'].iloc[0]:g}: one member, of the {len(twice)}{names} that answer to it"
    ]


def _why(status: str | None) -> str:
    return "no run" if status in (None, "missing") else "no scores" if status in FINISHED else status


def _stack(
    study: Claims, tables: list[pd.DataFrame], states: list[dict], seeds: list[int], metric: str
) -> Paired | list[str]:
    """Fill the array: diverged runs with the worst score, questions with a gap left out of every run."""
    diverged = [[seed for seed in seeds if state[seed] == "diverged"] for state in states]
    scored = [
        table.loc[[seed for seed in seeds if state[seed] != "diverged"]]
        for table, state in zip(tables, states, strict=True)
        if len(table)
    ]
    scored = [table for table in scored if len(table)]
    if scored:
        every = pd.concat(scored, axis=0)
        complete = every.columns[every.notna().all()]
        if complete.empty:
            return [f"questions with a {metric} in every run"]
        dropped = every.shape[1] - len(complete)
    else:  # every run diverged: one question stands for all
        complete, dropped = pd.Index([0]), 0
    values = np.full((len(tables), len(seeds), len(complete)), study.diverged.get(metric, 0.0))
    for i, (table, state) in enumerate(zip(tables, states, strict=True)):
        for j, seed in enumerate(seeds):
            if state[seed] != "diverged":
                values[i, j] = table.loc[seed, complete].to_numpy(dtype=float)
    return Paired(values, seeds, diverged, int(dropped))
