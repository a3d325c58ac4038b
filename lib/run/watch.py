"""A trial watched from inside its own processes, for `./run_all.sh check`: which keys of which run are read, how many
batches each phase takes, what is written outside the places that belong to the run, which addresses are connected to.

`environment` makes every Python process of the trial call `install` as it starts, so that nothing of this stands in the
code that trains. A key counts as read when code asks for it: by attribute on a section, or out of a section's
`model_dump()`. What lib/config.py and the checks do (validation, writing out, trial form) asks for all of them and does
not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from lib import config, record

UNSEEN = {config.__file__, str(Path(__file__).with_name("check.py"))}
_seen: set[tuple] = set()
_owners: dict[int, tuple[Any, str, str]] = {}  # id of a section -> (itself, to keep the id; run_id; dotted prefix)


def environment(folder: Path, allowed: list[str]) -> dict[str, str]:
    """What a command's environment needs so that its processes write what they do into `folder`."""
    Path(folder, "sitecustomize.py").write_text("from lib.run import watch\n\nwatch.install()\n")
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), str(config.ROOT)]),
        "STUDY_WATCH": str(folder),
        "STUDY_WATCH_ALLOWED": os.pathsep.join(allowed),
    }


def evidence(folder: Path) -> dict[str, list[tuple]]:
    """What all processes did, each once: {read: (run_id, key), batch: (phase, number), write: (path,), connect:
    (address,)}."""
    seen: dict[str, set[tuple]] = {kind: set() for kind in ("read", "batch", "write", "connect")}
    for path in folder.glob("*.jsonl"):
        for kind, *facts in record.read_jsonl(path):
            seen[kind].add(tuple(facts))
    return {kind: sorted(facts) for kind, facts in seen.items()}


def install() -> None:
    """Watch this process."""
    plain_get, plain_dump, build = config.Section.__getattribute__, config.Section.model_dump, config.build

    def get(self, name):
        value = plain_get(self, name)
        if id(self) in _owners and name in type(self).model_fields:
            _read(*_owners[id(self)][1:], name)
        return value

    def dump(self, *arguments, **options):
        values = plain_dump(self, *arguments, **options)
        return Watched(values, *_owners[id(self)][1:]) if id(self) in _owners and not _asked_by_config() else values

    def built(*arguments, **options):
        run = build(*arguments, **options)
        _own(run, run.run_id, "")
        return run

    config.Section.__getattribute__, config.Section.model_dump, config.build = get, dump, built
    record.count = lambda phase, number: _write("batch", phase, number)
    sys.addaudithook(_audit)


def _own(section: Any, run_id: str, prefix: str) -> None:
    """Remember to which run and key each section belongs."""
    for name in type(section).model_fields:
        value = section.__dict__[name]
        if isinstance(value, config.Section):
            _owners[id(value)] = (value, run_id, f"{prefix}{name}.")
            _own(value, run_id, f"{prefix}{name}.")


def _write(*facts: str | int) -> None:
    """One line in this process's file, once."""
    if facts not in _seen:
        _seen.add(facts)
        handle = os.open(
            Path(os.environ["STUDY_WATCH"], f"{os.getpid()}.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT
        )
        os.write(handle, (json.dumps(facts) + "\n").encode())
        os.close(handle)


def _read(run_id: str, prefix: str, key: str) -> None:
    if not _asked_by_config():
        _write("read", run_id, prefix + key)


def _asked_by_config() -> bool:
    """Whether the configuration layer asks."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename not in UNSEEN:
        frame = frame.f_back
    return frame is not None


class Watched(dict):
    """A section as a dictionary that notes which of its keys are asked for."""

    def __init__(self, values: dict, run_id: str, prefix: str):
        super().__init__({k: Watched(v, run_id, f"{prefix}{k}.") if type(v) is dict else v for k, v in values.items()})
        self._who = (run_id, prefix)

    def __getitem__(self, key):
        _read(*self._who, key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        _read(*self._who, key)
        return super().get(key, default)

    def __or__(self, other):
        return Watched({**dict(self.items()), **other}, *self._who)


def _audit(event: str, arguments: tuple) -> None:
    with contextlib.suppress(Exception):  # an observer never breaks what it observes
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            _write("connect", str(arguments[1][0]))
        is_open = event == "open" and not isinstance(arguments[0], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_open or event in ("os.rename", "os.link", "os.symlink"):
            path = os.path.abspath(os.fspath(arguments[0 if is_open else 1]))
            if not path.startswith(tuple(os.environ["STUDY_WATCH_ALLOWED"].split(os.pathsep))):
                _write("write", path)
