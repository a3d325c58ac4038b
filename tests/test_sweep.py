"""The search: cells are enqueued and read, killed trials are queued once more and none is repeated, direction
asserted."""

import optuna
import pytest

from lib import config, record, tables
from lib.errors import StudyError
from lib.run import members, runs, sweep
from tests.conftest import TINY

SPACE = {
    "beta": {"type": "categorical", "choices": [0.05, 0.5]},
    "learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-2},
}
GRID = [{"cells": [{"beta": 0.05}, {"beta": 0.5}]}]


def search(run, folder):
    """As notebooks/sweep.ipynb does it."""
    study = sweep.start(run, folder)
    while trials := sweep.ask_batch(run, study):
        for trial, value in zip(trials, sweep.train(run, trials), strict=True):
            study.tell(trial, value)
    return study


def searchable(tiny, trials=6, **optuna_section):
    return tiny(grid=GRID, seed_list=[1], optuna={"n_trials": trials, "search_space": SPACE, **optuna_section})


@pytest.fixture
def fake_training(monkeypatch):
    """members.submit/watch/collect without training: the score is a function of the settings; every training is
    noted."""
    trained = []

    def submit(run, wanted, subfolder="members"):
        fresh = [(subfolder, m.id) for m in wanted if (subfolder, m.id) not in trained]
        trained.extend(fresh)
        return wanted

    def score(member):
        return 0.5 + member.run.loss.beta / 10 - abs(member.run.training.learning_rate - 3e-3)

    monkeypatch.setattr(members, "submit", submit)
    monkeypatch.setattr(members, "watch", lambda job: None)
    monkeypatch.setattr(
        members, "collect", lambda job: [{"member": m.id, "validation_implicit_accuracy": score(m)} for m in job]
    )
    return trained


def test_a_cell_outside_the_space_is_no_trial(tiny):
    points = [{"beta": beta, "learning_rate": rate} for beta, rate in ((0.05, 1e-3), (0.3, 1e-3), (0.05, 1.0))]
    run = tiny(grid=[{"cells": points}], seed_list=[1], optuna={"n_trials": 4, "search_space": SPACE})
    assert sweep.cells(run) == points[:1]


def test_cells_first_each_once_and_the_number_of_trials_is_kept(tiny, tmp_path, fake_training):
    run = searchable(tiny)
    study = search(run, tmp_path / "sweep")
    table = sweep.table(study)
    assert len(table) == 6
    assert [t.params for t in sweep.completed_trials(study)][:2] == [
        {"beta": 0.05, "learning_rate": 1e-3},
        {"beta": 0.5, "learning_rate": 1e-3},
    ]
    assert fake_training[:2] == [("members", "beta0.05-s1"), ("members", "beta0.5-s1")], (
        "a cell's trial is the grid's own member"
    )
    assert len(fake_training) == len(set(fake_training)) == 6
    assert table["value"].is_monotonic_decreasing


def test_trials_of_other_settings_do_not_count(tiny, tmp_path, fake_training):
    """A finished search whose run has changed is made anew: its values were those of another training."""
    folder = tmp_path / "sweep"
    search(searchable(tiny), folder)
    training = {**TINY["training"], "weight_decay": 0.3}
    changed = tiny(training=training, grid=GRID, seed_list=[1], optuna={"n_trials": 6, "search_space": SPACE})
    before = len(fake_training)
    assert len(sweep.completed_trials(search(changed, folder))) == 6
    assert len(fake_training) >= before
    assert sweep.open_study(changed, folder).study_name != sweep.open_study(searchable(tiny), folder).study_name
    longer = sweep.open_study(searchable(tiny, trials=9), folder)
    assert longer.study_name == sweep.open_study(searchable(tiny), folder).study_name, "a longer search goes on"


def test_a_finished_search_is_not_done_again_and_a_longer_one_goes_on(tiny, tmp_path, fake_training):
    search(searchable(tiny), tmp_path / "sweep")
    before = list(fake_training)
    search(searchable(tiny), tmp_path / "sweep")
    assert fake_training == before
    assert len(sweep.completed_trials(search(searchable(tiny, trials=8), tmp_path / "sweep"))) == 8


def test_a_killed_search_loses_its_running_trials_and_repeats_no_finished_one(
    tiny, tmp_path, fake_training, monkeypatch
):
    """The process dies while a batch trains: its trials stay RUNNING in the journal, as after kill -9."""
    run, calls = searchable(tiny), []

    def dies(job):
        calls.append(len(calls))
        if len(calls) == 3:
            raise SystemExit("kill -9")

    monkeypatch.setattr(members, "watch", dies)
    with pytest.raises(SystemExit):
        search(run, tmp_path / "killed")
    finished = {str(t.params) for t in sweep.completed_trials(sweep.open_study(run, tmp_path / "killed"))}
    running = [
        t.params
        for t in sweep.open_study(run, tmp_path / "killed").trials
        if t.state == optuna.trial.TrialState.RUNNING
    ]
    assert running
    monkeypatch.setattr(members, "watch", lambda job: None)
    study = search(run, tmp_path / "killed")
    done = [str(t.params) for t in sweep.completed_trials(study)]
    assert len(done) == len(set(done)) == 6
    assert finished <= set(done)
    assert {str(p) for p in running} <= set(done), "what was running is done after all"
    assert not [t for t in study.trials if t.state == optuna.trial.TrialState.RUNNING]


def test_the_same_seed_searches_the_same_points(tiny, tmp_path, fake_training):
    points = [[t.params for t in sweep.completed_trials(search(searchable(tiny), tmp_path / name))] for name in "ab"]
    assert points[0] == points[1]


def test_a_journal_of_another_direction_is_refused(tiny, tmp_path, fake_training):
    run = searchable(tiny)
    sweep.open_study(run, tmp_path / "sweep")
    turned = config.apply(run, {"optuna.direction": "minimize"})
    with pytest.raises(StudyError, match="would maximize"):
        sweep.open_study(turned, tmp_path / "sweep")


def test_best_is_a_complete_yaml_with_its_members_over_every_seed(tiny, tmp_path, fake_training):
    run = config.apply(searchable(tiny), {"seed_list": [1, 2]})
    study = search(run, tmp_path / "sweep")
    best, finals = sweep.write_best(run, study, tmp_path / "sweep")
    loaded = config.load_run(tmp_path / "sweep" / "best.yaml", study="td_dpo", scale="laptop", mode="full")
    assert config.dump(loaded) == config.dump(best)
    assert [m.seed for m in finals] == [1, 2]
    assert loaded.loss.beta == 0.5, "the score above is best at the larger beta"


def test_a_real_trial_reads_the_cached_cell_and_trains_the_rest(tiny, pool_socket, tmp_path):
    run = searchable(tiny, trials=3)
    members.prepare_inputs(run)
    job = members.submit(run)
    members.watch(job)
    members.collect(job)
    stamps = {m: (f / "done.json").stat().st_mtime_ns for m, f in job.folders.items()}
    study = search(run, tmp_path / "results" / "tiny" / "sweep")
    assert {m: (f / "done.json").stat().st_mtime_ns for m, f in job.folders.items()} == stamps
    values = {t.number: t.value for t in sweep.completed_trials(study)}
    (cell,) = [record.read_json(f / "metrics.json") for m, f in job.folders.items() if m == "beta0.05-s1"]
    assert values[0] == cell["validation_implicit_accuracy"]
    (trial,) = (tmp_path / "results" / "tiny" / "sweep" / "trials").iterdir()
    assert "oracle_score" not in record.read_json(trial / "metrics.json"), "a trial is judged on validation pairs alone"


# ---- the run's summary


def test_the_cell_is_chosen_on_validation_among_those_with_the_most_seeds(tiny):
    run = tiny()
    records = [
        {
            "member": f"{c}-s{s}",
            "cell": c,
            "seed": s,
            "status": "completed",
            "validation_implicit_accuracy": v,
            "oracle_score": o,
        }
        for c, s, v, o in [
            ("a", 1, 0.6, 9.0),
            ("a", 2, 0.6, 9.0),
            ("b", 1, 0.7, 5.0),
            ("b", 2, 0.7, 6.0),
            ("lucky", 1, 0.9, 9.9),
        ]
    ]
    summary = runs.summary(run, records)
    assert summary["chosen_cell"] == "b", "not the better test score, and not the cell seen once"
    assert summary["key_metric"] == {"name": "oracle_score", "value": 5.5}


def recorded(folder, run, value, metric, **key):
    """`run` with its results in `folder`, and its metrics.json there."""
    run = run.model_copy(update={"results_dir": folder})
    key = {"name": metric, "value": None if key else value, **key}
    own = {"run_id": run.run_id, "role": run.role, "chosen_cell": "c", "chosen_on": "v", "members": {}}
    metrics = {metric: value, "energy": 2.0}
    record.write_json(folder / run.run_id / "metrics.json", {**own, "key_metric": key, "metrics": metrics})
    return run


def paper(study, *run_ids):
    folder = config.ROOT / "params" / study / "paper"
    return [config.load_run(folder / f"{i}.yaml", study=study, scale="paper", mode="full") for i in run_ids]


def test_aggregated_metrics_in_the_contracts_form(tmp_path, tiny):
    planned = [
        recorded(tmp_path, tiny().model_copy(update={"run_id": run_id, "role": role}), value, "oracle_score")
        for run_id, role, value in [
            ("abl", "ablation", 9.0),
            ("base_a", "comparative", 8.0),
            ("base_b", "comparative", 7.0),
            ("ours", "proposed", 6.0),
        ]
    ]
    made = tables.aggregate_metrics(planned)
    assert made["primary_metric"] == "oracle_score"
    assert made["metrics"]["oracle_score"] == {"abl": 9.0, "base_a": 8.0, "base_b": 7.0, "ours": 6.0}
    assert made["metrics"]["energy"]["ours"] == 2.0, "every metric that was collected"
    assert made["best_proposed"] == {"run_id": "ours", "value": 6.0}
    assert made["best_baseline"] == {"run_id": "base_a", "value": 8.0}, "an ablation is no baseline"
    assert made["gap"] == pytest.approx(-25.0)
    assert made["members"]["ours"] == {"cell": "c", "role": "proposed", "chosen_on": "v", "members": {}}


def test_runs_of_other_data_models_or_budgets_are_not_held_against_each_other(tmp_path):
    values = {
        "proposed-rte_iw_lora": 0.73,
        "comparative-1-rte_lora": 0.72,
        "proposed-mnli_iw_lora": 0.851,
        "comparative-1-mnli_lora": 0.846,
        "comparative-1-sst2_lora": 0.93,
    }
    f1 = {run_id: "validation_f1" if "rte" in run_id else "validation_accuracy" for run_id in values}
    found = paper("iw_lora", *values)
    made = tables.aggregate_metrics([recorded(tmp_path, r, values[r.run_id], f1[r.run_id]) for r in found])
    assert (made["group"], made["best_proposed"]["run_id"]) == ("deberta-v3-base, glue, mnli", "proposed-mnli_iw_lora")
    assert made["best_baseline"] == {"run_id": "comparative-1-mnli_lora", "value": 0.846}, (
        "and not the higher one on SST-2"
    )
    rte = made["groups"]["deberta-v3-base, glue, rte"]
    assert (rte["primary_metric"], rte["runs"]) == ("validation_f1", ["proposed-rte_iw_lora", "comparative-1-rte_lora"])
    assert rte["best_proposed"]["value"] == 0.73
    assert made["groups"]["deberta-v3-base, glue, sst2"]["gap"] is None

    found = paper(
        "graff", "control-fixed_60", "control-mistral_graff_30", "proposed-graff_30", "comparative-1-reactor_30"
    )
    values = {
        "control-fixed_60": 0.9,
        "control-mistral_graff_30": 0.8,
        "proposed-graff_30": 0.6,
        "comparative-1-reactor_30": 0.5,
    }
    made = tables.aggregate_metrics([recorded(tmp_path, r, values[r.run_id], "exact_match") for r in found])
    assert made["primary_metric"] == "Exact-match accuracy at 30 min wall-clock."
    assert made["metrics"][made["primary_metric"]] == made["metrics"][made["primary_key"]] == values
    assert (made["best_proposed"]["run_id"], made["best_baseline"]["run_id"]) == (
        "proposed-graff_30",
        "comparative-1-reactor_30",
    )
    assert made["gap"] == pytest.approx(20.0)
    virtual = [config.apply(run, {"training.clock": "virtual"}) for run in found]
    virtual = [run.model_copy(update={"results_dir": tmp_path}) for run in virtual]
    assert tables.aggregate_metrics(virtual)["primary_metric"] == "exact_match", "nothing was published of such minutes"
    assert set(made["groups"]) == {
        "Qwen3-0.6B, gsm8k, 60 budget minutes",
        "Mistral-7B-Instruct-v0.3, gsm8k, 30 budget minutes",
        "Qwen3-0.6B, gsm8k, 30 budget minutes",
    }


def test_the_primary_metric_is_null_while_answers_are_ungraded(tmp_path):
    command = "./run_all.sh judge --study td_dpo"
    dpo, ours = paper("td_dpo", "comparative-1-dpo", "proposed-td_dpo")
    planned = [recorded(tmp_path, dpo, 6.0, "mt_bench_score"), recorded(tmp_path, ours, 7.0, "mt_bench_score")]
    assert tables.aggregate_metrics(planned)["gap"] == pytest.approx(100 / 6)
    recorded(tmp_path, ours, 7.0, "mt_bench_score", graded_by=command)  # some of its seeds are not
    made = tables.aggregate_metrics(planned)
    assert (made["primary_metric"], made["graded_by"]) == ("mt_bench_score", command)
    assert made["best_proposed"] is made["best_baseline"] is made["gap"] is None


def test_a_runs_metrics_say_where_its_settings_and_histories_are(tiny):
    row = {"member": "a-s1", "cell": "a", "seed": 1, "status": "completed", "in_budget": True}
    made = runs.summary(tiny(), [{**row, "validation_implicit_accuracy": 0.5, "oracle_score": 6.0, "energy": 3.5}])
    assert made["metrics"] == {"oracle_score": 6.0, "validation_implicit_accuracy": 0.5, "energy": 3.5}
    assert made["configuration"] == "config.yaml"
    assert made["history"] == {"a-s1": "members/a-s1/history.jsonl"}


def test_a_diverged_seed_counts_as_the_worst_and_not_as_absent(tiny):
    run = tiny()
    good = {"status": "completed", "validation_implicit_accuracy": 0.6, "oracle_score": 6.0}
    records = [
        {"member": "steady-s1", "cell": "steady", "seed": 1, **good},
        {"member": "steady-s2", "cell": "steady", "seed": 2, **good},
        {
            "member": "wild-s1",
            "cell": "wild",
            "seed": 1,
            **good,
            "validation_implicit_accuracy": 0.65,
            "oracle_score": 9.0,
        },
        {"member": "wild-s2", "cell": "wild", "seed": 2, "status": "diverged"},
    ]
    assert runs.summary(run, records)["chosen_cell"] == "steady"
    alone = runs.summary(run, records[2:])
    assert alone["metrics"]["oracle_score"] == 5.0, "the mean of 9 and the lowest score"
