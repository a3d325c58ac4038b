"""lib/stats.py against its formulas: constants by simulation, coverage and error rates on grids of noise, peers."""

import functools

import numpy as np
import pytest
from scipy import stats

from lib import stats as st

LOOKS = (5, 8, 12, 20)


@pytest.mark.parametrize("looks", st.BOUNDS)
def test_the_stored_bounds_are_those_of_the_simulated_paths(looks):
    assert st.bound_of(looks) == pytest.approx(np.quantile(st.largest_deviates(looks), 0.95), abs=0.01)
    assert st.alpha_of(st.bound_of(looks), looks) == pytest.approx(0.05, abs=0.001)


def test_critical_values_are_their_formula():
    """c_k = F_t^-1(Phi(C); n_k - 1), as tables print them to three digits."""
    for n, printed in zip(LOOKS, (3.982, 3.140, 2.830, 2.633), strict=True):
        c = st.critical(st.bound_of(LOOKS), n)
        assert stats.t.cdf(c, n - 1) == pytest.approx(stats.norm.cdf(st.bound_of(LOOKS)), abs=1e-6)
        assert c == pytest.approx(printed, abs=0.003)


def test_one_look_without_questions_is_scipys_t():
    x = np.random.default_rng(3).normal(0.4, 1, 9)
    sequence, peer = st.look_sequentially(x[:, None], (9,)), stats.ttest_1samp(x, 0.1)
    interval = peer.confidence_interval(0.95)
    assert (sequence.low[0], sequence.high[0]) == pytest.approx((interval.low, interval.high))
    p = min(sequence.p(0.1, 1), sequence.p(0.1, -1))
    assert p == pytest.approx(peer.pvalue)


def test_the_two_way_layout_by_hand():
    d = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 8.0]])
    look = st.look_at(d)
    assert look.mean == pytest.approx(3.5)
    assert look.seed_ms == pytest.approx(3 * ((2 - 3.5) ** 2 + (5 - 3.5) ** 2))
    assert look.question_ms == pytest.approx(2 * ((2 - 3.5) ** 2 + (3 - 3.5) ** 2 + (5.5 - 3.5) ** 2) / 2)
    left = d - np.array([[2.0], [5.0]]) - np.array([2.0, 3.0, 5.5]) + 3.5
    assert look.residual_ms == pytest.approx((left**2).sum() / 2)


def noise(n, seeds, questions, seed_sd, question_sd, residual_sd, rng):
    """(n, seeds, questions) differences around 0."""
    between = rng.normal(0, seed_sd, (n, seeds, 1)) + rng.normal(0, question_sd, (n, 1, questions))
    return between + rng.normal(0, residual_sd, (n, seeds, questions))


GRID = [(1, 0, 0), (0, 1, 0.3), (0, 0, 1), (0.3, 0.3, 1), (1, 1, 1), (0.1, 1, 1), (0.05, 0.2, 1)]


@pytest.mark.parametrize("sds", GRID)
def test_the_intervals_of_all_looks_hold_together(sds):
    """Whenever the study stops: simultaneous coverage at least .945 (3,000 studies, so .95 comes out within .008)."""
    rng, n, questions = np.random.default_rng(11), 3000, 1 if sds == (1, 0, 0) else 24
    held = np.ones(n, dtype=bool)
    for start in range(0, n, 500):
        sequence = st.look_sequentially(noise(500, 20, questions, *sds, rng), LOOKS)
        held[start : start + 500] = ((sequence.low <= 0) & (sequence.high >= 0)).all(0)
    assert held.mean() >= 0.942


def test_bimodal_seeds_are_covered_less_well_where_they_hide():
    """Two-point seeds (a run that succeeds or fails) with the noise of the other arm at half their distance from the
    mean: about .92, with little noise .91, as the first five seeds may all come from one side."""
    rng = np.random.default_rng(12)
    for sd, least in ((0.5, 0.915), (0.2, 0.89)):
        d = rng.choice([-1.0, 1.0], (6000, 20, 1)) + rng.normal(0, sd, (6000, 20, 1))
        sequence = st.look_sequentially(d, LOOKS)
        assert ((sequence.low <= 0) & (sequence.high >= 0)).all(0).mean() >= least


def test_the_family_error_counts_both_words():
    """Five claims at the boundary of what is tested, stopped at any look: wrong words after Holm in at most 5.5 %."""
    rng, n, p = np.random.default_rng(13), 4000, []
    for _ in range(5):
        sequence = st.look_sequentially(0.5 + noise(n, 20, 30, 0.2, 0.1, 0.5, rng), LOOKS)
        p.append(st.decide("superiority", sequence, 0.5).p)
    assert (st.holm(np.stack(p, -1)) < 0.05).any(-1).mean() <= 0.055


@functools.cache
def decided(values: tuple, test: str, margin: float):
    d = np.array(values)[:, None]
    return st.decide(test, st.look_sequentially(d, (len(values),)), margin)


def test_words():
    assert decided((1.0, 1.1, 0.9, 1.0), "superiority", 0.5).code == st.SUPPORTED
    assert decided((1.0, 1.1, 0.9, 1.0), "superiority", 1.5).code == st.REFUTED
    assert decided((1.0, 1.1, 0.9, 1.0), "superiority", 1.0).code == st.INCONCLUSIVE
    assert decided((-1.0, -1.1, -0.9, -1.0), "non_inferiority", 0.5).code == st.REFUTED
    assert decided((-0.2, -0.1, -0.1, -0.2), "non_inferiority", 0.5).code == st.SUPPORTED
    assert decided((-0.2, 0.1, -0.1, 0.2), "equivalence", 0.5).code == st.SUPPORTED
    assert decided((1.0, 1.1, 0.9, 1.0), "equivalence", 0.5).code == st.REFUTED
    assert decided((-1.0, -1.1, -0.9, -1.0), "equivalence", 0.5).code == st.REFUTED
    assert decided((0.10, 0.16, 0.24), "equivalence", 0.005).code == st.INCONCLUSIVE
    assert decided((0.1, 0.2, 0.3), "superiority", 0.0).code == st.INCONCLUSIVE


@pytest.mark.parametrize(("test", "margin"), [("superiority", 0.3), ("non_inferiority", 0.3), ("equivalence", 0.2)])
def test_p_is_the_smallest_alpha_whose_interval_gives_a_word(test, margin):
    rng = np.random.default_rng(4)
    for mean in (-0.6, -0.25, 0.0, 0.15, 0.5):
        d = mean + noise(1, 12, 30, 0.15, 0.3, 0.8, rng)[0]
        p = float(st.decide(test, st.look_sequentially(d, LOOKS), margin).p)
        for alpha, decides in ((p * 1.05, True), (p * 0.95, False)):
            if 1e-4 < alpha < 0.6:
                bound = float(np.quantile(st.largest_deviates(LOOKS), 1 - alpha))
                each = [st.look_at(d[:n]).interval(bound) for n in (5, 8, 12)]
                words = [st.words(test, *map(np.asarray, ends), margin) for ends in each]
                assert any(word != st.INCONCLUSIVE for word in words) == decides


def test_equal_seed_means_are_not_certain():
    """Ties of rounded scores: without the floor of the residual, p would be 1e-21."""
    d = np.random.default_rng(5).choice([0.0, 1.0], (5, 40))
    d += (0.5 - d.mean(1))[:, None]
    sequence = st.look_sequentially(d, LOOKS)
    assert sequence.p(0.45, 1) > 0.01
    assert sequence.high[0] - sequence.low[0] > 0.1


def test_seeds_that_disagree_leave_an_empty_interval_that_decides_nothing():
    d = np.concatenate([np.full(5, 1.0), np.full(15, -5.0)])[:, None] + np.random.default_rng(0).normal(
        0, 1e-3, (20, 1)
    )
    sequence = st.look_sequentially(d, (5, 20))
    assert sequence.low[-1] > sequence.high[-1]
    assert st.decide("superiority", sequence, 0.0).code == st.INCONCLUSIVE


def test_the_order_of_seeds_within_a_look_does_not_matter():
    d = noise(1, 8, 10, 0.3, 0.2, 1.0, np.random.default_rng(6))[0]
    shuffled = np.concatenate([d[:5][::-1], d[5:][::-1]])
    for a, b in zip(st.look_sequentially(d, LOOKS)[2:], st.look_sequentially(shuffled, LOOKS)[2:], strict=True):
        np.testing.assert_allclose(a, b)


def test_leading_axes_are_repetitions():
    d = noise(3, 12, 10, 0.3, 0.2, 1.0, np.random.default_rng(7))
    many = st.decide("superiority", st.look_sequentially(d, LOOKS), 0.1)
    for i in range(3):
        one = st.decide("superiority", st.look_sequentially(d[i], LOOKS), 0.1)
        assert (one.code, one.p) == (many.code[i], pytest.approx(many.p[i]))


def test_too_few_seeds_are_an_error():
    with pytest.raises(ValueError, match="4 seeds: the first look is at 5"):
        st.look_sequentially(np.zeros((4, 1)), LOOKS)
    with pytest.raises(ValueError, match="at least 2"):
        st.look_at(np.zeros((1, 3)))


def test_the_chance_of_a_word_is_that_of_simulated_further_seeds():
    rng, n = np.random.default_rng(8), 4000
    seen = noise(1, 8, 1, 1.0, 0, 0, rng)[0] + 0.9
    look = st.look_at(seen)
    sigma = float(np.sqrt(look.seed_variance))
    true = look.mean + rng.normal(0, sigma / 8**0.5, n)
    new = true[:, None, None] + rng.normal(0, sigma, (n, 12, 1))
    mean = (8 * float(look.mean) + 12 * new.mean((1, 2))) / 20
    half = float(look.half_width(st.bound_of(LOOKS), 20))
    simulated = ((mean - half > 0) | (mean + half < 0)).mean()
    assert st.chance_of_word("superiority", look, 0.0, LOOKS, 20) == pytest.approx(simulated, abs=0.03)


def test_how_many_seeds_would_decide():
    look = st.look_at(noise(1, 5, 1, 1.0, 0, 0, np.random.default_rng(9))[0] * 1.0 + 0.6)
    n = st.seeds_to_decide("superiority", look, 0.0, LOOKS)
    assert st.chance_of_word("superiority", look, 0.0, LOOKS, n, known=True) >= 0.8
    assert st.chance_of_word("superiority", look, 0.0, LOOKS, int(n * 0.8), known=True) < 0.8
    assert st.seeds_to_decide("superiority", look, float(look.mean), LOOKS) is None


def test_log_variance_ratio_by_hand():
    treatment, baseline = np.zeros((3, 2, 4)), np.zeros((3, 2, 4))
    treatment += np.array([1.0, 2.0, 3.0])[:, None, None]
    baseline += np.array([2.0, 4.0, 6.0])[:, None, None]
    assert st.log_variance_ratio(treatment, baseline) == pytest.approx(np.log(0.25) * np.ones((2, 1)))


def test_holm_by_hand():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_probability_of_improvement_counts_seed_pairs_and_half_ties():
    assert st.probability_of_improvement(np.array([[1.0], [2.0]]), np.array([[1.0], [0.0]])) == pytest.approx(7 / 8)


def test_t_tail_is_scipys_one_sided_t_test():
    x = np.random.default_rng(2).normal(0.3, 1, 12)
    assert st.t_tail(x, 0.1, 1) == pytest.approx(stats.ttest_1samp(x, 0.1, alternative="greater").pvalue)
    assert st.t_tail(x, 0.1, -1) == pytest.approx(stats.ttest_1samp(x, 0.1, alternative="less").pvalue)
