"""The short form of `python -m tests.chaos`: one study that dies of every hard kind of fault, one after the other."""

import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from lib import record
from lib.run import runner
from tests.chaos import __main__ as chaos, lives, schedule
from tests.conftest import until
from tests.terminal import Terminal

pytestmark = pytest.mark.skipif(lives.sys.platform != "linux", reason="the hook finds processes in /proc")

FIGURE = f"{lives.RUN.replace('tiny', 'comparison')}/figures/comparison_primary_metric.pdf"  # the analysis' first
# Checkpoints only every fourth step: one at step 2 can only be that of a member that was asked to stop.
SETTINGS = {**lives.STUDY, "training": {**lives.STUDY["training"], "save_steps": 4}}


def strike(number: int, role: str, event: str, path: str, do: str, n: int = 1) -> dict:
    return {"id": f"f{number}", "role": role, "event": event, "path": path, "n": n, "do": do}


def told_by_status(study: lives.Study) -> str:
    """What `./run_all.sh status` says in another terminal."""
    environment = {**os.environ, "STUDY_OUTPUTS": str(study.home / "outputs")}
    command = [lives.sys.executable, "-m", "lib", "status"]
    return subprocess.run(command, env=environment, cwd=lives.ROOT, capture_output=True, text=True, check=True).stdout


def test_one_study_dies_of_everything_and_ends_with_the_record_of_an_undisturbed_one(tmp_path):
    undisturbed = ThreadPoolExecutor().submit(lives.events, tmp_path / "calm", SETTINGS)  # beside the first life
    study = lives.Study(tmp_path / "struck", SETTINGS)
    member = f"{lives.RUN}/members/default-s"

    # Ctrl-C in a terminal, while the first member is in its first step.
    terminal = Terminal()

    def interrupt(study, process, fault):
        line = terminal.wait_for(process, "tiny: member 1 of 2")
        assert terminal.wait_for(process, "notebooks done", "left").startswith("[")
        assert line.rpartition("tiny: ")[2].partition(",")[0] in told_by_status(study)
        os.killpg(process.pid, signal.SIGINT)
        terminal.wait_for(process, "stopping: waiting for", "Ctrl-C again leaves at once")

    first = strike(1, "member", "open", f"{member}1/history.jsonl", "tell")
    assert study.live([first], interrupt, terminal=terminal.theirs) == 130
    assert not study.orphans()
    assert not lives.litter(study)
    _, calm = undisturbed.result()
    saved = study.run / "members/default-s1/checkpoints/checkpoint-2/complete.json"
    assert record.read_json(saved), "it was given time to save"
    assert re.search(r"td_dpo/tiny +interrupted", told_by_status(study))
    assert lives.false_successes(study, calm) == []

    # Killed: a member inside a save, the fork server under the next member, and the runner at the notebook's rename.
    faults = [
        strike(2, "member", "os.rename", f"{member}1/checkpoints/checkpoint-4/complete.json", "kill"),
        strike(3, "member", "open", f"{member}2/history.jsonl", "kill:server", n=2),
        strike(4, "runner", "os.rename", f"{lives.RUN}/run.ipynb", "kill"),
    ]
    assert study.live(faults) == -signal.SIGKILL
    assert all(study.fired(fault) for fault in faults)
    assert not study.orphans()
    assert "its runner is gone" in told_by_status(study)
    assert lives.false_successes(study, calm) == []

    # The disk is full from the analysis' first figure on.
    full = strike(5, "kernel", "os.rename", FIGURE, "errno:28:stay")
    assert study.live([full]) in (1, 3)
    assert "No space left on device" in (study.home / "out.txt").read_text()
    assert not study.orphans()
    assert lives.false_successes(study, calm) == []

    # A second runner, a laptop that sleeps, and a killed kernel: none of them needs the command again.
    (study.home / f"{full['id']}.fired").unlink()
    last = [
        strike(6, "kernel", "os.mkdir", os.path.dirname(FIGURE), "tell"),
        strike(7, "kernel", "os.rename", FIGURE, "kill"),
    ]

    def asleep_beside_another(study, process, fault):
        lives.second_runner(study, process, fault)
        lives.sleep_and_wake(study, process, fault, seconds=1.0)

    assert study.live(last, asleep_beside_another) == 0
    assert all(study.fired(fault) for fault in last)
    assert lives.differences(study.run, calm) == []
    assert lives.litter(study) == []
    assert not study.orphans()


def test_ctrl_c_twice(tmp_path, request):
    """The member is held in the middle of a step, so that the first Ctrl-C has something to wait for."""
    study, terminal = lives.Study(tmp_path / "struck", SETTINGS), Terminal()
    first = strike(1, "member", "open", f"{lives.RUN}/members/default-s1/history.jsonl", "tell")
    process = study.start([first], terminal=terminal.theirs)
    request.addfinalizer(process.kill)
    until(lambda: study.fired(first), lambda: "\n".join(terminal.screen()), process)
    os.killpg(process.pid, signal.SIGINT)
    terminal.wait_for(process, "stopping: waiting for")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(0.75 * runner.STOP_SECONDS) == 130, "sooner than it would give up waiting for the held member"
    terminal.wait_for(None, "left at once")
    assert not study.orphans()
    left = [
        name for name in lives.litter(study) if not name.endswith(("/progress.json", ".tmp")) or name.startswith("tmp")
    ]
    assert not left, "but for what the next start removes"


def test_a_schedule_depends_on_its_seed_and_on_nothing_else():
    places = (
        ("member", "open", "members/default-s1/history.jsonl"), ("member", "os.rename", "members/default-s1/done.json"),
        ("member", "open", "members/default-s1/checkpoints/checkpoint-2/trainer_state.json"),
        ("kernel", "os.rename", "metrics.json"), ("runner", "os.rename", "run.ipynb"),
    )  # fmt: skip
    events = [
        {**strike(0, role, event, f"{lives.RUN}/{path}", "", n)} for n in range(1, 9) for role, event, path in places
    ]
    faults = schedule.draw(events, 100, 0)
    assert faults == schedule.draw(events, 100, 0) != schedule.draw(events, 100, 1)
    assert {f["kind"] for f in faults} == set(schedule.KINDS)
    assert sum(schedule.KINDS.values()) == len(faults) == len({f["id"] for f in faults}) == 100


@pytest.mark.slow
def test_a_hundred_faults(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["chaos", "--faults", "100", "--seed", "0"])
    assert chaos.main() == 0, capsys.readouterr().out
