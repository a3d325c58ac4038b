"""What a run is predicted to take: from the nearest records, and `?` where there are none; and --max-hours."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib import record
from lib.run import cli, forecast, plan, resources, runner, show
from tests.conftest import TINY


def member(
    run, name: str, seconds: float, *, run_id: str | None = None, study_dir: Path | None = None, **changes
) -> Path:
    folder = (study_dir or Path(run.results_dir)) / (run_id or run.run_id) / "members" / name
    record.write_json(
        folder / resources.NAME,
        {
            "seconds": seconds,
            "expected_seconds": 2.0,
            "base_memory_bytes": 500,
            "memory_bytes": 40,
            "device_memory_bytes": None,
            "resumed": False,
            **changes,
        },
    )
    return folder


def test_a_members_seconds_come_from_its_own_run_then_its_study_then_the_yaml(tiny):
    run = tiny(compute={"seconds_per_step": 0.5})
    assert forecast.member_seconds(run) == 12 * 0.5
    member(run, "a", 40.0, run_id="other")
    assert forecast.member_seconds(run) == 40.0
    for name, seconds in (("a", 7.0), ("b", 9.0), ("c", 8.0)):
        member(run, name, seconds)
    assert forecast.member_seconds(run) == 8.0


def test_the_rest_of_a_resumed_member_is_no_measure_of_a_whole_one(tiny):
    run = tiny()
    member(run, "a", 10.0)
    member(run, "b", 0.5, resumed=True)
    assert forecast.member_seconds(run) == 10.0


def test_other_studies_tell_how_fast_this_machine_is(tiny, tmp_path):
    run = tiny(compute={"seconds_per_step": 0.5, "prepare_seconds": 10})
    run = run.model_copy(update={"results_dir": tmp_path / "laptop-full" / "td_dpo"})
    for name, seconds in (("a", 5.0), ("b", 6.0), ("c", 7.0)):  # of 2.0 expected
        member(run, name, seconds, study_dir=tmp_path / "laptop-full" / "another", run_id="lora")
    assert forecast.machine_factor(run) == 3.0
    assert forecast.member_seconds(run) == pytest.approx(12 * 0.5 * 3)
    assert forecast.prepare_seconds(run) == pytest.approx(30)


def test_memory_and_disk_are_unknown_until_a_member_was_recorded(tiny):
    run = tiny()
    assert forecast.member_memory(run) == (None, None, None)
    assert forecast.member_disk(run) is None
    folder = member(run, "a", 1.0)
    (folder / "weights").write_bytes(b"x" * 1000)
    assert forecast.member_memory(run) == (500, 40, None)
    assert forecast.member_disk(run) == 1000 + (folder / resources.NAME).stat().st_size


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
        training=seconds,
        seconds=seconds,
        **changes,
    )


def test_training_shares_the_slots_preparation_and_analysis_do_not(tiny):
    run = tiny()
    found = forecast.forecast([step(run=run, seconds=80.0, prepare=10.0), step("analysis", 20.0, members=0)], slots=4)
    assert found.wall_seconds == 80 / 4 + 10 + 20
    assert found.device_hours == pytest.approx(80 / 3600)
    assert (found.memory_bytes, found.disk_bytes, found.cost(None)) == (None, None, None)
    assert found.cost(3600.0) == pytest.approx(80)
    member(run, "a", 20.0)
    found = forecast.forecast([step(run=run, members=3)], slots=8)
    assert found.memory_bytes == 500 + 3 * 40, "no more members at a time than there are"
    assert found.disk_bytes == 3 * forecast.member_disk(run)


def test_of_data_that_was_never_read_no_time_is_made_up(tiny, capsys):
    dataset, training = (
        {**TINY["dataset"], "name": "somebodys/pairs"},
        {**TINY["training"], "max_steps": None, "epochs": 2},
    )
    compute, limited = {"seconds_per_step": 0.1}, {**dataset, "limit": 80}
    unsaid = tiny(dataset=limited, training=training)
    assert forecast.member_seconds(unsaid) is None, "how long a step takes was not said either"
    bound = tiny(dataset=limited, training=training, compute=compute)
    run = tiny(dataset=dataset, training=training, compute=compute)
    (first, *_) = plan.steps([run], "laptop", "full")
    show.planned([first], 1, Path("."))
    said = capsys.readouterr().out
    assert "?" in next(line for line in said.splitlines() if "td_dpo/tiny" in line)
    assert "more than" in said
    assert forecast.member_seconds(bound) is not None, "as many steps as its limit allows, at most"
    member(run, "a", 20.0)
    assert not plan.steps([run], "laptop", "full")[0].unknown


def test_what_a_member_used_is_measured(tmp_path):
    """In a process of its own: what pytest held before would hide a peak."""
    code = (
        "import pathlib, sys, time\nfrom lib.running import resources\n"
        "with resources.measured(pathlib.Path(sys.argv[1]), 3.0):\n"
        "    held = bytearray(b'x') * (64 << 20)\n    time.sleep(0.02)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    found = record.read_json(tmp_path / resources.NAME)
    assert 60 << 20 <= found["memory_bytes"] < 300 << 20
    assert found["base_memory_bytes"] > 1 << 20
    assert found["seconds"] >= 0.02
    assert (found["expected_seconds"], found["resumed"], found["device_memory_bytes"]) == (3.0, False, None)


def settled(steps: list, slots: int, max_hours: float) -> dict[str, str]:
    """Ask as the runner's loop does; every step that starts succeeds at once."""
    mine = runner.Runner(steps, slots, max_hours=max_hours)
    for _ in range(10):
        for each in steps:
            if not mine.state[id(each)] and mine.ready(each):
                mine.state[id(each)] = "succeeded"
    return {s.name: mine.state[id(s)] for s in steps}


def test_max_hours_starts_what_fits_with_its_analysis_and_postpones_the_rest():
    small, large = step(name="small", seconds=600.0), step(name="large", seconds=36000.0)
    analysis = step("analysis", 120.0, needs=[small, large])
    assert settled([large, small, analysis], 1, 0.25) == {
        "small": "succeeded",
        "large": "postponed",
        "analysis": "succeeded",
    }
    assert set(settled([large, small, analysis], 1, 0.15).values()) == {"postponed"}, "600 s fit, its analysis does not"
    assert set(settled([large, small, analysis], 100, 0.25).values()) == {"succeeded"}


def test_a_search_is_postponed_with_its_run():
    train = step(name="run", seconds=7200.0)
    sweep = step("sweep", 1.0, name="sweep", needs=[train])
    assert settled([train, sweep], 1, 1.0) == {"run": "postponed", "sweep": "postponed"}


def test_what_does_not_fit_waits_while_something_runs():
    first, second = step(name="first", seconds=1800.0), step(name="second", seconds=3000.0)
    mine = runner.Runner([first, second], 1, max_hours=1.0)
    assert mine.ready(first)
    mine.state[id(first)], mine.since[id(first)] = "running", time.monotonic()
    assert not mine.ready(second)
    assert mine.state[id(second)] == "", "the first may be quicker than predicted"
    mine.state[id(first)] = "succeeded"
    assert mine.ready(second)


@pytest.mark.parametrize("wrong", ["0", "-1", "soon", "nan", "inf"])
def test_max_hours_is_a_positive_number(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--max-hours", wrong])
    assert stop.value.code == 2
    assert f"found '{wrong}'; expected a number above 0" in capsys.readouterr().err


def test_predictions_are_kept_beside_what_came(tmp_path):
    predicted = forecast.forecast([step("analysis", 30.0, members=0)], 2)
    for seconds in range(forecast.KEPT + 3):
        forecast.remember(tmp_path, predicted, float(seconds), ["td_dpo/comparison"], 2)
    rows = record.read_jsonl(tmp_path / "forecasts.jsonl")
    assert len(rows) == forecast.KEPT
    assert (rows[-1]["predicted_seconds"], rows[-1]["actual_seconds"]) == (30.0, forecast.KEPT + 2)
    assert rows[-1]["studies"] == ["td_dpo"]


def test_sizes_read_as_people_write_them():
    assert [show.size(n) for n in (None, 12, 3 << 20, int(2.5 * (1 << 30)))] == ["?", "12 B", "3 MiB", "2.5 GiB"]
