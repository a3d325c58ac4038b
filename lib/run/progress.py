"""What the command line shows: the plan, progress, the table of a finished run, the verdicts, the status, and
who works in an outputs folder."""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from lib import config, record
from lib.errors import MissingError, StudyError
from lib.run import plan


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(round(seconds)), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"


def format_forecast(forecast: plan.Forecast, about: str = "") -> str:
    """The wall-clock of a forecast, in words; a lower bound where members train for as long as their data turns out to
    have."""
    return f"{'more than ' if forecast.at_least else about}{duration(forecast.wall_seconds)}"


# ---- before a run


def print_plan(steps: list[plan.Step], slots: int, price: float | None = None) -> None:
    """The plan, a line per notebook, and what it will take in all."""
    print(f"\n{'run':34} {'members':>8} {'predicted':>10}  why")
    for step in steps:
        every = len(config.members(step.run)) if step.kind == "train" else 0
        members = f"{step.members}/{every}" if every else str(step.members or "")
        seconds = "?" if step.unknown else duration(step.seconds)
        print(f"{step.title:34} {members:>8} {seconds:>10}  {step.reason or 'cached: up to date'}")
        names = (step.run.model.name, step.run.dataset.name) if step.kind == "train" else ()
        if needs := [name for name in names if config.is_hub_id(name)]:
            print(f"{'':34} downloads: {', '.join(needs)}")
    if not steps:
        return
    found, gpus = plan.forecast(steps, slots), any(s.run is not None and s.run.compute.gpus for s in steps)
    cost = "" if price is None else f", {found.device_hours * price:.2f} at {price:g} an hour"
    print(
        f"\npredicted with {slots} members at a time: {format_forecast(found)} of wall-clock, "
        f"{'more than ' if found.at_least else ''}{found.device_hours:.2f} {'GPU' if gpus else 'core'}-hours{cost}"
    )


# ---- while it runs


def line(folder: Path, title: str) -> str:
    """One running notebook in one line, from the progress its `watch` writes: member i of n, step, loss, ETA."""
    state = record.read_json(folder / "progress.json")
    if not state:
        return f"{title}: starting"
    if state["phase"] == "measuring":
        return f"{title}: measuring {state['what'].replace('_', ' ')}, or waiting for a slot to do so"
    if state["phase"] != "training":
        return f"{title}: {state['phase']}" + _step(state, "base model ")
    running, done, members = state["running"], state["done"], state["members"]
    if not running and done < members:
        return f"{title}: {done} of {members} members done, waiting for a slot"
    which = f"{min(done + 1, members)}" + (f"-{done + len(running)}" if len(running) > 1 else "")
    left = seconds_left(state)
    eta = "" if left is None else f", ETA {duration(left)}"
    return f"{title}: member {which} of {members}" + (_step(running[0]) if running else "") + eta


def _step(state: dict, of: str = "") -> str:
    """`, step 34/300, loss 0.512`, with what is known of it."""
    if not state.get("step"):
        return ""
    said = f", {of}step {state['step']}" + (f"/{state['steps']}" if state.get("steps") else "")
    return said + (f", loss {state['loss']:.3f}" if state.get("loss") is not None else "")


def seconds_left(state: dict | None) -> float | None:
    """Of a run's members, from the share that is done: whole members, and the steps of those that run. None at the
    start."""
    if not state or state.get("phase") != "training" or not state.get("members"):
        return None
    parts = [min(1.0, r["step"] / r["steps"]) for r in state["running"] if r.get("step") and r.get("steps")]
    done = (state["done"] + sum(parts)) / state["members"]
    return state["elapsed"] * (1 - done) / done if done > 0 and state.get("elapsed") else None


class Live:
    """Progress in a line: rewritten in place on a terminal, a new one now and then elsewhere."""

    def __init__(self, runner):
        self.runner, self.shown = runner, set()
        self.started, self.last, self.terminal = time.monotonic(), 0.0, sys.stdout.isatty()

    def show(self) -> None:
        for step in self.runner.steps:
            if step.state not in ("", "running", "cached") and step.title not in self.shown:
                self.shown.add(step.title)
                self.clear()
                print(f"  {step.title} {step.state} in {step.minutes:.1f} min", flush=True)
                if self.runner.show_verdicts and step.state == "succeeded":
                    print_verdicts([step])
        if time.monotonic() - self.last < (0.5 if self.terminal else 20):
            return
        self.last = time.monotonic()
        open_steps = [s for s in self.runner.steps if s.state in ("", "running")]
        running = [s for s in open_steps if s.state == "running"]
        every = len(self.runner.steps)
        text = f"[{duration(self.last - self.started)}] {every - len(open_steps)} of {every} notebooks done"
        if open_steps:
            about = "more than" if any(s.unknown for s in open_steps) else "about"
            text += f", {about} {duration(self.left(running))} left"
        text += ": " + " | ".join(line(s.progress, s.name + " sweep" * (s.kind == "sweep")) for s in running)
        if self.terminal:
            self.clear()
            print(text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        else:
            print(text, flush=True)

    def left(self, running: list) -> float:
        """Seconds until the last notebook has ended: what runs by its own progress where it has any, the rest as
        planned. A notebook whose members wait for the slots of another's has all of its time before it."""
        slots, own = self.runner.slots, [0.0]
        waiting = sum(s.seconds for s in self.runner.steps if not s.state)
        for step in running:
            state = record.read_json(step.progress / "progress.json") or {}
            measured = seconds_left(state)
            if measured is None and step.kind != "analysis" and not state.get("running"):
                waiting += step.seconds
                own.append(step.prepare if state.get("phase") == "preparing" else 0.0)
            else:
                own.append(step.seconds / slots if measured is None else measured)
        return max(own) + waiting / slots

    def close(self) -> None:
        self.last = time.monotonic()
        self.show()
        self.clear()

    def clear(self) -> None:
        """Take the live line off the terminal."""
        if self.terminal:
            print("\r\x1b[J", end="", flush=True)


# ---- after it


def print_table(steps: list) -> None:
    print(f"\n{'run':34} {'status':11} {'minutes':>7}  key metric")
    for step in steps:
        state, status = step.state or "not started", record.read_json(step.folder / "status.json", {})
        metric = status.get("key_metric") or {}
        value = f"{metric['name']} {metric['value']:.3f}" if metric.get("value") is not None else ""
        state = status.get("status", state) if state == "failed" else state
        print(f"{step.title:34} {state:11} {step.minutes:7.2f}  {value}")
    for step in steps:
        if error := step.error:
            where = f" in cell {error['cell']}" if error["cell"] else ""
            print(f"\n{step.title} failed{where}\n  {error['exception']}")
            print(f"  notebook: {error['notebook']}\n  log: {error['log']}\n  again: {error['again']}")


def print_verdicts(steps: list) -> None:
    for step in steps:
        claims = record.read_json(step.folder / "claims.json") if step.kind == "analysis" else None
        for claim in claims or []:
            ends = ["unbounded" if bound is None else f"{bound:+.3f}" for bound in claim.get("interval95") or ()]
            found = f"{claim['estimate']:+.3f} [{', '.join(ends)}]" if ends else "-"
            print(f"{step.study} {claim['id']}  {claim['verdict']:13} {found:28} {claim['sentence']}")


def status(root: Path, studies: list[str] | None = None) -> int:
    rows = sorted(root.glob("*/*/status.json")) + sorted(root.glob("*/*/sweep/status.json"))
    if not rows:
        print(f"nothing has run in {os.path.relpath(root, os.getcwd())} yet: ./run_all.sh")
        return 0
    alive = is_running(root)
    for path in rows:
        state = record.read_json(path, {})
        if studies and state.get("study") not in studies:
            continue
        sweep, how = state.get("kind") == "sweep", state.get("status", "?")
        said = f"{state.get('minutes') or 0:.2f} min"
        if how == "running" and not alive:
            how, said = "interrupted", "its runner is gone; rerun the same command to resume"
        elif how == "running":
            said = line(path.parent.parent if sweep else path.parent, "now").removeprefix("now: ")
        elif how == "interrupted":
            said += "  rerun the same command to resume"
        elif state.get("error"):
            said += "  " + state["error"]["exception"].splitlines()[0] + f"  again: {state['error']['again']}"
        title = f"{state.get('study')}/{state.get('run_id')}" + " sweep" * sweep
        print(f"{title:34} {how:11} {said}")
    return 0


# ---- one runner at a time


@contextlib.contextmanager
def lock(root: Path):
    """One runner at a time in an outputs folder. The lock is the system's: it dies with its holder, however that one
    dies."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = FileLock(root / ".lock").acquire(timeout=2)  # `status` tests it by holding it for a moment
    except Timeout:
        fix = "wait for it, or look at ./run_all.sh status"
        raise StudyError(str(root), "another runner works here", "one runner at a time", fix) from None
    except OSError as error:
        found = f"cannot write there ({error.strerror})"
        raise MissingError(str(root), found, "a folder this user can write to", f"chmod -R u+w {root}") from None
    with held:
        yield


def is_running(root: Path) -> bool:
    """Whether a runner works in this outputs folder, and so holds its lock."""
    try:
        with FileLock(root / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False
