"""From tables of scores to words: which seeds a look takes, what is tested, what is missing, diverged, at chance or chosen
on pilots, and what `check` says of a claim that cannot be decided."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib import claims as c, config, power, stats as st, tables
from lib.claims import Chance, Claims, choose, pair_up, select
from lib.config import ROOT
from lib.errors import StudyError
from lib.run import check
from tests.notebook import write_member

LOOKS = (5, 8, 12, 20)
SEEDS = tuple(range(42, 62))
PUBLISHED = {study: c.load(ROOT / "params" / study / "claims.yaml") for study in ("td_dpo", "iw_lora", "graff")}


def study_of(*claims, **more):
    """Claims about `new` against `old`; what is not said: superiority at two thirds of 0.3."""
    made = []
    for i, claim in enumerate(claims):
        size = {} if {"gain", "margin"} & set(claim) else {"gain": 0.3}
        made.append({"id": f"X{i + 1}", "treatment": "new", "baseline": "old", **size, **claim})
    return Claims.model_validate({"study": "made", "keys": ["beta"], "claims": made, **more})


def record_of(scores, *, seeds=SEEDS, ended=None, metric="score", unit="question"):
    """(rows, members) of {method, or (method, beta): scores (S, Q)}. `ended`: {(method, seed): a status other than
    completed}, of which there are no rows; None: the run is in no table."""
    rows, members = [], []
    for name, values in scores.items():
        who = dict(zip(("method", "beta"), name if isinstance(name, tuple) else (name,), strict=False))
        for seed, own in zip(seeds, values, strict=False):
            status = (ended or {}).get((who["method"], seed), "completed")
            members += [{**who, "seed": seed, "status": status}] if status else []
            if status == "completed":
                rows += [{**who, "seed": seed, "status": status, unit: q, metric: x} for q, x in enumerate(own)]
    return pd.DataFrame(rows), pd.DataFrame(members)


def judge(study, rows, members=None, *, scale="laptop", mode="full", **more):
    return {v.id: v for v in c.evaluate(study, rows, members=members, scale=scale, mode=mode, **more)}


def judge_one(claim, rows, members=None, *, study=None, **more):
    return judge(study_of(claim, **(study or {})), rows, members, **more)["X1"]


def against(d, level=5.0, **more):
    """The record in which `new` is `d` (S, Q) above `old`."""
    old = np.full(np.shape(d), level)
    return record_of({"new": old + d, "old": old}, **more)


def around(mean, *, seeds=8, questions=20, seed_sd=0.05, residual_sd=0.2, seed=0):
    """Differences (S, Q) with this mean over the first 5 seeds, and little noise."""
    rng = np.random.default_rng(seed)
    d = rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, residual_sd, (seeds, questions))
    return d - d[:5].mean() + mean


# ---- one comparison


def test_what_is_reported_are_the_equations_over_the_looks():
    rng = np.random.default_rng(1)
    d = 1.5 + rng.normal(0, 0.3, (12, 1)) + rng.normal(0, 0.5, (1, 30)) + rng.normal(0, 1, (12, 30))
    found = judge_one({}, *against(d))
    bound, low, high = 2.4005, -np.inf, np.inf
    for n, look in zip(LOOKS, found.looks, strict=False):
        x = d[:n]
        of_seeds, of_questions, mean = x.mean(1), x.mean(0), x.mean()
        rest = ((x - of_seeds[:, None] - of_questions + mean) ** 2).sum() / (n - 1) / 29
        critical = stats.t.isf(stats.norm.sf(bound), n - 1)
        variance = critical**2 * max(30 * of_seeds.var(ddof=1), rest)
        variance += (0.934 * bound) ** 2 * max(n * of_questions.var(ddof=1) - rest, 0)
        half = (variance / (n * 30)) ** 0.5
        low, high = max(low, mean - half), min(high, mean + half)
        assert (look["seeds"], look["estimate"]) == (n, pytest.approx(mean))
        assert (look["low"], look["high"]) == (pytest.approx(low), pytest.approx(high))
    assert [look["seeds"] for look in found.looks] == [5, 8, 12]
    assert (found.estimate, found.interval95) == (pytest.approx(d.mean()), pytest.approx((low, high)))
    assert (found.n_seeds, found.n_questions) == (12, 30)
    assert found.per_seed == pytest.approx(dict(zip(SEEDS, d.mean(1), strict=False)))
    # p is the smallest alpha whose interval excludes what is tested
    assert judge_one({"margin": low}, *against(d)).p == pytest.approx(0.05, abs=5e-4)
    assert judge_one({"margin": high}, *against(d)).p == pytest.approx(0.05, abs=5e-4)


def test_one_number_per_seed_is_judged_by_t_and_comes_from_the_members_where_it_is_about_no_question():
    values = np.random.default_rng(2).normal(0.2, 0.1, (8, 1))
    rows, members = against(values, metric="f1", level=0.0)
    found = judge_one({"metric": "f1"}, pd.DataFrame(), members.merge(rows[["method", "seed", "f1"]]))
    interval = stats.ttest_1samp(values[:, 0], 0).confidence_interval(0.95)
    assert (found.n_questions, found.fixed95) == (1, pytest.approx(tuple(interval)))
    assert found.interval95[0] < interval.low


@pytest.mark.parametrize(
    ("claim", "means", "tested"),
    [
        ({"gain": 0.3}, (0.5, 0.2, 0.05), "at least 0.2, two thirds of the claimed 0.3"),
        ({"margin": 0.0}, (0.3, 0.0, -0.3), "above 0"),
        ({"test": "non_inferiority", "margin": 0.3}, (0.0, -0.3, -0.6), "at most 0.3 below"),
        ({"test": "equivalence", "margin": 0.3}, (0.0, 0.3, 0.6), "within 0.3 of 0"),
        ({"test": "equivalence", "margin": 0.3}, (0.0, -0.3, -0.6), "within 0.3 of 0"),
    ],
)
def test_one_interval_gives_both_words_and_the_sentence_names_what_was_tested(claim, means, tested):
    for mean, word in zip(means, ("supported", "inconclusive", "refuted"), strict=True):
        found = judge_one(claim, *against(around(mean)))
        assert (found.verdict, found.decided) == (word, word != "inconclusive")
        assert f"tested was {tested}" in found.reason
        assert (found.next_look is None) == found.decided
        assert ("After an early stop" in found.reason) == found.decided
    assert "early stop" not in judge_one(claim, *against(around(means[0], seeds=20))).reason


def test_a_refuted_gain_that_lies_above_0_says_so():
    assert "but above 0" in judge_one({"gain": 0.9}, *against(around(0.3))).reason
    assert "but above 0" not in judge_one({"gain": 0.9}, *against(around(-0.3))).reason


def test_a_factor_is_two_thirds_on_the_log_scale():
    claim = {"factor": 1.22, "margin": 0}
    word = {ratio: judge_one(claim, *against(4 * (ratio - 1) + around(0.0, residual_sd=0.1), level=4.0)).verdict
            for ratio in (1.22, 1.22 ** (2 / 3), 1.08)}  # fmt: skip
    assert list(word.values()) == ["supported", "inconclusive", "refuted"]
    assert study_of(claim).claims[0].threshold_text.startswith("above 1.14 times the baseline's, two thirds")
    with pytest.raises(ValueError, match="`factor` is what superiority claims"):
        study_of({"factor": 1.22, "test": "equivalence", "margin": 0.2})


def test_a_figure_of_its_own_belongs_to_the_papers_scale():
    claim = {"test": "absolute", "baseline": None, "reported": 5.0, "margin": 0.5}
    for mean, word in ((0.0, "supported"), (-0.5, "inconclusive"), (-1.0, "refuted")):
        assert judge_one(claim, *against(around(mean)), scale="paper").verdict == word
    assert judge_one(claim, *against(around(0.0))).verdict == "not evaluated"


# ---- small samples and ties, which a bootstrap or a z would decide


def test_three_seeds_of_different_differences_leave_everything_open():
    paper = {"study": {"looks": (3, 5, 8)}}
    found = judge_one({"margin": 0}, *against(np.array([[0.1], [0.2], [0.3]])), **paper)
    assert (found.verdict, found.n_seeds) == ("inconclusive", 3)
    assert found.interval95[0] < 0 < found.interval95[1]
    parity = {"test": "equivalence", "margin": 0.005}
    assert judge_one(parity, *against(np.array([[0.10], [0.16], [0.24]])), **paper).verdict == "inconclusive"


def test_equal_seed_means_prove_nothing_by_being_equal():
    d = np.random.default_rng(0).normal(0, 2, (5, 320))
    found = judge_one({"margin": 0}, *against(d - d.mean(1, keepdims=True) + 0.1))
    assert set(np.round(list(found.per_seed.values()), 9)) == {0.1}
    assert (found.verdict, found.p > 0.05) == ("inconclusive", True)
    # one number a seed, the same in all: as sure as the simulated bound can be, and no surer
    assert judge_one({"margin": 0}, *against(np.full((5, 1), 0.1))).p >= 1 / st.PATHS


def test_identical_scores_compare_nothing_and_have_no_p():
    rows, members = against(np.zeros((5, 20)))
    parity = {"test": "equivalence", "margin": 0.3}
    found = judge_one(parity, rows, members)
    assert (found.verdict, found.p, found.holm_p) == ("vacuous", None, None)
    assert found.reason.startswith("identical: every score of new is that of old")
    rows.loc[0, "score"] += 1e-9
    assert judge_one(parity, rows, members).verdict == "supported"


def test_looks_that_contradict_each_other_decide_nothing():
    tight = np.concatenate([around(1.0, seeds=5, seed_sd=1e-3), np.full((15, 20), 0.8)])
    found = judge_one({"margin": 0.9}, *against(tight))
    assert (found.verdict, found.decided, found.next_look) == ("inconclusive", False, None)
    assert "seeds disagree" in found.reason
    assert found.seeds_to_decide is None, "what is empty stays empty"
    assert "would decide it" not in found.reason
    assert all(look["low"] < look["high"] for look in found.looks), "no bar is drawn of an empty interval"
    assert found.looks[-1]["low"] < found.looks[-1]["estimate"] < found.looks[-1]["high"]


# ---- which seeds a look takes


def test_the_order_of_seeds_within_a_look_does_not_matter():
    d = around(0.25, seed_sd=0.3)
    numbers = ("verdict", "estimate", "interval95", "p", "chance", "seeds_to_decide")
    one, other = (judge_one({}, *against(d[order])) for order in (np.arange(8), [3, 1, 4, 0, 2, 7, 6, 5]))
    for name in numbers:
        assert getattr(one, name) == pytest.approx(getattr(other, name)), name


def test_a_look_takes_the_first_seeds_and_leaves_those_beyond_it():
    d = around(0.25, seeds=7)
    found = judge_one({}, *against(d))
    assert (list(found.per_seed), found.n_seeds, found.next_look) == ([42, 43, 44, 45, 46], 5, 8)
    d[5:] = 100.0
    assert c.to_json([judge_one({}, *against(d))]) == c.to_json([found])
    assert "missing: 1 of the 5 seeds" in judge_one({}, *against(d[:4])).reason


def test_a_run_that_its_cap_ended_beyond_the_look_takes_no_word_back():
    rows, members = against(around(0.25, seeds=7))
    members["capped"] = (members["method"] == "old") & (members["seed"] == 48)
    assert judge_one({}, rows, members).n_seeds == 5
    members["capped"] = (members["method"] == "old") & (members["seed"] == 44)
    assert "old, seed 44: ended by total_steps, not its budget" in judge_one({}, rows, members).reason


@pytest.mark.parametrize("status", ["failed", "lost", "out_of_memory", "missing", None])
def test_a_look_is_never_taken_on_a_completed_subset(status):
    d = around(0.5, seeds=9)
    found = judge_one({}, *against(d, ended={("old", 44): status}))
    assert (found.verdict, found.estimate, found.next_look) == ("not evaluated", None, None)
    assert f"old, seed 44: {'no run' if status in (None, 'missing') else status}" in found.reason
    # of the second look: then it is the first that counts, and not the eight that there are
    assert judge_one({}, *against(d, ended={("old", 47): status})).n_seeds == 5
    # beside a claim, the seeds that both sides have
    beside = {"baseline": "other", "beside": [{"name": "old", "baseline": "old"}]}
    rows, members = record_of({"new": d + 5, "other": d, "old": d + 4}, ended={("old", 44): status})
    assert judge_one(beside, rows, members).beside[0]["n_seeds"] == 8


def test_members_stand_in_the_order_of_the_plan_with_those_that_are_missing(tiny, tmp_path):
    """Read off the folders they would stand as 10, 100, 9, and what is missing last: a look's first seeds would be
    others."""
    run = tiny(seed_list=[9, 10, 100, 7])
    planned = config.members(run)
    for member in planned:
        if member.seed != 10:
            write_member(tmp_path, member, {"validation_implicit_accuracy": 0.6})
    everyone = tables.load(tmp_path, planned).everyone
    assert list(everyone["seed"]) == [9, 10, 100, 7]
    assert list(everyone["status"]) == ["completed", "missing", "completed", "completed"]
    assert set(everyone["beta"]) == {0.05}, "a missing member is found by its cell like any other"
    assert list(tables.load(tmp_path, planned).members["seed"]) == [9, 100, 7]


# ---- gaps


def test_a_few_questions_without_a_score_are_left_out_and_counted_and_more_are_a_gap():
    rows, members = against(around(0.5, questions=320, seeds=5))
    for missing, verdict in ((16, "supported"), (17, "not evaluated"), (319, "not evaluated")):
        left = rows[(rows["method"] == "new") | (rows["seed"] != 43) | (rows["question"] >= missing)]
        found = judge_one({}, left, members)
        assert found.verdict == verdict
        if verdict == "supported":
            assert (found.n_questions, found.n_dropped) == (304, 16)
            assert "16 question(s) without a score" in found.note
        else:
            assert f"{missing} of 320 questions, more than 5%" in found.reason


@pytest.mark.parametrize("gap", [np.inf, -np.inf, np.nan, None, "n/a"])
def test_an_infinite_score_is_a_gap_like_any_other(gap):
    rows, members = against(around(0.5, seeds=5), level=0.0)
    rows["score"] = rows["score"].astype(object)
    mine = (rows["method"] == "new") & (rows["seed"] == 44)
    one, whole, number = rows.copy(), rows.copy(), members.assign(score=0.5)
    one.loc[mine & (rows["question"] == 3), "score"] = gap
    whole.loc[mine, "score"] = gap
    assert (judge_one({}, one, members).n_dropped, judge_one({}, one, members).verdict) == (1, "supported")
    assert "new, seed 44: no scores" in judge_one({}, whole, members).reason
    number["score"] = number["score"].astype(object)
    number.loc[(number["method"] == "new") & (number["seed"] == 44), "score"] = gap
    assert "new, seed 44: no scores" in judge_one({}, pd.DataFrame(), number).reason


def test_a_question_is_the_mean_of_its_turns_and_missing_if_one_is():
    rows = pd.DataFrame({"method": "old", "seed": 42, "question": [1, 1, 2, 2], "score": [4, 8, 5, None]})
    rows = pd.concat([rows, *(pd.DataFrame({**rows, "question": q, "score": 1.0}) for q in range(3, 30))])
    members = pd.DataFrame({"method": ["old"], "seed": [42], "status": ["completed"]})
    pairs = pair_up(study_of({}), c.Data(rows, None, members, rows[:0], ()), [{"method": "old"}], "score")
    assert (pairs.values[0, 0, 0], pairs.values.shape, pairs.dropped) == (6.0, (1, 1, 28), 1)


def test_two_copies_of_a_run_are_refused_and_never_averaged():
    d = around(0.5)
    rows, members = against(d)
    copied = [pd.concat([x.assign(run_id="a"), x[x["method"] == "old"].assign(run_id="b")]) for x in (rows, members)]
    for found in (judge_one({}, *copied), judge_one({}, copied[0])):
        assert found.verdict == "not evaluated"
        assert "old, seed 42: one member, of the 2 (a, b) that answer to it" in found.reason


def test_scores_that_a_run_left_count_for_nothing_where_it_did_not_complete():
    """It may have died between its questions, or diverged after them."""
    rows, members = against(around(0.5))
    mine = (members["method"] == "old") & (members["seed"] == 44)
    assert "seed 44: failed" in judge_one({}, rows, members.assign(status=members.status.mask(mine, "failed"))).reason
    diverged = judge_one({}, rows, members.assign(status=members.status.mask(mine, "diverged")))
    assert diverged.per_seed[44] == pytest.approx(rows[(rows.method == "new") & (rows.seed == 44)].score.mean() - 1.0)


def test_what_is_not_evaluated_says_why():
    rows, members = against(around(0.5))
    trial = judge_one({}, rows, members, mode="trial")
    assert (trial.verdict, trial.estimate, trial.p) == ("not evaluated", None, None)
    assert "paper scale" in judge_one({"scales": ["paper"]}, rows, members).reason
    assert judge_one({"not_evaluated": "no definition"}, rows, members).reason == "no definition"
    assert judge_one({"metric": "joules"}, rows, members, absent={"joules": "no counter"}).reason == "no counter"
    assert judge_one({}, rows[:0], members, fix="./run_all.sh judge").reason.endswith("./run_all.sh judge")
    for nothing in ((pd.DataFrame(), pd.DataFrame()), (pd.DataFrame(), None)):
        assert judge_one({}, *nothing).verdict == "not evaluated"


def test_select_knows_numbers_from_strings_and_absent_columns():
    frame = pd.DataFrame({"method": ["a", "b"], "beta": ["0.1", 0.1]})
    assert len(select(frame, {"beta": 0.1})) == 2
    assert len(select(frame, {"method": "a", "beta": 0.1})) == 1
    assert select(frame, {"gamma": 1}).empty


# ---- several claims


def test_holm_takes_a_word_away_and_says_so():
    rows, members = against(around(0.5, seed_sd=0.2, seeds=5))
    alone = judge_one({}, rows, members)
    assert (alone.verdict, alone.holm_p) == ("supported", alone.p)
    assert 0.005 < alone.p < 0.05
    # a claim whose threshold is the estimate has no p to speak of; so many beside it that its own no longer stands out
    beside = [{"margin": alone.estimate}] * int(0.05 / alone.p)
    crowded = judge(study_of({}, *beside), rows, members)["X1"]
    assert crowded.holm_p == pytest.approx(alone.p * (len(beside) + 1))
    assert (crowded.verdict, crowded.decided, crowded.next_look) == ("inconclusive", False, 8)
    assert crowded.interval95 == alone.interval95
    assert f"only before the correction for {len(beside) + 1} claims" in crowded.reason
    # refuted as well: one correction over both words
    low, high = ({"gain": 1.5 * (alone.estimate + side * 0.25)} for side in (-1, 1))
    both = judge(study_of(low, high), rows, members)
    assert [both["X1"].verdict, both["X2"].verdict] == ["supported", "refuted"]
    assert both["X1"].holm_p > both["X1"].p


def test_claims_that_wait_for_scores_count_and_those_never_evaluated_or_about_times_do_not():
    """A word that the first scores give is not taken back when the other claims' come."""
    rows, members = against(around(0.5))
    gone, time = {"baseline": "nobody"}, {"test": "cost_ratio", "metric": "seconds", "margin": 1.02}
    found = judge(study_of({}, gone, time), rows, members, costs=timed(1.0))
    assert found["X1"].holm_p == pytest.approx(2 * found["X1"].p)
    assert found["X3"].holm_p == found["X3"].p
    assert found["X2"].holm_p is None
    here = judge(study_of({}, {"metric": "joules"}), rows, members, absent={"joules": "no counter"})
    assert here["X1"].holm_p == pytest.approx(2 * here["X1"].p)  # as on a machine that has one
    never = judge(study_of({}, gone | {"not_evaluated": "no definition"}), rows, members)
    assert never["X1"].holm_p == never["X1"].p


def test_a_word_that_the_study_takes_back_is_open_again():
    def take_back(verdicts):
        for verdict in verdicts:
            verdict.verdict = "inconclusive"

    found = judge(study_of({"margin": 0}), *against(around(1.0)), qualify=take_back)["X1"]
    assert (found.verdict, found.decided, found.next_look) == ("inconclusive", False, 12)
    assert "early stop" not in found.reason


def test_an_open_claim_says_what_would_decide_it():
    found = judge_one({}, *against(around(0.3, seed_sd=0.5)))
    assert (found.verdict, found.next_look) == ("inconclusive", 12)
    assert 0 < found.chance < 1
    assert f"about {found.seeds_to_decide} seeds would decide it (80 % chance)" in found.reason
    at_threshold = judge_one({}, *against(around(0.2)[:5]))
    assert (at_threshold.seeds_to_decide, "would decide" in at_threshold.reason) == (None, False)


# ---- the variance across levels

LEVELS = (1.0, 2.0, 3.0)
ACROSS = {"test": "variance_ratio", "across": {"beta": LEVELS}, "gain": 0.6, "guard": 0.3}


def spread_of(ratio, *, worse=0.0, seeds=5, sd=0.05):
    """In every seed the variance over beta of `new` is about `ratio` times that of `old`."""
    ratios = ratio * np.exp(sd * np.random.default_rng(0).permutation(np.linspace(-1, 1, seeds)))
    scores = {}
    for level, mean in zip(LEVELS, (4.0, 5.0, 6.0), strict=True):
        scores["old", level] = np.full((seeds, 4), mean)
        scores["new", level] = np.broadcast_to(5 - worse + (mean - 5) * np.sqrt(ratios)[:, None], (seeds, 4))
    return record_of(scores), ratios


@pytest.mark.parametrize(
    ("ratio", "worse", "word"),
    [
        (0.4, 0.0, "supported"),  # its best is lower by 0.37, less than the guard
        (0.6 ** (2 / 3), 0.0, "inconclusive"),
        (1.0, 0.0, "refuted"),
        (0.4, 1.0, "vacuous"),
        (0.85, 1.0, "vacuous"),
        (11.0, 0.0, "refuted"),
        (11.0, 3.0, "refuted"),  # worse scores, and no less variance: nothing that the guard is for
    ],
)
def test_a_variance_ratio_is_the_geometric_mean_over_seeds(ratio, worse, word):
    (rows, members), ratios = spread_of(ratio, worse=worse)
    found = judge_one(ACROSS | {"guard": 0.4}, rows, members)
    assert found.verdict == word, found.reason
    assert found.estimate == pytest.approx(np.exp(np.log(ratios).mean()))
    assert list(found.per_seed.values()) == pytest.approx(ratios)
    half = stats.t.isf(0.025, 4) * np.log(ratios).std(ddof=1) / 5**0.5
    assert found.fixed95 == pytest.approx(tuple(found.estimate * np.exp([-half, half])))
    assert "at most 0.711, two thirds of the claimed 0.6 on the log scale" in found.reason
    assert (word == "vacuous") == ("worse show nothing" in found.reason)


def test_a_ratio_that_is_refuted_and_below_1_says_so():
    assert "but below 1" in judge_one(ACROSS, *spread_of(0.85)[0]).reason
    assert "but below 1" not in judge_one(ACROSS, *spread_of(1.5)[0]).reason


def test_scores_that_do_not_vary_have_no_variance_ratio():
    scores = {(method, level): np.full((5, 4), 5.0) for method in ("new", "old") for level in LEVELS}
    assert judge_one(ACROSS, *record_of(scores)).verdict == "not evaluated"


# ---- times

TIME = {"test": "cost_ratio", "metric": "seconds", "margin": 1.02}


def timed(ratio, *, processes=8, pairs=9, method="new", seed=0):
    rng = np.random.default_rng(seed)
    logs = math.log(ratio) + rng.normal(0, 0.004, processes)[:, None] + rng.normal(0, 0.01, (processes, pairs))
    logs -= np.median(logs, axis=1).mean() - math.log(ratio)
    places = np.repeat(np.arange(processes), pairs)
    return pd.DataFrame({"method": method, "process": places, "seconds": np.exp(logs).ravel(), "seconds_baseline": 1.0})


@pytest.mark.parametrize(("ratio", "word"), [(1.0, "supported"), (1.02, "inconclusive"), (1.2, "refuted")])
def test_a_fresh_process_is_what_repeats_of_a_time(ratio, word):
    costs = timed(ratio, processes=9)
    found = judge_one(TIME, pd.DataFrame(), costs=costs)
    medians = np.log(costs["seconds"]).groupby(costs["process"]).median()[:8]
    assert (found.verdict, found.n_seeds, found.estimate) == (word, 8, pytest.approx(np.exp(medians.mean())))
    half = stats.t.isf(0.025, 7) * medians.std(ddof=1) / 8**0.5
    assert found.fixed95 == pytest.approx(tuple(found.estimate * np.exp([-half, half])))
    assert found.interval95[0] < found.fixed95[0]
    assert f"Processes differ from {np.exp(medians.min()):.3f} to {np.exp(medians.max()):.3f}" in found.reason
    assert "tested was a ratio of at most 1.02:" in found.reason
    assert judge_one(TIME | {"margin": None, "gain": 0.9}, pd.DataFrame(), costs=timed(0.85)).verdict == "supported"


def test_of_several_runs_each_process_counts_once_in_each():
    """A run of three that is slower is not hidden by the median of all their steps."""
    parts = [timed(ratio, seed=i).assign(run_id=str(i)) for i, ratio in enumerate((1.0, 1.0, 1.3))]
    found = judge_one(TIME, pd.DataFrame(), costs=pd.concat(parts))
    assert found.estimate == pytest.approx(1.3 ** (1 / 3), rel=5e-3)
    assert found.n_seeds == 8


def test_fewer_processes_other_methods_and_broken_pairs_are_no_measurement():
    mine, other = timed(1.0), timed(3.0, method="third", processes=12)
    broken = pd.DataFrame({"method": "new", "process": range(20, 25), "seconds": [0.0, -1.0, np.nan, np.inf, 1.0],
                           "seconds_baseline": [1.0, 1.0, 1.0, 1.0, 0.0]})  # fmt: skip
    only, among = (judge_one(TIME, pd.DataFrame(), costs=x) for x in (mine, pd.concat([other, mine, broken])))
    assert c.to_json([among]) == c.to_json([only])
    few = judge_one(TIME, pd.DataFrame(), costs=pd.concat([mine[mine["process"] < 7], broken]))
    assert (few.verdict, "7 processes, at least 8 are needed" in few.reason) == ("not evaluated", True)
    assert "0 processes" in judge_one(TIME, pd.DataFrame()).reason
    for looks, least in (((3, 5), 8), ((5, 12), 12)):
        found = judge_one(TIME, pd.DataFrame(), costs=mine, study={"looks": looks})
        assert found.n_seeds == 8 if least == 8 else "at least 12 are needed" in found.reason


# ---- what diverged


def test_a_diverged_run_has_the_worst_score_and_what_completed_stands_beside():
    d = around(0.5, seeds=5)
    found = judge_one({}, *against(d, ended={("old", 43): "diverged"}))
    assert (found.n_seeds, found.per_seed[43]) == (5, pytest.approx(5 + d[1].mean() - 1.0))
    assert (found.sensitivity["n_seeds"], found.sensitivity["estimate"]) == (4, pytest.approx(d[[0, 2, 3, 4]].mean()))
    assert "verdict" not in found.sensitivity
    rows, members = against(d, ended={("old", 43): "diverged"}, metric="accuracy")
    data = c.Data(rows, None, members, rows[:0], ())
    assert pair_up(study_of({}), data, [{"method": "old"}], "accuracy").values[0, 1].mean() == 0.5


def test_a_claim_of_no_divergence_is_not_supported_where_a_run_of_its_own_diverged():
    claim = {"margin": 0, "no_divergence": True, "premise": True}
    old = {("old", seed): "diverged" for seed in SEEDS[:5]}
    rows, members = against(around(4.0, seeds=5), ended=old)
    found = judge_one(claim, rows, members)
    assert (found.verdict, found.premise["holds"]) == ("supported", True)
    cheap = {"diverged": {"score": 9.0}}  # so that the interval supports
    found = judge_one(claim, *against(around(4.0, seeds=5), ended={("new", 43): "diverged"}), study=cheap)
    assert (found.verdict, found.premise["holds"]) == ("inconclusive", False)
    assert "But new diverged (seed 43)" in found.reason
    assert "old did not diverge in any of 5 runs" in found.premise["text"]


def test_an_average_in_which_most_runs_completed_has_not_diverged():
    """One level of three in each seed, another in every seed: six of nine runs of each side are there."""
    lost, rows, members = {(42, "a"), (43, "b"), (44, "c")}, [], []
    for method, task, seed in itertools.product(("new", "old"), "abc", (42, 43, 44)):
        status = "diverged" if (seed, task) in lost else "completed"
        members.append(run := {"method": method, "task": task, "seed": seed, "status": status})
        rows += [{**run, "question": q, "score": 5.0 + q + seed} for q in range(4)] * (status == "completed")
    claim = {"across": {"task": ["a", "b", "c"]}, "test": "non_inferiority", "margin": 0.5, "gain": None}
    study = {"looks": (3,), "keys": ("task",)}
    found = judge_one(claim, pd.DataFrame(rows), pd.DataFrame(members), study=study)
    assert "every run" not in found.reason
    assert "diverged (seed 42, 43, 44)" in found.reason


def test_a_metric_that_has_no_value_for_a_diverged_run_is_not_given_one():
    rows, members = against(around(1.0), ended={("new", 43): "diverged"})
    found = judge_one({"margin": 0}, rows, members, study={"diverged": {"accuracy": 0.0}})
    assert found.verdict == "not evaluated"
    assert "a score of diverged runs, for which `diverged` in its claims names none" in found.reason


def test_what_stands_for_diverged_runs_supports_nothing_by_itself():
    new, old = ({(method, seed): "diverged" for seed in SEEDS[:5]} for method in ("new", "old"))
    cheap = {"diverged": {"score": 9.0}}
    assert judge_one({}, *against(around(0.5, seeds=5), ended=new), study=cheap).verdict == "inconclusive"
    both = judge_one({}, *against(around(0.5, seeds=5), ended=new | old))
    assert (both.verdict, both.reason) == ("vacuous", "every run of new and of old diverged")


# ---- `best`


def chosen(members, cell=None):
    study = study_of({}, choose_on="tuning")
    return choose(study, cell or {"method": "old", "beta": "best"}, members)


def tuned(table, *, pilot=False, seeds=(1, 2), status="completed"):
    """Members of {beta: tuning scores}."""
    return pd.DataFrame([{"method": "old", "beta": beta, "seed": seed, "status": status, "tuning": x, "pilot": pilot}
                         for beta, scores in table.items() for seed, x in zip(seeds, scores, strict=True)])  # fmt: skip


def test_the_best_is_chosen_on_pilots_which_are_never_judged():
    pilots = tuned({0.1: (0.5, 0.6), 0.2: (0.9, 0.8)}, pilot=True)
    judged = tuned(dict.fromkeys((0.1, 0.2), (0.99, 0.1, 0.1, 0.1, 0.1)), seeds=SEEDS[:5])
    judged.loc[judged["beta"] == 0.1, "tuning"] = 1.0  # what judged seeds say of tuning chooses nothing
    assert chosen(pd.concat([judged, pilots]))["beta"] == 0.2
    assert chosen(judged)["beta"] == 0.1, "without pilots the runs' own"
    assert chosen(pd.concat([judged, pilots.assign(method="new")])) is None, (
        "its pilots are to come: nothing is best yet"
    )

    members = pd.concat([pilots, judged], ignore_index=True)
    new = members[members["beta"] == 0.1].assign(method="new", beta=np.nan)
    members = pd.concat([members, new], ignore_index=True)
    rows = pd.concat([members.assign(question=q, score=5.0 + 0.01 * q) for q in range(20)], ignore_index=True)
    rows["score"] += np.where(rows["method"] == "new", 1.0, np.where(rows["beta"] == 0.1, 3.0, 0.0))
    rows["score"] += np.where(rows["pilot"], 100.0, 0.001 * rows["seed"] * rows["question"])
    claim = {"baseline": {"method": "old", "beta": "best"}}
    for flagged in (rows, rows.drop(columns="pilot")):
        found = judge_one(claim, flagged, members, study={"choose_on": "tuning"})
        assert (found.verdict, list(found.per_seed)) == ("supported", list(SEEDS[:5]))
        assert (found.estimate, found.n_seeds) == (pytest.approx(1.0), 5)
    assert "of old (beta 0.2)" in found.reason or "above old (beta 0.2)" in found.reason


@pytest.mark.parametrize(
    ("scores", "said"),
    [((0.9, 0.6, 0.5), "least"), ((0.5, 0.6, 0.9), "largest"), ((0.5, 0.9, 0.6), None), ((0.9, 0.5), None)],
)
def test_a_best_at_the_end_of_what_was_tried_is_said_to_be_there(scores, said):
    """A rate that is too high for the baseline alone would look like a gain; of two values one is always at an end."""
    values = [0.1, 0.2, 0.4][: len(scores)]
    pilots = tuned({value: (x, x) for value, x in zip(values, scores, strict=True)}, pilot=True)
    best = values[scores.index(max(scores))]
    judged = tuned({best: (0.5,) * 5, 0.01: (1.0,) * 5}, seeds=SEEDS[:5])  # .01 is another claim's: no pilot tried it
    members = pd.concat([pilots, judged], ignore_index=True)
    new = members[~members["pilot"].astype(bool) & (members["beta"] == best)].assign(method="new", beta=np.nan)
    members = pd.concat([members, new], ignore_index=True)
    rows = pd.concat([members.assign(question=q, score=5.0 + 0.01 * q) for q in range(20)], ignore_index=True)
    rows["score"] += np.where(rows["method"] == "new", 1.0, 0.0) + 0.001 * rows["seed"] * rows["question"]
    found = judge_one({"baseline": {"method": "old", "beta": "best"}}, rows, members, study={"choose_on": "tuning"})
    assert found.verdict == "supported"
    assert (f"old (beta {best:g}) is the {said} that was tried." in found.reason) == bool(said)
    assert ("that was tried" in found.reason) == bool(said)


def test_what_a_run_chose_among_its_pilots_stands():
    """By another metric, or one that is minimized, the run may have trained a cell that this one ranks lower."""
    pilots, judged = tuned({0.1: (0.5, 0.6), 0.2: (0.9, 0.8)}, pilot=True), tuned({0.1: (0.4,)}, seeds=SEEDS[:1])
    assert chosen(pilots)["beta"] == 0.2
    assert chosen(pd.concat([pilots, judged]))["beta"] == 0.1


@pytest.mark.parametrize("gap", [None, np.nan, np.inf, "failed"])
def test_the_next_best_never_stands_for_a_best_that_is_not_known(gap):
    pilots = tuned({0.1: (0.5, 0.6), 0.2: (0.9, 0.8)}, pilot=True)
    pilots.loc[3, ["tuning", "status"]] = [None, gap] if gap == "failed" else [gap, "completed"]
    assert chosen(pilots) is None
    rows, members = against(around(0.5))
    members = pd.concat([members[members["method"] == "new"].assign(tuning=0.5, pilot=False), pilots])
    claim = {"baseline": {"method": "old", "beta": "best"}}
    found = judge_one(claim, rows, members, study={"choose_on": "tuning"})
    assert (found.verdict, found.reason) == ("not evaluated", "missing: a run with tuning")
    assert chosen(pilots.drop(columns="tuning")) is None


def test_a_diverged_run_counts_as_a_guess_where_the_best_is_chosen():
    pilots = tuned({0.1: (0.7, 0.7), 0.2: (0.8, 0.8)}, pilot=True)
    pilots.loc[3, ["tuning", "status"]] = [None, "diverged"]
    assert chosen(pilots)["beta"] == 0.1, "(0.8 + 0.5) / 2 is below 0.7"


def test_a_key_fixed_in_advance_is_filled_in_and_never_contradicted():
    study = PUBLISHED["td_dpo"]
    assert study.fill({"method": "td_dpo", "beta": 0.5}) == {"method": "td_dpo", "beta": 0.5, "tau": 1.0}
    with pytest.raises(ValueError, match="0.5 was fixed in advance"):
        study.fill({"method": "td_dpo", "beta": 0.01, "tau": 1.0})


# ---- runs at chance

CHANCE = Chance(metric="accuracy", what="guessing", no_better_than=(0.5, "longer"), no_worse_than=0.5).model_dump()
PARITY = {"test": "equivalence", "margin": 0.5}


def hits(share, *, seeds=5, pairs=400, seed=0):
    """0 and 1 (S, pairs), of each seed the share given (one, or one for each)."""
    rng, shares = np.random.default_rng(seed), np.broadcast_to(share, seeds)
    return np.stack([rng.permutation(pairs) < x * pairs for x in shares]).astype(float)


def at_chance(new, old, *, d=None, claim=PARITY, chance=CHANCE, longer=0.48, **more):
    rows, members = against(around(0.0, seeds=5) if d is None else d, **more)
    accuracy = record_of({"new": hits(new), "old": hits(old)}, metric="accuracy", unit="pair")[0]
    return judge_one(claim, rows, members.assign(longer=longer), study={"chance": chance}, accuracy=accuracy)


@pytest.mark.parametrize(
    ("new", "old", "longer", "vacuous"),
    [
        (0.50, 0.50, 0.48, True),
        (0.50, 0.60, 0.48, False),
        (0.60, 0.50, 0.48, False),
        (0.58, 0.57, 0.65, True),  # no better than taking the longer
        (0.75, 0.57, 0.65, False),
        (0.50, 0.40, 0.48, False),  # worse than guessing was learned
    ],
)
def test_a_claim_whose_runs_are_all_at_chance_is_vacuous_whatever_its_numbers_say(new, old, longer, vacuous):
    for mean, otherwise in ((0.0, "supported"), (2.0, "refuted")):
        d = around(mean, seeds=5)
        found = at_chance(new, old, d=d, longer=longer)
        assert found.verdict == ("vacuous" if vacuous else otherwise)
        assert found.estimate == pytest.approx(mean)
        assert ("not shown to be above" in found.reason) == vacuous
        assert at_chance(new, old, d=d, longer=longer, chance=None).verdict == otherwise


def test_chance_is_told_by_t_over_seeds():
    wide = [0.49, 0.50, 0.53, 0.54, 0.53]
    t = stats.ttest_1samp(wide, 0.5, alternative="greater")
    assert (t.pvalue > 0.05, stats.norm.sf(t.statistic) < 0.05) == (True, True)
    assert at_chance(wide, 0.5).verdict == "vacuous"
    assert at_chance([0.53, 0.54, 0.53, 0.54, 0.53], 0.5).verdict == "supported"


def test_one_run_that_has_clearly_learned_is_not_at_chance_and_a_lucky_one_is():
    for share, verdict in ((0.66, "supported"), (0.55, "vacuous")):  # z of 6.4, and of 2 in one of ten
        shares = [0.5, share, 0.5, 0.45, 0.5]
        assert stats.ttest_1samp(shares, 0.5, alternative="greater").pvalue > 0.05
        assert at_chance(0.5, shares).verdict == verdict


def test_a_divergence_and_a_missed_figure_are_results_and_no_chance():
    old = {("old", seed): "diverged" for seed in SEEDS[:5]}
    claim = {"margin": 0, "no_divergence": True}
    assert at_chance(0.5, 0.5, claim=claim, d=around(4.0, seeds=5), ended=old).verdict == "supported"
    figure = {"test": "absolute", "baseline": None, "reported": 9.0, "margin": 0.5}
    rows, members = against(around(0.0))
    accuracy = record_of({"new": hits(0.5)}, metric="accuracy", unit="pair")[0]
    found = judge_one(
        figure, rows, members.assign(longer=0.5), scale="paper", study={"chance": CHANCE}, accuracy=accuracy
    )
    assert found.verdict == "refuted"


def test_where_training_had_nothing_to_lose_worse_than_chance_is_chance():
    majority = {**CHANCE, "no_better_than": [0.55], "no_worse_than": None}
    assert at_chance(0.40, 0.45, chance=majority).verdict == "vacuous"
    assert at_chance(0.40, 0.65, chance=majority).verdict == "supported"


def test_what_is_needed_to_tell_chance_and_is_not_there_is_said_and_changes_no_verdict():
    rows, members = against(around(0.0, seeds=5))
    accuracy = record_of({"new": hits(0.5), "old": hits(0.5)}, metric="accuracy", unit="pair")[0]
    chance = {"study": {"chance": CHANCE}}
    for given in (None, accuracy[accuracy["method"] == "old"], accuracy):
        found = judge_one(PARITY, rows, members, accuracy=given, **chance)
        assert (found.verdict, "above chance is not known" in found.note) == ("supported", True)
    assert "no longer" in found.note


# ---- beside a claim


def test_what_stands_beside_a_claim_decides_nothing():
    d = around(0.5, seeds=5)
    rows, members = record_of({"new": d + 5, "old": d, "third": d + 4.4})
    one = record_of({"fourth": d[:1] + 5})
    rows, members = pd.concat([rows, one[0]]), pd.concat([members, one[1]])
    names = ("third", "fourth", "fifth")
    claim = {"factor": 1.1, "margin": 0, "baseline_name": "more than old"}
    found = judge_one(claim | {"beside": [{"name": n, "baseline": n} for n in names]}, rows, members)
    third, fourth, fifth = found.beside
    assert [b["decides"] for b in found.beside] == [False] * 3
    assert not any("verdict" in b for b in found.beside)
    assert (third["by_the_same_rule"], third["estimate"]) == ("supported", pytest.approx(0.6)), "without the factor"
    assert third["interval95"] == pytest.approx((0.6, 0.6))
    assert (fourth["n_seeds"], "interval95" in fourth, "no interval" in fourth["reason"]) == (1, False, True)
    assert "missing" in fifth["reason"]
    assert "above more than old" in found.reason


# ---- forms


def test_claims_json_holds_what_others_read_and_no_nan():
    d = around(0.25, seed_sd=0.3)
    study = study_of({"sentence": "New is better.", "note": "n"}, {"baseline": "nobody"}, names={"new": "New"})
    verdicts = list(judge(study, *against(d), scored_by="oracle score").values())
    open_, gone = json.loads(json.dumps(c.to_json(verdicts), allow_nan=False))
    assert set(open_) == set(gone)
    named = (
        "id sentence verdict reason estimate interval95 n_seeds metric test p holm_p per_seed looks next_look chance"
    )
    assert set(open_) >= set(f"{named} seeds_to_decide decided tested fixed95 sds".split())
    assert (open_["id"], open_["test"], open_["metric"], open_["decided"]) == ("X1", "superiority", "score", False)
    assert list(open_["looks"][0]) == ["seeds", "estimate", "low", "high"]
    assert [look["seeds"] for look in open_["looks"]] == [5, 8]
    assert open_["interval95"] == [open_["looks"][-1]["low"], open_["looks"][-1]["high"]]
    assert set(open_["per_seed"]) == {str(seed) for seed in SEEDS[:8]}
    assert open_["sds"].keys() == {"seed", "question", "residual"}
    assert (gone["verdict"], gone["decided"], gone["looks"], gone["next_look"]) == ("not evaluated", False, [], None)
    assert c.sentence(verdicts[0]).startswith("X1 inconclusive at laptop scale (oracle score): New scored")
    table = c.table(verdicts)
    assert list(table["claim"]) == ["X1", "X2"]
    assert table["95 % interval"][0] == " to ".join(f"{end:.3g}" for end in verdicts[0].interval95)
    broken = c.Verdict(study.claims[0], "laptop")
    broken.interval95, broken.estimate = (0.1, np.inf), np.nan
    assert (c.to_json([broken])[0]["interval95"], c.to_json([broken])[0]["estimate"]) == ([0.1, None], None)


def test_coverage_names_seeds_by_status():
    members = against(around(0.5, seeds=5), ended={("old", 43): "diverged", ("old", 44): "lost"})[1]
    table = c.coverage(study_of({}), members).set_index(["claim", "side"])
    row = table.loc[("X1", "baseline")]
    assert (row["completed"], row["diverged"], row["lost"], row["finished"]) == ("42, 45, 46", "43", "44", 4)


# ---- the file


def refused(tmp_path, old, new, study="td_dpo"):
    text = (ROOT / "params" / study / "claims.yaml").read_text()
    assert old in text
    path = tmp_path / "claims.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(StudyError) as error:
        c.load(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("margin: 0.3", "margn: 0.3", "did you mean claims.0.margin?"),
        ("      baseline: {method: discopop_card", "      basline: {method: discopop_card", "claims.1.beside.0.baseline?"),
        ("names:", "name:", "did you mean names?"),
        ("{method: td_dpo, beta: 2.5}", "{method: td_dpo, beta: 2.5, tau: 0.5}", "2 was fixed in advance"),
        ("{method: td_dpo, beta: 2.5}", "{method: td_dpo, beta: 3}", "not fixed for beta = 3"),
        ("id: C2", "id: C1", "not unique"),
        ("test: non_inferiority", "test: non_inferior", "non_inferiority"),
        ("    across:\n      beta: [0.01, 0.05, 0.5, 2.5]\n", "", "across"),
        ("    baseline: {method: dpo, beta: 0.05}\n", "", "needs a `baseline`"),
        ("{method: dpo, beta: 0.05}", "{method: dpo, beta: best}", "needs `choose_on`"),
        ("    gain: 1.5\n", "", "one of `gain`"),
        ("    gain: 1.5\n", "    gain: 1.5\n    margin: 1.0\n", "one of `gain`"),
        ("    margin: 0.3\n", "    gain: 0.3\n", "no gain is claimed"),
        ("    margin: 0.3\n", "    margin: -0.3\n", "not negative"),
        ("[5, 8, 12, 20]", "[5, 12, 8]", "growing numbers of seeds"),
        ("[5, 8, 12, 20]", "[1, 5]", "growing numbers of seeds"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_say_what_decides_is_refused(tmp_path, old, new, said):
    assert said in refused(tmp_path, old, new)


def test_numeric_strings_are_numbers_and_looks_are_a_scales_own(tmp_path):
    path = tmp_path / "claims.yaml"
    text = (ROOT / "params/td_dpo/claims.yaml").read_text()
    path.write_text(text.replace("{method: dpo, beta: 0.05}", "{method: dpo, beta: 5e-2}", 1))
    assert c.load(path).claims[0].baseline["beta"] == 0.05
    assert [PUBLISHED["td_dpo"].looks_of(scale) for scale in ("laptop", "paper")] == [LOOKS, (3, 5, 8)]
    assert study_of({}, looks=(4, 9)).looks_of("laptop") == (4, 9)


# ---- what can be decided


def test_no_published_gain_is_tested_against_itself_or_0_and_laptop_claims_can_be_decided():
    for study in PUBLISHED.values():
        for claim in study.claims:
            if claim.gain is not None:
                power_of_gain = claim.gain ** (2 / 3) if claim.test in c.RATIOS else claim.gain * 2 / 3
                assert claim.tested == pytest.approx(power_of_gain)
            elif claim.test == "superiority":
                assert claim.factor != 1, "a gain that is claimed is tested at two thirds of it"
            assert power.undecidable(study, claim, "laptop") == "", claim.id


def found_by_check(tmp_path, margin, scale):
    """What `check` says where TD-DPO's parity is claimed within `margin`, at both scales."""
    text, old = (ROOT / "params/td_dpo/claims.yaml").read_text(), "    margin: 0.3\n    scales: [laptop, small]\n"
    assert old in text
    (tmp_path / "claims.yaml").write_text(text.replace(old, f"    margin: {margin}\n"))
    found = check.claims_findings("td_dpo", [], scale, tmp_path / "claims.yaml")
    return [finding for finding in found if finding.key == "C3"]


def test_check_refuses_what_no_number_of_seeds_decides_and_only_warns_at_paper_scale(tmp_path):
    assert found_by_check(tmp_path, 0.3, "laptop") == []
    for scale, level, looks in (("laptop", "error", LOOKS), ("paper", "warning", (3, 5, 8))):
        (found,) = found_by_check(tmp_path, 0.05, scale)
        assert found.level == level
        assert f"{looks[-1]} seeds cannot decide within 0.05 of 0" in found.what
        assert "no number of seeds would: more questions, or a wider margin" in found.what
    (found,) = found_by_check(tmp_path, 0.2, "laptop")
    enough = int(found.what.split("; ")[1].split(" seeds would")[0])
    study = PUBLISHED["td_dpo"]
    sds, questions = power.sds_of(study, study.claims[2], min(study.noise.seed_sds), "laptop")
    d = np.full((enough, questions), 0.0)
    squares = [
        questions * sds["seed"] ** 2 + sds["residual"] ** 2,
        enough * sds["question"] ** 2 + sds["residual"] ** 2,
    ]
    look = st.look_at(d)._replace(seed_ms=squares[0], question_ms=squares[1], residual_ms=sds["residual"] ** 2)
    half = look.half_width(st.bound_of(LOOKS))
    assert (20 < enough < 100, half < 0.2, half > 0.19) == (True, True, True)


def test_what_claims_no_size_or_whose_scale_is_not_known_before_is_left_alone():
    noise = {"noise": {"seed_sds": [1.0], "question_sd": 0.1, "questions": 400}}
    elsewhere = {"gain": 0.1, "scales": ["paper"]}
    for claim in ({"margin": 0}, {"gain": 0.1, "metric": "energy"}, {"factor": 1.2, "margin": 0}, elsewhere):
        study = study_of(claim, **noise)
        assert power.undecidable(study, study.claims[0], "laptop") == ""
    study = study_of({"gain": 0.1}, **noise)
    assert "no number of seeds would" not in power.undecidable(study, study.claims[0], "laptop")
    assert "seeds would" in power.undecidable(study, study.claims[0], "laptop")


def test_the_power_table_decides_made_experiments_as_real_ones_are_decided():
    noise = {"seed_sds": [0.1, 0.6], "question_sd": 0.0, "residual_sd": 0.5, "questions": 20, "simulations": 400}
    parity = {"test": "equivalence", "margin": 0.4}
    study = study_of({"gain": 0.9}, parity, ACROSS, {"not_evaluated": "no"}, {"metric": "auc"}, noise=noise)
    table = power.table(study, scale="laptop").set_index(["claim", "seed"])
    assert list(table.index) == [("X1", 0.1), ("X1", 0.6), ("X2", 0.1), ("X2", 0.6), ("X3", 0.8)]
    supported, seeds = table["supported if true as claimed"], table["seeds"]
    assert (supported["X1", 0.1], supported["X2", 0.1]) == (1.0, 1.0)
    assert supported["X1", 0.6] < 0.9
    assert seeds["X1", 0.1] < seeds["X1", 0.6] <= 20
    # a wrong word at the boundary: three standard errors above 5 %
    assert (table["any word at the boundary"] <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5).all()
    assert list(table["tested"])[:1] == ["at least 0.6, two thirds of the claimed 0.9"]


def test_where_the_record_is_noisier_than_was_assumed_the_table_is_computed_again():
    noise = {"seed_sds": [0.1, 0.2], "question_sd": 0.3, "residual_sd": 0.5, "questions": 20, "simulations": 50}
    study, sds = study_of({"gain": 0.9}, noise=noise), {"seed": 0.2, "question": 0.3, "residual": 0.5}
    assert list(power.table(study, scale="laptop")["seed"]) == [0.1, 0.2]
    for seen, rows in ((sds, 0), (sds | {"seed": 0.4}, 1), (sds | {"question": 0.9}, 1), (sds | {"seed": 0.01}, 0)):
        table = power.table(study, scale="laptop", seen={"X1": seen})
        assert [(row.noise, row.seed) for row in table.itertuples()] == [("this record", seen["seed"])] * rows
