"""Group-sequential statistics of paired comparisons over seeds and questions.

A study looks at its claims after n_1 < n_2 < ... seeds and may stop at any look. The interval is a repeated confidence
interval (Jennison and Turnbull 1991, "Exact calculations for sequential t, chi-square and F tests", Biometrika 78; 1989,
"Interim analyses: the repeated confidence interval approach", JRSS B 51): it holds at all looks together with
probability 1 - alpha, so that when a study stops, and why, does not matter. With d[s, q] = treatment - baseline of seed
s and question q (one number per seed: Q = 1), and the mean squares of the two-way layout without replication,

    h_k^2 = (c_k^2 max(MS_A, MS_E) + z_Q^2 max(MS_B - MS_E, 0)) / (n_k Q)              interval: mean +- h_k
    c_k = F_t^-1(Phi(C); n_k - 1)        z_Q = 0.934 C        C(alpha): 1 - alpha quantile of max_k |u_k|
    u_k = Phi^-1(F_t(t_k; n_k - 1)) of paths of standard normal means

Seeds are replicates, so their part shrinks with n_k; the questions are a sample as well, whose part does not. What is
reported is the intersection of the intervals of the looks taken. Its limit are seeds that fail rarely: where one in five
is far from the rest, the first five may show none, and coverage falls (to .91 for two equally frequent values with
little noise, .71 for a rare one).

Arrays come as (..., S, Q), leading axes for repetitions of the whole experiment, so that what decides one experiment
decides ten thousand simulated ones.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy

SUPPORTED, INCONCLUSIVE, REFUTED = 1, 0, -1
LEVEL = 0.05
PATHS = 400_000
QUESTIONS = 0.934  # z_Q over C
LARGEST = 12.0  # of C: its alpha is 4e-33
# C(0.05) of the looks that the studies take; a test simulates them again
BOUNDS = {(5, 8, 12, 20): 2.4005, (3, 5, 8): 2.328, (3, 5, 8, 12, 20): 2.4895}


# ---- the bound on all looks together


@functools.lru_cache
def largest_deviates(looks: tuple[int, ...]) -> np.ndarray:
    """(PATHS,) sorted max_k |u_k| of paths without effect, drawn with a fixed seed."""
    rng, largest, n = np.random.default_rng(0), [], np.array(looks)
    for _ in range(0, PATHS, 20_000):
        x = rng.standard_normal((20_000, looks[-1]))
        total, squares = (np.cumsum(y, axis=1)[:, n - 1] for y in (x, x * x))
        t = total / n / np.sqrt((squares - total**2 / n) / (n - 1) / n)
        # of equal tails the largest deviate is the smallest tail: one inverse per path
        largest.append(scipy.stats.norm.isf(scipy.stats.t.sf(np.abs(t), n - 1).min(axis=1)))
    return np.sort(np.concatenate(largest))


def alpha_of(bound: np.ndarray, looks: tuple[int, ...]) -> np.ndarray:
    """P(max_k |u_k| >= bound): the error of an interval with this C; at least 1 / PATHS where it is simulated."""
    if len(looks) == 1:
        return 2 * scipy.stats.norm.sf(bound)
    deviates = largest_deviates(looks)
    return np.maximum(len(deviates) - np.searchsorted(deviates, bound), 1) / len(deviates)


def bound_of(looks: tuple[int, ...]) -> float:
    """C(LEVEL)."""
    if len(looks) == 1:
        return float(scipy.stats.norm.isf(LEVEL / 2))
    return BOUNDS.get(looks) or float(np.quantile(largest_deviates(looks), 1 - LEVEL))


def critical(bound: np.ndarray, seeds: int) -> np.ndarray:
    """c_k of a bound C at `seeds` seeds."""
    return scipy.stats.t.isf(scipy.stats.norm.sf(bound), seeds - 1)


# ---- one look


class Look(NamedTuple):
    """The two-way layout of S seeds by Q questions: the mean, and the mean squares of seeds, questions and residual."""

    seeds: int
    questions: int
    mean: np.ndarray
    seed_ms: np.ndarray
    question_ms: np.ndarray
    residual_ms: np.ndarray

    @property
    def seed_variance(self) -> np.ndarray:
        """Of one seed's mean. The floor MS_E handles ties and equal seed means."""
        return np.maximum(self.seed_ms, self.residual_ms) / self.questions

    @property
    def question_variance(self) -> np.ndarray:
        """Of the mean over all seeds there could be: what the choice of questions leaves open."""
        return np.maximum(self.question_ms - self.residual_ms, 0) / (self.seeds * self.questions)

    def half_width(self, bound: np.ndarray, seeds: int | None = None) -> np.ndarray:
        """h of this look, or what it is expected to be at another number of `seeds`."""
        n = seeds or self.seeds
        seed_part = critical(bound, n) ** 2 * self.seed_variance / n
        return np.sqrt(seed_part + (QUESTIONS * bound) ** 2 * self.question_variance)

    def interval(self, bound: float) -> tuple[np.ndarray, np.ndarray]:
        return self.mean - self.half_width(bound), self.mean + self.half_width(bound)

    def sds(self) -> dict[str, float]:
        """Standard deviations of the difference: between seeds, between questions, and what is left."""
        left = float(self.residual_ms)
        by_seed, by_question = float(self.seed_ms) - left, float(self.question_ms) - left
        parts = {"seed": by_seed / self.questions, "question": by_question / self.seeds, "residual": left}
        return {name: max(0.0, variance) ** 0.5 for name, variance in parts.items()}


def look_at(d: np.ndarray) -> Look:
    """The layout of d (..., S, Q). Raises ValueError for a single seed, which says nothing about seeds."""
    s, q = d.shape[-2:]
    if s < 2:
        raise ValueError(f"{s} seed: at least 2 are needed for an interval")
    by_seed, by_question, mean = d.mean(-1), d.mean(-2), d.mean((-2, -1))
    left = d - by_seed[..., None] - by_question[..., None, :] + mean[..., None, None]
    residual = (left**2).sum((-2, -1)) / max((s - 1) * (q - 1), 1)  # of one question both are 0
    return Look(s, q, mean, q * by_seed.var(-1, ddof=1), s * by_question.var(-1, ddof=min(1, q - 1)), residual)


# ---- the looks of a study


class Sequential(NamedTuple):
    """The looks `taken` of those `planned`, and after each the running intersection `low`, `high` (K, ...), which is
    empty (low above high) where seeds disagree."""

    planned: tuple[int, ...]
    taken: list[Look]
    low: np.ndarray
    high: np.ndarray

    def p(self, threshold: float, side: int) -> np.ndarray:
        """The smallest alpha at which the interval of some look taken lies wholly above (`side` 1) or below (-1)
        `threshold`."""
        smallest = np.ones_like(self.taken[0].mean)
        for look in self.taken:
            distance = side * (look.mean - threshold)
            low, high = np.zeros_like(distance), np.full_like(distance, LARGEST)
            for _ in range(45):  # half_width grows with C
                middle = (low + high) / 2
                inside = look.half_width(middle) < distance
                low, high = np.where(inside, middle, low), np.where(inside, high, middle)
            smallest = np.minimum(smallest, np.where(distance > 0, alpha_of(low, self.planned), 1.0))
        return smallest


def look_sequentially(d: np.ndarray, looks: Sequence[int]) -> Sequential:
    """The looks that the seeds of d (..., S, Q), in their order, suffice for. Raises ValueError where they suffice for
    none."""
    planned = tuple(looks)
    taken = [look_at(d[..., :n, :]) for n in planned if n <= d.shape[-2]]
    if not taken:
        raise ValueError(f"{d.shape[-2]} seeds: the first look is at {planned[0]}")
    ends = [look.interval(bound_of(planned)) for look in taken]
    low, high = (np.stack(each) for each in zip(*ends, strict=True))
    return Sequential(planned, taken, np.maximum.accumulate(low), np.minimum.accumulate(high))


class Decision(NamedTuple):
    """`code`: SUPPORTED, REFUTED or INCONCLUSIVE by the interval alone; `p`: the smallest alpha whose interval gives
    either word."""

    code: np.ndarray
    p: np.ndarray


def claimed(test: str, margin: float) -> tuple[float, float]:
    """Between what the mean lies if the claim holds."""
    return (margin if test == "superiority" else -margin), (margin if test == "equivalence" else np.inf)


def words(test: str, low: np.ndarray, high: np.ndarray, margin: float) -> np.ndarray:
    """SUPPORTED, REFUTED or INCONCLUSIVE by the interval. Superiority says that the mean is at least `margin`,
    non-inferiority and an absolute figure that it is at least -`margin`, equivalence that it lies within `margin` of 0.
    An empty interval decides nothing."""
    least, most = claimed(test, margin)
    supported, refuted = (low >= least) & (high <= most), (low > most) | (high < least)
    code = np.where(supported, SUPPORTED, np.where(refuted, REFUTED, INCONCLUSIVE))
    return np.where(low > high, INCONCLUSIVE, code)


def decide(test: str, sequence: Sequential, margin: float) -> Decision:
    """What the looks taken say; one interval decides both words."""
    code, (least, most) = words(test, sequence.low[-1], sequence.high[-1], margin), claimed(test, margin)
    inside = np.maximum(sequence.p(least, 1), sequence.p(most, -1))
    return Decision(code, np.minimum(inside, np.minimum(sequence.p(least, -1), sequence.p(most, 1))))


def chance_of_word(test: str, look: Look, margin: float, looks: tuple, seeds: int, known: bool = False) -> float:
    """Probability that the interval at `seeds` seeds decides, as this look has it: the mean after further seeds with
    the same standard deviations, of a true difference that is as uncertain as the look leaves it, or (`known`) equal to
    the estimate, in a study of that many new seeds."""
    share = 1.0 if known else max(0.0, seeds - look.seeds) / look.seeds
    sd, half = float(np.sqrt(look.seed_variance / seeds * share)), float(look.half_width(bound_of(looks), seeds))
    mean, (least, most) = scipy.stats.norm(float(look.mean), max(sd, 1e-12)), claimed(test, margin)
    inside = mean.cdf(most - half) - mean.cdf(least + half)
    return float(max(0.0, inside) + mean.sf(most + half) + mean.cdf(least - half))


def seeds_to_decide(test: str, look: Look, margin: float, looks: tuple) -> int | None:
    """How many seeds would decide with a chance of 80 % if the estimate and its standard deviations are true; None where
    10,000 would not: the questions, or an estimate at the margin, leave it open."""
    sizes = np.unique(np.geomspace(look.seeds + 1, 10_000, 200).astype(int))
    enough = (n for n in sizes if chance_of_word(test, look, margin, looks, int(n), known=True) >= 0.8)
    return next((int(n) for n in enough), None)


# ---- scores per seed of claims that are not about a mean over questions


def log_variance_ratio(treatment: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """(..., S, 1): each seed's log ratio of the variances across levels of treatment and baseline (..., L, S, Q). The
    noise of a run is part of both variances."""
    across = [x.mean(-1).var(-2, ddof=1) for x in (treatment, baseline)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(across[0] / across[1])[..., None]


def ratio_scores(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """(n,): scores of n questions whose mean is sum(numerator) / sum(denominator), and the mean of fewer of them what
    that ratio would be without the others, to first order: the infinitesimal jackknife's pseudo-values (Efron 1982). By
    them a statistic such as F1 is judged as a mean over questions is."""
    ratio = numerator.sum() / max(denominator.sum(), 1e-12)
    return ratio + (numerator - ratio * denominator) / max(denominator.mean(), 1e-12)


# ---- several claims; effect sizes; fixed sizes


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


def t_tail(values: np.ndarray, threshold: float, side: int) -> np.ndarray:
    """One-sided p of values (..., N): small where their mean is above (`side` 1) or below (-1) `threshold`; N - 1
    degrees of freedom. Without any spread it is 0 or 1."""
    n = values.shape[-1]
    error = np.maximum(values.std(-1, ddof=1) / n**0.5, 1e-12)
    return scipy.stats.t.sf(side * (values.mean(-1) - threshold) / error, n - 1)
