"""One comparison measured: estimate, intervals, p, what its rule says and the sentence that says it.

The functions give the fields of a verdict as a dict; lib/claims.py decides what becomes of them.
"""

from __future__ import annotations

import zlib

import numpy as np
import pandas as pd

from lib import statistics as st
from lib.verdict.claim_types import Claim
from lib.verdict.comparison import Paired

WORD = {st.SUPPORTED: "supported", st.REFUTED: "refuted", st.INCONCLUSIVE: "inconclusive"}
Names = tuple[str, str]  # of treatment and baseline, for sentences


def _rng(claim: Claim, part: str = "") -> np.random.Generator:
    """Each comparison has its own draws, so that none depends on which others were made."""
    return np.random.default_rng(zlib.crc32(f"{claim.id} {part}".encode()))


def measure(claim: Claim, pairs: Paired, n: int, names: Names, draws: int, part: str = "") -> dict:
    """Estimate, intervals, p, verdict and reason of one comparison: the first `n` cells against the rest."""
    treatment, baseline = pairs.values[:n], pairs.values[n:]
    if claim.test == "variance_ratio":
        return _measure_variance(claim, treatment, baseline, names, pairs.seeds, draws, part)
    return _measure_mean(claim, treatment[0], baseline[0] if len(baseline) else None, names, pairs.seeds, draws, part)


def decide_mean(claim: Claim, primary: st.Estimate, companion: st.Estimate) -> st.Decision:
    """The rule of a claim about a mean (difference); the simulations of lib/verdict/power.py decide by it too."""
    if claim.test == "absolute":  # a figure is reached to within the margin
        return st.superiority(primary, companion, -claim.margin)
    return {"non_inferiority": st.non_inferiority, "superiority": st.superiority, "equivalence": st.equivalence}[
        claim.test
    ](primary, companion, claim.margin)


def _measure_mean(claim, treatment, baseline, names, seeds, draws, part) -> dict:
    difference = treatment - (claim.reported if baseline is None else baseline)
    primary = st.crossed_bootstrap(difference, draws=draws, rng=_rng(claim, part))
    companion = st.over_seeds(difference.mean(-1))
    decision = decide_mean(claim, primary, companion)
    code, low95, high95 = int(decision.code), *map(float, st.interval(primary, 0.95))
    low90, high90 = map(float, st.interval(primary, 0.90))
    estimate = float(primary.value)
    side = "above" if estimate >= 0 else "below"
    m = claim.margin
    digits = 2 if max(m, abs(estimate)) >= 0.3 else 4  # grades of 1 to 10, or shares of 1
    reason = f"{names[0]} scored {abs(estimate):.{digits}f} {side} {names[1]}"
    reason += (
        f" (95 % interval {low95:+.{digits}f} to {high95:+.{digits}f}, "
        f"90 % {low90:+.{digits}f} to {high90:+.{digits}f}); "
    )
    support, refute = {
        "non_inferiority": (f"the 90 % interval stays above -{m:g}", f"the 95 % interval lies below -{m:g}"),
        "superiority": (f"the 95 % interval reaches {m:g}", f"the 95 % interval lies below {m:g}"),
        "equivalence": (f"the 90 % interval lies within {m:g} of 0", f"the 95 % interval lies more than {m:g} from 0"),
        "absolute": (
            f"the 95 % interval is at most {m:g} below it",
            f"the 95 % interval lies more than {m:g} below it",
        ),
    }[claim.test]
    reason += _because(decision, support, refute)
    against = {"non_inferiority": -m, "superiority": m, "absolute": -m, "equivalence": None}[claim.test]
    p_companion = (
        max(float(st.p_above(companion, -m)), float(st.p_below(companion, m)))
        if against is None
        else float(st.p_above(companion, against))
    )
    improvement = None if baseline is None else st.probability_of_improvement(treatment, baseline)
    return {
        "verdict": WORD[code],
        "reason": reason,
        "estimate": estimate,
        "interval95": (low95, high95),
        "interval90": (low90, high90),
        "level": 0.9 if claim.test in ("non_inferiority", "equivalence") else 0.95,
        "p": float(decision.p),
        "p_companion": p_companion,
        "companion_interval95": tuple(map(float, st.interval(companion, 0.95))),
        "per_seed": dict(zip(seeds, map(float, difference.mean(-1)), strict=True)),
        "probability_of_improvement": improvement,
    }


def _because(decision: st.Decision, support: str, refute: str, companion: str = "the t test over seeds") -> str:
    primary = int(decision.primary)
    if primary == st.INCONCLUSIVE:
        return "this leaves the claim open."
    text = support if primary == st.SUPPORTED else refute
    return f"{text}." if decision.agrees else f"{text}, but {companion} does not bear it out."


def _measure_variance(claim, treatment, baseline, names, seeds, draws, part) -> dict:
    result = st.variance_ratio(treatment, baseline, draws=draws, rng=_rng(claim, part))
    decision = st.lower_variance(result, claim.margin)
    ratio, low, high = float(result.ratio), float(result.low), float(result.high)
    (key,) = claim.across
    reason = f"across {key} the variance of {names[0]}'s scores is {ratio:.2f} times that of {names[1]}"
    reason += f" (95 % interval {low:.2f} to {high:.2f}); "
    reason += _because(
        decision,
        f"the interval lies below 1 and the ratio is at most {claim.margin:g}",
        f"the interval lies above {claim.margin:g}",
    )
    word = WORD[int(decision.code)]
    if not np.isfinite(ratio):
        word, reason = "inconclusive", f"across {key} the scores of {names[1]} vary no more than noise does"
    means, means_baseline = treatment.mean((1, 2)), baseline.mean((1, 2))
    if claim.guard is not None:
        for what, a, b in (("best", means.max(), means_baseline.max()), ("mean", means.mean(), means_baseline.mean())):
            if a < b - claim.guard:
                word = "vacuous"
                reason = (
                    f"the {what} score of {names[0]} over {key} is {a:.2f} against {b:.2f} of {names[1]}: scores that "
                    f"vary less (ratio of variances {ratio:.2f}, 95 % interval {low:.2f} to {high:.2f}) because they "
                    "are worse show nothing"
                )
                break
    own, own_baseline = (v for v in result.per_seed)
    own_ratio = [float(a / b) if b > 0 else None for a, b in zip(own, own_baseline, strict=True)]
    lower = own[:, None] - own_baseline[None, :]
    return {
        "verdict": word,
        "reason": reason,
        "estimate": ratio,
        "interval95": (low, high),
        "level": 0.95,
        "p": float(decision.p),
        "p_companion": float(st.p_below(st.over_seeds(own - own_baseline), 0.0)),
        "per_seed": dict(zip(seeds, own_ratio, strict=True)),
        "probability_of_improvement": float((lower < 0).mean() + 0.5 * (lower == 0).mean()),
    }


def measure_cost(claim: Claim, pairs: pd.DataFrame, names: Names, draws: int) -> dict:
    """Ratio of costs from pairs `metric`, `metric`_baseline, in the order in which they were measured."""
    cost, baseline = (pairs[name].to_numpy(dtype=float) for name in (claim.metric, f"{claim.metric}_baseline"))
    result = st.time_ratio(cost, baseline, draws=draws, rng=_rng(claim))
    decision = st.cost_at_most(result, claim.margin)
    ratio, low, high = float(result.ratio), float(result.low), float(result.high)
    reason = f"{names[0]} takes {ratio:.3f} times the {claim.metric} of {names[1]}"
    reason += f" (95 % interval {low:.3f} to {high:.3f}, {len(pairs)} pairs); "
    reason += _because(
        decision,
        f"the interval stays at or below {claim.margin:g}",
        f"the interval lies above {claim.margin:g}",
        companion="the t test over stretches of pairs",
    )
    per_seed = {}
    if "seed" in pairs:
        per_seed = (pairs[claim.metric] / pairs[f"{claim.metric}_baseline"]).groupby(pairs["seed"]).median()
    return {
        "verdict": WORD[int(decision.code)],
        "reason": reason,
        "estimate": ratio,
        "interval95": (low, high),
        "level": 0.95,
        "p": float(decision.p),
        "p_companion": float(st.p_below(st.over_seeds(result.blocks), np.log(claim.margin))),
        "per_seed": {int(seed): float(value) for seed, value in per_seed.items()},
        "probability_of_improvement": float((cost < baseline).mean() + 0.5 * (cost == baseline).mean()),
        "n_seeds": len(per_seed),
        "n_pairs": len(pairs),
    }
