"""What a run shows while it runs: a live line per notebook in a terminal, plain lines elsewhere. `status` reads the same."""

import fcntl
import shutil
import sys
import time
from pathlib import Path

from lib import record


def line(folder: Path, title: str) -> str:
    """One running notebook in one line, from the progress its `watch` writes."""
    state = record.read_json(folder / "progress.json")
    if not state:
        return f"{title}: starting"
    if state["phase"] == "preparing":
        step, steps, loss = state.get("step"), state.get("steps"), state.get("loss")
        return f"{title}: preparing" + (
            f" (base model step {step}/{steps}, loss {loss:.2f})" if step and steps and loss else ""
        )
    if state["phase"] == "recording":
        return f"{title}: recording"
    told = f"{title}: {state['done']}/{state['members']}"
    for running in state["running"][:1]:
        if running.get("step"):
            told += f" step {running['step']}" + (f" loss {running['loss']:.3f}" if running.get("loss") is not None else "")
    if state["done"] and state.get("elapsed"):
        left = state["elapsed"] / state["done"] * (state["members"] - state["done"])
        told += f" ETA {duration(left)}"
    return told


def running(root: Path) -> bool:
    """Whether a runner works in this outputs folder: it holds the lock (runner.locked), which dies with it."""
    try:
        with open(root / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def duration(seconds: float) -> str:
    seconds = int(round(seconds))
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m" if seconds >= 3600 else f"{seconds // 60}m{seconds % 60:02d}s"


class Live:
    """Prints one line per running notebook and a total: rewritten in place on a terminal, plain lines elsewhere."""

    def __init__(self, runner, on_end=None):
        """`on_end(step, state)` is called as each step ends: the command line prints a study's verdicts there."""
        self.on_end = on_end
        self.runner, self.started, self.last, self.told = runner, time.monotonic(), 0.0, set()
        self.terminal, self.shown = sys.stdout.isatty(), 0

    def show(self) -> None:
        for step in self.runner.steps:
            state = self.runner.state[id(step)]
            if state in ("succeeded", "failed", "blocked", "interrupted", "postponed") and id(step) not in self.told:
                self.told.add(id(step))
                self.clear()
                print(f"  {step.title} {state} in {self.runner.minutes.get(id(step), 0):.1f} min", flush=True)
                if self.on_end:
                    self.on_end(step, state)
        pause = 0.5 if self.terminal else 20
        if time.monotonic() - self.last < pause:
            return
        self.last = time.monotonic()
        running = [s for s in self.runner.steps if self.runner.state[id(s)] == "running"]
        lines = [line(s.progress, s.name if s.kind != "sweep" else f"{s.name} sweep") for s in running]
        ended = sum(self.runner.state[id(s)] not in ("", "running") for s in self.runner.steps)
        total = f"[{duration(time.monotonic() - self.started)}] {ended} of {len(self.runner.steps)} notebooks done"
        if not self.terminal:
            print(f"{total}: " + " | ".join(lines), flush=True)
            return
        self.clear()
        width = shutil.get_terminal_size().columns - 1
        for text in [*lines, total]:
            print(text[:width])
        sys.stdout.flush()
        self.shown = len(lines) + 1

    def clear(self) -> None:
        """Take the live lines off the terminal: up over them, and erase to the end of the screen."""
        if self.shown:
            print(f"\x1b[{self.shown}A\x1b[J", end="", flush=True)
            self.shown = 0

    def close(self) -> None:
        self.last = time.monotonic()
        self.show()
        self.clear()
