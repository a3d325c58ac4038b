"""Puts faults into every process of a study: Python imports this at start where the folder is on PYTHONPATH.

CHAOS_SPEC names a JSON file: {"home", "record", "faults": [{"id", "event", "path", "role", "n", "do"}], "clocks",
"patience"}. Every opening for writing, renaming, chmod, mkdir and removal below `home` is an event; the n-th of its
kind in its process is where a fault strikes, once. `record` (a path) has every event written down, for a schedule to
choose from.

do: kill (this process) | kill:server | kill:runner | kill:kernel | errno:<n> (this call fails; its message ends with
CHAOS_WORDS) | errno:<n>:stay (from here on every write of every process fails) | tell (create <id>.fired and wait for
<id>.go, `patience` seconds at most: a test that is gone must not leave it here forever)
"""

import json
import os
import re
import signal
import sys
import threading
import time

TEMPORARY = re.compile(r"/\.([^/]+)\.[A-Za-z0-9_]+\.tmp$")
EVENTS = ("open", "os.rename", "os.chmod", "os.mkdir", "os.remove")
born, within, counts = os.getpid(), threading.local(), {}


def role() -> str:
    if os.getpid() == born:
        words = sys.orig_argv
        return "server" if any("lib.run.pool" in w for w in words) else "runner" if "lib" in words else "other"
    return "kernel" if sys.argv[:1] == ["ipykernel_launcher"] else "member"


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def target(word: str) -> int:
    """The process that `kill:<word>` means, from where we are: member and kernel are children of the pool's fork
    server, which is one of the pool's server."""
    me = os.getpid()
    if word == "kernel":
        with open(spec["home"] + "/kernel.pid") as file:
            return int(file.read())
    server = me if role() == "server" else parent(os.getppid())
    return server if word == "server" else (me if role() == "runner" else parent(server))


def strike(fault: dict) -> None:
    what, _, detail = fault["do"].partition(":")
    marker = os.path.join(spec["home"], fault["id"] + ".fired")
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if what == "kill":
        os.kill(target(detail) if detail else os.getpid(), signal.SIGKILL)
        while detail and detail != "kernel":  # die with it, as this process would: it must not get further
            time.sleep(0.01)
    elif what == "tell":
        deadline = time.monotonic() + spec["patience"]
        while not os.path.exists(marker[:-5] + "go") and time.monotonic() < deadline:
            time.sleep(0.01)
    elif what == "errno":
        number = int(detail.partition(":")[0])
        raise OSError(number, os.strerror(number) + os.environ.get("CHAOS_WORDS", ""))


def place(event: str, args: tuple) -> str | None:
    """The path that an event is about, below home, with random names taken out; None where it is no event of ours."""
    path = args[1] if event == "os.rename" else args[0]
    if event == "open":
        mode, flags = args[1], args[2]
        if not (any(c in mode for c in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)):
            return None
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    path = os.path.abspath(os.fsdecode(path))
    if not path.startswith((spec["home"] + "/outputs", spec["home"] + "/cache")):
        return None
    return TEMPORARY.sub(r"/\1~tmp", path.removeprefix(spec["home"] + "/"))


def hook(event: str, args: tuple) -> None:
    if event not in EVENTS or getattr(within, "hook", False):  # its own writing; another thread's is an event
        return
    within.hook = True
    try:
        path = place(event, args)
        if path is None:
            return
        if role() == "kernel" and ("kernel", os.getpid()) not in counts:
            counts["kernel", os.getpid()] = 1
            with open(spec["home"] + "/kernel.pid", "w") as file:
                file.write(str(os.getpid()))
        key = (os.getpid(), event, path)
        n = counts[key] = counts.get(key, 0) + 1
        if spec.get("record"):
            line = json.dumps({"role": role(), "event": event, "path": path, "n": n}) + "\n"
            handle = os.open(spec["record"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, line.encode())
            os.close(handle)
        for fault in spec["faults"]:
            if (fault["event"], fault["path"], fault["role"], fault["n"]) == (event, path, role(), n):
                strike(fault)
            staying = fault["do"].endswith(":stay") and event != "os.remove"
            if staying and os.path.exists(os.path.join(spec["home"], fault["id"] + ".fired")):
                number = int(fault["do"].split(":")[1])
                raise OSError(number, os.strerror(number), path)
    finally:
        within.hook = False


def stop_clocks(how: str) -> None:
    """standing: no clock that measures moves (but the one that time-outs need); back, forward: the wall clock jumps."""
    real, start = time.time, time.time()
    if how == "standing":
        time.time, time.perf_counter = lambda: start, lambda: 5.0
    else:
        jump = -86400.0 if how == "back" else 366 * 86400.0
        time.time = lambda: real() + (jump if real() - start > 4 else 0.0)


if os.environ.get("CHAOS_SPEC"):
    with open(os.environ["CHAOS_SPEC"]) as _file:
        spec = json.load(_file)
    if spec.get("clocks"):
        stop_clocks(spec["clocks"])
    sys.addaudithook(hook)
