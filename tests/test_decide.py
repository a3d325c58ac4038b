"""Where the minutes go: claims' arms first, then seeds for claims that are open, times alone, the rest last; from the
record, so that nothing is trained twice and a kill costs nothing."""

import argparse
import os
import signal
import time
import types

import pytest
import yaml

from lib import claims, config, power, record
from lib.errors import StudyError
from lib.run import cli, decide, keys, members, model_card, pages, plan, preflight, runner
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
    return argparse.Namespace(**default | {"max_hours": None, "max_minutes": None, "claims": None} | given)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Four runs of a study, and `go(...)`, which executes rounds with notebooks that only leave their records. `words`:
    what the analysis says of a claim at a number of seeds; `trained`: members, in the order of their training."""
    monkeypatch.setattr(claims.Claims, "looks_of", lambda self, scale: LOOKS)
    monkeypatch.setattr(runner, "POLL", 0.01)
    monkeypatch.setattr(plan, "slowness", lambda run: 1.0)
    monkeypatch.setattr(plan, "NOTEBOOK_SECONDS", 0.0)
    monkeypatch.setattr(members, "CACHE", tmp_path / "cache")  # what was prepared on this machine is measured too
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
        other, beta = {"C2": ("discopop", 2.5), "C3": ("dpo", 0.05)}.get(name, ("", 0))
        arm = other and [(run_id, beta) for run_id in (other, "td_dpo")]
        seeds = min((sum(one == (m.run.run_id, m.run.loss.beta) for m in have) for one in arm), default=0)
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
    own = next(run for run in study.runs if run.run_id == "td_dpo")
    assert len(decide.recorded(own)["beta0.05-tau1"]) == 3, "no claim that waits for its first look waits for this one"
    study.go()
    assert "td_dpo/beta0.05-tau1-s1" in study.trained
    assert all((study.results / arm / "done.json").exists() for arm in
               ("td_dpo/members/beta0.05-tau1-s1", "dpo/members/beta0.05-s1"))  # fmt: skip
    assert not kept & set(study.trained)


def test_decide_goes_on_after_its_own_kill(study):
    """A member of the round that was broken off is no first look that is lacking."""
    study.open["C3"] = 4, 1.0
    study.go()
    assert (study.results / "td_dpo/members/beta0.05-tau1-s1/done.json").exists()
    (study.results / "dpo/members/beta0.05-s1/done.json").unlink()  # killed before it had ended
    study.trained.clear()
    study.go(command="decide")
    assert study.trained == ["dpo/beta0.05-s1"]


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
    assert spending.cost([timed]) == pytest.approx(8 * each)


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


# ---- what claims cost, and --claims


def spending_of(study, **given):
    return decide.Spending(options_of(command="plan", **given), study.runs, study.runs, slots=2)


def test_a_claim_is_priced_at_each_look_by_what_it_lacks_and_shared_arms_count_once(study):
    def seconds(*asked):
        return round(3600 * spending.hours(list(asked)), 6)

    spending = spending_of(study)
    priced = {looks[0].id: looks for looks in spending.priced()}
    c2, c3 = priced["C2"], priced["C3"]
    assert [seconds(each) for each in c3] == [2 * 2 * 12, 2 * 3 * 12, 2 * 4 * 12], "two cells, 12 s a member"
    assert seconds(c2[0], c3[0]) == seconds(c2[0]) + seconds(c3[0]), "they share no cell"
    shared = c3[2]._replace(id="C9", arms=[c3[2].arms[0], c2[2].arms[1]])
    assert seconds(c3[2], shared) == 3 * 4 * 12 < seconds(c3[2]) + seconds(shared)
    study.go()
    spending = spending_of(study)
    assert not spending.priced(), "a word is not bought twice"
    status = spending.folder("td_dpo") / "status.json"
    judged = record.read_json(status)
    record.write_json(status, judged | {"status": "failed"})
    assert spending.priced(), "what an analysis before the last one said is no word"
    record.write_json(status, judged)
    record.write_json(spending.folder("td_dpo") / "claims.json", [])
    assert [seconds(each) for each in spending.priced()[1]] == [0, 2 * 12, 2 * 2 * 12], "what is on record is not paid"


def test_of_a_run_whose_times_alone_are_asked_one_member_is_priced_too(study):
    timed = decide.Open("td_dpo", "C5", [(run, decide.TIMES) for run in study.runs if run.run_id == "td_dpo"], 8)
    scored = next(looks[0] for looks in spending_of(study).priced() if looks[0].id == "C3")
    measured = 8 * (plan.START_SECONDS + 12 / 2)
    assert 3600 * spending_of(study).hours([timed]) == pytest.approx(measured + 12)
    assert 3600 * spending_of(study).hours([timed, scored]) == pytest.approx(measured + 4 * 12)


def test_the_cheapest_likely_decision_of_each_study_and_what_fits_into_a_day(study):
    spending = spending_of(study)
    c2, c3 = (next(looks for looks in spending.priced() if looks[0].id == name) for name in ("C2", "C3"))

    def at(looks, *chances, study="td_dpo"):
        return [each._replace(study=study, chance=chance) for each, chance in zip(looks, chances, strict=True)]

    def chosen(limit, *priced):
        return [[(each.name, each.look) for each in found] for found in spending.choose(list(priced), limit)]

    second, first = at(c3, 0.1, 0.6, 0.9), at(c2, 0.6, 0.7, 0.8)
    assert chosen(24.0, second, first) == [[("td_dpo C2", 2)], [("td_dpo C2", 2), ("td_dpo C3", 3)]]
    other = at(c3, 0.2, 0.3, 0.5, study="graff")
    ahead = [("td_dpo C2", 2), ("graff C3", 4)]
    assert chosen(24.0, second, first, other) == [ahead, [*ahead, ("td_dpo C3", 3)]]
    assert chosen(144 / 3600, second, first, other)[1] == [*ahead, ("td_dpo C3", 3)], "its arms are graff's here: free"
    assert chosen(143 / 3600, second, first, other)[1] == [("td_dpo C2", 2), ("td_dpo C3", 3)], (
        "graff's 96 s do not fit"
    )
    assert chosen(119 / 3600, second, first, other)[1] == [("td_dpo C2", 2)]
    assert chosen(24.0, at(c2, *3 * [float("nan")])) == [[], []], "no noise is assumed: nothing is expected"


def test_prices_say_what_is_cheapest_and_where_nothing_is_expected(study, monkeypatch):
    chances = {"C2": (0.1, 0.6, 0.9), "C3": (0.1, 0.2, 0.3)}
    monkeypatch.setattr(
        power, "by_look", lambda _, claim, looks, scale: dict(zip(looks, chances[claim.id], strict=True))
    )
    monkeypatch.setattr(decide.Spending, "hours", lambda self, asked: 7.0 * sum(each.look for each in asked))
    asked = decide.select(["C2", "C3"], study.runs, "laptop")
    lines = list(spending_of(study, claims=asked).prices())
    assert lines[1] == "td_dpo C2       2:  14.0 ( 10%)   3:  21.0 ( 60%)   4:  28.0 ( 90%)"
    assert lines[-2].endswith("--claims td_dpo/C2, 21.0 device-hours")
    chances["C2"] = (0.1, 0.1, float("nan"))
    lines = list(spending_of(study, claims=asked).prices())
    assert "(   ?)" in lines[1]
    assert [line.endswith(": 0.0 device-hours; none of td_dpo") for line in lines[-2:]] == [True, True]


def test_the_chance_of_a_look_grows_and_is_unknown_where_no_noise_is_assumed():
    published = claims.load(plan.claims_of("td_dpo"))
    found = power.by_look(published, next(each for each in published.claims if each.id == "C2"), (3, 5, 8), "paper")
    assert 0 < found[3] < found[5] < found[8] < 1
    published = claims.load(plan.claims_of("graff"))
    unknown = power.by_look(published, next(each for each in published.claims if each.id == "C8"), (3, 5, 8), "paper")
    assert all(chance != chance for chance in unknown.values())


def test_claims_that_are_named_are_all_that_is_run(study):
    asked = decide.select(["C3"], study.runs, "laptop")
    study.go(claims=asked, only=["td_dpo", "dpo"])
    assert set(study.trained) == {
        f"{arm}-s{seed}" for arm in ("td_dpo/beta0.05-tau1", "dpo/beta0.05") for seed in (7, 5)
    }
    assert study.rounds == ["first looks"], "no times, no ablations, no searches"


def test_where_times_alone_are_named_one_member_is_trained_and_they_are_measured(study):
    study.go(claims=decide.select(["td_dpo/C5"], study.runs, "laptop"), only=["td_dpo"])
    assert study.trained == ["td_dpo/beta2.5-tau2-s7"]
    assert study.rounds == ["first looks", "times for td_dpo C5 to 8"]


@pytest.mark.parametrize("command", ["trial", "full"])
def test_claims_select_runs_on_the_command_line(monkeypatch, command):
    seen = []
    monkeypatch.setattr(preflight, "find_missing", lambda *_: [])
    monkeypatch.setattr(cli, "execute", lambda options, runs, whole: seen.append((options, runs)) or 0)
    assert cli.main([command, "--scale", "laptop", "--claims", "td_dpo/C2,C11"]) == 0
    options, runs = seen[0]
    assert [(run.study, run.run_id) for run in runs] == [
        ("iw_lora", "iw_lora"),
        ("td_dpo", "discopop"),
        ("td_dpo", "td_dpo"),
    ]
    assert {study: list(own) for study, own in options.claims.items()} == {"iw_lora": ["C11"], "td_dpo": ["C2"]}


def test_an_unknown_claim_is_named_with_those_there_are(capsys):
    assert cli.main(["plan", "--scale", "paper", "--study", "td_dpo", "--claims", "C1,C99"]) == 2
    said = capsys.readouterr()
    assert "no claim C99 at paper scale" in said.err
    assert "td_dpo/C1, td_dpo/C2, td_dpo/C4, td_dpo/C5, td_dpo/C6" in said.err
    assert not said.out


def test_a_round_says_how_much_comes_after_it(study):
    """The first verdict: the other first looks and the budget; the first looks: the budget alone; then what is left."""
    spending = spending_of(study, max_minutes=10)
    rounds = spending.rounds()
    first, looks = next(rounds), next(rounds)
    assert (first.what, looks.what) == ("first verdict", "first looks")
    assert looks.after == 600.0
    assert first.after > 600.0
    spending.until = time.monotonic() + 100.0
    assert 0 < spending.later([]) <= 100.0
    without = decide.Spending(options_of(command="decide"), study.runs, study.runs, slots=2)
    assert without.later([]) == 0.0, "without a budget nothing more is known"


def test_a_number_of_seeds_that_nobody_trains_is_no_price(study):
    study.open["C3"] = 4, 0.5
    study.go(max_minutes=0.01)
    spending = spending_of(study)
    row = next(row for row in record.read_json(spending.folder("td_dpo") / "claims.json") if row["id"] == "C3")
    rows = [{**row, "seeds_to_decide": 4339, "decided": False}]
    record.write_json(spending.folder("td_dpo") / "claims.json", rows)
    spending.list_left()
    (said,) = record.read_json(spending.folder("td_dpo") / "prices.json").values()
    assert said.startswith("thousands of seeds would decide it, far out of reach")
    assert "4339" not in said
    assert sum("decide --scale" in line for line in spending.left) <= 1, "a command is said once for all its claims"


def test_what_no_seed_measures_has_no_price(study):
    """Energy on a machine without a counter: its members are trained and give no number."""
    study.open["C3"] = 4, 0.5
    study.go(max_minutes=0.01)
    spending = spending_of(study)
    rows = record.read_json(spending.folder("td_dpo") / "claims.json")
    assert [each.id for each in spending.open_claims(timed=False)] == ["C3"]
    blind = [{**row, "n_seeds": 0, "minutes": 8.6, "next_look": None} for row in rows]
    record.write_json(spending.folder("td_dpo") / "claims.json", blind)
    assert spending.open_claims(timed=False) == []
