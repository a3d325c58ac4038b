"""The cell `tuned`: what a run's search found is frozen, trained for the judged seeds and compared by that name alone, by
as many trials on either side; until the search has ended, nothing stands in for it."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from lib import claims, config, record, stats, tables
from lib.graff import report as graff
from lib.iw_lora import report
from lib.run import check, decide, plan, runs, sweep, wandb
from tests.test_claims import around, record_of, study_of
from tests.test_seeds import finish

SPACE = {"beta": {"type": "loguniform", "low": 0.01, "high": 1}, "tau": {"type": "categorical", "choices": [0.5, 1.0]}}
SEARCH = {"n_trials": 3, "search_space": SPACE}
FOUND = {"loss.beta": 0.3, "loss.tau": 0.5}


@pytest.fixture
def run(tiny):
    return tiny(pilot_seeds=[8], optuna=SEARCH, grid=[{"tuned": True}])


def end_search(run, cell=FOUND, **changes):
    """What the search's notebook leaves."""
    folder = run.results_dir / run.run_id / "sweep"
    metrics = {"trials": 3, "best": {"beta": 0.3, "tau": 0.5}, "final": None, "cell": cell}
    record.write_json(folder / "metrics.json", {**metrics, "search": runs.search_of(run), **changes})


def ids(run):
    return [member.id for member in config.members(run)]


def test_what_the_search_found_is_the_cell_and_nothing_before_it_ended(run):
    assert (ids(run), ids(runs.settle(run))) == ([], [])
    assert ids(runs.settle(run, guess=True)) == ["tuned-s1", "tuned-s2"]
    end_search(run)
    settled = runs.settle(run)
    assert ids(settled) == ids(runs.settle(settled)) == ["tuned-s1", "tuned-s2"]
    assert {(m.run.loss.beta, m.run.loss.tau, m.pilot) for m in config.members(settled)} == {(0.3, 0.5, False)}
    longer = config.apply(run, {"optuna.n_trials": 9})
    assert ids(runs.settle(longer)) == [], "a longer search has not ended"
    more = config.with_seeds(run, {config.TUNED: [1, 2, 3]})
    assert ids(runs.settle(more)) == ["tuned-s1", "tuned-s2", "tuned-s3"]


def test_a_search_is_the_same_whatever_it_has_found(run, tmp_path):
    before = sweep.open_study(run, tmp_path).study_name
    assert sweep.cells(run) == [{"beta": 0.05, "tau": 1.0}], "the run's own setting is a trial"
    member, place = sweep.trial_member(run, {"beta": 0.05, "tau": 1.0})
    assert (member.seed, place) == (8, "sweep/trials"), "of a seed that is never judged"
    end_search(run)
    assert sweep.open_study(runs.settle(run), tmp_path).study_name == before


def test_the_search_is_planned_before_its_run_which_waits_for_it(run):
    first, then, analysis = plan.steps([run], searched=[run])
    assert [(step.title, step.members) for step in (first, then)] == [("td_dpo/tiny sweep", 3), ("td_dpo/tiny", 2)]
    assert (first.needs, then.needs, analysis.needs) == ([], [first], [first, then])
    end_search(run)
    finish(runs.settle(run), {"tuned": 0.9})
    (then, _) = plan.steps([run])
    assert then.members == 0
    end_search(run, {"loss.beta": 0.4, "loss.tau": 0.5})
    assert plan.steps([run])[0].members == 2, "another cell"


def test_the_record_of_what_was_found_is_gone_on_from_and_it_is_what_the_run_is_known_by(run):
    asked = config.with_seeds(run, {config.TUNED: [1]})
    end_search(run)
    finish(runs.settle(asked), {"tuned": 0.9})
    record.write_json(run.results_dir / "tiny" / "config.yaml", config.dump(asked))
    assert decide.recorded(run) == {config.TUNED: [1]}
    rows = [{"member": "beta2-s1", "cell": "beta2", "seed": 1, "oracle_score": 9.0}]
    rows += [{"member": "tuned-s1", "cell": "tuned", "seed": 1, "oracle_score": 5.0}]
    found = runs.summary(run, [{"status": "completed", "validation_implicit_accuracy": 1.0, **row} for row in rows])
    assert (found["chosen_cell"], found["metrics"]["oracle_score"]) == ("tuned", 5.0)
    record.write_json(run.results_dir / "tiny" / "metrics.json", found)
    (row,) = tables.tuned_runs([run]).to_dict("records")
    assert {"run": "tiny", "beta": 0.3, "trials": 3, "seeds": 1, "oracle_score": 5.0}.items() <= row.items()


def test_where_no_claim_compares_it_the_table_has_the_searchs_own_final_runs(tiny):
    run = tiny(optuna=SEARCH)
    end_search(run, final={"cell": "beta0.3", "seeds": 2, "oracle_score": 6.5})
    record.write_json(run.results_dir / "tiny" / "metrics.json", {"chosen_cell": "default", "members": {}})
    (row,) = tables.tuned_runs([run]).to_dict("records")
    assert (row["seeds"], row["oracle_score"]) == (2, 6.5)


def test_w_and_bs_final_run_is_the_one_that_aggregated_metrics_speak_of(tmp_path):
    folder = tmp_path / "paper-full" / "td_dpo" / "r"
    settings = {"optuna": {"n_trials": 3}}
    record.write_text(folder / "config.yaml", "wandb: null")
    record.write_json(folder / "done.json", {})
    made = {}
    for cell in ("beta1", "tuned"):
        spec = {"study": "td_dpo", "scale": "paper", "mode": "full", "config": settings}
        record.write_json(folder / "members" / f"{cell}-s1" / "member.json", spec)
        entry_config = {**settings, "record": {"scale": "paper", "mode": "full"}}
        made[f"{cell}-s1"] = wandb.Entry({"id": cell}, entry_config, {}, folder, {}, True)
    for chosen in ("beta1", "tuned"):
        record.write_json(folder / "metrics.json", {"chosen_cell": chosen, "metrics": {"score": 1.0}})
        (folder / "sweep" / "metrics.json").unlink(missing_ok=True)
        assert wandb.final_entry(folder, made) is None, "its search is still to come"
        record.write_json(folder / "sweep" / "metrics.json", {"trials": 3, "final": {"score": 2.0}})
        final = wandb.final_entry(folder, made)
        assert (final.config["record"]["chosen"], final.summary) == (f"{chosen}-s1", {"score": 1.0})


# ---- claims


TUNED = {"treatment": {"method": "new", "cell": "tuned"}, "baseline": {"method": "old", "cell": "tuned"}}


def tuned_record(d, rest=9.0):
    """`new` is `d` above `old` where both are tuned, and `rest` above it at another cell of the same values."""
    old = np.full(d.shape, 5.0)
    parts = [record_of({"new": old + gain, "old": old}) for gain in (d, np.full(d.shape, rest))]
    tables = zip(*([t.assign(cell=cell) for t in part] for part, cell in zip(parts, ("tuned", "default"), strict=True)),
                 strict=True)  # fmt: skip
    return [pd.concat(each, ignore_index=True) for each in tables]


def test_a_tuned_cell_answers_to_its_name_alone():
    rows, everyone = tuned_record(around(0.4))
    study = study_of(TUNED, {"treatment": "new", "baseline": "old"})
    tuned, other = claims.evaluate(study, rows, members=everyone, scale="laptop", mode="full")
    assert (tuned.estimate, other.estimate) == (pytest.approx(rows_mean(rows, "tuned")), pytest.approx(9.0))
    assert len(claims.select_any(everyone, study.claims[1], {"method": "new"})) == 8
    cost = study.claims[1].model_copy(update={"test": "cost_ratio"})
    assert len(claims.select_any(everyone, cost, {"method": "new"})) == 16, "a cost is measured over all cells"


def rows_mean(rows, cell):
    mean = rows[rows["cell"] == cell].groupby("method")["score"].mean()
    return mean["new"] - mean["old"]


def test_without_its_search_a_claim_is_not_evaluated_says_how_and_counts_for_holm():
    rows, everyone = (table[table["cell"] != "tuned"] for table in tuned_record(around(0.4)))
    tuned, other = claims.evaluate(
        study_of(TUNED, {"treatment": "new", "baseline": "old"}), rows, members=everyone, scale="paper", mode="full"
    )
    assert tuned.verdict == "not evaluated"
    assert "no search has ended; ./run_all.sh full --scale paper --claims made/X1 searches" in tuned.reason
    assert other.holm_p == pytest.approx(2 * other.p), "a word is not taken back when the search has ended"


def by_check(tmp_path, runs_of, **cell):
    text, cell = config.load_yaml(plan.claims_of("td_dpo")), cell or {"cell": "tuned"}
    sides = {"treatment": {"method": "td_dpo", **cell}, "baseline": {"method": "dpo", **cell}}
    text["choose_on"] = "validation_implicit_accuracy"
    text["claims"] = [
        {"id": "X1", "sentence": "X", "test": "superiority", "margin": 2.0, "scales": ["laptop"], **sides}
    ]
    record.write_json(tmp_path / "claims.yaml", text)
    return [f.what for f in check.claims_findings("td_dpo", runs_of, "laptop", tmp_path / "claims.yaml")
            if f.level == "error"]  # fmt: skip


def test_check_refuses_a_best_of_more_cells_on_one_side(tiny, tmp_path):
    def made(name, *betas):
        loss = {"name": name, "beta": 0.05} | ({"tau": 1.0} if name == "td_dpo" else {})
        grid = [{"product": {"beta": [*betas]}, "pilot": True}]
        return tiny(run_id=name, method=name, loss=loss, pilot_seeds=[8], grid=grid)

    even, more = [made("td_dpo", 0.05, 0.5), made("dpo", 0.05, 0.5)], [made("td_dpo", 0.05, 0.5), made("dpo", 0.05)]
    assert by_check(tmp_path, even, beta="best") == []
    (said,) = by_check(tmp_path, more, beta="best")
    assert said.startswith("`best` of unequal grids: ")
    assert said.count(" 2 cells") == said.count(" 1 cells") == 1


def test_check_refuses_sides_with_unequal_trials_and_searches_that_cannot_be(tiny, tmp_path):
    def made(name, trials, **changes):
        loss = {"name": name, "beta": 0.05} | ({"tau": 1.0} if name == "td_dpo" else {})
        own = {"run_id": name, "method": name, "loss": loss, "pilot_seeds": [8], "grid": [{"tuned": True}]}
        space = {key: SPACE[key] for key in ("beta",)}
        return tiny(**{**own, "optuna": {"n_trials": trials, "search_space": space}, **changes})

    assert by_check(tmp_path, [made("td_dpo", 3), made("dpo", 3)]) == []
    assert by_check(tmp_path, [made("td_dpo", 3), made("dpo", 2)]) == ["tuned with unequal trials: td_dpo 3, dpo 2"]
    (what,) = by_check(tmp_path, [made("td_dpo", 3), made("dpo", 3, grid=None)])
    assert what == "no run at laptop scale trains DPO (cell tuned)"
    for changes, key in (({"pilot_seeds": None}, "pilot_seeds"), ({"optuna": {"n_trials": 0}}, "grid: tuned")):
        assert key in [f.key for f in check.findings(made("td_dpo", 3, **changes)) if f.level == "error"]


def test_a_tuned_block_is_what_a_search_finds_and_nothing_else(tiny):
    with pytest.raises(config.StudyError, match="the search finds the cell"):
        tiny(pilot_seeds=[8], grid=[{"tuned": True, "pilot": True}])


def test_a_claims_searches_are_in_its_price_and_what_was_searched_is_not(run, monkeypatch):
    monkeypatch.setattr(plan, "member_seconds", lambda run: 100.0)
    monkeypatch.setattr(plan, "prepare_seconds", lambda run: 0.0)
    monkeypatch.setattr(plan, "NOTEBOOK_SECONDS", 0.0)
    spending = decide.Spending.__new__(decide.Spending)
    spending.seeds, spending.slots = {"td_dpo/tiny": {}}, 1
    asked = [decide.Open("td_dpo", "X", [(run, config.TUNED)], 2)]
    assert spending.cost(asked) == 100.0 * (3 + 2)
    record.write_json(run.results_dir / "tiny" / "sweep" / "trials" / "a-s8" / "done.json", {})
    assert spending.cost(asked) == 100.0 * (2 + 2)
    end_search(run)
    assert spending.cost(asked) == 100.0 * 2


def test_members_of_the_paper_scales_claims_are_tuned_on_both_sides_by_as_many_trials():
    for study, named in (("iw_lora", 16), ("graff", 5)):
        folder = config.ROOT / "params" / study
        loaded = [config.load_run(p, scale="paper", mode="full") for p in sorted((folder / "paper").glob("*.yaml"))]
        arms = decide.arms(claims.load(folder / "claims.yaml"), loaded, "paper")
        trials = {each.run_id: each.optuna.n_trials for each in loaded}
        tuned = {name: own for name, own in arms.items() if any(cell == config.TUNED for _, cell in own)}
        assert len(tuned) == named
        for own in tuned.values():
            assert {cell for _, cell in own} == {config.TUNED}
            assert len({trials[run_id] for run_id, _ in own}) == 1
        assert all(each.pilot_seeds for each in loaded if any(block.tuned for block in each.grid or ()))


# ---- F1, an average over tasks, and costs as claims


def confusions(rng, n=120, right=0.8, positives=0.5):
    """(labels, predictions) of two-way entailment, 0 the positive one."""
    labels = (rng.random(n) > positives).astype(int)
    return labels, np.where(rng.random(n) < right, labels, 1 - labels)


def of_rte(labels, predictions, seed=1, **who):
    rows = {"run_id": "r", "cell": "c", "seed": seed, "subset": "rte", "method": "lora", **who}
    correct = labels == predictions
    return pd.DataFrame({**rows, "example": range(len(labels)), "label": labels, "prediction": predictions,
                         "correct": correct})  # fmt: skip


@pytest.mark.parametrize(("n", "right", "positives"), [(277, 0.75, 0.53), (40, 0.9, 0.2), (30, 0.0, 0.5)])
def test_a_members_f1_scores_have_sklearns_f1_as_their_mean_and_vary_as_it_does(n, right, positives):
    labels, predictions = confusions(np.random.default_rng(n), n, right, positives)
    found = report.scores(of_rte(labels, predictions))["f1"].to_numpy()
    f1 = f1_score(labels, predictions, pos_label=0)
    assert found.mean() == pytest.approx(f1, abs=1e-12)
    left_out = np.array([f1_score(np.delete(labels, i), np.delete(predictions, i), pos_label=0) for i in range(n)])
    jackknife = n * f1 - (n - 1) * left_out  # Tukey's pseudo-values, to first order the same
    assert np.corrcoef(found, jackknife)[0, 1] > 0.999 if f1 else not found.any()
    assert found.var(ddof=1) == pytest.approx(jackknife.var(ddof=1), rel=0.15)


def test_the_interval_of_f1_covers_it_as_that_of_a_mean_covers_a_mean():
    """Two-way layout: 3 seeds answer the same 150 examples, some of which are hard for all. A fixed-size study."""
    rng, inside, n_sim, n, seeds = np.random.default_rng(0), 0, 300, 150, 3
    hard = rng.random(200_000) < 0.3  # the population: P(right) .5 where hard, else .9
    right = np.where(hard, 0.5, 0.9)
    true = (2 * right.mean() / 2) / (right.mean() / 2 * 2 + (1 - right.mean()))  # labels in halves
    for _ in range(n_sim):
        labels, p = (rng.random(n) < 0.5).astype(int), np.where(rng.random(n) < 0.3, 0.5, 0.9)
        made = [(labels == 0, np.where(rng.random(n) < p, labels, 1 - labels) == 0) for _ in range(seeds)]
        d = np.stack([stats.ratio_scores(2.0 * (y & g), y * 1.0 + g) for y, g in made])
        low, high = stats.look_at(d).interval(stats.bound_of((seeds,)))
        inside += low <= true <= high
    assert 0.94 <= inside / n_sim <= 1.0


def test_a_published_score_is_f1_on_rte_and_accuracy_elsewhere():
    labels, predictions = confusions(np.random.default_rng(1))
    parts = [of_rte(labels, predictions), of_rte(labels, predictions, subset="sst2", run_id="s")]
    rows = report.scores(pd.concat(parts, ignore_index=True))
    rte, sst2 = (rows[rows["subset"] == task] for task in ("rte", "sst2"))
    assert (rte["score"] == rte["f1"]).all()
    assert sst2["f1"].isna().all()
    assert sst2["score"].mean() == pytest.approx((labels == predictions).mean())


def test_an_average_over_tasks_counts_each_alike_whatever_its_number_of_questions():
    gains, parts = {"a": (0.02, 400), "b": (0.05, 40), "c": (-0.01, 100)}, []
    rng = np.random.default_rng(0)
    for task, (gain, n) in gains.items():
        old = rng.normal(0.7, 0.1, (8, n))
        d = gain + rng.normal(0, 0.002, (8, 1)) + rng.normal(0, 0.01, (8, n))
        rows, everyone = record_of({"new": old + d, "old": old})
        parts.append((rows.assign(task=task), everyone.assign(task=task)))
    rows, everyone = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    claim = {"treatment": "new", "baseline": "old", "across": {"task": list(gains)}, "gain": 0.006}
    study = study_of(claim, chance={"metric": "score", "what": "a guess", "no_better_than": [0.5]})
    (found,) = claims.evaluate(study, rows, members=everyone, scale="laptop", mode="full")
    per_task = rows.groupby(["task", "method"])["score"].mean().unstack()
    assert found.estimate == pytest.approx((per_task["new"] - per_task["old"]).mean())
    assert found.verdict == "supported"
    assert (found.n_seeds, found.n_questions) == (8, 540)
    one = everyone["task"].eq("b") & everyone["seed"].eq(42) & everyone["method"].eq("new")
    lost = everyone.assign(status=everyone["status"].mask(one, "missing"))
    (late,) = claims.evaluate(study, rows, members=lost, scale="laptop", mode="full")
    assert late.verdict == "not evaluated", "a look has all its seeds of every task"
    (other,) = claims.evaluate(study, rows, members=everyone[~one], scale="laptop", mode="full")
    assert "the same seeds in every part" in other.reason
    (chance,) = claims.evaluate(
        study_of(claim, chance={"metric": "score", "what": "a guess", "no_better_than": [0.9]}),
        rows, members=everyone, scale="laptop", mode="full",
    )  # fmt: skip
    assert (chance.verdict, "no run is shown to have learned" in chance.reason) == ("vacuous", True)


def test_calibration_is_a_cost_of_the_whole_training(tmp_path):
    costs = pd.DataFrame([{"run_id": "r", "method": "iw_lora", "process": p, "seconds": s}
                          for p in range(8) for s in (0.1, 0.1, 0.3)])  # fmt: skip
    for p in range(8):
        counts = {"training_passes": 1000, "seconds": 1.0 + p / 100}
        record.write_json(tmp_path / "r" / "step_cost" / str(p) / "calibration.json", counts)
    found = report.with_calibration(costs, tmp_path)
    claim = {"treatment": "iw_lora", "baseline": "iw_lora", "baseline_name": "the same without", "gain": None}
    claim |= {"test": "cost_ratio", "metric": "training_seconds", "margin": 1.02}
    del claim["gain"]
    (verdict,) = claims.evaluate(study_of(claim), pd.DataFrame(), members=pd.DataFrame({"method": []}), costs=found,
                                 scale="laptop", mode="full")  # fmt: skip
    assert verdict.estimate == pytest.approx(1.01035, abs=1e-5)
    assert (verdict.verdict, "training_seconds of the same without" in verdict.reason) == ("supported", True)


def test_a_step_of_graff_is_timed_without_its_evaluations():
    who = {"run_id": "proposed-graff_30", "cell": "c", "method": "graff", "learning_rate": 2e-4}
    used = [(0.0, None), (2.0, 1e-4), (4.0, 1e-4), (9.0, None), (11.5, 1e-4)]
    history = pd.DataFrame([{**who, "seed": 1, "used": u, "eta": eta} for u, eta in used])
    everyone = pd.DataFrame([{**who, "seed": 1, "status": "completed", "auc": 0.5, "pilot": False}])
    empty = pd.DataFrame()
    found = graff.areas(tables.Records(everyone, history, empty, empty, empty, everyone))
    assert found["step_score"].tolist() == pytest.approx([-np.log((2 + 2 + 2.5) / 3)])


def test_the_published_figures_are_claims():
    by = {c.id: c for c in claims.load(config.ROOT / "params" / "iw_lora" / "claims.yaml").claims}
    figures = {(c.treatment["run_id"]): (c.reported, c.metric) for c in by.values() if c.test == "absolute"}
    named = ("comparative-1-{}_lora", "comparative-2-{}_adalora", "proposed-{}_iw_lora")
    for task, metric, own in (
        ("mnli", "accuracy", (0.846, 0.853, 0.851)),
        ("sst2", "accuracy", (0.932, 0.938, 0.937)),
        ("rte", "f1", (0.72, 0.734, 0.732)),
    ):
        assert [figures[name.format(task)] for name in named] == [(value, metric) for value in own]
    average = next(c for c in by.values() if c.across)
    assert (average.across["subset"], average.gain) == (("mnli", "sst2", "rte"), 0.006)
    false = [c for c in by.values() if c.metric == "training_seconds" and "False by the design" in c.note]
    assert [c.treatment["run_id"] for c in false] == ["proposed-rte_iw_lora"]
