"""The client's side of the pool (`lib/run/forkserver.py`): start one, give it work, watch the work, lose nothing.

The runner owns one pool for all notebooks (its socket is in STUDY_POOL); a kernel without a runner, as in JupyterLab,
starts its own at the first use and takes it down when the kernel ends.
"""

import atexit
import contextlib
import fcntl
import functools
import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lib import record

FORKSERVER = Path(__file__).with_name("forkserver.py")
PREFIX = "study-pool-"
SOCKET_PATH = 103  # bytes that a Unix socket's path may have: 107 on Linux, 103 on macOS
PROBE = 0.25  # seconds between two looks at what runs
START_SECONDS = 600  # for the server to listen, where disk and memory are slow; one that ends is not waited for


class PoolLost(RuntimeError):
    """The pool's process is gone."""


def gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; [] without a driver, or where a cluster's
    count."""
    if os.environ.get("STUDY_CLUSTER"):
        return []
    with contextlib.suppress(Exception):  # NVML raises its own errors where there is no driver
        import pynvml

        pynvml.nvmlInit()
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        return (
            [d for d in named.split(",") if d]
            if named is not None
            else [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
        )
    return []


@functools.cache
def cores() -> int:
    """The processors that this process may use: of the machine's what its affinity, its container's quota and the
    variable LOKY_MAX_CPU_COUNT leave it."""
    from joblib import cpu_count

    return cpu_count()


def place() -> str:
    """Where pools have their folders: the temporary directory, unless a socket's path would be too long there."""
    here = tempfile.gettempdir()
    return here if len(os.fsencode(here)) <= SOCKET_PATH - len(f"/{PREFIX}xxxxxxxx/kxxxxxxxx-5") else "/tmp"


def own_folder() -> tuple[str, int]:
    """A new folder for a pool's socket, and the descriptor of its lock, held for as long as its server (or a child)
    lives."""
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=place())
        held = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(held, fcntl.LOCK_EX)
        if os.path.exists(folder):  # a sweep may have come between
            return folder, held
        os.close(held)


def sweep() -> None:
    """Remove the folders of pools whose server was killed together with its owner: nobody holds their lock."""
    for lock in Path(place()).glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError), open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


class Pool:
    """A running fork server. It lives as long as this object's pipe to it: a killed owner takes it along."""

    def __init__(self, slots: int | None = None, *, bare: bool = False, keep_secrets: bool = False):
        devices = gpus()
        self.slots = slots or len(devices) or cores()
        sweep()
        self.folder, held = own_folder()
        self.socket = os.path.join(self.folder, "s")
        environment = {k: v for k, v in os.environ.items() if keep_secrets or not record.is_secret(k, v)}
        # One thread each until a member asks for more: N slots with N threads each would fight for the same cores.
        environment |= {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MPLBACKEND": "Agg",
            "PYTHONUNBUFFERED": "1",
            "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES",
        }
        environment.pop("STUDY_POOL", None)
        # Packages make temporary folders as they are imported (wandb, torch), and a kill leaves them: they go with
        # ours.
        environment["TMPDIR"] = os.path.join(self.folder, "tmp")
        os.mkdir(environment["TMPDIR"])
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(FORKSERVER),
                self.socket,
                str(self.slots),
                "--devices",
                ",".join(devices),
                *(["--bare"] if bare else []),
            ],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            pass_fds=[held],
        )
        os.close(held)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(record.secret_variables(os.environ)).encode() + b"\n")
            self.process.stdin.flush()
        deadline = time.monotonic() + START_SECONDS
        while not os.path.exists(self.socket):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise PoolLost("the pool of worker processes did not start")
            time.sleep(0.01)

    def alive(self) -> bool:
        return self.process.poll() is None

    def ask_to_stop(self) -> None:
        """Members save a checkpoint after the step they are in and end; when none is left, the server ends with the
        rest."""
        with contextlib.suppress(OSError):
            self.process.stdin.write(b"stop\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """End the server, which kills its children first; where it does not react, they end by its death (their
        lifeline)."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # it may still be importing
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_own: Pool | None = None


def address() -> str:
    """The pool's socket: the runner's, or one of this process's own."""
    global _own
    if os.environ.get("STUDY_POOL"):
        return os.environ["STUDY_POOL"]
    if _own is None or not _own.alive():
        _own = Pool()
        atexit.register(_own.close)
    return _own.socket


@dataclass
class Task:
    """One piece of work for the pool. `check` says, after exit code 0, whether it really left its result."""

    name: str
    target: str
    argument: dict
    folder: Path
    threads: int = 1
    slots: int = 1  # GPUs (or slots) it takes at a time
    cpu: bool = False  # whether it is shown no GPU, whatever there is
    check: Callable[[], bool] = lambda: True
    state: str = "queued"  # queued, running, succeeded, failed, lost
    seconds: float = 0.0
    attempts: int = 0
    pid: int | None = None
    connection: socket.socket | None = field(default=None, repr=False)
    buffer: bytes = field(default=b"", repr=False)

    @property
    def ended(self) -> bool:
        return self.state in ("succeeded", "failed", "lost")

    @property
    def log(self) -> Path:
        return self.folder / "train.log"


def connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError as error:
        raise PoolLost(f"the pool of worker processes is gone ({error})") from None
    return connection


def start(task: Task) -> None:
    """Queue the task; it runs when a slot is free, for as long as this process keeps the connection."""
    task.connection, task.buffer, task.state = connect(address()), b"", "queued"
    task.attempts += 1
    target, argument = task.target, task.argument
    if os.environ.get("STUDY_CLUSTER"):
        argument = {
            "target": target,
            "argument": argument,
            "folder": str(task.folder),
            "slots": task.slots,
            "threads": task.threads,
        }
        target = "lib.run.cluster:run"
    request = {
        "kind": "member",
        "name": str(task.folder),
        "target": target,
        "argument": argument,
        "log": str(task.log),
        "threads": task.threads,
        "slots": task.slots,
        "cpu": task.cpu,
    }
    task.connection.sendall(json.dumps(request).encode() + b"\n")


def stop(tasks: Iterable[Task]) -> None:
    for task in tasks:
        if task.connection:
            task.connection.close()
            task.connection = None


def drive(
    tasks: list[Task], on_change: Callable[[Task], None] = lambda task: None, on_tick: Callable[[], None] = lambda: None
) -> None:
    """Watch started tasks until all have ended. A lost process is started once more; an exception is not."""
    selector = selectors.DefaultSelector()
    for task in tasks:
        if task.connection and not task.ended:
            selector.register(task.connection, selectors.EVENT_READ, task)
    try:
        while selector.get_map():
            for key, _ in selector.select(PROBE):
                task = key.data
                for event in _events(task):
                    if event["event"] == "started":
                        task.state, task.pid, task.seconds = "running", event["pid"], time.monotonic()
                        on_change(task)
                        continue
                    selector.unregister(task.connection)
                    task.connection.close()
                    task.connection = None
                    _end(task, event["code"])
                    if task.state == "lost" and task.attempts < 2 and event["code"] is not None:
                        start(task)
                        selector.register(task.connection, selectors.EVENT_READ, task)
                    on_change(task)
            on_tick()
    finally:
        selector.close()
        stop(tasks)


def _events(task: Task) -> list[dict]:
    """What the pool said of this task since the last look; the end of the connection counts as a lost process."""
    try:
        data = task.connection.recv(1 << 16)
    except OSError:
        data = b""
    if not data:
        return [{"event": "exit", "code": None}]
    *lines, task.buffer = (task.buffer + data).split(b"\n")
    return [json.loads(line) for line in lines]


def _end(task: Task, code: int | None) -> None:
    if task.state == "running":
        task.seconds = time.monotonic() - task.seconds
    if code == 0:
        task.state = "succeeded" if task.check() else "failed"
    else:
        task.state = "failed" if code is not None and code > 0 else "lost"
