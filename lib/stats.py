"""Statistics of paired comparisons over seeds and questions: intervals, tests, ratios.

Scores come as arrays (..., S, Q): S seeds by Q questions (problems, examples), leading axes for repetitions of the
whole experiment, so that what decides one experiment decides ten thousand simulated ones. Everything is seeded by its
caller.

Crossed bootstrap: Owen (2007), "The pigeonhole bootstrap", Ann. Appl. Stat. 1(2). Seeds and questions are each drawn
with replacement and the mean of the drawn rows and columns is taken. With three seeds its standard error is too small
by sqrt((S - 1) / S) in the seeds' part, hence the factor sqrt(S / (S - 1)) on the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

SUPPORTED, INCONCLUSIVE, REFUTED = 1, 0, -1
COMPANION_LEVEL = 0.05  # one-sided level at which the companion test must come down on the same side
_TINY = 1e-12  # stands for a standard error of 0 (all differences equal)


class Estimate(NamedTuple):
    """A mean with its standard error and degrees of freedom (infinite: normal); the fields may be arrays."""

    value: np.ndarray
    se: np.ndarray
    df: float


class Decision(NamedTuple):
    """`code` SUPPORTED, REFUTED or INCONCLUSIVE; `primary` is what the primary test alone says (where they differ, the
    companion is on the other side); `p` and `p_companion` are the two one-sided p of the claim."""

    code: np.ndarray
    primary: np.ndarray
    p: np.ndarray
    p_companion: np.ndarray


def _decide(p, supports, refutes, companion_for, companion_against) -> Decision:
    """What the primary test says (`p`, whether it `supports` or `refutes`) stands where the companion's one-sided p
    on the same side is small; else the claim is open."""
    primary = np.where(supports, SUPPORTED, np.where(refutes, REFUTED, INCONCLUSIVE))
    companion = np.where(primary == SUPPORTED, companion_for, companion_against)
    agrees = (primary == INCONCLUSIVE) | (companion <= COMPANION_LEVEL)
    return Decision(np.where(agrees, primary, INCONCLUSIVE), primary, p, companion_for)


# ---- means over seeds and questions


def seed_factor(seeds: int) -> float:
    """sqrt(S / (S - 1)); a single seed says nothing about seeds."""
    if seeds < 2:
        raise ValueError(f"{seeds} seed(s): at least 2 are needed for an interval")
    return (seeds / (seeds - 1)) ** 0.5


def resampling_shares(x: np.ndarray, draws: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The shares (draws, S) and (draws, Q) that each seed and question of x (..., S, Q) has in the bootstrap's sets."""
    return [rng.multinomial(n, np.full(n, 1 / n), size=draws) / n for n in x.shape[-2:]]


def resampled_means(x: np.ndarray, by_seed: np.ndarray, by_question: np.ndarray) -> np.ndarray:
    """Crossed bootstrap means (..., draws) of x (..., S, Q)."""
    return np.einsum("...sb,bs->...b", x @ by_question.T, by_seed)


def crossed_bootstrap(x: np.ndarray, *, draws: int, rng: np.random.Generator) -> Estimate:
    """Mean of x (..., S, Q) with its crossed bootstrap standard error (`draws` draws), times sqrt(S / (S - 1))."""
    means = resampled_means(x, *resampling_shares(x, draws, rng))
    # about the mean itself, as the draws' own mean differs from it only by chance
    deviation = means - x.mean((-2, -1))[..., None]
    return Estimate(x.mean((-2, -1)), seed_factor(x.shape[-2]) * np.sqrt((deviation**2).mean(-1)), np.inf)


def crossed_mean(x: np.ndarray) -> Estimate:
    """As `crossed_bootstrap`, in the limit of infinitely many draws.

    With multinomial counts the bootstrap's variance is exactly sum a^2/S^2 + sum b^2/Q^2 + sum c^2/(SQ)^2, where
    a, b and c are the seeds' effects, the questions' effects and what is left.
    """
    s, q = x.shape[-2:]
    mean = x.mean((-2, -1), keepdims=True)
    a, b = x.mean(-1, keepdims=True) - mean, x.mean(-2, keepdims=True) - mean
    c = x - mean - a - b
    variance = (a**2).sum((-2, -1)) / s**2 + (b**2).sum((-2, -1)) / q**2 + (c**2).sum((-2, -1)) / (s * q) ** 2
    return Estimate(x.mean((-2, -1)), seed_factor(s) * np.sqrt(variance), np.inf)


def seed_mean(values: np.ndarray) -> Estimate:
    """The companion: mean of per-seed values (..., S) with the t distribution's S - 1 degrees of freedom."""
    n = values.shape[-1]
    return Estimate(values.mean(-1), values.std(-1, ddof=1) / n**0.5, n - 1)


def interval(estimate: Estimate, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided interval at `level`."""
    half = stats.t.ppf((1 + level) / 2, estimate.df) * estimate.se
    return estimate.value - half, estimate.value + half


def p_above(estimate: Estimate, threshold: float) -> np.ndarray:
    """One-sided p of "not above `threshold`": small where the mean is above it."""
    return stats.t.sf((estimate.value - threshold) / np.maximum(estimate.se, _TINY), estimate.df)


def p_below(estimate: Estimate, threshold: float) -> np.ndarray:
    """One-sided p of "not below `threshold`"."""
    return stats.t.sf((threshold - estimate.value) / np.maximum(estimate.se, _TINY), estimate.df)


def p_for_and_against(test: str, estimate: Estimate, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """The two one-sided p of a claim about a mean: superiority says that it is above `margin`, non-inferiority and an
    absolute figure that it is above -`margin`, equivalence that it lies between the two."""
    if test == "equivalence":
        inside = np.maximum(p_above(estimate, -margin), p_below(estimate, margin))
        return inside, np.minimum(p_above(estimate, margin), p_below(estimate, -margin))
    threshold = margin if test == "superiority" else -margin
    return p_above(estimate, threshold), p_below(estimate, threshold)


def decide_mean(test: str, primary: Estimate, companion: Estimate, margin: float) -> Decision:
    """The rule of a claim about a mean. Non-inferiority and equivalence are supported by the 90 % interval, superiority
    and an absolute figure by the 95 % interval; the 95 % interval refutes."""
    p, against = p_for_and_against(test, primary, margin)
    level = 0.05 if test in ("non_inferiority", "equivalence") else 0.025
    return _decide(p, p <= level, against <= 0.025, *p_for_and_against(test, companion, margin))


def noise_sds(difference: np.ndarray) -> dict[str, float]:
    """Standard deviations behind a paired difference (S, Q), from its mean squares: between seeds, between questions,
    and what is left. To be set beside the assumed ones."""
    s, q = difference.shape
    by_seed, by_question = difference.mean(1), difference.mean(0)
    left = difference - by_seed[:, None] - by_question[None, :] + difference.mean()
    error = (left**2).sum() / ((s - 1) * (q - 1))
    return {
        "seed": max(0.0, by_seed.var(ddof=1) - error / q) ** 0.5,
        "question": max(0.0, by_question.var(ddof=1) - error / s) ** 0.5,
        "answer": error**0.5,
    }


# ---- variance across levels (beta, say)


class Ratio(NamedTuple):
    """A ratio with its 95 % bootstrap interval and its `draws` (..., draws). `companion`: what the t test is made on,
    each seed's own two variances, both (..., S), or the log ratios of K blocks of times (..., K)."""

    ratio: np.ndarray
    low: np.ndarray
    high: np.ndarray
    draws: np.ndarray
    companion: tuple[np.ndarray, np.ndarray] | np.ndarray

    def p(self, beyond: np.ndarray) -> np.ndarray:
        """One-sided p: the share of draws that lie `beyond` the threshold, the estimate counted as one of them."""
        return (1 + beyond.sum(-1)) / (self.draws.shape[-1] + 1)


def variance_across(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance across the L levels of x (..., L, S, Q), less the noise within a level; and each seed's own (..., S).

    The level means are means over seeds; their noise is the levels' average variance over seeds, divided by S. One
    seed's variance across levels holds that noise S times over.
    """
    by_seed = x.mean(-1)
    seeds = by_seed.shape[-1]
    within = by_seed.var(-1, ddof=1).mean(-1)
    return by_seed.mean(-1).var(-1, ddof=1) - within / seeds, by_seed.var(-2, ddof=1) - within[..., None]


def variance_ratio(treatment: np.ndarray, baseline: np.ndarray, *, draws: int, rng: np.random.Generator) -> Ratio:
    """Ratio of variances across levels, treatment (..., L, S, Q) over baseline, with a crossed bootstrap interval.

    The same seeds and questions are drawn for every level of both. A draw's variances hold the draw's own noise: they
    are centered on the estimates and widened by sqrt(S / (S - 1)) before the ratio is taken. Where the baseline's is not
    positive the ratio counts as infinite, which can only widen the interval upwards.
    """
    shares = resampling_shares(treatment, draws, rng)
    estimates, per_seed = zip(variance_across(treatment), variance_across(baseline), strict=True)
    widened = []
    for x, estimate in zip((treatment, baseline), estimates, strict=True):
        drawn = np.moveaxis(resampled_means(x, *shares), -1, -2).var(-1, ddof=1)
        noise = drawn - drawn.mean(-1, keepdims=True)
        widened.append(estimate[..., None] + seed_factor(x.shape[-2]) * noise)
    ratios = _ratio(*widened)
    # a quantile between two infinities is not a number
    low, high = np.quantile(ratios, (0.025, 0.975), axis=-1, method="inverted_cdf")
    return Ratio(_ratio(*estimates), low, high, ratios, per_seed)


def _ratio(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """max(upper, 0) / lower, infinite where lower is not positive."""
    positive = lower > 0
    return np.where(positive, np.maximum(upper, 0) / np.where(positive, lower, 1), np.inf)


def decide_variance(result: Ratio, point: float) -> Decision:
    """Supported: the interval's high end is below 1 and the ratio at most `point`. Refuted: its low end is above
    `point`.

    Companion: a t test over seeds of treatment - r * baseline, the two variances of each seed (r = 1, r = `point`).
    """
    treatment, baseline = result.companion
    return _decide(
        result.p(result.draws >= 1),
        (result.high < 1) & (result.ratio <= point),
        result.low > point,
        p_below(seed_mean(treatment - baseline), 0.0),
        p_above(seed_mean(treatment - point * baseline), 0.0),
    )


# ---- ratios of times


def time_ratio(
    seconds: np.ndarray, baseline: np.ndarray, *, draws: int, rng: np.random.Generator, blocks: int = 10
) -> Ratio:
    """Ratio of times (..., N) measured in N interleaved pairs: the median of the pairs' ratios, as a hiccup of the
    machine in one step says nothing of the method; pairs are drawn with replacement.

    Times of neighboring steps resemble each other: `blocks` stretches of consecutive pairs give the companion its
    values.
    """
    log = np.log(seconds) - np.log(baseline)
    n = log.shape[-1]
    # the median of a resample is that of its ranks, which are drawn without looking at the times
    ranks = np.sort(rng.integers(0, n, (draws, n)), axis=-1)[:, [(n - 1) // 2, n // 2]]
    drawn = np.sort(log, axis=-1)[..., ranks].mean(-1)
    size = n // blocks
    stretches = np.median(log[..., : size * blocks].reshape(*log.shape[:-1], blocks, size), axis=-1)
    low, high = np.quantile(drawn, (0.025, 0.975), axis=-1)
    return Ratio(np.exp(np.median(log, axis=-1)), np.exp(low), np.exp(high), np.exp(drawn), stretches)


def decide_cost(result: Ratio, limit: float) -> Decision:
    """Supported: the 95 % interval's high end is at most `limit`. Refuted: its low end is above."""
    p, companion, log = result.p(result.draws > limit), seed_mean(result.companion), np.log(limit)
    return _decide(p, result.high <= limit, result.low > limit, p_below(companion, log), p_above(companion, log))


# ---- several claims; effect sizes


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values along the last axis (Holm 1979, Scand. J. Statist. 6)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, axis=-1, kind="stable")
    factors = np.arange(p.shape[-1], 0, -1)
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, -1) * factors, axis=-1)
    return np.take_along_axis(np.minimum(stepped, 1.0), np.argsort(order, axis=-1), -1)


def probability_of_improvement(treatment: np.ndarray, baseline: np.ndarray) -> float:
    """P(treatment above baseline) on a question, over all pairs of seeds; ties count half (Agarwal et al. 2021, section
    4). Both (S, Q)."""
    difference = treatment[:, None, :] - baseline[None, :, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())
