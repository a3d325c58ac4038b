"""What a run shows while it runs: one live line in a terminal, plain lines elsewhere; `status` reads the same files."""

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


def duration(seconds: float) -> str:
    seconds = int(round(seconds))
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m" if seconds >= 3600 else f"{seconds // 60}m{seconds % 60:02d}s"


class Live:
    """Prints the running notebooks: rewritten in place on a terminal, every 20 s as a plain line elsewhere."""

    def __init__(self, runner, on_end=None):
        """`on_end(step, state)` is called as each step ends: the command line prints a study's verdicts there."""
        self.on_end = on_end
        self.runner, self.started, self.last, self.told = runner, time.monotonic(), 0.0, set()
        self.terminal = sys.stdout.isatty()

    def show(self) -> None:
        for step in self.runner.steps:
            state = self.runner.state[id(step)]
            if state in ("succeeded", "failed", "blocked", "interrupted") and id(step) not in self.told:
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
        text = " | ".join(line(s.progress, s.name if s.kind != "sweep" else f"{s.name} sweep") for s in running)
        text = f"[{duration(time.monotonic() - self.started)}] {text}"
        if self.terminal:
            import shutil

            width = shutil.get_terminal_size().columns
            print("\r\x1b[K" + text[: width - 1], end="", flush=True)
        else:
            print(text, flush=True)

    def clear(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="")

    def close(self) -> None:
        self.last = time.monotonic()
        self.show()
        self.clear()
