"""The verdicts of lib/claims.py: the rules of the TD-DPO claims, what is missing or diverged, false support and
power."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib import claims as c, power, stats as st
from lib.claims import Chance, Claims, Noise, choose, pair_up, select
from lib.config import ROOT
from lib.errors import StudyError

PATH = ROOT / "params" / "td_dpo" / "claims.yaml"
STUDY = c.load(PATH)
BY_ID = {claim.id: claim for claim in STUDY.claims}
TAU = {0.01: 0.5, 0.05: 1.0, 0.5: 1.0, 2.5: 2.0}
SEEDS = (42, 43, 44)
CHANCE = Chance(
    metric="accuracy", what="guessing, or the longer answer", no_better_than=(0.5, "length_baseline"), no_worse_than=0.5
)
# scores in which every claim but C3 holds as claimed: the same best, a higher floor
GOOD = {"dpo": (4.0, 6.0, 7.5, 7.5), "discopop": (3.0, 4.0, 7.0, 5.0), "td_dpo": (6.0, 6.0, 7.5, 6.5)}


def made(means=GOOD, *, seed_sd=0.02, answer_sd=0.3, questions=80, diverged=(), seed=0):
    """(rows, members) of a study: `diverged` holds (method, beta, seed), which have no rows."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, 1.5, questions)
    rows, members = [], []
    for method, scores in means.items():
        for beta, mean in zip(TAU, scores, strict=True):
            for s in SEEDS:
                status = "diverged" if (method, beta, s) in diverged else "completed"
                who = {
                    "method": method,
                    "beta": beta,
                    "tau": TAU[beta] if method == "td_dpo" else np.nan,
                    "seed": s,
                    "status": status,
                }
                members.append(
                    {**who, "validation_implicit_accuracy": None if status == "diverged" else 0.5 + mean / 100}
                )
                if status == "completed":
                    scores_s = mean + rng.normal(0, seed_sd) + hard + rng.normal(0, answer_sd, questions)
                    rows += [{**who, "question": q, "score": x} for q, x in enumerate(scores_s)]
    return pd.DataFrame(rows), pd.DataFrame(members)


def times(ratio=1.0, n=120, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "method": "td_dpo",
            "seed": np.repeat(SEEDS, n // 3),
            "seconds_baseline": 0.1,
            "seconds": 0.1 * ratio * np.exp(rng.normal(0, 0.03, n)),
        }
    )


@pytest.fixture(autouse=True, scope="module")
def fewer_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c, "DRAWS", 1000)
        patch.setattr(c, "COST_DRAWS", 200)
        yield


def judge(rows, members=None, *, study=STUDY, mode="full", scale="laptop", **more):
    return {v.id: v for v in c.evaluate(study, rows, members=members, mode=mode, scale=scale, **more)}


@pytest.fixture(scope="module")
def good():
    rows, members = made()
    return judge(rows, members, costs=times())


# ---- the five claims


def test_true_claims_are_supported(good):
    assert {k: v.verdict for k, v in good.items() if k != "C3"} == dict.fromkeys(("C1", "C2", "C4", "C5"), "supported")
    c1 = good["C1"]
    assert c1.interval95[0] < c1.interval90[0] < c1.estimate < c1.interval90[1] < c1.interval95[1]
    assert c1.interval90[0] > -0.3
    assert set(c1.per_seed) == set(SEEDS)
    assert np.mean(list(c1.per_seed.values())) == pytest.approx(c1.estimate)
    assert (c1.n_seeds, c1.n_questions, c1.level) == (3, 80, 0.9)
    assert c1.p < c1.holm_p < 0.05
    assert 0.3 < c1.probability_of_improvement < 0.7
    mean = made()[0].groupby(["method", "beta"]).score.mean()
    assert c1.estimate == pytest.approx(mean["td_dpo", 0.01] - mean["dpo", 0.05])
    assert good["C2"].estimate == pytest.approx(mean["td_dpo", 2.5] - mean["discopop", 2.5])


def test_c1_is_refuted_below_the_margin_and_names_the_best_dpo_beside():
    rows, members = made({**GOOD, "td_dpo": (5.0, 6.0, 7.5, 6.5)})
    v = judge(rows, members)["C1"]
    assert v.verdict == "refuted"
    assert v.interval95[1] < -0.3
    beside = v.beside[0]
    assert beside["baseline"] in ("DPO (beta 0.5)", "DPO (beta 2.5)")
    assert beside["decides"] is False
    assert "verdict" not in beside


def test_c2_below_one_point_is_refuted_and_says_whether_the_baseline_failed():
    rows, members = made({**GOOD, "td_dpo": (6.0, 6.0, 7.5, 5.5)})
    v = judge(rows, members)["C2"]
    assert v.verdict == "refuted"
    assert v.premise["holds"] is False
    assert "0 of" not in v.premise["text"]
    assert [b["name"] for b in v.beside] == [
        "against DiscoPOP in the released card's form",
        "against DiscoPOP at its best reported beta",
    ]
    assert "missing" in v.beside[0]["reason"]


def test_c2_is_not_supported_where_a_td_dpo_run_diverged():
    # all DiscoPOP runs diverged (1.0), one TD-DPO run too: far above on average, and yet it did not avoid divergence
    diverged = [("discopop", 2.5, s) for s in SEEDS] + [("td_dpo", 2.5, 43)]
    rows, members = made({**GOOD, "td_dpo": (6.0, 6.0, 7.5, 9.0)}, diverged=diverged)
    v = judge(rows, members)["C2"]
    assert v.verdict == "inconclusive"
    rows, members = made({**GOOD, "td_dpo": (6.0, 6.0, 7.5, 9.0)}, diverged=diverged[:3])
    v = judge(rows, members)["C2"]
    assert v.verdict == "supported"
    assert v.premise["holds"] is True


def test_no_divergence_overrides_a_supporting_interval():
    study = STUDY.model_copy(update={"diverged": {"score": 9.0}})  # a divergence that would cost nothing
    rows, members = made({**GOOD, "td_dpo": (6.0, 6.0, 7.5, 9.0)}, diverged=[("td_dpo", 2.5, 43)])
    v = judge(rows, members, study=study)["C2"]
    assert v.verdict == "inconclusive"
    assert "diverged (seed 43)" in v.reason


def test_c4_is_vacuous_where_less_variance_comes_from_worse_scores():
    rows, members = made({**GOOD, "td_dpo": (5.7, 6.8, 6.8, 6.5)})  # near its reference everywhere; DPO's best is 7.5
    v = judge(rows, members)["C4"]
    assert v.verdict == "vacuous"
    assert v.estimate < 0.2
    assert "best score" in v.reason
    rows, members = made({**GOOD, "td_dpo": (5.6, 5.6, 7.4, 5.6)})
    assert judge(rows, members)["C4"].verdict != "vacuous"  # within .3 in best and mean
    rows, members = made({**GOOD, "td_dpo": (5.4, 5.4, 7.4, 5.5), "dpo": (4.0, 7.5, 7.5, 7.5)})
    assert "mean score" in judge(rows, members)["C4"].reason


def test_c4_is_refuted_where_variance_is_not_lower():
    rows, members = made({**GOOD, "td_dpo": (3.5, 6.0, 7.8, 7.8)})
    v = judge(rows, members)["C4"]
    assert v.verdict == "refuted"
    assert v.interval95[0] > 0.75


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "supported"), (1.02, "inconclusive"), (1.1, "refuted")])
def test_c5(ratio, verdict):
    rows, members = made()
    v = judge(rows, members, costs=times(ratio))["C5"]
    assert v.verdict == verdict
    assert v.estimate == pytest.approx(ratio, rel=0.02)
    assert v.n_pairs == 120
    assert set(v.per_seed) == set(SEEDS)


def test_the_companions_p_is_scipys_one_sided_t_test():
    rows, members = made({**GOOD, "td_dpo": (5.9, 6.1, 7.5, 6.1)}, seed_sd=0.3, seed=3)
    costs = times(1.005)
    found = judge(rows, members, costs=costs)
    (paper,) = judge(rows, members, study=absolute(reported=5.9), scale="paper").values()
    of = {name: np.array(list(v.per_seed.values())) for name, v in {**found, "A": paper}.items()}

    def p(values, threshold, alternative):
        return stats.ttest_1samp(values, threshold, alternative=alternative).pvalue

    assert found["C1"].p_companion == pytest.approx(p(of["C1"], -0.3, "greater"))
    assert found["C2"].p_companion == pytest.approx(p(of["C2"], 1.0, "greater"))
    assert found["C3"].p_companion == pytest.approx(max(p(of["C3"], -0.1, "greater"), p(of["C3"], 0.1, "less")))
    assert paper.p_companion == pytest.approx(p(of["A"], -0.5, "greater"))
    # C4: each seed's variance across beta, less the noise within a cell, of TD-DPO against DPO
    means = rows.groupby(["method", "beta", "seed"]).score.mean().unstack()
    own = [means.loc[m].var(ddof=1) - means.loc[m].var(axis=1, ddof=1).mean() for m in ("td_dpo", "dpo")]
    assert found["C4"].p_companion == pytest.approx(stats.ttest_rel(*own, alternative="less").pvalue)
    # C5: the medians of ten stretches of neighboring pairs
    blocks = np.median(np.log(costs.seconds / costs.seconds_baseline).to_numpy().reshape(10, 12), axis=1)
    assert found["C5"].p_companion == pytest.approx(p(blocks, np.log(1.02), "less"))
    for value in (found["C2"].p_companion, found["C3"].p_companion, found["C4"].p_companion):
        assert 1e-4 < value < 0.9999, "else a wrong side or a wrong threshold could go unseen"
    low, high = stats.ttest_1samp(of["C1"], 0).confidence_interval(0.95)
    assert found["C1"].companion_interval95 == pytest.approx((low, high))


def test_a_cost_is_judged_by_its_own_methods_pairs_that_were_timed():
    """Pairs of another method, and pairs without two times, are not of the claim."""
    rows, members = made()
    mine, other = times(1.0), times(3.0, n=300, seed=1).assign(method="td_dpo_anchored")
    broken = pd.DataFrame(
        {"method": "td_dpo", "seed": 42, "seconds": [0.0, -1.0, np.nan, 0.5], "seconds_baseline": [1.0, 1.0, 1.0, 0.0]}
    )
    (only,) = judge(rows, members, costs=mine, study=STUDY.model_copy(update={"claims": (BY_ID["C5"],)})).values()
    (among,) = judge(
        rows, members, costs=pd.concat([other, mine, broken]), study=STUDY.model_copy(update={"claims": (BY_ID["C5"],)})
    ).values()
    assert (among.n_pairs, among.verdict) == (120, "supported")
    assert c.to_json([among]) == c.to_json([only])
    assert judge(rows, members, costs=pd.concat([other, mine[:19], broken]))["C5"].verdict == "not evaluated"
    assert judge(rows, members, costs=pd.concat([other, mine[:20], broken]))["C5"].n_pairs == 20


# ---- runs at chance

PARITY = BY_ID["C3"].model_copy(update={"margin": 0.5, "beside": ()})


def learnt(td_dpo, dpo, *, pairs=400, seed=0):
    """Implicit accuracy of every test pair in the cells of C3: in every seed the shares given."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "method": method,
            "beta": 0.05,
            "tau": 1.0 if method == "td_dpo" else np.nan,
            "seed": s,
            "status": "completed",
            "pair": p,
            "accuracy": float(hit),
        }
        for method, share in (("td_dpo", td_dpo), ("dpo", dpo))
        for s in SEEDS
        for p, hit in enumerate(rng.permutation(pairs) < share * pairs)
    ]
    return pd.DataFrame(rows)


def at_chance(claim, accuracy, means=GOOD, *, length=0.48, chance=CHANCE, **more):
    rows, members = made(means, **more)
    study = STUDY.model_copy(update={"claims": (claim,), "chance": chance})
    return judge(rows, members.assign(length_baseline=length), study=study, accuracy=accuracy)[claim.id]


@pytest.mark.parametrize(
    ("td_dpo", "dpo", "length", "vacuous"),
    [
        (0.50, 0.50, 0.48, True),
        (0.50, 0.60, 0.48, False),
        (0.60, 0.50, 0.48, False),
        (0.58, 0.57, 0.65, True),
        (0.75, 0.57, 0.65, False),
        (0.50, 0.40, 0.48, False),
    ],
)
def test_a_claim_whose_runs_are_all_at_chance_is_vacuous_whatever_its_numbers_say(td_dpo, dpo, length, vacuous):
    """Neither parity of two that learnt nothing nor a difference between them is about the methods. Worse than guessing
    is no chance: it was learnt."""
    for means, otherwise in ((GOOD, "supported"), ({**GOOD, "td_dpo": (6.0, 4.0, 7.5, 6.5)}, "refuted")):
        found = at_chance(PARITY, learnt(td_dpo, dpo), means, length=length)
        assert found.verdict == ("vacuous" if vacuous else otherwise)
        assert found.interval95 is not None
        assert found.estimate is not None
        assert ("not shown to be above" in found.reason) == vacuous
        assert at_chance(PARITY, learnt(td_dpo, dpo), means, chance=None).verdict == otherwise


def test_a_divergence_is_a_result_and_no_chance():
    """What stands for a diverged run's accuracy is guessing: a claim of avoiding divergence would never be decided."""
    accuracy, discopop = learnt(0.5, 0.5), {"method": "discopop", "beta": 2.5, "tau": np.nan}
    accuracy = accuracy.assign(beta=2.5, tau=2.0).query("method == 'td_dpo'")
    more = {"means": {**GOOD, "td_dpo": (6.0, 6.0, 7.5, 9.0)}, "diverged": [("discopop", 2.5, s) for s in SEEDS]}
    assert at_chance(BY_ID["C2"], accuracy, **more).verdict == "supported"
    assert at_chance(BY_ID["C2"], pd.concat([accuracy, accuracy.assign(**discopop)])).verdict == "vacuous"


def test_a_figure_of_its_own_is_missed_by_a_model_that_learnt_nothing():
    rows, members = made(answer_sd=0.1)
    study = absolute(reported=8.0).model_copy(update={"chance": CHANCE})
    (found,) = judge(
        rows, members.assign(length_baseline=0.48), study=study, scale="paper", accuracy=learnt(0.5, 0.5)
    ).values()
    assert found.verdict == "refuted"


def test_where_training_had_nothing_to_lose_worse_than_chance_is_chance():
    majority = CHANCE.model_copy(update={"no_better_than": (0.55,), "no_worse_than": None})
    assert at_chance(PARITY, learnt(0.40, 0.45), chance=majority).verdict == "vacuous"
    assert at_chance(PARITY, learnt(0.40, 0.65), chance=majority).verdict == "supported"


def test_one_run_that_has_clearly_learnt_is_not_at_chance_however_much_the_seeds_differ():
    accuracy = learnt(0.5, 0.5)
    mine = (accuracy.method == "dpo") & (accuracy.seed == 43)
    accuracy.loc[mine, "accuracy"] = (np.arange(400) < 0.66 * 400).astype(float)
    means = accuracy[accuracy.method == "dpo"].groupby("seed").accuracy.mean()
    assert stats.ttest_1samp(means, 0.5, alternative="greater").pvalue > 0.1, "the cell as a whole is not shown to have"
    assert at_chance(PARITY, accuracy).verdict == "supported"
    # z is 2: of six runs at chance one or the other is so good
    accuracy.loc[mine, "accuracy"] = (np.arange(400) < 0.55 * 400).astype(float)
    assert at_chance(PARITY, accuracy).verdict == "vacuous"


def test_what_is_needed_to_tell_chance_and_is_not_there_is_said_and_changes_no_verdict():
    accuracy = learnt(0.5, 0.5)
    for missing in (None, accuracy[accuracy.method == "dpo"]):
        found = at_chance(PARITY, missing)
        assert found.verdict == "supported"
        assert "above chance is not known" in found.note
    rows, members = made()
    study = STUDY.model_copy(update={"claims": (PARITY,), "chance": CHANCE})
    (found,) = judge(rows, members, accuracy=accuracy, study=study).values()
    assert "no length_baseline" in found.note


def test_beside_a_claim_chance_is_told_too():
    claim = PARITY.model_copy(update={"beside": BY_ID["C1"].beside})
    for share, other in (
        (0.5, 0.7),
        (0.7, 0.5),
    ):  # of the claim's own rival, and of the one beside it (best, at beta .5)
        accuracy = pd.concat([learnt(0.5, share), learnt(0.5, other).query("method == 'dpo'").assign(beta=0.5)])
        found = at_chance(claim, accuracy)
        assert found.beside[0]["baseline"] == "DPO (beta 0.5)"
        assert (found.verdict == "vacuous") == (share == 0.5)
        assert (found.beside[0]["by_the_same_rule"] == "vacuous") == (other == 0.5)


# ---- diverged, missing, trial, scale


def test_a_diverged_run_scores_one_on_every_question_and_sensitivity_leaves_it_out():
    rows, members = made(diverged=[("dpo", 0.05, 43)])
    v = judge(rows, members)["C1"]
    assert v.n_seeds == 3
    score = rows[(rows.method == "td_dpo") & (rows.beta == 0.01) & (rows.seed == 43)].score.mean()
    assert v.per_seed[43] == pytest.approx(score - 1.0)
    assert v.sensitivity["n_seeds"] == 2
    assert v.sensitivity["estimate"] == pytest.approx(np.mean([v.per_seed[42], v.per_seed[44]]))
    assert "verdict" not in v.sensitivity


def test_a_diverged_run_is_read_off_rows_alone_too():
    rows, _ = made(diverged=[("dpo", 0.05, 43)])
    mark = {"method": "dpo", "beta": 0.05, "seed": 43, "status": "diverged"}
    with_mark = judge(pd.concat([rows, pd.DataFrame([mark])]))["C1"]
    assert with_mark.per_seed[43] > 3
    assert "seed 43: no run" in judge(rows)["C1"].reason


def test_where_everything_diverged_nothing_is_shown():
    diverged = [(m, b, s) for m, b in (("td_dpo", 0.01), ("dpo", 0.05)) for s in SEEDS]
    rows, members = made(diverged=diverged)
    assert judge(rows, members)["C1"].verdict == "vacuous"


def test_diverged_accuracy_is_a_half():
    rows, members = made(diverged=[("dpo", 0.05, 43)])
    accuracy = rows.rename(columns={"score": "accuracy", "question": "pair"}).assign(accuracy=1.0)
    pairs = pair_up(STUDY, accuracy, members, [{"method": "dpo", "beta": 0.05}], "accuracy")
    assert pairs.values[0].mean(1).tolist() == [1.0, 0.5, 1.0]


def test_missing_cells_are_named_and_nothing_is_guessed():
    rows, members = made()
    gone = (members.method == "dpo") & (members.beta == 0.05) & (members.seed == 44)
    members.loc[gone, "status"] = "failed"
    rows = rows[~((rows.method == "dpo") & (rows.beta == 0.05) & (rows.seed == 44))]
    v = judge(rows, members)
    assert v["C1"].verdict == "not evaluated"
    assert "DPO (beta 0.05), seed 44: failed" in v["C1"].reason
    assert v["C4"].verdict == "not evaluated"
    assert v["C2"].verdict == "supported"
    assert v["C5"].verdict == "not evaluated"
    assert "0 pairs" in v["C5"].reason
    assert v["C1"].holm_p is None


@pytest.mark.parametrize("status", ["failed", "lost", "out_of_memory"])
def test_scores_that_a_failed_run_left_are_not_taken(status):
    """It may have died between its questions, or with weights that nobody kept."""
    rows, members = made()
    gone = (members.method == "dpo") & (members.beta == 0.05) & (members.seed == 44)
    members.loc[gone, "status"] = status
    verdict = judge(rows, members)["C1"]
    assert (verdict.verdict, verdict.estimate) == ("not evaluated", None)
    assert f"DPO (beta 0.05), seed 44: {status}" in verdict.reason
    (against_best,) = judge(
        rows,
        members.assign(validation_implicit_accuracy=np.where(members.beta == 0.05, 0.9, 0.5)),
        study=STUDY.model_copy(
            update={"claims": (BY_ID["C1"].model_copy(update={"baseline": {"method": "dpo", "beta": 0.5}}),)}
        ),
    ).values()
    assert against_best.beside[0]["n_seeds"] == 2, "beside a claim, the seeds that both sides have"


def test_scores_that_a_diverged_run_left_do_not_count():
    rows, members = made()
    members.loc[(members.method == "dpo") & (members.beta == 0.05) & (members.seed == 44), "status"] = "diverged"
    score = rows[(rows.method == "td_dpo") & (rows.beta == 0.01) & (rows.seed == 44)].score.mean()
    assert judge(rows, members)["C1"].per_seed[44] == pytest.approx(score - 1.0)


def test_two_runs_of_one_cell_are_never_averaged():
    rows, members = made()
    twin = (members.method == "dpo") & (members.beta == 0.05)
    members = pd.concat([members.assign(run_id="dpo"), members[twin].assign(run_id="dpo_fast")], ignore_index=True)
    verdict = judge(rows, members)["C1"]
    assert verdict.verdict == "not evaluated"
    assert "DPO (beta 0.05), seed 42: one member, of the 2 (dpo, dpo_fast) that answer to it" in verdict.reason


def test_no_records_at_all():
    assert {v.verdict for v in judge(pd.DataFrame(), pd.DataFrame()).values()} == {"not evaluated"}
    assert {v.verdict for v in judge(pd.DataFrame()).values()} == {"not evaluated"}


def test_one_seed_is_not_enough():
    rows, members = made()
    v = judge(rows[rows.seed == 42], members[members.seed == 42])["C1"]
    assert v.verdict == "not evaluated"
    assert "one seed" in v.reason


def test_questions_without_a_score_are_counted():
    rows, members = made()
    rows.loc[(rows.method == "dpo") & (rows.beta == 0.05) & (rows.seed == 42) & (rows.question < 5), "score"] = None
    v = judge(rows, members)["C1"]
    assert (v.n_questions, v.n_dropped) == (75, 5)
    assert "5 question(s)" in v.note


def test_a_question_is_the_mean_of_its_turns_and_missing_if_one_is():
    rows = pd.DataFrame({"method": "dpo", "beta": 0.05, "seed": 42, "question": [1, 1, 2, 2], "score": [4, 8, 5, None]})
    members = pd.DataFrame({"method": ["dpo"], "beta": [0.05], "seed": [42], "status": ["completed"]})
    pairs = pair_up(STUDY, rows, members, [{"method": "dpo", "beta": 0.05}], "score")
    assert pairs.values.tolist() == [[[6.0]]]
    assert pairs.dropped == 1


def test_trial_never_gives_a_verdict():
    rows, members = made()
    verdicts = judge(rows, members, mode="trial", costs=times())
    assert {v.verdict for v in verdicts.values()} == {"not evaluated"}
    assert all(v.estimate is None and v.p is None for v in verdicts.values())


def absolute(**more):
    claim = {
        "id": "A",
        "sentence": "DPO at beta .05 scores 6.",
        "estimand": "mean score",
        "test": "absolute",
        "treatment": {"method": "dpo", "beta": 0.05},
        "reported": 6.0,
        "margin": 0.5,
    }
    return Claims.model_validate({"study": "s", "keys": ["beta"], "claims": [{**claim, **more}]})


def test_absolute_figures_belong_to_the_papers_scale():
    rows, members = made(answer_sd=0.1)
    assert judge(rows, members, study=absolute())["A"].verdict == "not evaluated"
    rows["score"] -= rows.groupby("question").score.transform("mean") - rows.score.mean()
    assert judge(rows, members, study=absolute(), scale="paper")["A"].verdict == "supported"
    assert judge(rows, members, study=absolute(reported=8.0), scale="paper")["A"].verdict == "refuted"


def test_best_is_chosen_on_validation_with_diverged_runs_as_guesses():
    _, members = made({**GOOD, "dpo": (4.0, 6.0, 7.5, 7.0)}, diverged=[("dpo", 0.5, s) for s in SEEDS])
    assert choose(STUDY, {"method": "dpo", "beta": "best"}, members) == {"method": "dpo", "beta": 2.5}
    one = made({**GOOD, "dpo": (4.0, 6.0, 7.5, 7.0)}, diverged=[("dpo", 0.5, 42)])[1]
    assert choose(STUDY, {"method": "dpo", "beta": "best"}, one)["beta"] == 2.5, "(.5 + .575 + .575) / 3 is below .57"
    assert choose(STUDY, {"method": "dpo", "beta": "best"}, one[one.status == "completed"])["beta"] == 0.5
    assert (
        choose(STUDY, {"method": "dpo", "beta": "best"}, members.drop(columns="validation_implicit_accuracy")) is None
    )
    assert choose(STUDY, {"method": "td_dpo", "beta": 0.5}, members) == {"method": "td_dpo", "beta": 0.5, "tau": 1.0}


@pytest.mark.parametrize("status", ["failed", "lost", "missing", "completed"])
def test_the_next_best_never_stands_for_a_best_that_is_not_known(status):
    """A failed run of the best cell would else make a rival of what is second best."""
    rows, members = made()
    gone = (members.method == "dpo") & (members.beta == 0.5)
    members.loc[gone, ["status", "validation_implicit_accuracy"]] = [status, None]
    assert choose(STUDY, {"method": "dpo", "beta": "best"}, members) is None


def test_what_diverged_is_said_and_supports_nothing_by_itself():
    """The score that stands for a diverged run is ours: whatever it is, a treatment that has no other supports no
    claim."""
    high = STUDY.model_copy(update={"diverged": {"score": 9.0}, "claims": (BY_ID["C1"],)})
    rows, members = made(diverged=[("td_dpo", 0.01, seed) for seed in SEEDS])
    verdict = judge(rows, members, study=high)["C1"]
    assert verdict.verdict == "inconclusive"
    assert "TD-DPO (beta 0.01, tau 0.5) diverged (seed 42, 43, 44)" in verdict.reason


def test_a_claim_may_name_what_its_metric_is_less_of():
    named = BY_ID["C1"].model_copy(update={"baseline_name": "1.22 times the area of DPO"})
    rows, members = made()
    verdict = judge(rows, members, study=STUDY.model_copy(update={"claims": (named,)}))["C1"]
    assert "1.22 times the area of DPO" in verdict.reason


def test_beside_with_one_seed_has_no_interval():
    rows, members = made()
    extra = rows[(rows.method == "discopop") & (rows.beta == 2.5) & (rows.seed == 42)].assign(method="discopop_card")
    who = members[(members.method == "discopop") & (members.beta == 2.5) & (members.seed == 42)]
    v = judge(pd.concat([rows, extra]), pd.concat([members, who.assign(method="discopop_card")]))["C2"]
    assert v.verdict == "supported"
    assert v.beside[0]["n_seeds"] == 1
    assert "interval95" not in v.beside[0]


def test_support_needs_holm():
    rows, members = made({**GOOD, "td_dpo": (5.95, 6.0, 7.5, 6.5)}, answer_sd=0.8, seed_sd=0.01)
    alone = judge(rows, members, study=STUDY.model_copy(update={"claims": (BY_ID["C1"],)}))["C1"]
    assert alone.verdict == "supported"
    assert alone.holm_p == alone.p
    # so many hopeless claims beside it that its p no longer stands out
    hopeless = BY_ID["C2"].model_copy(update={"margin": 9.0, "beside": ()})
    others = tuple(hopeless.model_copy(update={"id": f"X{i}"}) for i in range(int(0.05 / alone.p) + 1))
    crowded = judge(rows, members, study=STUDY.model_copy(update={"claims": (BY_ID["C1"], *others)}))["C1"]
    assert crowded.holm_p == pytest.approx(alone.p * (len(others) + 1))
    assert crowded.verdict == "inconclusive"
    assert "Holm" in crowded.reason


def test_select_knows_numbers_from_strings_and_absent_columns():
    frame = pd.DataFrame({"method": ["a", "b"], "beta": ["0.1", 0.1]})
    assert len(select(frame, {"beta": 0.1})) == 2
    assert len(select(frame, {"method": "a", "beta": 0.1})) == 1
    assert select(frame, {"gamma": 1}).empty


# ---- forms


def test_json_table_and_sentence(good):
    text = json.dumps(c.to_json(list(good.values())), allow_nan=False)
    assert json.loads(text)[0]["per_seed"].keys() == {"42", "43", "44"}
    frame = c.table(list(good.values()))
    assert list(frame["claim"]) == ["C1", "C2", "C3", "C4", "C5"]
    assert c.sentence(good["C1"]).startswith("C1 supported at laptop scale: TD-DPO (beta 0.01, tau 0.5) scored")


def test_json_of_an_infinite_interval_has_null():
    v = c.Verdict(BY_ID["C1"], "laptop")
    v.interval95, v.estimate = (0.1, np.inf), np.nan
    assert c.to_json([v])[0]["interval95"] == [0.1, None]
    assert c.to_json([v])[0]["estimate"] is None


def test_verdicts_do_not_change_between_calls(good):
    rows, members = made()
    assert c.to_json(list(judge(rows, members, costs=times()).values())) == c.to_json(list(good.values()))


def test_coverage_names_seeds_by_status():
    _, members = made(diverged=[("discopop", 2.5, 43)])
    table = c.coverage(STUDY, members).set_index(["claim", "side"])
    (row,) = table.loc[[("C2", "baseline")]].to_dict("records")
    assert (row["completed"], row["diverged"], row["finished"]) == ("42, 44", "43", 3)
    assert len(table.loc["C4"]) == 8


# ---- the file


def broken(tmp_path, old, new):
    text = PATH.read_text()
    assert old in text
    path = tmp_path / "claims.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(StudyError) as error:
        c.load(path)
    return str(error.value)


def test_unknown_keys_are_refused(tmp_path):
    message = broken(tmp_path, "margin: 0.3", "margn: 0.3")
    assert "claims.0.margn: unknown key" in message
    assert "did you mean claims.0.margin?" in message
    beside = "DPO beta that is best on validation\n      {}:"
    message = broken(tmp_path, beside.format("baseline"), beside.format("basline"))
    assert "did you mean claims.0.beside.0.baseline?" in message
    assert "did you mean names?" in broken(tmp_path, "names:", "name:")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{method: td_dpo, beta: 2.5}", "{method: td_dpo, beta: 2.5, tau: 0.5}", "2 was fixed in advance"),
        ("{method: td_dpo, beta: 2.5}", "{method: td_dpo, beta: 3}", "not fixed for beta = 3"),
        ("id: C2", "id: C1", "not unique"),
        ("test: non_inferiority", "test: non_inferior", "non_inferiority"),
        ("    across:\n      beta: [0.01, 0.05, 0.5, 2.5]\n", "", "across"),
        ("    baseline: {method: dpo, beta: 0.05}\n", "", "needs a `baseline`"),
        ("choose_on: validation_implicit_accuracy", "choose_on: null", "needs `choose_on`"),
    ],
)
def test_a_file_that_does_not_say_what_decides_is_refused(tmp_path, old, new, said):
    assert said in broken(tmp_path, old, new)


def test_numeric_strings_are_numbers(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(PATH.read_text().replace("{method: dpo, beta: 0.05}", "{method: dpo, beta: 5e-2}", 1))
    assert c.load(path).claims[0].baseline["beta"] == 0.05


# ---- false support and power, decided by the functions above

NULLS = [
    ("seeds differ little", {}, 0.05),
    ("seeds differ", {}, 0.15),
    ("seeds differ more than questions", {}, 0.6),
    ("questions decide", {"interaction_sd": 1.5, "answer_sd": 0.5}, 0.05),
    ("question sd 1.5 in pairs", {"answer_sd": 1.06}, 0.15),
    ("little spread", {"spread": 0.3}, 0.15),
]


CASES = [
    pytest.param(claim, noise, seed_sd, id=f"{claim.id}, {what}")
    for claim in STUDY.claims
    for what, noise, seed_sd in (NULLS[:1] if claim.test == "cost_ratio" else NULLS)
]  # times have their own noise


@pytest.mark.parametrize(("claim", "noise", "seed_sd"), CASES)
def test_false_support_is_at_most_five_percent(claim, noise, seed_sd):
    n = 600 if claim.test == "variance_ratio" else 3000
    size = {"seed_sd": seed_sd, "questions": 80, "effect": power.null_effect(claim), "n_sim": n}
    share = share_supported(claim, STUDY.noise.model_copy(update=noise), seed=1, **size)
    # three standard errors of a share of .05 above .05
    assert share <= 0.05 + 3 * (0.05 * 0.95 / n) ** 0.5


@pytest.mark.parametrize("claim", [k for k in STUDY.claims if k.test != "cost_ratio"], ids=lambda claim: claim.id)
def test_the_opposite_of_a_claim_is_hardly_ever_supported(claim):
    opposite = {"C1": -0.8, "C2": 0.0, "C3": 0.4, "C4": 1.6}[claim.id]
    assert share_supported(claim, STUDY.noise, seed_sd=0.15, questions=80, effect=opposite, n_sim=600, seed=2) <= 0.02


def test_the_power_table_says_what_a_study_of_this_size_can_show():
    table = power.table(STUDY, n_sim=400)
    assert sorted(set(table["seed sd"])) == [0.05, 0.15]
    small = table[(table["seed sd"] == 0.05) & (table["claim"] != "C3")]
    assert list(small["claim"]) == ["C1", "C2", "C4", "C5"]
    assert (small["power alone"] >= 0.8).all(), small.to_string()
    assert (table["power with Holm"] <= table["power alone"]).all()
    assert (table[table.claim == "C3"]["power alone"] < 0.2).all()
    assert list(table["if true, it is shown"]) == [power.word_for(share) for share in table["power with Holm"]]
    words = [power.word_for(share) for share in (1.0, 0.8, 0.79, 0.5, 0.49, 0.2, 0.19, 0.0)]
    assert words == [w for w in ("nearly always", "more often than not", "seldom", "hardly ever") for _ in range(2)]
    made_up = pd.DataFrame({"claim": ["A", "B", "C"] * 2, "power with Holm": [0.0, 0.1, 0.004, 0.08, 0.3, 0.0]})
    assert power.weak_claims(made_up) == {"A": "0 to 8 %", "C": "0 %"}, "B is shown at one of the standard deviations"
    assert "A (0 to 8 %), C (0 %)" in power.summary(made_up)
    assert "a fifth" in power.summary(made_up[made_up.claim == "B"])


def test_a_claim_that_stays_open_says_that_it_would_have_if_it_were_true():
    rows, members = made(answer_sd=1.2, seed_sd=0.15)
    low = pd.DataFrame({"claim": ["C1", "C2", "C3"], "power with Holm": [0.04, 0.03, 0.02]})
    verdicts = list(judge(rows, members).values())
    before = {v.id: (v.verdict, v.reason) for v in verdicts}
    assert before["C3"][0] == "inconclusive"
    power.explain_open(verdicts, low)
    said = {v.id: v.reason for v in verdicts}
    assert (
        said["C3"]
        == before["C3"][1] + " Even if it is true, a study of this size would hardly ever show it (power 2 %)."
    )
    assert before["C2"][0] == "supported"
    assert said["C2"] == before["C2"][1], "it was shown"
    power.explain_open(verdicts, None)
    assert said == {v.id: v.reason for v in verdicts}


def share_supported(claim, noise, *, seed, **size):
    decided = power.simulate(claim, noise, seeds=3, rng=np.random.default_rng(seed), **size)
    return float((decided.code == st.SUPPORTED).mean())


def test_simulated_and_real_decisions_agree():
    """`evaluate` on simulated rows and `power.simulate`'s closed form come to the same share of supported claims."""
    study = STUDY.model_copy(update={"claims": (BY_ID["C1"],)})
    real = []
    for seed in range(60):
        rows, members = made({k: v for k, v in GOOD.items() if k != "discopop"}, seed_sd=0.05, answer_sd=0.7, seed=seed)
        real.append(judge(rows, members, study=study)["C1"].verdict == "supported")
    share = share_supported(
        BY_ID["C1"],
        Noise(interaction_sd=0.0, answer_sd=0.7),
        seed_sd=0.05,
        questions=80,
        effect=0.0,
        n_sim=2000,
        seed=3,
    )
    assert np.mean(real) == pytest.approx(share, abs=0.17)


@pytest.mark.parametrize("effect", [0.0, 0.1, 0.2])
def test_power_where_only_questions_of_a_method_differ_is_a_closed_form(effect):
    """With neither seeds nor answers that differ, every seed sees the same differences d_q ~ N(effect, 2
    interaction^2): their mean over sqrt(3/2) times its (population) standard error is a noncentral t, and the companion
    has nothing against it."""
    claim, q = BY_ID["C2"].model_copy(update={"margin": 0.0}), 80
    noise = Noise(interaction_sd=0.4, answer_sd=0.0, question_sd=1.5)
    share = share_supported(claim, noise, seed_sd=0.0, questions=q, effect=effect, n_sim=4000, seed=5)
    critical = stats.norm.ppf(0.975) * (1.5 * (q - 1) / q) ** 0.5
    expected = stats.nct.sf(critical, q - 1, effect * q**0.5 / (2**0.5 * 0.4))
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4000) ** 0.5 + 1e-3)


def test_power_where_only_seeds_differ_is_a_closed_form():
    """Then the companion is the narrower gate: t of 3 seeds above 2.92, where the primary asks for 1.96."""
    claim = BY_ID["C2"].model_copy(update={"margin": 0.0})
    share = share_supported(
        claim, Noise(interaction_sd=0.0, answer_sd=0.0), seed_sd=0.3, questions=80, effect=0.8, n_sim=4000, seed=6
    )
    critical = max(stats.t.ppf(0.95, 2), stats.norm.ppf(0.975) * (1.5 * 2 / 3) ** 0.5)
    expected = stats.nct.sf(critical, 2, 0.8 * 3**0.5 / (2**0.5 * 0.3))
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4000) ** 0.5)


def test_noise_seen_recovers_what_was_put_in():
    rng = np.random.default_rng(4)
    d = rng.normal(0, 0.5, (200, 1)) + rng.normal(0, 0.8, (1, 400)) + rng.normal(0, 1.2, (200, 400))
    assert st.noise_sds(d) == pytest.approx({"seed": 0.5, "question": 0.8, "answer": 1.2}, rel=0.12)
