"""What a run is predicted to take: from the nearest records, and `?` where there are none; and --max-hours."""

from pathlib import Path

import pytest

from lib import record
from lib.run import cli, decide, members, plan, progress, runner
from tests.conftest import TINY


def member(run, name: str, seconds: float, *, run_id: str | None = None) -> None:
    folder = Path(run.results_dir) / (run_id or run.run_id) / "members" / name
    record.write_json(folder / "metrics.json", {"status": "completed", "seconds": seconds})


def test_a_members_seconds_come_from_its_own_run_then_its_study_then_the_yaml(tiny, monkeypatch):
    run = tiny(compute={"seconds_per_step": 0.5})
    monkeypatch.setattr(plan, "slowness", lambda _: 3.0)
    assert plan.member_seconds(run) == 12 * 0.5 * 3, "its YAML's, as slow as this machine is"
    member(run, "a", 40.0, run_id="other")
    assert plan.member_seconds(run) == 40.0
    told = {"config": {"compute": {"seconds_per_step": 1.0}}}
    record.write_json(Path(run.results_dir) / "other" / "members" / "a" / "member.json", told)
    assert plan.member_seconds(run) == 20.0, "the other method's step takes twice this one's, say their YAMLs"
    for name, seconds in (("a", 7.0), ("b", 9.0), ("c", 8.0)):
        member(run, name, seconds)
    assert plan.member_seconds(run) == 8.0


def test_what_was_prepared_here_tells_how_slow_the_machine_is(tiny, monkeypatch, tmp_path):
    run = tiny(compute={"seconds_per_step": 0.5, "prepare_seconds": 40.0})
    monkeypatch.setattr(members, "CACHE", tmp_path / "cache")
    assert (plan.prepare_seconds(run), plan.member_seconds(run)) == (40.0, 12 * 0.5), "as their YAMLs say"

    def made(name: str, seconds: float, **about) -> None:
        about = {"scale": "laptop", "mode": "full", "seconds": seconds, "said": 50.0, **about}
        record.write_json(tmp_path / "cache" / name / "complete.json", about)

    made("graff/old", 500.0, said=None)
    made("graff/trial", 5.0, mode="trial")
    made("graff/small", 5000.0, scale="small")
    assert plan.prepare_seconds(run) == 40.0, "none of these tells"
    made("graff/a", 70.0)
    made("iw_lora/a", 80.0)
    assert plan.prepare_seconds(run) == pytest.approx(40.0 * 1.5), "other studies' preparation, as slow as it was"
    assert plan.member_seconds(run) == pytest.approx(12 * 0.5 * 1.5)
    made("td_dpo/a", 45.0)
    assert plan.prepare_seconds(run) == 45.0, "its own study's"


def step(kind="train", seconds=60.0, run=None, **changes) -> plan.Step:
    return plan.Step(
        kind,
        "td_dpo",
        changes.pop("name", kind),
        Path("n.ipynb"),
        Path("nowhere"),
        {},
        "key",
        "never run",
        run,
        members=changes.pop("members", 4),
        seconds=seconds,
        **changes,
    )


def test_preparation_and_training_share_the_slots_and_analysis_does_not(tiny):
    found = plan.forecast([step(run=tiny(), seconds=80.0, prepare=10.0), step("analysis", 20.0, members=0)], slots=4)
    assert found.wall_seconds == (80 + 10) / 4 + 20
    assert found.device_hours == pytest.approx(90 / 3600)
    assert plan.forecast([step(run=tiny(), seconds=80.0)], slots=64).wall_seconds == 20, "a member is on one slot"


def test_of_data_that_was_never_read_no_time_is_made_up(tiny, capsys):
    dataset = {**TINY["dataset"], "name": "somebodys/pairs"}
    training = {**TINY["training"], "max_steps": None, "epochs": 2}
    compute, limited = {"seconds_per_step": 0.1}, {**dataset, "limit": 80}
    unsaid = tiny(dataset=limited, training=training)
    assert plan.member_seconds(unsaid) is None, "how long a step takes was not said either"
    bound = tiny(dataset=limited, training=training, compute=compute)
    run = tiny(dataset=dataset, training=training, compute=compute)
    (first, *_) = plan.steps([run])
    progress.print_plan([decide.Round("", [first])], 1)
    said = capsys.readouterr().out
    assert "?" in next(line for line in said.splitlines() if "td_dpo/tiny" in line)
    assert "more than" in said
    assert plan.member_seconds(bound) is not None, "as many steps as its limit allows, at most"
    member(run, "a", 20.0)
    assert not plan.steps([run])[0].unknown


def settled(steps: list, slots: int, max_hours: float) -> dict[str, str]:
    """Ask as the runner's loop does; every step that starts succeeds at once."""
    mine = runner.Runner(steps, slots, max_hours=max_hours)
    for _ in range(10):
        for each in steps:
            if not each.state and mine.ready(each):
                each.state = "succeeded"
    return {s.name: s.state for s in steps}


def test_max_hours_starts_what_fits_with_its_analysis_and_postpones_the_rest():
    small, large = step(name="small", seconds=600.0), step(name="large", seconds=36000.0)
    analysis = step("analysis", 120.0, needs=[small, large])
    assert settled([large, small, analysis], 1, 0.25) == {
        "small": "succeeded",
        "large": "postponed",
        "analysis": "succeeded",
    }
    assert set(settled([large, small, analysis], 1, 0.15).values()) == {"postponed"}, "600 s fit, its analysis does not"
    assert settled([large, small, analysis], 100, 0.25)["large"] == "postponed", "a member of it alone takes longer"
    large.members = 400
    assert set(settled([large, small, analysis], 100, 0.25).values()) == {"succeeded"}


def test_a_search_is_postponed_with_its_run():
    train = step(name="run", seconds=7200.0)
    sweep = step("sweep", 1.0, name="sweep", needs=[train])
    assert settled([train, sweep], 1, 1.0) == {"run": "postponed", "sweep": "postponed"}


def test_what_does_not_fit_waits_while_something_runs():
    first, second = step(name="first", seconds=1800.0), step(name="second", seconds=3000.0)
    mine = runner.Runner([first, second], 1, max_hours=1.0)
    assert mine.ready(first)
    first.state = "running"
    assert not mine.ready(second)
    assert second.state == "", "the first may be quicker than predicted"
    first.state = "succeeded"
    assert mine.ready(second)


@pytest.mark.parametrize("wrong", ["0", "-1", "soon", "nan", "inf"])
def test_max_hours_is_a_positive_number(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--max-hours", wrong])
    assert stop.value.code == 2
    assert f"found '{wrong}'; expected a number above 0" in capsys.readouterr().err
