"""What a run shows while it runs: a live line per notebook in a terminal, plain lines elsewhere. `status` reads the
same."""

import shutil
import sys
import time
from pathlib import Path

from lib import record


def line(folder: Path, title: str) -> str:
    """One running notebook in one line, from the progress its `watch` writes: member i of n, step, loss, ETA."""
    state = record.read_json(folder / "progress.json")
    if not state:
        return f"{title}: starting"
    if state["phase"] == "recording":
        return f"{title}: recording"
    if state["phase"] == "measuring":
        return f"{title}: measuring {state['what'].replace('_', ' ')}, or waiting for a slot to do so"
    if state["phase"] == "preparing":
        return f"{title}: preparing" + _step({**state, "name": "base model "})
    running = state["running"]
    if not running and state["done"] < state["members"]:
        return f"{title}: {state['done']} of {state['members']} members done, waiting for a slot"
    first = min(state["done"] + 1, state["members"])
    told = f"{title}: member {first}" + (f"-{state['done'] + len(running)}" if len(running) > 1 else "")
    told += f" of {state['members']}" + (_step(running[0]) if running else "")
    left = seconds_left(state)
    return told + ("" if left is None else f", ETA {duration(left)}")


def _step(state: dict) -> str:
    """`, step 34/300, loss 0.512`, with what is known of it."""
    if not state.get("step"):
        return ""
    told = f", {state.get('name', '')}step {state['step']}" + (f"/{state['steps']}" if state.get("steps") else "")
    return told + (f", loss {state['loss']:.3f}" if state.get("loss") is not None else "")


def seconds_left(state: dict | None) -> float | None:
    """Of a run's members, from the share that is done: whole members, and the steps of those that run. None at the
    start."""
    if not state or state.get("phase") != "training" or not state.get("members"):
        return None
    parts = [min(1.0, r["step"] / r["steps"]) for r in state["running"] if r.get("step") and r.get("steps")]
    done = (state["done"] + sum(parts)) / state["members"]
    return state["elapsed"] * (1 - done) / done if done > 0 and state.get("elapsed") else None


def duration(seconds: float) -> str:
    seconds = int(round(seconds))
    return (
        f"{seconds // 3600}h{seconds % 3600 // 60:02d}m" if seconds >= 3600 else f"{seconds // 60}m{seconds % 60:02d}s"
    )


def predicted(found, about: str = "") -> str:
    """The wall-clock of a Forecast, in words: where members train for as long as their data turns out to have, that it
    is a lower bound."""
    return f"{'more than ' if found.at_least else about}{duration(found.wall_seconds)}"


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
        open_ended = any(s.unknown and self.runner.state[id(s)] in ("", "running") for s in self.runner.steps)
        about = "more than" if open_ended else "about"
        total += f", {about} {duration(self.left(running))} left" if ended < len(self.runner.steps) else ""
        if not self.terminal:
            print(f"{total}: " + " | ".join(lines), flush=True)
            return
        self.clear()
        size = shutil.get_terminal_size()
        most = max(1, size.lines - 3)  # what has scrolled off the screen cannot be rewritten
        if len(lines) > most:
            lines[most - 1 :] = [f"… and {len(lines) - most + 1} more notebooks"]
        for text in [*lines, total]:
            print(text[: size.columns - 1])
        sys.stdout.flush()
        self.shown = len(lines) + 1

    def left(self, running: list) -> float:
        """Seconds until the last notebook has ended: what runs by its own progress where it has any, the rest as
        planned; a notebook that is open and whose members wait for the slots of another's has all of its time before
        it."""
        now, slots, own = time.monotonic(), self.runner.slots, []
        waiting = sum(s.seconds for s in self.runner.steps if not self.runner.state[id(s)])
        for step in running:
            state = record.read_json(step.progress / "progress.json") or {}
            measured, phase = seconds_left(state), state.get("phase")
            open_for = now - self.runner.since.get(id(step), now)
            if measured is not None:
                own.append(measured)
            elif step.kind == "analysis" or state.get("running") or phase in ("recording", "measuring"):
                own.append(max(0.0, step.seconds / slots - open_for))
            else:  # none of its members runs yet: they wait for slots or, before "training", for what they share
                waiting += step.seconds
                own.append(0.0 if phase == "training" else max(0.0, getattr(step, "prepare", 0.0) - open_for))
        return max(own, default=0.0) + waiting / slots

    def clear(self) -> None:
        """Take the live lines off the terminal: up over them, and erase to the end of the screen."""
        if self.shown:
            print(f"\x1b[{self.shown}A\x1b[J", end="", flush=True)
            self.shown = 0

    def close(self) -> None:
        self.last = time.monotonic()
        self.show()
        self.clear()
