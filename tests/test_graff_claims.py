"""GRAFF's claims on made records: energy to a level, what is vacuous or not evaluated and why, who is set beside
whom."""

import math

import numpy as np
import pandas as pd
import pytest

from lib import claims, config
from lib.graff import report, trainer
from tests.conftest import ROOT

PUBLISHED = claims.load(ROOT / "params" / "graff" / "claims.yaml")
SEEDS = (42, 43, 44, 45, 46)


def runs(scale="laptop"):
    return [
        config.load_run(path, study="graff", scale=scale, mode="full")
        for path in sorted((ROOT / "params" / "graff" / scale).glob("*.yaml"))
    ]


# ---- what a curve comes to


def test_energy_to_a_level_lies_between_two_evaluations_and_is_none_where_it_says_nothing():
    joules, em = [0.0, 100.0, 200.0, 300.0], [0.1, 0.2, 0.6, 0.5]
    assert trainer.energy_to_level(joules, em, 0.4) == pytest.approx(150.0)
    assert trainer.energy_to_level(joules, em, 0.6) == pytest.approx(200.0)
    assert trainer.energy_to_level(joules, em, 0.7) is None  # never
    assert trainer.energy_to_level(joules, em, 0.1) is None  # the base model is there
    assert trainer.energy_to_level([None] * 4, em, 0.4) is None
    assert trainer.energy_to_level(joules, em, None) is None


# ---- energy as a claim


def studied(per_joule: dict[str, float], *, base=0.1, joules=1000.0, spread=0.02, problems=60, read=True, ends=None):
    """(members, evaluations): exact match rises from `base` by `per_joule` of each method, problems solved in a drawn
    order."""
    members, rows, rng = [], [], np.random.default_rng(0)
    for method, slope in per_joule.items():
        for seed in SEEDS:
            who = {
                "run_id": method,
                "method": method,
                "learning_rate": 0.003,
                "seed": seed,
                "cell": "c",
                "status": "completed",
            }
            slope_s, order = slope * math.exp(rng.normal(0, spread)), rng.permutation(problems)
            members.append(
                {
                    **who,
                    "dev_exact_match": 0.5,
                    "energy": joules if read else None,
                    "energy_source": "nvml" if read else None,
                    "energy_reason": None if read else "no counter here",
                }
            )
            for at in np.linspace(0, joules, 11):
                share = min(base + slope_s * at, (ends or {}).get(method, 1.0))
                hits = (order < round(share * problems)).astype(int)
                rows.append(
                    {
                        **who,
                        "used": at / 10,
                        "joules": at if read else None,
                        "exact_match_subset": hits.mean(),
                    }
                )
    return pd.DataFrame(members), pd.DataFrame(rows)


def judged(members, evaluations, stated=None):
    """(verdict on the claim about energy, the level), as the analysis comes to them."""
    energies, level, absent = None, None, {}
    areas = pd.DataFrame(
        {**{k: m[k] for k in report.KEYS}, "auc": 0.5, "status": "completed"} for m in members.to_dict("records")
    )
    try:
        report.check_energy(members)
        level = report.choose_level(evaluations, stated)
        energies = report.energy_scores(evaluations, level)
        areas = areas.merge(energies, on=report.KEYS, how="left")
    except report.NoEnergy as reason:
        absent = {report.METRIC: str(reason)}
    found = claims.evaluate(
        PUBLISHED,
        pd.DataFrame(columns=["method", "seed", "exact_match"]),
        scale="laptop",
        mode="full",
        members=members,
        accuracy=areas,
        absent=absent,
        qualify=lambda found: energies is None or report.qualify(found, PUBLISHED, members, energies),
    )
    return next(v for v in found if v.id == "C7"), level


@pytest.mark.parametrize(("ratio", "verdict"), [(0.5, "supported"), (0.883, "inconclusive"), (1.8, "refuted")])
def test_energy_ends_as_a_verdict_with_an_interval_where_it_was_read(ratio, verdict):
    slope = {"reactor": 8e-4, "graff": 8e-4 / ratio, "fixed": 6e-4}
    found, level = judged(*studied(slope))
    assert found.verdict == verdict, found.reason
    assert level == pytest.approx((0.1 + 0.7) / 2, abs=0.02)  # halfway from the base model to the fixed rate's end
    assert found.estimate == pytest.approx(-math.log(ratio), abs=0.08)
    assert found.tested == pytest.approx(-math.log(0.83) * 2 / 3, abs=1e-3)
    assert found.interval95[0] < found.estimate < found.interval95[1]
    assert (found.n_seeds, found.n_questions) == (5, 1)
    assert found.holm_p is not None


def test_energy_that_could_not_be_read_leaves_the_claim_not_evaluated_with_the_reason():
    found, _ = judged(*studied({"reactor": 5e-4, "graff": 1e-3, "fixed": 6e-4}, read=False))
    assert found.verdict == "not evaluated"
    assert "energy could not be read (no counter here)" in found.reason


def test_a_level_that_the_base_model_has_already_is_refused():
    members, evaluations = studied({"reactor": 5e-4, "graff": 1e-3, "fixed": 6e-4}, base=0.2)
    found, level = judged(members, evaluations, stated=0.1)
    assert (found.verdict, level) == ("not evaluated", None)
    assert "base model's exact match is 0.200 already" in found.reason
    assert judged(members, evaluations, stated=0.5)[1] == 0.5
    members, evaluations = studied({"reactor": 5e-4, "graff": 1e-3, "fixed": 0.0})
    assert "no level lies between" in judged(members, evaluations)[0].reason
    members, evaluations = studied({"reactor": 5e-4, "graff": 1e-3})
    assert "no fixed rate's record" in judged(members, evaluations)[0].reason


def test_no_verdict_rests_on_a_level_that_was_not_reached():
    slope = {"reactor": 5e-4, "graff": 2e-3, "fixed": 6e-4}
    never = judged(*studied(slope, ends={"graff": 0.3, "reactor": 0.3}))[0]
    assert never.verdict == "vacuous"
    lost = judged(*studied(slope | {"graff": 5e-4}, ends={"graff": 0.35}))[0]  # its whole energy is the least it can be
    assert lost.verdict == "refuted"
    assert "GRAFF (learning_rate 0.003) did not reach the level with seed 42, 43, 44, 45, 46" in lost.reason
    slower = judged(*studied(slope, ends={"reactor": 0.3}))[0]  # REACTOR needs at least its whole run
    assert slower.verdict == "supported"
    members, evaluations = studied(slope | {"reactor": 1.5e-3, "graff": 3.15e-4}, ends={"reactor": 0.3})
    assert (
        judged(members, evaluations)[0].verdict == "inconclusive"
    )  # refuted only by the least that REACTOR can have taken


# ---- every claim of notebooks/graff/METHOD.md is there, at the scale it is about


def test_the_reported_claims_are_all_there():
    paper = {claim.id: claim for claim in PUBLISHED.claims if "paper" in claim.scales}
    reported = {claim.treatment["method"]: claim.reported for claim in paper.values() if claim.test == "absolute"}
    assert reported == {
        "fixed": 0.74,
        "graff": 0.924,
        "reactor": 0.908,
        "bats_reconstructed": 0.885,
        "salelr_reconstructed": 0.84,
    }
    for scale in ("laptop", "paper"):
        metrics = {claim.metric for claim in PUBLISHED.claims if scale in claim.scales}
        assert {"exact_match", "auc", "energy_score"} <= metrics
    assert {claim.factor for claim in PUBLISHED.claims if claim.metric == "auc"} == {1.22}
    mistral = [claim for claim in paper.values() if "mistral" in str(claim.treatment.get("run_id"))]
    assert {(claim.treatment["method"], claim.gain) for claim in mistral} == {("graff_frozen", 0.018), ("graff", 0.018)}
    assert all(claim.treatment["run_id"] in {run.run_id for run in runs("paper")} for claim in mistral)


def test_coverage_counts_the_runs_that_the_best_is_chosen_among():
    members = pd.concat(
        [studied({"graff": 1e-3, "reactor": 1e-3})[0].assign(learning_rate=rate) for rate in (3e-4, 3e-3)]
    )
    found = claims.coverage(PUBLISHED, members).set_index(["claim", "side"]).loc[("C1", "treatment")]
    assert (found["runs"], found["finished"], found["completed"]) == (10, 10, "42, 43, 44, 45, 46")


def test_figures_reported_for_what_has_no_definition_are_never_evaluated_and_say_why():
    rows = pd.DataFrame(
        [
            {
                "run_id": "comparative-1-reactor_30",
                "method": "reactor",
                "seed": seed,
                "example": i,
                "exact_match": 1.0,
                "status": "completed",
            }
            for seed in SEEDS
            for i in range(9)
        ]
    )
    found = {v.id: v for v in claims.evaluate(PUBLISHED, rows, scale="paper", mode="full")}
    assert found["C14"].verdict == "not evaluated"
    assert "no public definition" in found["C14"].reason


def test_no_claim_is_judged_by_a_run_that_a_cap_ended_before_its_budget():
    rows, members = scored({"graff": 0.5, "reactor": 0.3, "fixed": 0.4, "hypergradient": 0.4})
    members["capped"] = (members["method"] == "reactor") & (members["seed"] == 43)
    found = verdicts_of(rows, members)
    assert (found["C1"].verdict, found["C3"].verdict != "not evaluated") == ("not evaluated", True)
    assert "seed 43: ended by total_steps, not its budget" in found["C1"].reason
    assert verdicts_of(rows, members.assign(capped=None))["C1"].verdict != "not evaluated", (
        "a record that knows no caps"
    )


# ---- where next to nothing is answered


def scored(means: dict[str, float], problems=200, base=0.0, rate=0.003):
    rng = np.random.default_rng(0)
    who = [
        {
            "run_id": m,
            "method": m,
            "learning_rate": rate,
            "seed": s,
            "status": "completed",
            "dev_exact_match": 0.0,
            "base_exact_match": base,
            "dev_loss": 2.0,
        }
        for m in means
        for s in SEEDS
    ]
    rows = [
        {
            **{k: v for k, v in w.items() if k != "base_exact_match"},
            "example": i,
            "exact_match": float(rng.random() < means[w["method"]]),
        }
        for w in who
        for i in range(problems)
    ]
    return pd.DataFrame(rows), pd.DataFrame(who)


def verdicts_of(rows, members):
    return {v.id: v for v in claims.evaluate(PUBLISHED, rows, scale="laptop", mode="full", members=members)}


def test_a_claim_about_next_to_nothing_is_vacuous_and_not_refuted():
    """As on real problems: the base model answers none of them, and neither does what was trained."""
    none = dict.fromkeys(("graff", "graff_frozen", "reactor", "fixed", "hypergradient"), 0.002)
    found = verdicts_of(*scored(none))
    assert found["C1"].verdict == found["C5"].verdict == "vacuous"  # both ask for more, of which this falls short
    assert "not shown to be above 0.050" in found["C5"].reason
    found = verdicts_of(*scored(none | {"reactor": 0.4, "fixed": 0.4}))
    assert found["C1"].verdict == "refuted"  # one side does answer


def test_models_made_worse_than_the_base_model_are_a_result():
    """C4's runs at the laptop scale: at a tenth of the tuned rate both end below the base model."""
    rows, members = scored(
        {"graff": 0.05, "fixed": 0.04, "hypergradient": 0.05, "reactor": 0.05}, base=0.146, rate=0.0003
    )
    assert verdicts_of(rows, members)["C4"].verdict in ("inconclusive", "refuted")
    rows["exact_match"] = (rows["example"] % 7 == 0).astype(float)  # 0.145 in every run
    assert verdicts_of(rows, members)["C4"].verdict == "vacuous"
