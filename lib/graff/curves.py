"""What a curve of exact match over a run comes to: its area over time, and the energy at which it reaches a level."""

from __future__ import annotations


def auc(times: list[float], values: list[float], budget: float) -> float:
    """Area under `values` over time by the trapezoid rule, from t = 0 to the budget (the last value holds), over the
    budget."""
    times, values = [*times, budget], [*values, values[-1]]
    return (
        sum((t1 - t0) * (v0 + v1) / 2 for t0, t1, v0, v1 in zip(times, times[1:], values, values[1:], strict=False))
        / budget
    )


def to_level(joules: list, exact_match: list, level: float | None) -> float | None:
    """Joules when exact match first reaches `level`, between two evaluations by linear interpolation. None where no
    level is stated, nothing was read, it is never reached, or the base model (the first evaluation) is there already:
    then nothing was spent on reaching it."""
    if level is None or any(j is None or j != j for j in joules) or exact_match[0] >= level:
        return None
    for j0, j1, e0, e1 in zip(joules, joules[1:], exact_match, exact_match[1:], strict=False):
        if e1 >= level:
            return j0 + (j1 - j0) * (level - e0) / (e1 - e0)
    return None
