"""lib/stats.py against hand-computed cases, full enumeration, scipy and simulated coverage."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from lib import stats as st

LADDER = np.array([[0.0, 2.0], [2.0, 4.0], [4.0, 6.0]])  # 3 seeds x 2 questions, purely additive


def rng(seed=0):
    return np.random.default_rng(seed)


def estimate(value, se, df=np.inf):
    return st.Estimate(np.asarray(value), np.asarray(se), df)


# ---- crossed bootstrap


def test_crossed_se_by_hand():
    # seeds' effects -2 0 2, questions' -1 1: variance 8/9 + 2/4, times 3/2
    assert st.crossed_mean(LADDER).se == pytest.approx((1.5 * (8 / 9 + 2 / 4)) ** 0.5)


def test_crossed_se_is_the_bootstrap_over_every_possible_draw():
    x = rng(1).normal(size=(3, 4))
    means = [x[np.ix_(s, q)].mean() for s in product(range(3), repeat=3) for q in product(range(4), repeat=4)]
    assert st.crossed_mean(x).se == pytest.approx(1.5**0.5 * np.std(means), rel=1e-12)


def test_drawn_bootstrap_approaches_the_closed_form_and_is_seeded():
    x = rng(2).normal(size=(3, 80)) + rng(3).normal(0, 0.2, (3, 1))
    drawn = st.crossed_bootstrap(x, draws=20_000, rng=rng())
    assert drawn.se == pytest.approx(st.crossed_mean(x).se, rel=0.02)
    assert drawn.value == pytest.approx(x.mean())
    assert drawn.se == st.crossed_bootstrap(x, draws=20_000, rng=rng()).se


def test_leading_axes_are_repetitions():
    x = rng(4).normal(size=(5, 3, 7))
    assert st.crossed_mean(x).se == pytest.approx([st.crossed_mean(each).se for each in x])
    assert st.crossed_bootstrap(x, draws=50, rng=rng()).se.shape == (5,)


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="at least 2"):
        st.crossed_mean(np.zeros((1, 5)))


def test_crossed_interval_covers_where_questions_matter_more_than_seeds():
    r, n = rng(5), 2000
    x = r.normal(0, 0.05, (n, 3, 1)) + r.normal(0, 1, (n, 1, 80)) + r.normal(0, 0.7, (n, 3, 80))
    low, high = st.interval(st.crossed_mean(x), 0.95)
    assert 0.94 < np.mean((low < 0) & (high > 0)) <= 1


# ---- companion, p-values, intervals


def test_companion_equals_scipys_t_test():
    values = np.array([0.3, 0.1, 0.6])
    companion = st.seed_mean(values)
    assert st.p_above(companion, 0.1) == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="greater").pvalue)
    assert st.p_below(companion, 0.1) == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="less").pvalue)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert st.interval(companion, 0.9) == pytest.approx(tuple(expected))


def test_normal_interval_and_p():
    assert st.interval(estimate(1.0, 0.5)) == pytest.approx((1 - 0.5 * 1.959964, 1 + 0.5 * 1.959964))
    assert st.p_above(estimate(1.0, 0.5), 0) == pytest.approx(stats.norm.sf(2))


def test_no_spread_at_all_is_certain_and_not_nan():
    assert st.p_above(estimate(0.2, 0.0, 2), 0.1) == pytest.approx(0, abs=1e-6)
    assert st.p_above(estimate(0.0, 0.0, 2), 0.1) == pytest.approx(1)
    assert st.p_above(estimate(0.1, 0.0), 0.1) == pytest.approx(0.5)


# ---- rules


@pytest.mark.parametrize(("value", "code"), [(0.0, 1), (-0.1, 1), (-0.2, 0), (-0.3, 0), (-0.45, 0), (-0.55, -1)])
def test_non_inferiority_rule(value, code):
    # se .1: the 90 % low end is above -.3 from -.1355 on, the 95 % high end below -.3 up to -.496
    sure = estimate(value, 0.01)
    assert st.decide_mean("non_inferiority", estimate(value, 0.1), sure, 0.3).code == code


@pytest.mark.parametrize(("value", "code"), [(1.21, 1), (1.19, 0), (1.0, 0), (0.81, 0), (0.79, -1)])
def test_superiority_rule(value, code):
    assert st.decide_mean("superiority", estimate(value, 0.1), estimate(value, 0.01), 1.0).code == code


@pytest.mark.parametrize(
    ("value", "se", "code"),
    [
        (0.0, 0.06, 1),
        (0.0, 0.062, 0),
        (0.05, 0.03, 1),
        (0.05, 0.04, 0),
        (0.3, 0.1, -1),
        (-0.3, 0.1, -1),
        (0.29, 0.1, 0),
    ],
)
def test_equivalence_rule(value, se, code):
    decision = st.decide_mean("equivalence", estimate(value, se), estimate(value, se / 10), 0.1)
    assert decision.code == code
    assert decision.p == pytest.approx(stats.norm.sf((0.1 - abs(value)) / se))


# ---- variance across levels


def test_variance_across_by_hand():
    x = np.array([[[1.0], [3.0]], [[5.0], [7.0]]])  # 2 levels x 2 seeds x 1 question
    value, each = st.variance_across(x)
    assert value == 8 - 2 / 2  # of the level means 2 and 6, less the mean variance within a level over 2 seeds
    assert list(each) == [8 - 2, 8 - 2]


def test_variance_across_is_unbiased_by_noise():
    x = rng(6).normal(0, 0.4, (4000, 4, 3, 5)) + np.array([0.0, 1, 2, 3])[:, None, None]
    value, each = st.variance_across(x)
    assert value.mean() == pytest.approx(np.var([0, 1, 2, 3], ddof=1), rel=0.01)
    assert each.mean() == pytest.approx(np.var([0, 1, 2, 3], ddof=1), rel=0.01)


def levels(spread, noise, seed, n=1):
    r = rng(seed)
    return np.array([-1.0, -0.2, 0.5, 0.7])[:, None, None] * spread + r.normal(0, noise, (n, 4, 3, 60))


def test_variance_ratio_interval_covers_the_truth():
    result = st.variance_ratio(levels(2 * 0.6**0.5, 1, 7, 400), levels(2, 1, 8, 400), draws=300, rng=rng())
    covered = np.mean((result.low < 0.6) & (result.high > 0.6))
    assert 0.94 < covered <= 1
    assert np.median(result.ratio) == pytest.approx(0.6, abs=0.03)


def test_variance_ratio_interval_and_p_are_those_of_every_possible_draw():
    """Questions alike and a baseline without noise leave the 27 draws of three seeds: each has a share of 1/27, more
    than the 2.5 % beyond an end, so the interval goes from the least to the greatest of them."""
    across, noise = np.array([0.0, 1.0, 3.0]), np.array([[0.2, -0.1, 0.4], [-0.3, 0.5, 0.1], [0.3, -0.2, 0.6]])
    treatment = np.repeat((across[:, None] + noise)[:, :, None], 2, axis=-1)
    baseline = np.broadcast_to(across[:, None, None], treatment.shape)
    drawn = np.array([treatment[:, list(s), 0].mean(-1).var(ddof=1) for s in product(range(3), repeat=3)])
    value, truth = float(st.variance_across(treatment)[0]), np.var(across, ddof=1)
    # about the estimate, which the draws' own mean is not (they hold the seeds' noise), and wider by sqrt(3 / 2)
    expected = (value + 1.5**0.5 * (drawn - drawn.mean())) / truth
    assert abs(drawn.mean() - value) > 0.01 * value
    result = st.variance_ratio(treatment, baseline, draws=20_000, rng=rng())
    assert result.ratio == pytest.approx(value / truth)
    assert (result.low, result.high) == (
        pytest.approx(expected.min(), abs=2e-3),
        pytest.approx(expected.max(), abs=2e-3),
    )
    assert 0.05 < (expected >= 1).mean() < 0.95
    assert result.p(result.draws >= 1) == pytest.approx((expected >= 1).mean(), abs=0.015)


def test_variance_ratio_of_pure_noise_is_never_supported_and_never_nan():
    result = st.variance_ratio(levels(0, 1, 9, 200), levels(0, 1, 10, 200), draws=200, rng=rng())
    assert not np.isnan(np.stack([result.ratio, result.low, result.high])).any()
    assert np.isinf(result.ratio).any()  # where the baseline's variance is below the noise
    assert (st.decide_variance(result, 0.75).code == st.SUPPORTED).mean() <= 0.05


def test_lower_variance_rule():
    def decide(ratio, low, high, baseline=(4.0, 4.1, 3.9)):
        per_seed = np.array(baseline) * ratio, np.array(baseline)
        result = st.Ratio(*map(np.asarray, (ratio, low, high)), np.zeros(99), per_seed)
        return int(st.decide_variance(result, 0.75).code)

    assert decide(0.6, 0.4, 0.9) == st.SUPPORTED
    assert decide(0.6, 0.4, 1.0) == st.INCONCLUSIVE
    assert decide(0.76, 0.6, 0.9) == st.INCONCLUSIVE  # lower, but not by enough
    assert decide(1.2, 0.8, 1.6) == st.REFUTED
    assert decide(0.6, 0.4, 0.9, (1.0, 9.0, 0.1)) == st.INCONCLUSIVE  # the seeds do not bear it out


@pytest.mark.parametrize(
    ("treatment", "bounds", "code"),
    [
        (
            (0.66, 0.71, 0.60),
            (0.5, 0.9),
            st.SUPPORTED,
        ),  # below 1 in every seed, and no more than about .75 of the baseline's
        ((0.66, 0.71, 0.30), (0.5, 0.9), st.SUPPORTED),  # against .75 its p would be .13
        ((0.66, 0.71, 0.10), (0.5, 0.9), st.INCONCLUSIVE),  # p .06
        ((0.66, 0.99, 0.10), (0.5, 0.9), st.INCONCLUSIVE),
        ((0.90, 0.93, 0.88), (0.8, 0.99), st.REFUTED),  # above .75 in every seed, and nowhere above 1
        ((0.90, 0.93, 0.76), (0.8, 0.99), st.INCONCLUSIVE),  # p .07
        ((0.80, 0.99, 0.60), (0.8, 0.99), st.INCONCLUSIVE),
    ],
)
def test_lower_variance_has_a_companion_for_each_of_its_thresholds(treatment, bounds, code):
    """Support is held against a ratio of 1, refutation against `point`, each one-sided at 5 % (paired t over the
    seeds)."""
    own, base, point = np.array(treatment), np.array([1.0, 1.01, 0.99]), 0.75
    result = st.Ratio(own.mean(), *map(np.asarray, bounds), np.zeros(99), (own, base))
    p = {
        st.SUPPORTED: stats.ttest_rel(own, base, alternative="less").pvalue,
        st.REFUTED: stats.ttest_rel(own, point * base, alternative="greater").pvalue,
    }
    primary = st.SUPPORTED if own.mean() <= point else st.REFUTED
    decision = st.decide_variance(result, point)
    assert int(decision.code) == code
    assert int(decision.primary) == primary
    assert bool(decision.code == primary) == (p[primary] <= 0.05) == (code == primary)


@pytest.mark.parametrize(("sd", "agrees"), [(0.0586, True), (0.0596, False)])
def test_a_companion_agrees_at_five_percent_one_sided(sd, agrees):
    # t of 3 seeds: 2.920 at 5 %; the mean .1 over sd / sqrt(3)
    values = 0.1 + sd * np.array([-1.0, 0.0, 1.0])
    assert (stats.ttest_1samp(values, 0.0, alternative="greater").pvalue < 0.05) == agrees
    assert (
        bool(st.decide_mean("superiority", estimate(0.1, 1e-3), st.seed_mean(values), 0.0).code != st.INCONCLUSIVE)
        == agrees
    )
    assert (
        bool(st.decide_mean("superiority", estimate(-0.1, 1e-3), st.seed_mean(-values), 0.0).code != st.INCONCLUSIVE)
        == agrees
    )


# ---- times


def test_time_ratio_ignores_hiccups_of_the_machine():
    r = rng(11)
    base = 0.1 * np.exp(r.normal(0, 0.02, 200))
    treatment = 1.005 * 0.1 * np.exp(r.normal(0, 0.02, 200))
    treatment[::25] *= 20
    result = st.time_ratio(treatment, base, draws=1000, rng=rng())
    assert result.ratio == pytest.approx(1.005, abs=0.006)
    assert st.decide_cost(result, 1.02).code == st.SUPPORTED
    assert st.decide_cost(result, 0.98).code == st.REFUTED
    assert st.decide_cost(result, 1.005).code == st.INCONCLUSIVE


@pytest.mark.parametrize("pairs", [20, 21])
def test_time_ratio_draws_the_bootstrap_of_the_median(pairs):
    log = rng(13).normal(0, 0.05, (2, pairs))
    result = st.time_ratio(np.exp(log), np.ones_like(log), draws=40_000, rng=rng(), blocks=5)
    for mine, theirs in zip(result.draws, log, strict=True):
        peer = stats.bootstrap(
            (theirs,), np.median, n_resamples=40_000, method="percentile", vectorized=True, rng=rng(14)
        )
        mine, theirs = (np.log(mine).round(9), peer.bootstrap_distribution.round(9))  # steps at the same places
        assert stats.ks_2samp(mine, theirs).statistic < 0.015  # 1 % of such pairs of samples differ by .0115


def test_cost_needs_the_blocks_to_agree():
    log = np.concatenate([np.full(54, 0.0), np.full(46, 0.2)])  # a median of 1, and half the time 22 % slower
    result = st.time_ratio(np.exp(log + rng(12).normal(0, 1e-4, 100)), np.ones(100), draws=400, rng=rng())
    assert st.decide_cost(result, 1.02).code == st.INCONCLUSIVE


# ---- Holm, probability of improvement


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, made monotone
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert st.holm([[0.01, 0.04], [0.5, 0.02]]) == pytest.approx(np.array([[0.02, 0.04], [0.5, 0.04]]))


def test_holm_keeps_the_family_wise_error():
    p = rng(13).uniform(size=(20_000, 5))
    assert (st.holm(p) < 0.05).any(-1).mean() == pytest.approx(0.05, abs=0.005)


def test_probability_of_improvement_counts_seed_pairs_and_half_ties():
    treatment, baseline = np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[2.0, 5.0], [2.0, 4.0]])
    # question 1: 1>2 no no, 3>2 yes yes; question 2: 5=5 half, 5>4 yes, twice
    assert st.probability_of_improvement(treatment, baseline) == (2 + 3) / 8
