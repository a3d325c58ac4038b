"""What is planned: an analysis is executed again when records that it reads (or its code) changed, and for nothing
else."""

import types

import pytest

from lib import config, record
from lib.run import cli, keys, members, model_card, pages, plan, runner


@pytest.fixture
def study(tiny, tmp_path, monkeypatch):
    """Two runs of one study, and `go(*runs)`: plan and execute them as the runner does, with notebooks that only leave
    their records. Gives the titles of what was executed."""
    runs = {name: tiny(run_id=name) for name in ("a", "b")}
    results = runs["a"].results_dir
    record.write_json(results / "comparison" / "runs.json", [config.dump(run) for run in runs.values()])
    executed, failing = [], set()

    def execute(step, nonce):
        executed.append(step.title.partition("/")[2])
        for member in config.members(step.run) if step.kind == "train" else ():
            folder = step.folder / "members" / member.id
            if members.stale(member, folder):
                record.write_json(folder / "metrics.json", {"status": "completed"})
                record.write_json(
                    folder / "done.json", {"status": "completed", "key": keys.member_key(member), "nonce": nonce}
                )
        if step.name in failing:
            raise ValueError("on purpose")
        record.write_json(step.folder / "metrics.json", {"nonce": nonce})
        record.write_json(step.folder / "done.json", {"nonce": nonce})
        runner.partial(step).parent.mkdir(parents=True, exist_ok=True)
        runner.partial(step).write_text("{}")
        return types.SimpleNamespace(cells=[])

    monkeypatch.setattr(runner, "execute_notebook", execute)
    for module, name in ((pages, "notebook_html"), (model_card, "write_all")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(runner.Runner, "ensure_pool", lambda self: None)

    def go(*names, only=None, force=False):
        executed.clear()
        forced = [f"td_dpo/{name}" for name in names] if force else ()
        steps = plan.steps([runs[name] for name in names], forced=forced)
        engine = runner.Runner(steps, 1)
        for step in steps:
            if step.reason and only in (None, step.kind):
                engine.execute(step)
        return executed.copy()

    return types.SimpleNamespace(go=go, results=results, failing=failing)


def test_two_selections_of_runs_given_in_turns_execute_the_analysis_once(study):
    assert study.go("a", "b") == ["a", "b", "comparison"]
    for names in (("a",), ("b",), ("a", "b"), ("b", "a"), ("a",)):
        assert study.go(*names) == [], names


def test_an_analysis_is_made_again_when_a_record_is_another_one(study):
    assert study.go("a") == ["a", "comparison"]
    assert study.go("b") == ["b", "comparison"], "the record of b is new"
    assert study.go("a") == []
    assert study.go("b", force=True) == ["b", "comparison"]
    assert study.go("a") == []
    (study.results / "b" / "members" / "default-s1" / "judged.json").write_text('{"model": "m"}')
    assert study.go("a") == ["comparison"], "a judge graded answers of the run that is not asked for"


def test_an_analysis_that_a_failed_run_left_behind_is_made_again_when_the_run_is_whole(study):
    study.failing.add("b")
    assert study.go("a", "b") == ["a", "b", "comparison"]
    study.failing.clear()
    assert study.go("b", only="train") == ["b"], "and then the power went"
    assert study.go("a", "b") == ["comparison"]
    assert study.go("a", "b") == []


def test_grid_all_gives_every_cell_every_seed():
    options = cli.parser().parse_args(["plan", "--scale", "laptop", "--study", "td_dpo", "--run", "td_dpo"])
    counts = {}
    for options.grid in (None, "all"):
        options.mode = "full"
        ((_, run, _),) = cli.select_runs(options)
        counts[options.grid] = len(config.members(run))
    assert counts == {None: 88, "all": 240}
    assert {member.seed for member in config.members(run)} == set(range(42, 62))
