"""The search: cells are enqueued and read, killed trials are queued once more and none is repeated, direction asserted."""

import optuna
import pytest

from lib import aggregate, config, members, record, runs, sweep
from lib.errors import StudyError

SPACE = {
    "beta": {"type": "categorical", "choices": [0.05, 0.5]},
    "learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-2},
}
GRID = [{"cells": [{"beta": 0.05}, {"beta": 0.5}]}]


def searchable(tiny, trials=6, **optuna_section):
    return tiny(grid=GRID, seed_list=[1], optuna={"n_trials": trials, "search_space": SPACE, **optuna_section})


@pytest.fixture
def fake_training(monkeypatch):
    """members.submit/watch/collect without training: the score is a function of the settings; every training is noted."""
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


def test_cells_first_each_once_and_the_number_of_trials_is_kept(tiny, tmp_path, fake_training):
    run = searchable(tiny)
    study = sweep.search(run, tmp_path / "sweep")
    table = sweep.table(study)
    assert len(table) == 6
    assert [t.params for t in sweep.searched(study)][:2] == [
        {"beta": 0.05, "learning_rate": 1e-3},
        {"beta": 0.5, "learning_rate": 1e-3},
    ]
    assert fake_training[:2] == [("members", "beta0.05-s1"), ("members", "beta0.5-s1")], (
        "a cell's trial is the grid's own member"
    )
    assert len(fake_training) == len(set(fake_training)) == 6
    assert table["value"].is_monotonic_decreasing


def test_a_finished_search_is_not_done_again_and_a_longer_one_goes_on(tiny, tmp_path, fake_training):
    sweep.search(searchable(tiny), tmp_path / "sweep")
    before = list(fake_training)
    sweep.search(searchable(tiny), tmp_path / "sweep")
    assert fake_training == before
    assert len(sweep.searched(sweep.search(searchable(tiny, trials=8), tmp_path / "sweep"))) == 8


def test_a_killed_search_loses_its_running_trials_and_repeats_no_finished_one(tiny, tmp_path, fake_training, monkeypatch):
    """The process dies while a batch trains: its trials stay RUNNING in the journal, as after kill -9."""
    run, calls = searchable(tiny), []

    def dies(job):
        calls.append(len(calls))
        if len(calls) == 3:
            raise SystemExit("kill -9")

    monkeypatch.setattr(members, "watch", dies)
    with pytest.raises(SystemExit):
        sweep.search(run, tmp_path / "killed")
    finished = {str(t.params) for t in sweep.searched(sweep.open_study(run, tmp_path / "killed"))}
    running = [
        t.params for t in sweep.open_study(run, tmp_path / "killed").trials if t.state == optuna.trial.TrialState.RUNNING
    ]
    assert running
    monkeypatch.setattr(members, "watch", lambda job: None)
    study = sweep.search(run, tmp_path / "killed")
    done = [str(t.params) for t in sweep.searched(study)]
    assert len(done) == len(set(done)) == 6
    assert finished <= set(done)
    assert {str(p) for p in running} <= set(done), "what was running is done after all"
    assert not [t for t in study.trials if t.state == optuna.trial.TrialState.RUNNING]


def test_the_same_seed_searches_the_same_points(tiny, tmp_path, fake_training):
    points = [[t.params for t in sweep.searched(sweep.search(searchable(tiny), tmp_path / name))] for name in "ab"]
    assert points[0] == points[1]


def test_a_journal_of_another_direction_is_refused(tiny, tmp_path, fake_training):
    run = searchable(tiny)
    sweep.open_study(run, tmp_path / "sweep")
    turned = config.apply(run, {"optuna.direction": "minimize"})
    with pytest.raises(StudyError, match="would maximize"):
        sweep.open_study(turned, tmp_path / "sweep")


def test_best_is_a_complete_yaml_with_its_members_over_every_seed(tiny, tmp_path, fake_training):
    run = config.apply(searchable(tiny), {"seed_list": [1, 2]})
    study = sweep.search(run, tmp_path / "sweep")
    best, finals = sweep.write_best(run, study, tmp_path / "sweep")
    loaded = config.load_run(tmp_path / "sweep" / "best.yaml", study="td_dpo", scale="laptop", mode="full")
    assert config.dump(loaded) == config.dump(best)
    assert [m.seed for m in finals] == [1, 2]
    assert loaded.loss.beta == 0.5, "the score above is best at the larger beta"


def test_a_real_trial_reads_the_cached_cell_and_trains_the_rest(tiny, pool_socket, tmp_path):
    run = searchable(tiny, trials=3)
    members.prepared(run)
    job = members.submit(run)
    members.watch(job)
    members.collect(job)
    stamps = {m: (f / "done.json").stat().st_mtime_ns for m, f in job.folders.items()}
    study = sweep.search(run, tmp_path / "results" / "tiny" / "sweep")
    assert {m: (f / "done.json").stat().st_mtime_ns for m, f in job.folders.items()} == stamps
    values = {t.number: t.value for t in sweep.searched(study)}
    (cell,) = [record.read_json(f / "metrics.json") for m, f in job.folders.items() if m == "beta0.05-s1"]
    assert values[0] == cell["validation_implicit_accuracy"]
    (trial,) = (tmp_path / "results" / "tiny" / "sweep" / "trials").iterdir()
    assert "oracle_score" not in record.read_json(trial / "metrics.json"), "a trial is judged on validation pairs alone"


# --------------------------------------------------------------------------------------------------- the run's summary


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


def test_aggregated_metrics_in_the_contracts_form(tmp_path):
    for run_id, role, value in [
        ("ours", "proposed", 6.0),
        ("base_a", "comparative", 8.0),
        ("base_b", "comparative", 7.0),
        ("abl", "ablation", 9.0),
    ]:
        record.write_json(
            tmp_path / run_id / "metrics.json",
            {
                "run_id": run_id,
                "role": role,
                "chosen_cell": "c",
                "chosen_on": "validation_implicit_accuracy",
                "key_metric": {"name": "oracle_score", "value": value},
                "metrics": {"oracle_score": value, "sampled_kl": 1.0},
                "members": {},
            },
        )
    made = aggregate.aggregated("td_dpo", tmp_path)
    assert made["primary_metric"] == "oracle_score"
    assert made["metrics"]["oracle_score"] == {"abl": 9.0, "base_a": 8.0, "base_b": 7.0, "ours": 6.0}
    assert made["best_proposed"] == {"run_id": "ours", "value": 6.0}
    assert made["best_baseline"] == {"run_id": "base_a", "value": 8.0}, "an ablation is no baseline"
    assert made["gap"] == pytest.approx(-25.0)


def test_a_diverged_seed_counts_as_the_worst_and_not_as_absent(tiny):
    run = tiny()
    good = {"status": "completed", "validation_implicit_accuracy": 0.6, "oracle_score": 6.0}
    records = [
        {"member": "steady-s1", "cell": "steady", "seed": 1, **good},
        {"member": "steady-s2", "cell": "steady", "seed": 2, **good},
        {"member": "wild-s1", "cell": "wild", "seed": 1, **good, "validation_implicit_accuracy": 0.65, "oracle_score": 9.0},
        {"member": "wild-s2", "cell": "wild", "seed": 2, "status": "diverged"},
    ]
    assert runs.summary(run, records)["chosen_cell"] == "steady"
    alone = runs.summary(run, records[2:])
    assert alone["metrics"]["oracle_score"] == 5.0, "the mean of 9 and the lowest score"
