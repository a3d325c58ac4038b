"""A trial observed from inside its own processes, for `./run_all.sh check`: how many batches each phase takes, what is
written outside the places that belong to the run, which addresses are connected to.

`environment` makes every Python process of the trial call `install` as it starts, so that nothing of this stands in the
code that trains.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from lib import config, record

_seen: set[tuple] = set()


def environment(folder: Path, allowed: list[str]) -> dict[str, str]:
    """What a command's environment needs so that its processes write what they do into `folder`."""
    Path(folder, "sitecustomize.py").write_text("from lib.run import watch\n\nwatch.install()\n")
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), str(config.ROOT)]),
        "STUDY_WATCH": str(folder),
        "STUDY_WATCH_ALLOWED": os.pathsep.join(allowed),
    }


def evidence(folder: Path) -> dict[str, list[tuple]]:
    """What all processes did, each once: {batch: (phase, number), write: (path,), connect: (address,)}."""
    seen: dict[str, set[tuple]] = {kind: set() for kind in ("batch", "write", "connect")}
    for path in folder.glob("*.jsonl"):
        for kind, *facts in record.read_jsonl(path):
            seen[kind].add(tuple(facts))
    return {kind: sorted(facts) for kind, facts in seen.items()}


def install() -> None:
    """Observe this process."""
    record.count = lambda phase, number: _write("batch", phase, number)
    sys.addaudithook(_audit)


def _write(*facts: str | int) -> None:
    """One line in this process's file, once."""
    if facts not in _seen:
        _seen.add(facts)
        with open(Path(os.environ["STUDY_WATCH"], f"{os.getpid()}.jsonl"), "a") as file:
            file.write(json.dumps(facts) + "\n")


def _audit(event: str, arguments: tuple) -> None:
    with contextlib.suppress(Exception):  # an observer never breaks what it observes
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            _write("connect", str(arguments[1][0]))
        is_open = event == "open" and not isinstance(arguments[0], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_open or event in ("os.rename", "os.link", "os.symlink"):
            path = os.path.abspath(os.fspath(arguments[0 if is_open else 1]))
            if not path.startswith(tuple(os.environ["STUDY_WATCH_ALLOWED"].split(os.pathsep))):
                _write("write", path)
