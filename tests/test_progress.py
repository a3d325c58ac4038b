"""What a person sees of a run: the block on a terminal, the lines without one, `status`, the tables at the end."""

import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest

from lib import record
from lib.run import cli, decide, plan, progress, runner
from tests.conftest import until
from tests.terminal import Terminal


def test_a_line_says_member_step_loss_and_when_it_will_end(tmp_path):
    def line(**state):
        record.write_json(tmp_path / "progress.json", state)
        return progress.line(tmp_path)

    assert progress.line(tmp_path / "none") == "", "it starts"
    assert line(phase="preparing", step=40, steps=300, loss=3.21) == "preparing, base model step 40/300, loss 3.210"
    waiting = {"phase": "training", "done": 0, "members": 6, "running": [], "elapsed": 0.0}
    assert line(**waiting) == "", "it waits for a slot"
    running = [{"member": "a", "step": 30, "steps": 60, "loss": 0.5}, {"member": "b", "steps": 60}]
    assert line(**waiting | {"done": 2, "running": running, "elapsed": 50.0}) == (
        "member 3-4 of 6, step 30/60, loss 0.500, ETA 1m10s"
    )  # 2.5 of 6 members in 50 s: 20 s each
    assert line(**waiting | {"running": [{"member": "a", "step": 3}]}) == "member 1 of 6, step 3"
    assert line(phase="measuring step cost") == "measuring step cost"
    assert line(phase="recording", done=6, members=6, running=[]) == "recording"


@pytest.fixture
def thirty(tmp_path, tiny):
    """A runner of thirty notebooks of 100 s, of which three are executed, and one of these trains."""
    run = tiny()
    steps = [
        plan.Step("train", "td_dpo", f"run number {i}", tmp_path, tmp_path / str(i), {}, "", "never run", run)
        for i in range(30)
    ]
    for step in steps[:3]:
        state = {"phase": "training", "done": 0, "members": 2, "running": [], "elapsed": 30.0}
        record.write_json(step.folder / "progress.json", state)
    running = [{"member": "a", "step": 5, "steps": 10, "loss": 0.25}]
    record.write_json(steps[0].folder / "progress.json", {**state, "done": 1, "running": running})
    record.write_json(steps[1].folder / "progress.json", {"phase": "preparing"})
    for step in steps:
        step.state, step.seconds = "running" if step in steps[:3] else "", 100.0
    return types.SimpleNamespace(steps=steps, slots=2, published=[])


@pytest.fixture
def live(thirty):
    thirty.publish = thirty.published.append
    live = progress.Live(thirty)
    live.begin("first looks", after=600.0)
    return live


def test_without_a_terminal_a_short_line_names_only_what_runs_and_what_has_ended(thirty, live, capsys):
    live.show()
    said = capsys.readouterr().out
    first = "td_dpo/run number 0: member 2 of 2, step 5/10"
    assert said.startswith(f"[0m00s] first looks: 0 of 30 notebooks done, about 35 min left in all | {first}")
    assert said.endswith("…\n")
    assert len(said) == 121
    thirty.steps[0].state, thirty.steps[0].minutes = "failed", 2.5
    for step in thirty.steps[3:]:
        step.state = "postponed"
    live.show()
    assert capsys.readouterr().out.splitlines() == [
        "  td_dpo/run number 0 failed in 2.5 min",
        "  postponed: td_dpo/run number 3, td_dpo/run number 4, td_dpo/run number 5 and 24 more",
    ], "a line for all that were not executed, and no other line within 30 s"
    assert thirty.published[-1]["text"].startswith("[0m00s] first looks: 28 of 30 notebooks done")
    assert len(thirty.published) == 2, "at the beginning, and as something ended"


@pytest.mark.parametrize(("seconds", "said"), [(9, "1 min"), (200, "3 min"), (5000, "83 min"), (114540, "31.8 h")])
def test_a_prediction_is_said_as_precisely_as_it_is_known(seconds, said):
    assert progress.rough(seconds) == said


def test_the_time_left_follows_how_quickly_the_planned_work_was_done(thirty, live):
    done, seconds = live.forecast(60.0)
    assert (done, seconds) == pytest.approx((0.75 / 30, 30 * 100.0 / 2 - 60)), "too little is done to tell: as planned"
    for step in thirty.steps[3:18]:
        step.state = "succeeded"
    done, seconds = live.forecast(630.0)
    assert done == pytest.approx(15.75 / 30)
    assert seconds == pytest.approx(630.0 * 14.25 / 15.75)


def test_a_run_whose_pilots_have_ended_does_not_begin_again_in_the_time_left(thirty, live):
    step = thirty.steps[2]
    step.members, thirty.steps[:] = 18, [step]
    live.to_do, found = [step], []
    for state in (
        {"phase": "preparing"},
        {"phase": "training", "pilots": True, "done": 4, "members": 8, "running": []},
        {"phase": "recording", "pilots": True, "done": 8, "members": 8, "running": []},
        {"phase": "preparing"},  # of the others' seeds
        {"phase": "training", "pilots": False, "done": 0, "members": 10, "running": []},
        {"phase": "training", "pilots": False, "done": 5, "members": 10, "running": []},
        {"phase": "recording", "pilots": False, "done": 10, "members": 10, "running": []},
    ):
        record.write_json(step.progress / "progress.json", state)
        found.append(round(18 * live.forecast(600.0)[0]))
    assert found == [0, 4, 8, 8, 8, 13, 18]


# ---- on a terminal


CLAIMS = [
    {"id": "C1", "verdict": "refuted", "estimate": -1.0, "interval95": [-1.5, None], "sentence": "A word " * 30},
    {"id": "C2", "verdict": "not evaluated", "sentence": "Said of another scale."},
]


class Stub(runner.Runner):
    """Executes its steps without a pool: the first ends well after a moment and is judged, the others go on."""

    ends = ""

    def ensure_pool(self):
        streams = {"stdout": self.live.pipe[1], "stderr": subprocess.STDOUT}
        command = "print('a warning of a child'); print('and half a line', end='', flush=True)"
        subprocess.run([sys.executable, "-c", command], check=True, **streams)

    def execute(self, step):
        while not (step is self.steps[0] and time.monotonic() > self.began + 1.0) and not self.stopping:
            time.sleep(0.02)
            if self.ends == "exception" and time.monotonic() > self.began + 1.5:
                self.steps = None  # what the runner trips over
            if self.ends == "well" and time.monotonic() > self.began + 2.0:
                break
        step.minutes, step.state = 0.5, "interrupted" if self.stopping else "succeeded"


def seen(tmp_path, tiny, terminal: Terminal, ends: str) -> int:
    """A stub's run on a terminal, in a process of its own; its exit code once it has ended."""
    run, folder = tiny(), tmp_path / "td_dpo"
    state = {"phase": "training", "done": 0, "members": 2, "elapsed": 3.0}
    steps = [
        plan.Step("train", "td_dpo", f"run{i}", tmp_path, folder / f"run{i}", {}, "", "new", run) for i in range(8)
    ]
    steps[0] = plan.Step(
        "analysis", "td_dpo", "comparison", tmp_path, folder / "comparison", {"mode": "full"}, "", "new"
    )
    record.write_json(folder / "comparison" / "claims.json", CLAIMS)
    for step in steps:
        step.seconds = 30.0
        running = [{"member": "a", "step": 5, "steps": 10, "loss": 0.25}]
        record.write_json(step.folder / "progress.json", {**state, "running": running})
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        os.login_tty(terminal.theirs)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ |= {"TERM": "xterm"}
        os.environ.pop("COLUMNS", None)  # of whoever runs the tests
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.default_int_handler)
        mine = Stub(steps, 6)
        mine.ends = ends

        def sleep(seconds):  # between two looks, not in the middle of one
            if ends.startswith("SIG") and time.monotonic() > mine.began + 1.5:
                os.kill(os.getpid(), getattr(signal, ends))
            time.sleep(seconds)

        runner.time = types.SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=sleep)
        code = 0 if mine.run() else 1
        print("over", flush=True)
    except KeyboardInterrupt:
        code = 130
    except TypeError:
        code = 9
    finally:
        sys.stdout.flush()
        os._exit(code)


@pytest.mark.parametrize("columns", [100, 44])
def test_a_terminal_has_one_block_that_everything_else_comes_above(tmp_path, tiny, monkeypatch, columns):
    monkeypatch.setattr(runner, "POLL", 0.05)
    terminal, text = Terminal(columns), "notebooks done"
    assert seen(tmp_path, tiny, terminal, "well") == 0
    last = until(lambda: "over" in terminal.screen() and terminal.screen())
    before_each = [place.start() for place in re.finditer("\r\x1b\\[2K", terminal.written)]  # refresh of the block
    shown = [[line for line in terminal.screen(terminal.written[:place]) if line] for place in before_each]
    shown = [screen for screen in shown if any(text in line for line in screen)]
    assert len(shown) > 5
    for screen in shown:
        (place,) = [i for i, line in enumerate(screen) if text in line]
        bar, *lines = screen[place - 1], *screen[place + 1 :]
        assert set(bar) <= {"━", "─"}
        assert len(bar) == min(60, columns)
        assert len(lines) <= 5, "a handful of running lines"
        assert all(re.match(r"td_dpo/\w+: member", line) for line in lines), (
            f"{screen}: nothing is written into the block or below it"
        )
        assert max(map(len, screen[place - 1 :])) <= columns
    above = "\n".join(shown[-1][: [i for i, line in enumerate(shown[-1]) if text in line][0]])
    assert "a warning of a child" in above
    assert "td_dpo/comparison succeeded in 0.5 min" in above
    assert "td_dpo C1 refuted -1.000 [-1.500, unbounded]" in " ".join(above.split())
    assert "another scale" not in above
    assert not any(text in line for line in last), "the block is gone"
    assert terminal.written.rfind("\x1b[?25h") > terminal.written.rfind("\x1b[?25l"), "the cursor is back"


@pytest.mark.parametrize(("ends", "code"), [("SIGINT", 130), ("SIGTERM", 130), ("exception", 9)])
def test_the_block_goes_whatever_ends_the_run(tmp_path, tiny, monkeypatch, ends, code):
    monkeypatch.setattr(runner, "POLL", 0.05)
    terminal = Terminal(80)
    assert seen(tmp_path, tiny, terminal, ends) == code
    until(lambda: terminal.written.rfind("\x1b[?25h") > terminal.written.rfind("\x1b[?25l"), "the cursor is not back")
    screen = "\n".join(terminal.screen())
    assert "notebooks done" not in screen
    assert "━" not in screen
    assert "refuted" in screen, "what was said stays"


def test_a_log_has_no_escape_codes_and_no_long_line(thirty, live, capsys, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    record.write_json(thirty.steps[0].folder / "claims.json", CLAIMS)
    prices = {"C1": "about 36 seeds and 11 min more on this machine would decide it with 80 % chance"}
    record.write_json(thirty.steps[0].folder / "prices.json", prices)
    for step in thirty.steps:
        step.state = "succeeded" if step.kind == "train" else step.state
        step.parameters["mode"] = "full"
    thirty.steps[0].kind = "analysis"
    live.start()
    live.show()
    live.close()
    progress.print_verdicts([thirty.steps[0].folder], set(), priced=True)
    rounds = [decide.Round("seeds for many claims", thirty.steps)]
    list(cli.announced(rounds, 2))
    progress.print_table(thirty.steps)
    said = capsys.readouterr().out
    assert "refuted" in said
    assert "Open at 0: about 36 seeds" in " ".join(said.split())
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 120
    assert "never run: td_dpo/run number 0, td_dpo/run number 1, td_dpo/run number 2 and 27 more" in said


def test_a_verdict_is_said_again_only_where_it_has_changed(tmp_path, capsys):
    folder, printed = tmp_path / "td_dpo" / "comparison", set()
    record.write_json(folder / "claims.json", CLAIMS)
    progress.print_verdicts([folder], printed)
    assert "refuted" in capsys.readouterr().out
    progress.print_verdicts([folder], printed)
    assert capsys.readouterr().out == ""
    record.write_json(folder / "claims.json", [{**CLAIMS[0], "verdict": "inconclusive"}])
    progress.print_verdicts([folder], printed)
    assert "inconclusive" in capsys.readouterr().out


def test_the_table_at_the_end_has_what_was_executed_and_counts_the_rest(thirty, capsys):
    again = plan.Step(**{**vars(thirty.steps[0]), "state": "postponed", "error": None})
    for i, step in enumerate(thirty.steps):
        step.state, step.minutes = ("cached", 0.0) if i > 1 else ("succeeded", 2.5)
    progress.print_table([*thirty.steps, again])
    header, *rows = capsys.readouterr().out.strip().splitlines()
    assert header.startswith("run")
    assert [row.split()[:5] for row in rows[:2]] == [
        ["td_dpo/run", "number", f"{i}", "succeeded", "2.50"] for i in (0, 1)
    ]
    assert rows[2:] == ["and 28 cached"]


# ---- from another terminal


def test_status_says_how_far_it_is_what_runs_and_what_has_gone_wrong(tmp_path, capsys):
    root = tmp_path / "laptop-full"
    about = {"study": "td_dpo", "minutes": 1.0}
    error = {"exception": "no such file\nand more", "again": "./run_all.sh full --run bad"}
    for run, more in (
        ("good", {"status": "succeeded"}),
        ("tiny", {"status": "running"}),
        ("bad", {"status": "failed", "error": error}),
    ):
        record.write_json(root / "td_dpo" / run / "status.json", {**about, "run_id": run, **more})
    record.write_json(root / "td_dpo" / "comparison" / "claims.json", CLAIMS)
    record.write_json(root / "td_dpo" / "tiny" / "progress.json", {"phase": "preparing"})
    record.write_json(root / "progress.json", {"text": "[1m00s] first looks: 1 of 3 notebooks done"})
    with progress.lock(root):
        progress.status(root)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1m00s] first looks: 1 of 3 notebooks done"
    assert [" ".join(line.split()) for line in lines[1:5]] == [
        "td_dpo/bad failed no such file",
        "again: ./run_all.sh full --run bad",
        "td_dpo/tiny running preparing",
        "1 succeeded",
    ]
    assert lines[5].startswith("td_dpo C1   refuted")
    assert max(map(len, lines)) <= 120


def test_status_of_a_runner_that_is_gone_is_interrupted(tmp_path, capsys):
    root = tmp_path / "outputs"
    record.write_json(
        root / "td_dpo" / "tiny" / "status.json", {"run_id": "tiny", "study": "td_dpo", "status": "running"}
    )
    progress.status(root)
    assert "interrupted" in capsys.readouterr().out
    with progress.lock(root):
        progress.status(root)
        assert "running" in capsys.readouterr().out
    progress.status(root)
    assert "its runner is gone" in capsys.readouterr().out
