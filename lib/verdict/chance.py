"""Whether the runs that a claim compares have learnt anything: a difference between runs at chance says nothing of
methods.

What chance is stands in claims.yaml (`chance`), fixed before any score is seen. Runs are at chance unless they are
shown to be above it or, where they began with something to lose, below that: a cell as a whole (one-sided at the
companion's level, by the crossed seed x question standard error), or any of them alone, over its questions (at that
level over the number of runs: one lucky seed of many shows nothing, and one that has clearly learnt is no run at
chance, however much the seeds differ). To diverge is a result, and not chance.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lib import statistics as st
from lib.verdict.claim_types import Cell, Chance, Claims
from lib.verdict.comparison import Paired, pair_up, select


class Unknown(Exception):
    """What is missing to tell."""


def at_chance(
    study: Claims, rows: pd.DataFrame, members: pd.DataFrame, cells: list[Cell], n: int, names: tuple[str, str]
) -> str:
    """The sentence that says it, where every one of `cells` (the first `n` called names[0], the rest names[1]) is at
    chance; the empty string where one is not. Raises Unknown where that cannot be told. `study` has a `chance`."""
    chance = study.chance
    pairs = pair_up(study, rows, members, cells, chance.metric, all_seeds=False)
    if not isinstance(pairs, Paired):
        raise Unknown("; ".join(pairs))
    if len(pairs.seeds) < 2:
        raise Unknown("one seed tells nothing about seeds")
    if any(pairs.diverged):
        return ""
    limits = [_limits(study, chance, cell, members) for cell in cells]
    runs, questions = len(cells) * len(pairs.seeds), pairs.values.shape[-1]
    for values, (upper, lower) in zip(pairs.values, limits, strict=True):
        alone = st.Estimate(values.mean(-1), values.std(-1) / max(1, questions - 1) ** 0.5, np.inf)
        for estimate, level in ((st.crossed(values), st.COMPANION_LEVEL), (alone, st.COMPANION_LEVEL / runs)):
            if np.any(st.p_above(estimate, upper) <= level):
                return ""
            if lower is not None and np.any(st.p_below(estimate, lower) <= level):
                return ""
    means, upper = pairs.values.mean((1, 2)), max(limit for limit, _ in limits)
    of = [f"{part.max():.3f} of {name}" for part, name in zip((means[:n], means[n:]), names, strict=True)]
    return (
        f"no run is shown to have learnt anything: {chance.metric.replace('_', ' ')} is {' and '.join(of)}, not shown to "
        f"be above {upper:.3f} ({chance.what}), and differences between runs at chance show nothing"
    )


def _limits(study: Claims, chance: Chance, cell: Cell, members: pd.DataFrame) -> tuple[float, float | None]:
    found = select(members, cell)

    def value(level: float | str) -> float:
        if not isinstance(level, str):
            return float(level)
        column = pd.to_numeric(found[level], errors="coerce").dropna() if level in found else []
        if not len(column):
            raise Unknown(f"{study.label(cell)}: no {level}")
        return float(np.mean(column))

    return max(map(value, chance.no_better_than)), None if chance.no_worse_than is None else value(chance.no_worse_than)
