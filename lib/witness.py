"""What a trial really did, written down by its own processes: evidence for `./run_all.sh check`
(lib/commands/check/trial.py).

With STUDY_WITNESS=<folder> in its environment every process of a trial appends to a file of its own: which keys of
which run were read, how many batches each phase took, what was written outside the places that belong to the run, which
addresses were connected to. Without the variable nothing is installed and `batches` is only a generator.

A key counts as read when code asks for it: by attribute on a section, or out of a section's `model_dump()`. What the
configuration layer does (validation, writing out, trial form, checks) asks for all of them and does not count:
`unseen`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

FOLDER = os.environ.get("STUDY_WITNESS", "")
T = TypeVar("T")
_told: set[str] = set()
_owners: dict[
    int, tuple[Any, str, str]
] = {}  # id of a section -> (itself, to keep the id taken; run_id; dotted prefix)
_blind = threading.local()


def tell(kind: str, **facts: Any) -> None:
    """One line in this process's file, once."""
    line = json.dumps({"kind": kind, **facts}, sort_keys=True)
    if line not in _told:
        _told.add(line)
        handle = os.open(os.path.join(FOLDER, f"{os.getpid()}.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(handle, (line + "\n").encode())
        os.close(handle)


def batches(phase: str, items: Iterable[T]) -> Iterator[T]:
    """`items`, counted: a trial may take two at most in each phase that touches data."""
    for number, item in enumerate(items, 1):
        if FOLDER:
            tell("batch", phase=phase, number=number)
        yield item


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """What is read inside does not count."""
    before = getattr(_blind, "on", False)
    _blind.on = True
    try:
        yield
    finally:
        _blind.on = before


def own(run: Any) -> None:
    """Remember to which run and key each section of `run` belongs."""
    if not FOLDER:
        return

    def walk(section: Any, prefix: str) -> None:
        from lib.settings.schema import Section

        for name in type(section).model_fields:
            value = section.__dict__[name]
            if isinstance(value, Section):
                _owners[id(value)] = (value, run.__dict__["run_id"], f"{prefix}{name}.")
                walk(value, f"{prefix}{name}.")

    walk(run, "")


def _read(section: Any, key: str) -> None:
    if not getattr(_blind, "on", False) and id(section) in _owners:
        _, run_id, prefix = _owners[id(section)]
        tell("read", run_id=run_id, key=prefix + key)


class Watched(dict):
    """A section as a dictionary that tells which of its keys are asked for; copies of it tell too."""

    def __init__(self, values: dict, run_id: str, prefix: str):
        super().__init__({k: Watched(v, run_id, f"{prefix}{k}.") if type(v) is dict else v for k, v in values.items()})
        self._who = (run_id, prefix)

    def _tell(self, key: Any) -> None:
        if not getattr(_blind, "on", False):
            tell("read", run_id=self._who[0], key=f"{self._who[1]}{key}")

    def __getitem__(self, key):
        self._tell(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self._tell(key)
        return super().get(key, default)

    def pop(self, key, *default):
        self._tell(key)
        return super().pop(key, *default)

    def copy(self):
        return Watched(self, *self._who)

    def __or__(self, other):
        return Watched({**dict(self.items()), **other}, *self._who)


def install(section_type: type) -> None:
    """Let every section of a run tell what is read, and this process what it opens and connects to."""
    plain_get, plain_dump = section_type.__getattribute__, section_type.model_dump

    def get(self, name):
        value = plain_get(self, name)
        if not name.startswith("_") and name in type(self).model_fields:
            _read(self, name)
        return value

    def dump(self, *arguments, **options):
        values = plain_dump(self, *arguments, **options)
        if id(self) in _owners and not getattr(_blind, "on", False):
            return Watched(values, *_owners[id(self)][1:])
        return values

    section_type.__getattribute__, section_type.model_dump = get, dump
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple) -> None:
    with contextlib.suppress(Exception):  # an observer never breaks what it observes
        if event == "open" and not isinstance(arguments[0], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            _written(os.fspath(arguments[0]))
        elif event in ("os.rename", "os.link", "os.symlink"):
            _written(os.fspath(arguments[1]))
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            tell("connect", address=str(arguments[1][0]))


def _written(path: str) -> None:
    whole = os.path.abspath(path)
    if not whole.startswith(tuple(os.environ.get("STUDY_WITNESS_ALLOWED", "").split(os.pathsep))):
        tell("write", path=whole)


def evidence(folder: Path) -> list[dict]:
    """All that was told, over all processes."""
    rows = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a killed process may leave half a line
                rows.append(json.loads(line))
    return rows
