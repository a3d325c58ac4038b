"""A verdict and its forms: JSON, a table, one sentence."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field

import pandas as pd

from lib.record import finite

VERDICTS = ("supported", "refuted", "inconclusive", "vacuous", "not evaluated")


@dataclass
class Verdict:
    """What one claim came to, at one scale. Numbers that do not exist are None.

    `p` is the one-sided p of the claim's own primary test, `holm_p` adjusted over the claims evaluated with it,
    `p_companion` that of the t test over seeds. `per_seed` maps a seed to its own estimate. `level` is that of the
    interval which supports the claim. `scored_by` names what gave the scores. `n_pairs` counts pairs of costs,
    `n_dropped` questions left out for want of a score.
    """

    id: str
    sentence: str
    test: str
    metric: str
    scale: str
    verdict: str
    reason: str
    estimand: str = ""
    margin: float | None = None
    claimed: float | None = None
    estimate: float | None = None
    interval95: tuple[float, float] | None = None
    interval90: tuple[float, float] | None = None
    level: float | None = None
    p: float | None = None
    holm_p: float | None = None
    p_companion: float | None = None
    companion_interval95: tuple[float, float] | None = None
    per_seed: dict = field(default_factory=dict)
    probability_of_improvement: float | None = None
    n_seeds: int = 0
    n_questions: int = 0
    n_pairs: int = 0
    n_dropped: int = 0
    premise: dict | None = None
    note: str = ""
    scored_by: str = ""
    beside: list[dict] = field(default_factory=list)
    sensitivity: dict | None = None


def to_json(verdicts: list[Verdict]) -> list[dict]:
    """Plain data without NaN or infinities (they become null), ready for record.write_json."""
    return json.loads(json.dumps([finite(asdict(verdict)) for verdict in verdicts], allow_nan=False))


def _span(bounds: tuple | None) -> str:
    return "" if bounds is None else " to ".join(f"{b:.3g}" if math.isfinite(b) else "no bound" for b in bounds)


def table(verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per claim, for people."""
    return pd.DataFrame(
        [
            {
                "claim": v.id,
                "verdict": v.verdict,
                "estimate": v.estimate,
                "95 % interval": _span(v.interval95),
                "p": v.p,
                "Holm p": v.holm_p,
                "P(improvement)": v.probability_of_improvement,
                "per seed": ", ".join(f"{value:.3g}" for value in v.per_seed.values() if value is not None),
                "seeds": v.n_seeds,
                "scale": v.scale,
                "why": v.reason,
            }
            for v in verdicts
        ]
    )


def sentence(verdict: Verdict) -> str:
    """`C1 refuted at laptop scale (oracle score): ...`."""
    by = f" ({verdict.scored_by})" if verdict.scored_by else ""
    return f"{verdict.id} {verdict.verdict} at {verdict.scale} scale{by}: {verdict.reason}"
