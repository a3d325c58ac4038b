"""The pool: a process that has imported the third-party packages, never `lib`, and forks one process per member.

Importing torch, transformers and trl costs 10 s; a record of fifty members must not pay it fifty times. Run as a script:

    python lib/forkserver.py SOCKET SLOTS [--devices 0,1] [--bare]

Protocol, over a Unix socket, one JSON object per line, one connection per child:
    -> {"kind": "member" | "kernel", "target": "lib.members:work", "argument": {...}, "log": path, "env": {...},
        "name": same names never run at the same time, "threads": n, "slots": GPUs or slots that it takes}
    <- {"event": "started", "pid": p}     when its slot is free (a kernel takes no slot)
    -> {"signal": n}                      sent on to the child's process group
    <- {"event": "exit", "code": c}       negative: killed by that signal
Closing the connection kills the child with its process group, so a client that goes away leaves no orphan. The server
ends with its standard input, and a child with the server (each holds a pipe whose other end only the server has).
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = (
    "numpy",
    "pandas",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "optuna",
    "ipykernel.kernelapp",
    "matplotlib.pyplot",
    "seaborn",
    "scipy.stats",
    "sklearn.linear_model",
    "pydantic",
    "yaml",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.dpo_trainer",
    "IPython.display",
    "nbformat",
)


def preload() -> None:
    """Import what members and kernels need. One thread only: a fork copies no other thread, but keeps its locks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names optional kernels that are not installed
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def run_child(request: dict) -> None:
    """In the child: take its place (log, environment, threads) and call its target."""
    os.environ.update(request.get("env", {}))
    for name in request.get("unset", ()):
        os.environ.pop(name, None)
    if request.get("cwd"):
        os.chdir(request["cwd"])
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if request.get("threads") and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(request["threads"]))
    module, function = request["target"].split(":")
    getattr(importlib.import_module(module), function)(request["argument"])


def redirect(log: str | None) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if log:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    else:
        out = null
    os.dup2(out, 1)
    os.dup2(out, 2)


def die_with(lifeline: int) -> None:
    """End this process when the pipe's other end closes, that is when the server is gone, however it went."""

    def wait():
        os.read(lifeline, 1)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def guarded(request: dict) -> int:
    try:
        run_child(request)
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()


class Child:
    """One connection and, once started, its process."""

    def __init__(self, connection: socket.socket):
        self.connection, self.buffer, self.request, self.pid, self.slots = connection, b"", None, None, []

    @property
    def takes_slot(self) -> bool:
        return self.request["kind"] == "member"


class Server:
    def __init__(self, path: str, slots: int, devices: list[str]):
        self.slots, self.devices, self.spawn = list(range(slots)), devices, bool(devices)
        self.total = slots
        self.children: dict[int, Child] = {}
        self.queue: list[Child] = []
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen(128)
        self.lifeline_read, self.lifeline_write = os.pipe()
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(wake_read, False)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.wake, self.private = wake_read, (self.lifeline_write, wake_read, wake_write)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(wake_read, selectors.EVENT_READ)
        self.selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def serve(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    child = Child(self.listener.accept()[0])
                    self.selector.register(child.connection, selectors.EVENT_READ, child)
                elif key.fileobj == self.wake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.wake, 4096)
                elif key.fileobj == sys.stdin.fileno():
                    if not os.read(sys.stdin.fileno(), 4096):
                        return self.close()
                else:
                    self.receive(key.data)
            self.reap()
            self.start_waiting()

    def receive(self, child: Child) -> None:
        try:
            data = child.connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return self.forget(child)
        child.buffer += data
        while b"\n" in child.buffer:
            line, child.buffer = child.buffer.split(b"\n", 1)
            message = json.loads(line)
            if "signal" in message:
                if child.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, message["signal"])
            else:
                child.request = message
                self.queue.append(child)

    def forget(self, child: Child) -> None:
        """The client went away: its child goes too."""
        self.selector.unregister(child.connection)
        child.connection.close()
        if child in self.queue:
            self.queue.remove(child)
        if child.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def start_waiting(self) -> None:
        running = {c.request.get("name") for c in self.children.values()}
        for child in list(self.queue):
            wanted = min(child.request.get("slots", 1), self.total) if child.takes_slot else 0
            if child.takes_slot and (len(self.slots) < wanted or child.request.get("name") in running):
                if len(self.slots) < wanted and wanted > 1:
                    break  # what needs several slots waits for them at the head, or single ones would always take them
                continue
            self.queue.remove(child)
            if child.takes_slot:
                child.slots, self.slots = self.slots[:wanted], self.slots[wanted:]
                running.add(child.request.get("name"))
            self.start(child)

    def start(self, child: Child) -> None:
        request = child.request
        if self.devices and child.slots:
            given = dict.fromkeys(self.devices[slot % len(self.devices)] for slot in child.slots)
            request.setdefault("env", {})["CUDA_VISIBLE_DEVICES"] = ",".join(given)
        child.pid = self.spawned(request) if self.spawn else self.forked(child)
        self.children[child.pid] = child
        self.send(child, {"event": "started", "pid": child.pid})

    def forked(self, child: Child) -> int:
        pid = os.fork()
        if pid:
            with contextlib.suppress(OSError):
                os.setpgid(pid, pid)
            return pid
        code = 1
        try:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.selector.close()
            self.listener.close()
            for descriptor in self.private:
                os.close(descriptor)
            for other in [*self.children.values(), *self.queue, child]:
                other.connection.close()
            redirect(child.request.get("log"))
            die_with(self.lifeline_read)
            code = guarded(child.request)
        finally:
            os._exit(code)

    def spawned(self, request: dict) -> int:
        """A fresh interpreter: where CUDA is visible (bitsandbytes initialises it on import, and CUDA survives no fork)."""
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(self.lifeline_read)],
            stdin=subprocess.PIPE,
            pass_fds=[self.lifeline_read],
            env={**os.environ, **request.get("env", {})},
            start_new_session=True,
        )
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
        process.returncode = 0  # reaped here with the others; Popen must not try
        return process.pid

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            child = self.children.pop(pid, None)
            if child is None:
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what the child itself started ends with it
            self.slots = sorted([*self.slots, *child.slots])
            self.send(child, {"event": "exit", "code": os.waitstatus_to_exitcode(status)})
            child.pid = None

    def send(self, child: Child, message: dict) -> None:
        with contextlib.suppress(OSError):
            child.connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def fork_works() -> bool:
    """One forked matrix product, within 20 s: some accelerated libraries (macOS) hang or die after a fork."""
    import torch

    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        os._exit(0 if float((torch.ones(256, 256) @ torch.ones(256, 256)).sum()) == 256**3 else 1)
    return os.waitpid(pid, 0)[1] == 0


def main() -> None:
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "lib"]  # lib/statistics.py is not `statistics`
    if sys.argv[1:2] == ["--child"]:
        request = json.loads(sys.stdin.buffer.read())
        redirect(request.get("log"))
        die_with(int(sys.argv[2]))
        sys.exit(guarded(request))
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("slots", type=int)
    parser.add_argument("--devices", default="", help="GPUs to hand out, one per slot; members are then spawned, not forked")
    parser.add_argument("--bare", action="store_true", help="preload nothing (tests)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle; it closes our standard input
    devices = [d for d in arguments.devices.split(",") if d]
    server = Server(arguments.socket, arguments.slots, devices)  # clients may queue while we import
    if not arguments.bare and not devices:
        preload()
        if sys.platform == "darwin":
            server.spawn = not fork_works()
    server.serve()


if __name__ == "__main__":
    main()
