"""The pool: processes for members and notebook kernels, as many members at a time as there are slots.

The runner owns one pool for all notebooks (its socket is in STUDY_POOL); a kernel without a runner, as in JupyterLab,
starts its own at the first use. The pool's server is a process of its own. It starts children with multiprocessing:
forked from a fork server that has imported the third-party packages (`lib/run/preload.py`) and no study code, or
spawned on macOS and where CUDA is visible, for CUDA survives no fork.

One connection per child: the client sends a request (a dictionary), the server answers ("started", pid) when its slot
is free and ("exit", code) at its end, where a negative code is the signal that killed it; the client may send a signal's
number, which goes to the child's process group. Closing the connection kills the child with its group, so a client that
goes away leaves no orphan. The server ends with its owner, and a child with the server: each holds a pipe whose other
end only the one above it has. What a child writes comes through a pipe to the server, which writes the log: a killed child
loses no line, and no line holds a secret.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path

from lib import record

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "study-pool-"
SOCKET_PATH = 103  # bytes that a Unix socket's path may have: 107 on Linux, 103 on macOS
LONGEST_NAME = "/tmp/pymp-xxxxxxxx/listener-xxxxxxxx"  # of a socket in a pool's folder: the fork server's
PROBE = 0.25  # seconds between two looks at what runs
LOOK_SECONDS = 2.0  # between two looks whether a waiting child's client is still there
START_SECONDS = 600  # for the server to listen, where disk and memory are slow; one that ends is not waited for


class PoolLost(RuntimeError):
    """The pool's process is gone."""


def gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; [] without a driver, or where a cluster's
    count."""
    from lib.run.preflight import visible_gpus

    return [] if os.environ.get("STUDY_CLUSTER") else [gpu.device for gpu in visible_gpus()]


@functools.cache
def cores() -> int:
    """The processors that this process may use: of the machine's what its affinity, its container's quota and the
    variable LOKY_MAX_CPU_COUNT leave it."""
    from joblib import cpu_count

    return cpu_count()


# ---- the owner's side: start a server, and take it down


def socket_root() -> str:
    """Where pools have their folders: the temporary directory, unless a socket's path would be too long there."""
    here = tempfile.gettempdir()
    return here if len(os.fsencode(here)) + len(f"/{PREFIX}xxxxxxxx{LONGEST_NAME}") <= SOCKET_PATH else "/tmp"


def remove_stale_folders() -> None:
    """Remove the folders of pools whose server was killed together with its owner: nobody listens at their socket."""
    for path in Path(socket_root()).glob(f"{PREFIX}*/s"):
        try:
            Client(str(path), "AF_UNIX").close()
        except ConnectionRefusedError:
            shutil.rmtree(path.parent, ignore_errors=True)
        except OSError:  # another user's, or gone meanwhile
            continue


class Pool:
    """A running server. It lives as long as this object's pipe to it: a killed owner takes it along."""

    def __init__(self, slots: int | None = None, *, bare: bool = False, keep_secrets: bool = False, output=None):
        devices = gpus()
        self.slots = slots or len(devices) or cores()
        remove_stale_folders()
        self.folder = tempfile.mkdtemp(prefix=PREFIX, dir=socket_root())
        self.socket = os.path.join(self.folder, "s")
        environment = {k: v for k, v in os.environ.items() if keep_secrets or not record.is_secret(k, v)}
        # One thread each until a member asks for more: N slots with N threads each would fight for the same cores.
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # Packages make temporary folders as they are imported (wandb, torch), and a kill leaves them: they go with ours.
        environment["TMPDIR"] = os.path.join(self.folder, "tmp")
        for name in ("STUDY_POOL", "JPY_PARENT_PID"):  # of a notebook that the runner was started in
            environment.pop(name, None)
        os.mkdir(environment["TMPDIR"])
        command = [sys.executable, "-P", "-c", "from lib.run.pool import serve; serve()"]
        streams = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}  # of it and of its children
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        about = {"path": self.socket, "slots": self.slots, "devices": devices, "bare": bare}
        self.say(json.dumps({**about, "secrets": record.secret_variables(os.environ)}))
        deadline = time.monotonic() + START_SECONDS
        while not os.path.exists(self.socket):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise PoolLost("the pool of worker processes did not start")
            time.sleep(0.01)

    def say(self, line: str) -> None:
        """The first line is what the server is to be. After "stop" members save a checkpoint after the step they are in
        and end; when none is left, the server ends with the rest."""
        with contextlib.suppress(OSError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def alive(self) -> bool:
        return self.process.poll() is None

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
    task.connection.send({**work, **takes, "name": str(task.folder), "log": str(task.log), "cpu": task.cpu})


def stop(tasks: Iterable[Task]) -> None:
    for task in tasks:
        if task.connection:
            task.connection.close()
            task.connection = None


def wait_for(tasks: list[Task], on_change=lambda task: None, on_tick=lambda: None) -> None:
    """Watch started tasks until all have ended. A lost process is started once more; an exception is not.

    on_change(task) is called when a task has begun or ended, on_tick() at every look.
    """
    try:
        while open_now := {task.connection: task for task in tasks if task.connection}:
            for connection in wait(list(open_now), PROBE):
                task, (event, value) = open_now[connection], receive(connection)
                if event == "started":
                    task.state, task.seconds = "running", time.monotonic()
                else:
                    stop([task])
                    if task.state == "running":
                        task.seconds = time.monotonic() - task.seconds
                    lost = value is None or value < 0
                    task.state = "lost" if lost else "failed" if value or not task.check() else "succeeded"
                    if lost and value is not None and task.attempts < 2:
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


# ---- the server


def next_in_turn(queue: list[dict], free: int, total: int, busy: set[str]) -> dict | None:
    """The first request that may start: `free` of `total` slots suffice, and no other child of its name is at work
    (`busy`). What needs several slots waits for them at the head, or single ones would always take them."""
    for request in queue:
        wanted = min(request["slots"], total)
        if wanted <= free and request["name"] not in busy:
            return request
        if wanted > free and wanted > 1:
            return None
    return None


def signal_group(pid: int, number: int) -> None:
    """Signal a child's process group; right after the fork it has none of its own yet."""
    try:
        os.killpg(pid, number)
    except OSError:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


class Server:
    """Slots, numbered; `devices` are the GPUs behind them (slot by slot, round-robin), [] where there are none. A
    thread for each connection takes its child from the queue to its end."""

    def __init__(self, path: str, slots: int, devices: list[str], bare: bool, secrets: dict):
        self.total, self.devices, self.folder, self.secrets = slots, devices, Path(path).parent, secrets
        self.free, self.queue, self.busy = list(range(slots)), [], set()
        self.children: dict = {}  # process: its request
        self.stopping, self.changed = False, threading.Condition()
        self.starting = threading.Lock()  # multiprocessing's bookkeeping of children is not made for several threads
        record.KNOWN.update(secrets)
        # Accelerated libraries of macOS may hang or die after a fork.
        self.context = multiprocessing.get_context("spawn" if devices or sys.platform == "darwin" else "forkserver")
        if self.context.get_start_method() == "forkserver":
            self.context.set_forkserver_preload([] if bare else ["lib.run.preload"])
            forkserver.ensure_running()  # it imports while notebooks are still read
        unready = str(self.folder / "n")
        self.listener = Listener(unready, "AF_UNIX", backlog=128)
        os.rename(unready, path)  # clients wait for this name: a bound socket that does not listen yet refuses them

    def serve(self) -> None:
        """Until the owner is gone, however it went: then its end of our standard input closes."""
        threading.Thread(target=self.accept, daemon=True).start()
        for _ in sys.stdin.buffer:  # it wants us to stop
            with self.changed:
                self.stopping = True
                for process in self.members():
                    with contextlib.suppress(OSError):
                        os.kill(process.pid, signal.SIGTERM)
            self.end_when_idle()
        self.end()

    def accept(self) -> None:
        """Requests come into the queue one after the other, in the order in which clients connected."""
        while True:
            connection = self.listener.accept()
            with contextlib.suppress(EOFError, OSError):
                request = connection.recv()
                if "name" in request:
                    with self.changed:
                        self.queue.append(request)
                threading.Thread(target=self.handle, args=(connection, request), daemon=True).start()

    def members(self) -> list:
        return [process for process, request in self.children.items() if "name" in request]

    def end_when_idle(self) -> None:
        if self.stopping and not self.members():
            self.end()

    def end(self) -> None:
        """Children and the socket's folder go too, then the fork server with us."""
        for process in list(self.children):
            signal_group(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 2
        while self.children and time.monotonic() < deadline:  # their threads write the logs to their end
            time.sleep(0.02)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    def handle(self, connection: Connection, request: dict) -> None:
        """One connection, from its request to its child's end. A client that goes away takes its child along."""
        with connection, contextlib.suppress(EOFError, OSError):
            taken = []
            if "name" in request and (taken := self.take_slots(request, connection)) is None:
                return
            if taken and (self.devices or request["cpu"]):
                given = () if request["cpu"] else [self.devices[slot % len(self.devices)] for slot in taken]
                request["env"] = {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(given))}
            try:
                code = self.run(request, connection)
            finally:
                with self.changed:
                    self.free = sorted([*self.free, *taken])
                    self.busy.discard(request.get("name"))
                    self.changed.notify_all()
            connection.send(("exit", code))
        self.end_when_idle()

    def take_slots(self, request: dict, connection: Connection) -> list[int] | None:
        """Wait for its turn; None where the client has gone meanwhile."""
        with self.changed:
            while not connection.poll() and (
                self.stopping or next_in_turn(self.queue, len(self.free), self.total, self.busy) is not request
            ):
                self.changed.wait(LOOK_SECONDS)
            self.queue.remove(request)
            self.changed.notify_all()
            if connection.poll():
                return None
            wanted = min(request["slots"], self.total)
            taken, self.free = self.free[:wanted], self.free[wanted:]
            self.busy.add(request["name"])
            return taken

    def run(self, request: dict, connection: Connection) -> int:
        """The child's exit code; what it writes goes into its log meanwhile, and signals come from the client."""
        output, out = multiprocessing.Pipe(duplex=False)
        process = self.context.Process(target=run_child, args=(request, self.secrets, out))  # pyright: ignore[reportAttributeAccessIssue]
        with self.starting:
            process.start()
        out.close()
        with self.changed:
            self.children[process] = request
            if self.stopping and "name" in request:
                os.kill(process.pid, signal.SIGTERM)
        with contextlib.suppress(OSError):
            connection.send(("started", process.pid))
        log, watched = record.Log(request["log"]), [process.sentinel, connection, output]

        def copy_output() -> None:
            data = os.read(output.fileno(), 1 << 16)
            log.feed(data)
            if not data:
                watched.remove(output)

        while process.sentinel in watched:
            for ready in wait(watched):
                if ready is output:
                    copy_output()
                elif ready is connection:
                    try:
                        signal_group(process.pid, connection.recv())
                    except (EOFError, OSError):
                        watched.remove(connection)
                        signal_group(process.pid, signal.SIGKILL)
                else:
                    watched.remove(process.sentinel)
        with self.starting:
            process.join()
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # what the child itself started ends with it
        while output in watched and output.poll():  # to its end, without waiting for whoever else has the pipe
            copy_output()
        log.close()
        with self.changed:
            del self.children[process]
        # 255 is multiprocessing's code of a child that went with its fork server
        return -signal.SIGKILL if process.exitcode == 255 else process.exitcode


def serve() -> None:
    """The server's process: its owner's first line says what it is to be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle; it closes our standard input
    Server(**json.loads(sys.stdin.buffer.readline())).serve()


# ---- in a child


def run_child(request: dict, secrets: dict, out: Connection) -> None:
    """Take its place (process group, log, environment, threads) and call its target."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (1, 2):
        os.dup2(out.fileno(), stream)
    out.close()
    end_with_parent()
    # multiprocessing hands each child an end of the pipe that keeps the fork server alive: it would outlive the server.
    with contextlib.suppress(AttributeError, TypeError, OSError):
        os.close(forkserver._forkserver._forkserver_alive_fd)  # pyright: ignore[reportAttributeAccessIssue]
    record.KNOWN.update(secrets)
    os.environ.update(request.get("env", {}))
    if threads := request.get("threads"):
        # a spawned child is yet to import torch, which reads these
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(int(threads))
    pkgutil.resolve_name(request["target"])(request["argument"])


def launch_kernel(argument: dict) -> None:
    """Become an IPython kernel."""
    from ipykernel.kernelapp import IPKernelApp

    os.chdir(argument["cwd"])
    sys.argv = ["ipykernel_launcher", "-f", argument["connection_file"]]
    if transformers := sys.modules.get("transformers"):  # how it loads is for a member's log, not for a page
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    IPKernelApp.launch_instance()


def end_with_parent() -> None:
    """End this process with its group when its parent is gone, however it went: a child's is the pool's server, to which
    it has a pipe; no pipe tells of a Ray worker or of torchrun."""
    server, parent = multiprocessing.parent_process(), os.getppid()
    # The kernel sees to it as well: our thread cannot run while a long call into C holds the interpreter's lock.
    if server and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def end() -> None:
        if server:
            server.join()
        while not server and os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()
