"""Targets for the pool's processes that die at a stated place, once, and then behave: what a kill -9 does, made
exact."""

import os
import signal
from pathlib import Path


def _die_once(marker: str) -> None:
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def killed_member(argument: dict) -> None:
    """lib.run.work.train, killed right after step `kill_at` is in its history, or inside the save of a
    checkpoint."""
    from lib import record, training as checkpoints
    from lib.run import work

    marker, kill_at = argument["marker"], argument["kill_at"]
    append, mark = record.append_jsonl, checkpoints.mark_complete

    def append_and_die(path, row):
        append(path, row)
        if row.get("step") == kill_at and "loss" in row:
            _die_once(marker)

    def die_in_save(folder, state):
        if kill_at == "save" and state["step"] == 8:
            _die_once(marker)
        mark(folder, state)

    record.append_jsonl, checkpoints.mark_complete = append_and_die, die_in_save
    work.train(argument)


def stopped_member(argument: dict) -> None:
    """lib.run.work.member, asked to stop (SIGTERM), once, when step `stop_at` is in its history."""
    from lib import record
    from lib.run import work

    append = record.append_jsonl

    def append_and_stop(path, row):
        append(path, row)
        if row.get("step") == argument["stop_at"] and "loss" in row and not Path(argument["marker"]).exists():
            Path(argument["marker"]).touch()
            os.kill(os.getpid(), signal.SIGTERM)

    record.append_jsonl = append_and_stop
    work.member(argument)


def sleep(argument: dict) -> None:
    import time

    Path(argument["started"]).write_text(str(os.getpid()))
    time.sleep(argument["seconds"])


def hold(argument: dict) -> None:
    """Says in the file `said` that it has begun and that it ends; from `go` on it takes a moment, until then for
    ever."""
    import time

    def say(word: str) -> None:
        with open(argument["said"], "a") as file:
            file.write(f"{word} {argument['who']}\n")

    say("begun")
    while not os.path.exists(argument["go"]):
        time.sleep(0.01)
    time.sleep(argument.get("seconds", 0))
    say("ended")


def fail(argument: dict) -> None:
    raise ValueError(argument["message"])


def die(argument: dict) -> None:
    """Always killed: a lost process that a second start does not help."""
    with open(argument["count"], "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def note_environment(argument: dict) -> None:
    """Where members are spawned: the slot's GPU, and the standard library's modules rather than lib's of the same
    name."""
    import statistics

    Path(argument["path"]).write_text(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {statistics.fmean([1, 3])}")


def out_of_memory_member(argument: dict) -> None:
    """lib.run.work.train on a GPU that is too small: the allocator gives up in the backward pass of step 3."""
    from lib.run import work
    from lib.td_dpo import trainer

    no_memory_at(trainer, 3)
    work.train(argument)


def no_memory_at(trainer, step: int) -> None:
    import torch

    objective = trainer.objective

    def full(section, chosen, *rest):
        calls.append(chosen)
        if len(calls) == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return objective(section, chosen, *rest)

    calls = []
    trainer.objective = full


# A sitecustomize.py for the processes of a whole command: every member of seed 2 runs out of memory.
SITECUSTOMIZE = """
import importlib.abc, importlib.util, sys

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "lib.td_dpo.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def patched(module):
            execute(module)
            made = module.PreferenceTrainer.__init__
            def init(self, run, seed, *rest):
                if seed == 2:
                    from tests.faults import no_memory_at
                    no_memory_at(module, 3)
                made(self, run, seed, *rest)
            module.PreferenceTrainer.__init__ = init
        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Hook())
"""


def say(argument: dict) -> None:
    """Write a secret in every way there is."""
    import subprocess
    import sys

    secret = argument["secret"]
    print("one", secret)
    print("\x1b[2Jgone\x07", file=sys.stderr)
    os.write(1, b"two " + secret[:4].encode())
    os.write(1, secret[4:].encode() + b"\n")
    subprocess.run([sys.executable, "-c", f"print('three', {secret!r})"], check=True)
    os.write(2, f"four {secret} the last words".encode())


def say_and_die(argument: dict) -> None:
    say(argument)
    os.kill(os.getpid(), signal.SIGKILL)


def hold_the_lock(argument: dict) -> None:
    """A minute inside C without letting any other thread of this process run."""
    import ctypes

    Path(argument["started"]).write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(3600)  # longer than any test waits for its end
