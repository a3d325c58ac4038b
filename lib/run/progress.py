"""What the command line shows: the plan, progress, the table of a finished run, the verdicts, the status, and
who works in an outputs folder."""

import contextlib
import math
import os
import shlex
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live as Block
from rich.text import Text

from lib import config, hub, record
from lib.errors import MissingError, StudyError
from lib.run import plan, runs

WIDTH = 120  # characters of a line
TITLE = 46  # of them for a run: the longest id at paper scale, its study and " sweep"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(round(seconds)), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"


def rough(seconds: float) -> str:
    """A predicted time, as precise as predictions are."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes} min"


def width() -> int:
    """Characters of a line: the terminal's, where there is one."""
    return min(WIDTH, Console().width) if sys.stdin.isatty() else WIDTH


def clip(text: str) -> str:
    return text if len(text) <= width() else f"{text[: width() - 1]}…"


def some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def say(text: str) -> None:
    """Print it in lines that fit, the later ones indented."""
    print(textwrap.fill(text, width(), subsequent_indent=" " * 12, break_long_words=False), flush=True)


def format_forecast(forecast: plan.Forecast, about: str = "") -> str:
    """The wall-clock of a forecast, in words; a lower bound where members train for as long as their data turns out to
    have."""
    return f"{'more than ' if forecast.at_least else about}{rough(forecast.wall_seconds)}"


# ---- before a run


def print_plan(rounds: list, slots: int, minutes: float = math.inf, price: float | None = None) -> None:
    """The plan, a line per notebook of each round, and what it will take in all; `minutes`: the budget of all that
    comes after the first looks."""
    print(f"\n{'run':{TITLE}} {'members':>8} {'predicted':>10}  why")
    for each in rounds:
        if each.what:
            print(f"{each.what}: {format_forecast(plan.forecast(each.steps, slots), 'about ')}")
        for step in each.steps:
            every = len(config.members(runs.settle(step.run, guess=True))) if step.kind == "train" else 0
            members = f"{step.members}/{every}" if every else str(step.members or "")
            seconds = "?" if step.unknown else duration(step.seconds)
            print(f"{step.title:{TITLE}} {members:>8} {seconds:>10}  {step.reason or 'cached: up to date'}")
            names = (step.run.model.name, step.run.dataset.name) if step.kind == "train" else ()
            if needs := [name for name in names if hub.is_hub_id(name) and not hub.fetched(name)]:
                print(f"{'':{TITLE}} downloads: {', '.join(needs)}")
    steps = [step for each in rounds for step in each.steps]
    split = sum(len(each.steps) for each in rounds if each.what.startswith("first") or not each.what)
    first, later = (plan.forecast(mine, slots) for mine in (steps[:split], steps[split:]))
    share = min(1.0, 60 * minutes / later.wall_seconds) if later.wall_seconds else 1.0
    wall, hours = (getattr(first, name) + share * getattr(later, name) for name in ("wall_seconds", "device_hours"))
    found = plan.Forecast(wall, hours, first.at_least or later.at_least)
    gpus = any(step.run is not None and step.run.compute.gpus for step in steps)
    cost = "" if price is None else f", {hours * price:.2f} at {price:g} an hour"
    rest = f", {minutes:g} minutes of it for all after the first looks" if share < 1 else ""
    said = f"{'more than ' * found.at_least}{hours:.2f} {'GPU' if gpus else 'core'}-hours{cost}"
    print(f"\npredicted with {slots} members at a time: {format_forecast(found)} of wall-clock{rest}, {said}")


# ---- while it runs


def line(folder: Path) -> str:
    """What one running notebook does, from the progress its `watch` writes: member i of n, step, loss, ETA. Empty while
    nothing of it runs: it starts, or waits for a slot."""
    state = record.read_json(folder / "progress.json", {})
    if state.get("phase") != "training":
        return f"{state.get('phase', '')} {state.get('of', '')}".strip() + _step(state, "base model ")
    running, done, members = state["running"], state["done"], state["members"]
    if not running:
        return ""
    which = f"{done + 1}" + (f"-{done + len(running)}" if len(running) > 1 else "")
    share = share_of(state)
    eta = f", ETA {duration(state['elapsed'] * (1 - share) / share)}" if share and state["elapsed"] else ""
    return f"member {which} of {members}{_step(running[0])}{eta}"


def _step(state: dict, of: str = "") -> str:
    """`, step 34/300, loss 0.512`, with what is known of it."""
    if not state.get("step"):
        return ""
    said = f", {of}step {state['step']}" + (f"/{state['steps']}" if state.get("steps") else "")
    return said + (f", loss {state['loss']:.3f}" if state.get("loss") is not None else "")


def share_of(state: dict) -> float:
    """How much of a run's training is done, from its progress: whole members, and the steps of those that run."""
    if not state.get("members"):
        return float(state.get("phase", "preparing") != "preparing")
    running = state.get("running", ())
    parts = [min(1.0, r["step"] / r["steps"]) for r in running if r.get("step") and r.get("steps")]
    return (state["done"] + sum(parts)) / state["members"]


def left(step: plan.Step) -> float:
    """Predicted seconds on one slot of what is not done yet of a step's members, and of what they share."""
    if step.state not in ("", "running"):
        return 0.0
    state = record.read_json(step.progress / "progress.json", {})
    lacking = sum(not (folder / "complete.json").exists() for folder in step.makes) / max(1, len(step.makes))
    share = share_of(state)
    if state.get("members") and step.members:  # of pilots, which others follow, or of those that follow them
        members = step.members if state.get("pilots") else min(step.members, state["members"])
        share = 1 - (members - share * state["members"]) / step.members
    return step.seconds * (1 - share) + lacking * step.prepare


def queued(step: plan.Step) -> int:
    """How many members of a running step wait for a slot."""
    state = record.read_json(step.progress / "progress.json", {})
    if state.get("phase") == "training":
        return state["members"] - state["done"] - len(state["running"])
    return step.members if state.get("phase", "preparing") == "preparing" else 0


class Live:
    """What a runner does: on a terminal a block that is rewritten in place, elsewhere a line now and then; above it a
    line for what has ended, and the verdicts as they come."""

    def __init__(self, runner):
        self.runner, self.began, self.last, self.block = runner, time.monotonic(), -math.inf, None
        self.verdicts: set[str] = set()  # those that were printed
        self.printed, self.pipe = b"", (-1, None)  # by children, whose output comes above the block too

    def begin(self, what: str = "", after: float = 0.0) -> None:
        """A round, after which so many seconds are predicted for others."""
        self.what, self.after, self.started = what.partition(" for ")[0], after, time.monotonic()
        self.to_do = [step for step in self.runner.steps if step.state in ("", "running")]
        self.planned = plan.forecast(self.to_do, self.runner.slots)
        # of `left`: what is prepared between pilots and others counts from zero again
        self.least: dict[str, float] = {}
        self.shown: set[str] = set()

    def start(self) -> None:
        """Put the block on the terminal, where there is one."""
        if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            self.pipe = os.pipe()
            os.set_blocking(self.pipe[0], False)
            self.block = Block(Text("planning"), console=Console(highlight=False), auto_refresh=False, transient=True)
            self.block.start()

    def close(self) -> None:
        """Take the block off the terminal. Prints nothing: whoever read what was printed may be gone."""
        with contextlib.suppress(OSError):
            if self.block:
                self.block.stop()
                self.copy()

    def copy(self) -> None:
        """Print the whole lines that children wrote."""
        with contextlib.suppress(BlockingIOError):
            self.printed += os.read(self.pipe[0], 1 << 16)
        whole, _, self.printed = self.printed.rpartition(b"\n")
        if whole:
            self.block.console.out(whole.decode(errors="replace"))

    def show(self) -> None:
        ended = [step for step in self.to_do if step.state not in ("", "running") and step.title not in self.shown]
        self.shown |= {step.title for step in ended}
        for state in dict.fromkeys(step.state for step in ended):
            steps = [step for step in ended if step.state == state]
            said = [f"{step.title} {state} in {step.minutes:.1f} min" for step in steps if step.minutes]
            for text in said or [f"{state}: {some([step.title for step in steps])}"]:
                print(clip(f"  {text}"), flush=True)
        judged = [step for step in ended if step.state == "succeeded" and step.kind == "analysis"]
        print_verdicts([step.folder for step in judged if step.parameters["mode"] == "full"], self.verdicts)
        text, lines, share = self.state(now := time.monotonic())
        if self.block:
            self.copy()
            bar = f"{'━' * round(min(60, width()) * share):─<{min(60, width())}}"
            block = Text("\n".join([bar, text, *lines[:5]]), no_wrap=True, overflow="ellipsis")
            self.block.update(block, refresh=True)
        if is_due := now - self.last >= 30:
            self.last = now
        if is_due and not self.block:
            print(clip(" | ".join([text, *lines])), flush=True)
        if is_due or ended:
            self.runner.publish({"text": text, "lines": lines})

    def state(self, now: float) -> tuple[str, list[str], float]:
        """(how far it is, a line for each notebook that trains, share of the whole time that is over)."""
        waiting = [step for step in self.to_do if step.state in ("", "running")]
        seconds = self.forecast(now - self.started)[1] * bool(waiting) + self.after
        about = "more than" if any(step.unknown for step in waiting) else "about"
        text = f"[{duration(now - self.began)}] {self.what}{': ' * bool(self.what)}"
        text += f"{len(self.to_do) - len(waiting)} of {len(self.to_do)} notebooks done"
        text += f", {about} {rough(seconds)} left in all" if seconds else ""
        running = [step for step in waiting if step.state == "running"]
        said = {step.title: line(step.progress) or "judging" * (step.kind == "analysis") for step in running}
        lines = [f"{title}: {words}" for title, words in said.items() if words]
        return text, lines, (now - self.began) / (now - self.began + seconds or 1)

    def forecast(self, elapsed: float) -> tuple[float, float]:
        """(share of this round that is done, seconds left of it): at first as planned, then by what was done in the
        time so far."""
        counted = [step for step in self.to_do if step.state in ("", "running", "succeeded", "failed")]
        whole = sum(step.seconds + step.prepare for step in counted)
        self.least = {step.title: min(self.least.get(step.title, math.inf), left(step)) for step in counted}
        done = 1 - sum(self.least.values()) / whole if whole else 1.0
        return done, elapsed * (1 - done) / done if done > 0.1 else max(0.0, self.planned.wall_seconds - elapsed)


# ---- after it


def print_table(steps: list) -> None:
    """What was executed, with the minutes of all its rounds, how many were not, and what went wrong."""
    done = {step.title: step for step in steps if step.state not in ("", "cached", "postponed", "blocked")}
    others = Counter({step.title: step.state or "not started" for step in steps if step.title not in done}.values())
    print(f"\n{'run':{TITLE}} {'status':11} {'minutes':>7}  key metric")
    for title, step in done.items():
        state, status = step.state, record.read_json(step.folder / "status.json", {})
        metric, minutes = status.get("key_metric") or {}, sum(each.minutes for each in steps if each.title == title)
        value = f"{metric['name']} {metric['value']:.3f}" if metric.get("value") is not None else ""
        state = status.get("status", state) if state == "failed" else state
        print(f"{title:{TITLE}} {state:11} {minutes:7.2f}  {value}")
    for state, n in others.items():
        print(f"and {n} {state}")
    for step in done.values():
        if error := step.error:
            where = f" in cell {error['cell']}" if error["cell"] else ""
            print(f"\n{step.title} failed{where}\n  {error['exception']}")
            print(f"  notebook: {error['notebook']}\n  log: {error['log']}\n  again: {error['again']}")


def print_verdicts(folders: Iterable[Path], printed: set[str], *, priced: bool = False) -> None:
    """The words of these analyses that were not `printed` yet; where `priced`, with what is open."""
    for folder in folders:
        prices = record.read_json(folder / "prices.json", {}) if priced else {}
        for claim in record.read_json(folder / "claims.json", []):
            price = prices.get(claim["id"])
            ends = ["unbounded" if bound is None else f"{bound:+.3f}" for bound in claim.get("interval95") or ()]
            found = f"{claim['estimate']:+.3f} [{', '.join(ends)}]  " if ends else ""
            text = f"{folder.parent.name} {claim['id']:4} {claim['verdict']:13} {found}{claim['sentence']}"
            if text not in printed and (price or claim["verdict"] != "not evaluated"):
                say(text + f" Open at {claim.get('n_seeds') or 0}: {price}." * bool(price))
            printed.add(text)


def status(root: Path, studies: list[str] | None = None) -> None:
    rows, done = [*root.glob("*/*/status.json"), *root.glob("*/*/sweep/status.json")], 0
    alive = root.is_dir() and is_running(root)  # whose lock would make the folder
    if alive:
        print(clip(record.read_json(root / "progress.json", {}).get("text", "a runner has just started")))
    elif not rows:
        print(f"nothing has run in {os.path.relpath(root, os.getcwd())} yet: ./run_all.sh")
    for path in sorted(rows):
        state = record.read_json(path, {})
        if studies and state.get("study") not in studies:
            continue
        sweep, how, error = state.get("kind") == "sweep", state.get("status", "?"), state.get("error") or {}
        said = error.get("exception", f"{state.get('minutes') or 0:.2f} min")
        if how == "succeeded":
            done += 1
            continue
        if how == "running" and alive:
            said = line(path.parent.parent if sweep else path.parent) or "starting, or waiting for a slot"
        elif how in ("running", "interrupted"):
            how, said = "interrupted", "its runner is gone; rerun the same command to resume"
        title = f"{state.get('study')}/{state.get('run_id')}" + " sweep" * sweep
        print(clip(f"{title:{TITLE}} {how:11} {said.splitlines()[0]}"))
        if error:
            print(f"  again: {error['again']}")
    print(f"{done} succeeded" if done else "", end="\n" * bool(done))
    print_verdicts((f for f in sorted(root.glob("*/comparison")) if not studies or f.parent.name in studies), set())


# ---- one runner at a time


@contextlib.contextmanager
def lock(*roots: Path):
    """One runner at a time in each of these outputs folders. The locks are the system's: they die with their holder,
    however that one dies."""
    with contextlib.ExitStack() as held:
        for root in roots:
            try:
                root.mkdir(parents=True, exist_ok=True)
                # `status` tests it by holding it for a moment
                held.enter_context(FileLock(root / ".lock").acquire(timeout=2))
            except Timeout:
                fix = "wait for it, or look at ./run_all.sh status"
                raise StudyError(str(root), "another runner works here", "one runner at a time", fix) from None
            except OSError as error:
                found = f"cannot write there ({error.strerror})"
                there = next(folder for folder in (root, *root.parents) if os.path.exists(folder))
                fix = f"chmod -R u+w {shlex.quote(str(there))}, or --results-dir with another"
                raise MissingError(str(root), found, "a folder this user can write to", fix) from None
        yield


def is_running(root: Path) -> bool:
    """Whether a runner works in this outputs folder, and so holds its lock."""
    try:
        with FileLock(root / ".lock").acquire(timeout=0):
            return False
    except OSError as error:  # as Timeout is
        return isinstance(error, Timeout)
