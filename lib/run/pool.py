"""The pool: processes for members and notebook kernels, as many members at a time as there are slots.

The runner owns one pool for all notebooks (its socket is in STUDY_POOL); a kernel without a runner, as in JupyterLab,
starts its own at the first use. The pool's server is a process of its own. It starts children with multiprocessing:
forked from a fork server that has imported the third-party packages (`lib/run/preload.py`) and no study code, or
spawned where CUDA is visible, for CUDA survives no fork.

One connection per child: the client sends a request (a dictionary), the server answers ("started", pid) when its slot
is free and ("exit", code) at its end, where a negative code is the signal that killed it; the client may send a signal's
number, which goes to the child's process group. Closing the connection kills the child with its group, so a client that
goes away leaves no orphan. The server ends with its owner, and a child with the server: each holds a pipe whose other
end only the server has. What a child writes comes through a pipe to the server, which writes the log: a killed child
loses no line, and no line holds a secret.
"""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import importlib
import json
import multiprocessing
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any

from lib import record

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "study-pool-"
SOCKET_PATH = 103  # bytes that a Unix socket's path may have: 107 on Linux, 103 on macOS
LONGEST_NAME = "/tmp/pymp-xxxxxxxx/listener-xxxxxxxx"  # of a socket in a pool's folder: the fork server's
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
        every = [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return every if named is None else [device for device in named.split(",") if device]
    return []


@functools.cache
def cores() -> int:
    """The processors that this process may use: of the machine's what its affinity, its container's quota and the
    variable LOKY_MAX_CPU_COUNT leave it."""
    from joblib import cpu_count

    return cpu_count()


# ---- the owner's side: start a server, and take it down


def place() -> str:
    """Where pools have their folders: the temporary directory, unless a socket's path would be too long there."""
    here = tempfile.gettempdir()
    return here if len(os.fsencode(here)) + len(f"/{PREFIX}xxxxxxxx{LONGEST_NAME}") <= SOCKET_PATH else "/tmp"


def new_folder() -> tuple[str, int]:
    """A new folder for a pool's socket, and the descriptor of its lock, held for as long as its server lives."""
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
    """A running server. It lives as long as this object's pipe to it: a killed owner takes it along."""

    def __init__(self, slots: int | None = None, *, bare: bool = False, keep_secrets: bool = False):
        devices = gpus()
        self.slots = slots or len(devices) or cores()
        sweep()
        self.folder, held = new_folder()
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
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            # Packages make temporary folders as they are imported (wandb, torch), and a kill leaves them: they go with
            # ours.
            "TMPDIR": os.path.join(self.folder, "tmp"),
        }
        environment.pop("STUDY_POOL", None)
        os.mkdir(environment["TMPDIR"])
        secrets = record.secret_variables(os.environ)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from lib.run.pool import serve; serve()"],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            pass_fds=[held],
        )
        os.close(held)
        request = {"path": self.socket, "slots": self.slots, "devices": devices, "bare": bare, "secrets": secrets}
        self._say(json.dumps(request))
        deadline = time.monotonic() + START_SECONDS
        while not os.path.exists(self.socket):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise PoolLost("the pool of worker processes did not start")
            time.sleep(0.01)

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def alive(self) -> bool:
        return self.process.poll() is None

    def ask_to_stop(self) -> None:
        """Members save a checkpoint after the step they are in and end; when none is left, the server ends with the
        rest."""
        self._say("stop")

    def close(self) -> None:
        """End the server, which kills its children first; where it does not react, they end by its death."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
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


# ---- the client's side: give it work, and watch the work


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
    connection: Connection | None = field(default=None, repr=False)

    @property
    def ended(self) -> bool:
        return self.state in ("succeeded", "failed", "lost")

    @property
    def log(self) -> Path:
        return self.folder / "train.log"


def connect(path: str) -> Connection:
    try:
        return Client(path, "AF_UNIX")
    except OSError as error:
        raise PoolLost(f"the pool of worker processes is gone ({error})") from None


def start(task: Task) -> None:
    """Queue the task; it runs when a slot is free, for as long as this process keeps the connection."""
    task.connection, task.state = connect(address()), "queued"
    task.attempts += 1
    takes = {"slots": task.slots, "threads": task.threads}
    work = {"target": task.target, "argument": task.argument}
    if os.environ.get("STUDY_CLUSTER"):  # a node does it; the slot's process hands it over
        work = {"target": "lib.run.cluster:run", "argument": {**work, **takes, "folder": str(task.folder)}}
    names = {"name": str(task.folder), "log": str(task.log)}
    task.connection.send({**work, **takes, **names, "kind": "member", "cpu": task.cpu})


def stop(tasks: Iterable[Task]) -> None:
    for task in tasks:
        if task.connection:
            task.connection.close()
            task.connection = None


def drive(
    tasks: list[Task], on_change: Callable[[Task], None] = lambda task: None, on_tick: Callable[[], None] = lambda: None
) -> None:
    """Watch started tasks until all have ended. A lost process is started once more; an exception is not."""
    try:
        while open_now := {task.connection: task for task in tasks if task.connection}:
            for connection in wait(list(open_now), PROBE):
                task, (event, value) = open_now[connection], receive(connection)
                if event == "started":
                    task.state, task.pid, task.seconds = "running", value, time.monotonic()
                else:
                    stop([task])
                    _end(task, value)
                    if task.state == "lost" and task.attempts < 2 and value is not None:
                        start(task)
                on_change(task)
            on_tick()
    finally:
        stop(tasks)


def receive(connection: Connection) -> tuple[str, int | None]:
    """What the server says of a child; where it is gone, that the child has ended, and nobody knows how."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return "exit", None


def _end(task: Task, code: int | None) -> None:
    if task.state == "running":
        task.seconds = time.monotonic() - task.seconds
    if code == 0 and task.check():
        task.state = "succeeded"
    else:
        task.state = "lost" if code is None or code < 0 else "failed"


# ---- the server


class Slots:
    """Whose turn it is among those that wait, and which GPUs it is then shown. `total` slots, numbered; `devices` are
    the GPUs behind them (slot by slot, in turns), [] where there is none."""

    def __init__(self, total: int, devices: list[str]):
        self.total, self.devices, self.free = total, devices, list(range(total))

    def turns(self, waiting: Collection, busy: set) -> Iterator:
        """Those of `waiting` (Child) that may start now, each with its slots taken. `busy`: names at work."""
        for child in list(waiting):
            if child.takes_slot:
                wanted, name = min(child.request.get("slots", 1), self.total), child.request.get("name")
                short = len(self.free) < wanted
                if short and wanted > 1:
                    return  # what needs several slots waits for them at the head, or single ones would always take them
                if short or name in busy:
                    continue
                child.slots, self.free = self.free[:wanted], self.free[wanted:]
                busy.add(name)
            yield child

    def give_back(self, slots: list[int]) -> None:
        self.free = sorted([*self.free, *slots])

    def environment(self, child) -> dict[str, str]:
        """What a child on its slots is to see of the GPUs; nothing is said where there are none, or of who takes no
        slot."""
        if not self.devices or not child.slots:
            return {}
        given = dict.fromkeys(self.devices[slot % len(self.devices)] for slot in child.slots)
        return {"CUDA_VISIBLE_DEVICES": "" if child.request.get("cpu") else ",".join(given)}


class Child:
    """One connection and, once started, its process."""

    process: Any  # of multiprocessing

    def __init__(self, connection: Connection):
        self.connection, self.request, self.process, self.slots = connection, {}, None, []
        self.log: record.Log | None = None
        self.output: Connection | None = None  # the end of its stdout and stderr that the server reads

    @property
    def takes_slot(self) -> bool:
        return self.request.get("kind") == "member"

    def kill(self, number: int = signal.SIGKILL, *, ended: bool = False) -> None:
        """Signal its process group. Right after the fork it has none of its own yet; when it has ended, the group is
        what it itself had started."""
        try:
            os.killpg(self.process.pid, number)
        except OSError:
            with contextlib.suppress(OSError):
                if not ended:
                    os.kill(self.process.pid, number)


class Server:
    def __init__(self, path: str, slots: int, devices: list[str], bare: bool, secrets: dict):
        self.slots, self.folder, self.secrets = Slots(slots, devices), Path(path).parent, secrets
        self.stopping = self.owner_gone = False
        record.KNOWN.update(secrets)
        self.context = multiprocessing.get_context("spawn" if devices else "forkserver")
        self.context.set_forkserver_preload([] if bare else ["lib.run.preload"])
        if not devices:
            forkserver.ensure_running()  # it imports while notebooks are still read
        self.children, self.queue = [], []
        self.lifeline, self.lifeline_end = multiprocessing.Pipe(duplex=False)
        self.woken, self.wake = multiprocessing.Pipe(duplex=False)
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        unready = str(Path(path).with_name("n"))
        self.listener.bind(unready)
        self.listener.listen(128)
        os.rename(unready, path)  # clients wait for this name: a bound socket that does not listen yet refuses them
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.selector.register(self.woken, selectors.EVENT_READ, self.woken.recv)
        threading.Thread(target=self.watch_owner, daemon=True).start()

    def watch_owner(self) -> None:
        """The owner says that it wants us to stop; the end of its pipe that it is gone, however it went. In a thread,
        because the first child is there only when the fork server has imported all, which takes seconds."""
        for _ in sys.stdin.buffer:
            self.stopping, self.slots.free = True, []
            for child in list(self.children):
                if child.takes_slot:
                    with contextlib.suppress(OSError):
                        os.kill(child.process.pid, signal.SIGTERM)
            self.wake.send(None)
        self.owner_gone = True
        self.wake.send(None)
        time.sleep(2 if self.children else 0)  # for the other thread to write the logs to their end
        self.end()

    def end(self) -> None:
        """Children and the socket's folder go too, then the fork server with us."""
        for child in list(self.children):
            child.kill()
            self.copy_output(child, last=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    def serve(self) -> None:
        while not self.owner_gone and not (self.stopping and not any(child.takes_slot for child in self.children)):
            for child in self.slots.turns(self.queue, {c.request.get("name") for c in self.children}):
                self.queue.remove(child)
                self.start(child)
            for key, _ in self.selector.select():
                key.data()
        self.end()

    def accept(self) -> None:
        child = Child(Connection(self.listener.accept()[0].detach()))
        self.selector.register(child.connection, selectors.EVENT_READ, lambda: self.receive(child))

    def receive(self, child: Child) -> None:
        try:
            message = child.connection.recv()
        except (EOFError, OSError):  # the client went away: its child goes too
            self.selector.unregister(child.connection)
            child.connection.close()
            if child in self.queue:
                self.queue.remove(child)
            if child in self.children:
                child.kill()
            return
        if isinstance(message, dict):
            child.request = message
            self.queue.append(child)
        elif child in self.children:
            child.kill(message)

    def start(self, child: Child) -> None:
        request, out = child.request, None
        request["env"] = request.get("env", {}) | self.slots.environment(child)
        if request.get("log"):
            child.log = record.Log(request["log"])
            child.output, out = multiprocessing.Pipe(duplex=False)
            os.set_blocking(child.output.fileno(), False)
            self.selector.register(child.output, selectors.EVENT_READ, lambda: self.copy_output(child))
        child.process = self.context.Process(target=run_child, args=(request, self.secrets, self.lifeline, out))  # pyright: ignore[reportAttributeAccessIssue]
        child.process.start()
        if out:
            out.close()
        self.children.append(child)
        self.selector.register(child.process.sentinel, selectors.EVENT_READ, lambda: self.reap(child))
        self.send(child, "started", child.process.pid)

    def copy_output(self, child: Child, *, last: bool = False) -> None:
        """What a child has written so far into its log. At its end (`last`) without waiting for whoever else has the
        pipe."""
        while child.output is not None:
            try:
                data = os.read(child.output.fileno(), 1 << 16)
            except BlockingIOError:
                if not last:
                    return
                data = b""
            if data:
                child.log.feed(data)
            else:
                self.selector.unregister(child.output)
                child.output.close()
                child.output = None
                child.log.close()
            if not last:  # the others' turn
                return

    def reap(self, child: Child) -> None:
        self.selector.unregister(child.process.sentinel)
        child.process.join()
        child.kill(ended=True)  # what the child itself started ends with it
        self.children.remove(child)
        if not self.stopping:
            self.slots.give_back(child.slots)
        self.copy_output(child, last=True)
        code = child.process.exitcode
        self.send(child, "exit", -signal.SIGKILL if code == LOST else code)

    def send(self, child: Child, *message) -> None:
        with contextlib.suppress(OSError):
            child.connection.send(message)


LOST = 255  # multiprocessing's code of a child that went with its fork server


def serve() -> None:
    """The server's process: its owner's first line says what it is to be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle; it closes our standard input
    server = Server(**json.loads(sys.stdin.buffer.readline()))
    if sys.platform == "darwin" and not server.slots.devices and not fork_works(server.context):
        server.context = multiprocessing.get_context("spawn")
    server.serve()


def fork_works(context) -> bool:
    """One forked matrix product, within 20 s: some accelerated libraries (macOS) hang or die after a fork."""
    child = context.Process(target=_matrix_product, daemon=True)
    child.start()
    child.join(20)
    child.kill()
    return child.exitcode == 0


def _matrix_product() -> None:
    import torch

    torch.ones(256, 256) @ torch.ones(256, 256)


# ---- in a child


def run_child(request: dict, secrets: dict, lifeline: Connection, out: Connection | None) -> None:
    """Take its place (process group, log, environment, threads) and call its target."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null if out is None else out.fileno(), stream)
    if out is not None:
        out.close()
    die_with(lifeline)
    # multiprocessing hands each child an end of the pipe that keeps the fork server alive: it would outlive the server.
    with contextlib.suppress(AttributeError, TypeError, OSError):
        os.close(forkserver._forkserver._forkserver_alive_fd)  # pyright: ignore[reportAttributeAccessIssue]
    record.KNOWN.update(secrets)
    os.environ.update(request["env"])
    for name in request.get("unset", ()):
        os.environ.pop(name, None)
    if request.get("cwd"):
        os.chdir(request["cwd"])
    if request.get("threads") and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(request["threads"]))
    module, function = request["target"].split(":")
    getattr(importlib.import_module(module), function)(request["argument"])


def launch_kernel(argument: dict) -> None:
    """Become an IPython kernel."""
    from ipykernel.kernelapp import IPKernelApp

    sys.argv = ["ipykernel_launcher", "-f", argument["connection_file"]]
    if transformers := sys.modules.get("transformers"):  # how it loads is for a member's log, not for a page
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    IPKernelApp.launch_instance()


def die_with(lifeline: Connection) -> None:
    """End this process when the pipe's other end closes, that is when the server is gone, however it went.

    On Linux the kernel sees to it as well: our thread cannot run while a long call into C holds the interpreter's lock.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        wait([lifeline])
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent() -> None:
    """End this process and its group when its parent is gone, which no pipe tells: a Ray worker, or torchrun."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
