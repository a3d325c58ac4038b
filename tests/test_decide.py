"""Where the minutes go: claims' arms first, then seeds for claims that are open, times alone, the rest last; from the
record, so that nothing is trained twice and a kill costs nothing."""

import argparse
import os
import signal
import types

import pytest
import yaml

from lib import claims, config, record
from lib.errors import StudyError
from lib.run import cli, decide, keys, members, model_card, pages, plan, runner
from tests.conftest import TINY

# Arms: C3 compares td_dpo with dpo at beta 0.05, C2 td_dpo with discopop at 2.5; dpo at 0.5 belongs to neither.
RUNS = {
    "td_dpo": [{"beta": 0.05, "tau": 1.0}, {"beta": 2.5, "tau": 2.0}],
    "dpo": [{"beta": 0.05}, {"beta": 0.5}],
    "discopop": [{"beta": 2.5}],
    "td_dpo_anchored": [{"beta": 0.05, "tau": 1.0}],
}
LOOKS = (2, 3, 4)


def options_of(**given) -> argparse.Namespace:
    """The command line's, of `full` at laptop scale."""
    default = {"command": "full", "scale": "laptop", "mode": "full", "grid": None, "force": False, "run": None}
    return argparse.Namespace(**default | {"max_hours": None, "max_minutes": None} | given)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Four runs of a study, and `go(...)`, which executes rounds with notebooks that only leave their records. `words`:
    what the analysis says of a claim at a number of seeds; `trained`: members, in the order of their training."""
    monkeypatch.setattr(claims.Claims, "looks_of", lambda self, scale: LOOKS)
    monkeypatch.setattr(runner, "POLL", 0.01)
    monkeypatch.setattr(plan, "slowness", lambda run: 1.0)
    monkeypatch.setattr(plan, "NOTEBOOK_SECONDS", 0.0)
    runs = []
    for name, cells in RUNS.items():
        path = tmp_path / "params" / "td_dpo" / "laptop" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        role = {"td_dpo": "proposed", "td_dpo_anchored": "ablation"}.get(name, "comparative")
        own = {"run_id": name, "method": name, "role": role, "seed_list": [7, 5, 9, 1], "grid": [{"cells": cells}]}
        loss = {"name": name, "beta": 0.05} | ({"tau": 1.0} if "td" in name else {})
        compute = {"seconds_per_step": 1.0, "prepare_seconds": 0.0}
        path.write_text(yaml.safe_dump({**TINY, **own, "loss": loss, "compute": compute}))
        runs.append(
            config.load_run(path, study="td_dpo", scale="laptop", mode="full", results_dir=tmp_path / "out" / "td_dpo")
        )
    results = runs[0].results_dir
    words = {"C2": "refuted", "C3": "refuted", "C5": "supported"}
    state = types.SimpleNamespace(
        runs=runs, results=results, words=words, open={}, trained=[], executed=[], failing=set(), kill_at=None
    )

    def finish_member(member, folder):
        if state.kill_at == f"{member.run.run_id}/{member.id}":
            os.kill(os.getpid(), signal.SIGKILL)
        record.write_json(folder / "metrics.json", {"status": "completed", "seconds": 12.0})
        record.write_json(folder / "done.json", {"status": "completed", "key": keys.member_key(member), "nonce": "n"})
        state.trained.append(f"{member.run.run_id}/{member.id}")

    def execute(step, nonce):
        state.executed.append(step.title.partition("/")[2] + (" sweep" if step.kind == "sweep" else ""))
        if step.name in state.failing:
            raise ValueError("on purpose")
        if step.kind == "train":
            text = yaml.safe_dump(config.dump(step.run))
            record.write_text(step.folder / "config.yaml", text)
            for member in config.members(step.run):
                folder = step.folder / "members" / member.id
                if members.stale(member, folder):
                    finish_member(member, folder)
        if step.kind == "analysis":
            record.write_json(step.folder / "claims.json", [judged(name) for name in ("C1", "C2", "C3", "C5")])
        record.write_json(step.folder / "metrics.json", {"nonce": nonce})
        record.write_json(step.folder / "done.json", {"nonce": nonce})
        record.write_text(runner.partial(step), "{}")
        return types.SimpleNamespace(cells=[])

    def judged(name):
        """The row of claims.json: its word at the seeds that `open` says, until then open with what that says."""
        listed = record.read_json(results / "comparison" / "runs.json")
        restored = [config.restore({k: v for k, v in r.items() if k not in ("study", "scale", "mode")}, study="td_dpo",
                                   scale="laptop", mode="full", results_dir=results) for r in listed]  # fmt: skip
        have = [
            m
            for run in restored
            for m in config.members(run)
            if (run.results_dir / run.run_id / "members" / m.id / "done.json").exists()
        ]
        arm = {"C2": ("discopop", 2.5), "C3": ("dpo", 0.05)}.get(name)
        seeds = sum(arm == (m.run.run_id, m.run.loss.beta) for m in have) if arm else 0
        until, chance = state.open.get(name, (0, 1.0))
        row = {
            "id": name,
            "verdict": words.get(name, "not evaluated"),
            "sentence": name,
            "n_seeds": seeds,
            "decided": name in words and seeds >= until,
        }
        more = next((n for n in LOOKS if n > seeds), None) if not row["decided"] and arm else None
        if name == "C5":
            row["decided"] = state.results.joinpath("td_dpo", "times").exists()
        return row | {"next_look": more, "chance": chance, "seeds_to_decide": until or None}

    def measure(run, function="step_cost", processes=8):
        state.executed.append(f"times of {run.run_id}, {processes}")
        record.write_json(results / "td_dpo" / "times", {})

    monkeypatch.setattr(runner, "execute_notebook", execute)
    monkeypatch.setattr(members, "measure", measure)
    for module, name in ((pages, "notebook_html"), (model_card, "write_all")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(runner.Runner, "ensure_pool", lambda self: None)

    def go(*, command="full", slots=1, only=None, **given):
        state.trained.clear(), state.executed.clear()
        options = options_of(command=command, **given)
        spending = decide.Spending(options, [r for r in runs if only is None or r.run_id in only], runs, slots)
        state.rounds = []

        def watched():
            for each in spending.rounds():
                if each.what != "first verdict":
                    state.rounds.append(each.what)
                yield each

        runner.Runner([], slots).run(watched())
        state.left = spending.left
        return state

    state.go = go
    return state


def test_arms_are_the_cells_that_claims_compare(study):
    published = claims.load(plan.claims_of("td_dpo"))
    found = decide.arms(published, study.runs, "laptop")
    assert found["C3"] == [("td_dpo", "beta0.05-tau1"), ("dpo", "beta0.05")]
    assert found["C2"] == [("td_dpo", "beta2.5-tau2"), ("discopop", "beta2.5")]
    assert found["C5"] == [("td_dpo", decide.TIMES)]
    assert "C1" not in found, "not all that it compares is among the runs"
    assert "C6" not in found, "it is about the other scale"


def test_arms_first_then_times_alone_then_what_decides_nothing(study):
    study.go()
    assert study.rounds == ["first looks", "times for td_dpo C5 to 8", "ablations, controls and searches"]
    first, arms, *_ = (i for i, what in enumerate(study.executed) if what == "comparison")
    assert study.executed[:first] == ["td_dpo", "discopop"], "the first verdict's: no claim takes less"
    assert study.executed[first + 1 : arms] == ["td_dpo", "dpo"]
    assert study.executed[arms + 1 :][:2] == ["times of td_dpo, 8", "comparison"]
    assert study.trained[:2] == ["td_dpo/beta2.5-tau2-s7", "td_dpo/beta2.5-tau2-s5"], "the first look's, in order"
    assert [m for m in study.trained if "beta0.5-" in m or "anchored" in m] == study.trained[-4:], "last"
    assert study.left == []


def test_a_second_command_finds_all_cached(study):
    study.open["C3"] = 3, 1.0
    study.go()
    before = study.rounds
    study.go()
    assert (study.executed, study.trained) == ([], [])
    assert before[1] == "seeds for td_dpo C3 to 3"
    assert study.rounds == ["first looks", "ablations, controls and searches"]


def test_only_arms_of_open_claims_get_seeds_and_nothing_is_trained_twice(study):
    study.open["C3"] = 4, 0.9
    study.go()
    assert study.rounds[1:3] == ["seeds for td_dpo C3 to 3", "seeds for td_dpo C3 to 4"]
    assert len(study.trained) == len(set(study.trained))
    assert {m for m in study.trained if m.endswith(("s9", "s1"))} == {
        f"{arm}-s{seed}" for arm in ("td_dpo/beta0.05-tau1", "dpo/beta0.05") for seed in (9, 1)
    }


def test_the_cheapest_expected_decision_comes_first(study):
    study.open |= {"C2": (4, 1.0), "C3": (3, 1.0)}
    study.go(max_minutes=1)  # 12 s a member: C3 takes 24 s to its word, C2 48 s
    assert study.rounds[1:4] == [f"seeds for td_dpo {what}" for what in ("C3 to 3", "C2 to 3", "C2 to 4")]


def test_claims_whose_decisions_all_fit_in_go_together(study):
    study.open |= {"C2": (4, 1.0), "C3": (3, 1.0)}
    study.go(max_minutes=2)
    assert study.rounds[1:3] == ["seeds for td_dpo C3 to 3, td_dpo C2 to 3", "seeds for td_dpo C2 to 4"]


def test_a_claim_with_hardly_a_chance_of_a_word_waits_for_the_others(study):
    study.open |= {"C2": (4, 1.0), "C3": (3, 0.05)}
    study.go()
    assert study.rounds[1:4] == [f"seeds for td_dpo {what}" for what in ("C2 to 3", "C2 to 4", "C3 to 3")]


def test_the_budget_ends_and_what_is_left_is_said_with_its_command(study):
    study.open["C3"] = 4, 1.0
    study.go(max_minutes=0.01)
    assert study.rounds == ["first looks", "ablations, controls and searches"]
    assert not [m for m in study.trained if "anchored" in m]
    assert any(
        "td_dpo C3" in line and "./run_all.sh decide --scale laptop --study td_dpo" in line for line in study.left
    )
    assert any("td_dpo/td_dpo_anchored" in line and "--max-minutes" in line for line in study.left)
    study.go(command="decide")
    assert study.rounds == [
        "first looks",
        "seeds for td_dpo C3 to 3",
        "seeds for td_dpo C3 to 4",
        "times for td_dpo C5 to 8",
    ]
    assert all(m.endswith(("s9", "s1")) for m in study.trained), "nothing is trained again"


def test_a_runner_killed_in_a_round_of_seeds_goes_on_there_and_trains_nothing_twice(study):
    study.open["C3"] = 4, 1.0
    study.kill_at = "td_dpo/beta0.05-tau1-s1"  # of the round that brings C3 from 3 seeds to 4
    if not (child := os.fork()):
        study.go()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    kept = {f"{done.parents[2].name}/{done.parent.name}" for done in study.results.glob("*/members/*/done.json")}
    study.kill_at = None
    study.go()
    assert "td_dpo/beta0.05-tau1-s1" in study.trained
    assert all((study.results / arm / "done.json").exists() for arm in
               ("td_dpo/members/beta0.05-tau1-s1", "dpo/members/beta0.05-s1"))  # fmt: skip
    assert not kept & set(study.trained)


@pytest.mark.parametrize(("minutes", "code"), [(None, 0), (0.01, 4)])
def test_a_budget_that_was_asked_for_and_ends_is_an_exit_code(study, monkeypatch, tmp_path, minutes, code):
    monkeypatch.setattr(cli, "root_of", lambda _: tmp_path / "out")
    monkeypatch.setattr(pages, "index_html", lambda _: tmp_path / "index.html")
    monkeypatch.setattr(decide, "MINUTES", {"laptop": 0.01})  # the default budget ends as early
    options = options_of(jobs=1, cluster=None, fail_fast=False, max_minutes=minutes)
    study.open["C3"] = 4, 1.0
    assert cli.execute(options, study.runs, study.runs) == code
    assert not list(study.results.glob("td_dpo_anchored/members/*")), "there was no time left for it"


def test_times_are_predicted_by_their_processes_and_need_no_bases(study, monkeypatch):
    monkeypatch.setattr(plan, "prepare_seconds", lambda run: 1000.0)
    options = options_of(command="plan")
    spending = decide.Spending(options, study.runs, study.runs, slots=2)
    timed = decide.Open("td_dpo", "C5", [(study.runs[0], decide.TIMES)], members.PROCESSES)
    each = plan.START_SECONDS + 12 / 2  # half of a member's 12 steps of one second
    assert spending.cost([(timed, 8)]) == pytest.approx(8 * each)


def test_decide_wants_a_record_to_go_on_from(study):
    with pytest.raises(StudyError, match="a record of the first look"):
        study.go(command="decide")
    assert study.executed == []


def test_a_run_that_fails_is_not_tried_again_and_again(study):
    study.failing.add("dpo")
    study.open["C3"] = 4, 1.0
    study.go()
    assert study.executed.count("dpo") == 1
    assert not any("C3" in what for what in study.rounds)
    study.failing.clear()
    study.go()
    assert "seeds for td_dpo C3 to 4" in study.rounds


def test_a_run_that_is_named_is_executed_whole(study):
    study.go(only=["td_dpo_anchored"], run=["td_dpo_anchored"])
    assert study.executed == ["td_dpo_anchored", "comparison"]


def test_a_plan_shows_the_rounds_and_changes_nothing(study, capsys):
    options = options_of(command="plan")
    first, looks, rest = decide.Spending(options, study.runs, study.runs, 2).preview()
    assert {s.name: s.members for s in first.steps} == {"td_dpo": 2, "discopop": 2, "comparison": 0}
    assert {s.name: s.members for s in looks.steps} == {"td_dpo": 2, "dpo": 2, "comparison": 0}
    assert {s.name: s.members for s in rest.steps} == {"dpo": 2, "td_dpo_anchored": 2, "comparison": 0}
    assert not study.results.exists()
