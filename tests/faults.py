"""Targets for the pool's processes that die at a stated place, once, and then behave: what a kill -9 does, made exact."""

import os
import signal
from pathlib import Path


def _die_once(marker: str) -> None:
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def killed_member(argument: dict) -> None:
    """lib.work.train, killed right after step `kill_at` is in its history, or inside the save of a checkpoint."""
    from lib import checkpoints, record, work

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


def sleep(argument: dict) -> None:
    import time

    Path(argument["started"]).write_text(str(os.getpid()))
    time.sleep(argument["seconds"])


def fail(argument: dict) -> None:
    raise ValueError(argument["message"])


def die(argument: dict) -> None:
    """Always killed: a lost process that a second start does not help."""
    with open(argument["count"], "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def note_environment(argument: dict) -> None:
    """Where members are spawned: the slot's GPU, and the standard library's modules rather than lib's of the same name."""
    import statistics

    Path(argument["path"]).write_text(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {statistics.fmean([1, 3])}")


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
    ctypes.PyDLL(None).sleep(60)
