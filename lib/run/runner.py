"""Executes the planned notebooks headlessly through papermill and decides what counts as done.

Papermill alone cannot say that a run succeeded: a killed kernel, a time-out and Ctrl-C all leave cells marked
`completed`, and `sys.exit(0)` in a cell ends with code 0. Here a notebook succeeded only if papermill raised nothing,
every code cell has an execution count, and the record's sentinel carries this attempt's nonce and metrics that parse.
"""

import contextlib
import importlib
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib import config, record
from lib.errors import StudyError
from lib.run import decide, members, model_card, pages, plan, pool, progress, runs, wandb

POLL = 0.3
STOP_SECONDS = 60  # for members to save a checkpoint after Ctrl-C
MIRROR_SECONDS = 15  # for W&B mirrors that are still under way when the last run has ended


class Runner:
    """The pool and the threads that execute notebooks; what each step came to is written into it. `root`:
    outputs/<scale>-<mode>, where whoever looks on finds how far it is."""

    def __init__(self, steps: list, slots: int, *, fail_fast=False, keep_secrets=False, max_hours=math.inf, root=None):
        self.slots, self.fail_fast, self.keep_secrets, self.root = slots, fail_fast, keep_secrets, root
        self.began, self.stopping, self.pool = time.monotonic(), False, None
        self.guard, self.mirrors, self.live = threading.Lock(), wandb.Mirrors(), progress.Live(self)
        self.latest, self.steps = self.began + 3600 * (max_hours or math.inf), []
        self.add(steps)

    def add(self, steps: list[plan.Step], until: float = math.inf) -> None:
        """More steps to execute, none of which starts where it is predicted to end after `until`."""
        self.until = min(until, self.latest)
        self.steps = [*self.steps, *steps]
        for step in steps:
            step.state = "" if step.reason else "cached"

    def run(self, rounds: Iterable[decide.Round] = ()) -> bool:
        """Execute what is to be done, then round after round. True where every step ended well."""
        at_once = max(4, self.slots + 2)
        self.live.begin()
        try:
            self.live.start()
            with ThreadPoolExecutor(at_once) as threads:
                try:
                    self.finish(threads, at_once)
                    for each in rounds:
                        self.add(each.steps, each.until)
                        self.live.begin(each.what, each.after)
                        self.finish(threads, at_once)
                except BaseException as error:
                    self.stopping = True
                    self.live.close()
                    if self.pool:
                        if isinstance(error, KeyboardInterrupt):
                            self.wait_for_members()
                        self.pool.close()
                    raise
        finally:
            self.live.close()
            if self.pool:
                self.pool.close()
            self.mirrors.close(0 if self.stopping else MIRROR_SECONDS)
        return all(step.state in ("cached", "succeeded") for step in self.steps)

    def finish(self, threads: ThreadPoolExecutor, at_once: int) -> None:
        """Execute the steps that wait, to their end."""
        if not self.count(""):
            return
        self.ensure_pool()
        # Before threads do: two that enter the cycle of jupyter_client's imports at different places find it half made.
        for module in ("nbconvert", "lib.run.kernels"):
            importlib.import_module(module)
        while self.count("") or self.count("running"):
            for step in self.steps:
                if not step.state and self.count("running") < at_once and self.ready(step):
                    step.state = "running"
                    threads.submit(self.execute, step)
            self.live.show()
            time.sleep(POLL)
        self.live.show()

    def publish(self, state: dict) -> None:
        """How far it is, for `status` and for the index, which is written anew."""
        with contextlib.suppress(Exception):  # of records that are being written; a page is no reason to end a run
            if self.root:
                record.write_json(self.root / "progress.json", state)
                pages.index_html(self.root.parent)

    def count(self, state: str) -> int:
        return sum(step.state == state for step in self.steps)

    def wait_for_members(self) -> None:
        """After the first Ctrl-C: say what is being waited for, and wait for it. A second one ends everything at
        once."""
        signal.signal(signal.SIGINT, self.leave)
        signal.signal(signal.SIGTERM, self.leave)
        waiting = f"waiting for members to save a checkpoint, at most {STOP_SECONDS} s"
        print(f"\nstopping: {waiting}; Ctrl-C again leaves at once", file=sys.stderr, flush=True)
        self.pool.say("stop")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.pool.process.wait(STOP_SECONDS)

    def leave(self, *_) -> None:
        """The second Ctrl-C. Members, kernels and mirrors die with us; nothing waits for anything."""
        print("left at once: rerun the same command to resume from the last checkpoints", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # whatever state it is in, it is to go
            self.live.close()
            self.pool.close()
            self.mirrors.close(0)
        os._exit(130)

    def ready(self, step: plan.Step) -> bool:
        """Whether what it needs has ended and it fits into the time. A sweep needs its run's success, or the run its
        sweep's; an analysis names what is missing itself. What will never be ready is blocked or postponed."""
        needed, needs_success = {each.state for each in step.needs if each.reason}, step.kind != "analysis"
        if (self.fail_fast and self.count("failed")) or (needs_success and "failed" in needed):
            step.state = "blocked"
        elif needed == {"postponed"} or (needs_success and "postponed" in needed):
            step.state = "postponed"
        elif not needed & {"", "running"} and not self.disturbs(step):
            if self.fits(step):
                return True
            if not self.count("running"):  # else it waits for what runs, which may be quicker than predicted
                step.state = "postponed"
        return False

    def disturbs(self, step: plan.Step) -> bool:
        """Whether it would hold up what runs: times are measured alone, and while enough members wait for a slot, those
        of a later notebook only come between them and their verdicts."""
        running = [each for each in self.steps if each.state == "running"]
        if "times" in (step.kind, *(each.kind for each in running)):
            return bool(running)
        return step.kind != "analysis" and sum(map(progress.queued, running)) >= 2 * self.slots

    def fits(self, step: plan.Step) -> bool:
        """Whether it is predicted to end in time, its study's analysis included."""
        if self.until == math.inf:
            return True
        shared = sum(progress.left(each) for each in self.steps if each.state == "running")
        analyses = (each for each in self.steps if each.kind == "analysis" and each.study == step.study)
        alone, longest = sum(each.seconds for each in analyses if each.state in ("", "running")), 0.0
        if step.kind == "times":
            alone += step.seconds
        elif step.kind != "analysis":
            shared, longest = shared + step.seconds + step.prepare, step.of_each
        return time.monotonic() + max(shared / self.slots, longest) + alone <= self.until

    def ensure_pool(self) -> None:
        with self.guard:
            if self.stopping or (self.pool and self.pool.alive()):
                return
            if self.pool:
                self.pool.close()
            self.pool = pool.Pool(self.slots, keep_secrets=self.keep_secrets, output=self.live.pipe[1])
            os.environ |= {"STUDY_POOL": self.pool.socket, "STUDY_SLOTS": str(self.slots)}

    def execute(self, step: plan.Step) -> None:
        """One notebook to its end, however that is: in its step, and in its status.json."""
        if self.stopping:  # still in the queue when the run was interrupted: its record stays as it is
            step.state = "interrupted"
            return
        started, outcome = time.time(), "succeeded"
        try:
            if step.kind == "analysis":  # its runs have ended, and the records are what they are
                step.key = plan.analysis_key(step.study, step.folder.parent)
            if step.reason == plan.FORCED:
                for folder in sorted((step.folder / "members").glob("*/")) if step.kind == "train" else ():
                    members.archive(folder)
                if step.kind == "times":
                    shutil.rmtree(step.folder, ignore_errors=True)
            self.attempt(step, started)
        except BaseException as error:
            outcome = "interrupted" if self.stopping else "failed"
            if not self.stopping:  # kernels that we ended ourselves are no error
                step.error = explain(step, error)
            with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
                write_status(step, outcome, started)
                (step.progress / "progress.json").unlink(missing_ok=True)
        finally:
            step.minutes, step.state = (time.time() - started) / 60, outcome
            for other in self.steps:  # what it took says how long others will take
                if not other.state and other.kind != "analysis":
                    other.predict()

    def attempt(self, step: plan.Step, started: float) -> None:
        """Execute, once more where a process was lost (its members resume from their checkpoints)."""
        for number in (1, 2):
            self.ensure_pool()
            nonce = os.urandom(8).hex()
            write_status(step, "running", started)
            self.mirror(step)
            try:
                if step.kind == "times":
                    members.measure(step.run, processes=step.processes)
                else:
                    check_success(step, execute_notebook(step, nonce), nonce)
                    os.replace(partial(step), step.output)
                    pages.notebook_html(step.output)
                break
            except BaseException as error:
                if number == 2 or self.stopping or not _lost(error):
                    raise
        write_status(step, "succeeded", started)
        self.mirror(step)
        if step.kind == "analysis":
            model_card.write_all(step.folder.parent)

    def mirror(self, step: plan.Step) -> None:
        if step.kind != "analysis":
            self.mirrors.follow(step.progress, config.wandb_mode(step.run))


def write_status(step: plan.Step, status: str, started: float) -> None:
    """The step's status.json: `out_of_memory` instead of failed where that is what ended a member."""
    now, seconds, metric = time.time(), None, None
    if status == "failed":
        ended = (record.read_json(path, {}).get("status") for path in step.folder.glob("*/*/error.json"))
        status = "out_of_memory" if "out_of_memory" in ended else status
    elif status == "succeeded":
        trained = [path for path in step.folder.glob("*/*/metrics.json") if path.stat().st_mtime >= started]
        seconds = round(sum(record.read_json(path, {}).get("seconds", 0.0) for path in trained), 1)
        metric = record.read_json(step.folder / "metrics.json", {}).get("key_metric")
    about = {"run_id": step.name, "kind": step.kind, "study": step.study, "status": status, "key": step.key}
    times = {"started": started, "ended": None if status == "running" else now, "actual_member_seconds": seconds}
    times["minutes"] = round((now - started) / 60, 3)
    outcome = {"key_metric": metric, "error": step.error, "command": step.command}
    record.write_json(step.folder / "status.json", about | times | outcome)


def explain(step: plan.Step, error: BaseException) -> dict:
    """What a person needs of a failure: the cell, the exception, the log and the command to run it again."""

    def clean(text) -> str:
        return record.escape_controls(record.redact(str(text)))

    name = getattr(error, "ename", type(error).__name__)
    value = clean(getattr(error, "evalue", "") or error).strip()
    log = step.folder / "attempts" / "error.log"
    with contextlib.suppress(OSError):
        record.write_text(log, clean("".join(traceback.format_exception(error))))
    exception = value if name in ("StudyError", "MissingError", "PapermillExecutionError") else f"{name}: {value}"
    about = {"cell": getattr(error, "exec_count", None), "exception": exception, "again": step.command}
    return about | {"log": str(log), "notebook": str(partial(step))}


def partial(step: plan.Step) -> Path:
    return step.folder / "attempts" / f"{step.output.stem}.partial.ipynb"


def _lost(error: BaseException) -> bool:
    """A process went away (kernel, pool): worth a second try. An exception in a cell is not."""
    from nbclient.exceptions import DeadKernelError

    return isinstance(error, DeadKernelError | pool.PoolLost) or "Kernel died" in str(error) or "PoolLost" in str(error)


def execute_notebook(step: plan.Step, nonce: str):
    """Papermill on the step's notebook, to a name that says it is not finished."""
    import papermill

    from lib.run import kernels

    kernels.register()
    path = partial(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # the last attempt did not get through: keep it beside this one
        number = record.next_number(path.parent, f"{step.output.stem}.*.failed.ipynb")
        path.replace(path.with_name(f"{step.output.stem}.{number}.failed.ipynb"))
    options = {"kernel_name": "python3", "engine_name": "study", "progress_bar": False, "start_timeout": 600}
    return papermill.execute_notebook(str(step.notebook), str(path), {**step.parameters, "nonce": nonce}, **options)


def check_success(step: plan.Step, notebook, nonce: str) -> None:
    """The completion rules. Raises StudyError for the first that does not hold."""
    look, done = f"look at {partial(step)}", record.read_json(step.folder / "done.json")
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "code" and "".join(cell.source).strip() and cell.execution_count is None:
            raise StudyError(step.title, f"cell {number} of its notebook never ran", "every code cell executed", look)
    if not done or done.get("nonce") != nonce:
        expected = "done.json written by the notebook's last cell"
        raise StudyError(step.title, "its record has no sentinel of this attempt", expected, look)
    if record.read_json(step.folder / "metrics.json") is None:
        raise StudyError(step.title, "metrics.json is missing or does not parse", "a JSON object")
    for member in config.members(runs.settle(step.run)) if step.kind == "train" else ():
        if reason := members.stale(member, step.folder / "members" / member.id):
            raise StudyError(step.title, f"member {member.id}: {reason}", "every member's record matching this run")


def remove_leftovers(root: Path) -> None:
    """Temporary files of a killed writer, and progress of runs that are no longer running."""
    record.remove_temporary(root)
    for path in root.rglob("progress.json"):
        path.unlink(missing_ok=True)
