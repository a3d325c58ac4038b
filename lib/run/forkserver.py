"""The pool: a process that has imported the third-party packages, no study code, and forks one process per member.

Importing torch, transformers and trl costs 10 s; a record of fifty members must not pay it fifty times. Run as a
script:

    python lib/run/forkserver.py SOCKET SLOTS [--devices 0,1] [--bare]

Protocol, over a Unix socket, one JSON object per line, one connection per child:
    -> {"kind": "member" | "kernel", "target": "lib.run.work:member", "argument": {...}, "log": path, "env":
    {...},
        "name": same names never run at the same time, "threads": n, "slots": as many, "cpu": shown no GPU}
    <- {"event": "started", "pid": p}     when its slot is free (a kernel takes no slot)
    -> {"signal": n}                      sent on to the child's process group
    <- {"event": "exit", "code": c}       negative: killed by that signal
Closing the connection kills the child with its process group, so a client that goes away leaves no orphan. The server
reads the owner's secrets from its standard input, ends with it and takes its folder along; a child ends with the server
(each holds a pipe whose other end only the server has). What a child writes to stdout and stderr comes through a pipe
to the server, which writes the log: a killed child loses no line, and no line holds a secret.
"""

import argparse
import contextlib
import json
import os
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # as a script: what lies beside it has no names of its own
    sys.path[:] = [
        str(ROOT),
        *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, Path(__file__).resolve().parent)),
    ]

# With these, all that the server knows of `lib`: it would not see later changes of what it has imported.
from lib import record  # noqa: E402
from lib.run.child import die_with, fork_works, guarded, preload, redirect  # noqa: E402
from lib.run.slots import Slots  # noqa: E402


class Child:
    """One connection and, once started, its process."""

    def __init__(self, connection: socket.socket):
        self.connection, self.buffer, self.request, self.pid, self.slots = connection, b"", None, None, []
        self.log: record.Log | None = None
        self.output: int | None = None  # the end of its stdout and stderr that the server reads

    @property
    def takes_slot(self) -> bool:
        return self.request["kind"] == "member"


class Server:
    def __init__(self, path: str, slots: int, devices: list[str]):
        self.slots, self.spawn, self.folder = Slots(slots, devices), bool(devices), Path(path).parent
        self.children: dict[int, Child] = {}
        self.stopping, self.queue = False, []
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unready = str(Path(path).with_name("n"))  # no longer than the name: a socket's path has 107 characters at most
        self.listener.bind(unready)
        self.listener.listen(128)
        os.rename(unready, path)  # clients wait for this name: a bound socket that does not listen yet refuses them
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
                    self.ask_to_stop()
                elif isinstance(key.fileobj, int):
                    self.copy_output(key.data)
                else:
                    self.receive(key.data)
            self.reap()
            if self.stopping and not any(child.takes_slot for child in self.children.values()):
                return self.close()
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

    def copy_output(self, child: Child, *, last: bool = False) -> None:
        """What a child has written so far into its log. At its end (`last`) without waiting for whoever else has the
        pipe."""
        while child.output is not None:
            try:
                data = os.read(child.output, 1 << 16)
            except BlockingIOError:
                if not last:
                    return
                data = b""
            if data:
                child.log.feed(data)
            else:
                self.selector.unregister(child.output)
                os.close(child.output)
                child.output = None
                child.log.close()
            if not last:  # the others' turn
                return

    def forget(self, child: Child) -> None:
        """The client went away: its child goes too."""
        self.selector.unregister(child.connection)
        child.connection.close()
        if child in self.queue:
            self.queue.remove(child)
        if child.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def ask_to_stop(self) -> None:
        """The owner has said so: start nothing more, let members save where they are, and end when the last has
        ended."""
        self.stopping = True
        self.slots.close()
        for pid, child in self.children.items():
            if child.takes_slot:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def start_waiting(self) -> None:
        for child in self.slots.turns(self.queue, {c.request.get("name") for c in self.children.values()}):
            self.queue.remove(child)
            self.start(child)

    def start(self, child: Child) -> None:
        request = child.request
        request["env"] = request.get("env", {}) | self.slots.environment(child)
        out = None
        if request.get("log"):
            child.log = record.Log(request["log"])
            child.output, out = os.pipe()
            os.set_blocking(child.output, False)
            self.selector.register(child.output, selectors.EVENT_READ, child)
        child.pid = self.spawned(request, out) if self.spawn else self.forked(child, out)
        if out is not None:
            os.close(out)
        self.children[child.pid] = child
        self.send(child, {"event": "started", "pid": child.pid})

    def forked(self, child: Child, out: int | None) -> int:
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
            for other in {*self.children.values(), *self.queue, child}:
                other.connection.close()
                if other.output is not None:
                    os.close(other.output)
            redirect(out)
            die_with(self.lifeline_read)
            code = guarded(child.request)
        finally:
            os._exit(code)

    def spawned(self, request: dict, out: int | None) -> int:
        """A fresh interpreter: where CUDA is visible (bitsandbytes initialises it on import, and CUDA survives no
        fork)."""
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(self.lifeline_read)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL if out is None else out,
            stderr=subprocess.DEVNULL if out is None else out,
            pass_fds=[self.lifeline_read],
            env={**os.environ, **request.get("env", {})},
            start_new_session=True,
        )
        process.stdin.write(json.dumps({**request, "secrets": record.KNOWN}).encode())
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
            if not self.stopping:
                self.slots.give_back(child.slots)
            self.copy_output(child, last=True)
            self.send(child, {"event": "exit", "code": os.waitstatus_to_exitcode(status)})
            child.pid = None

    def send(self, child: Child, message: dict) -> None:
        with contextlib.suppress(OSError):
            child.connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """The owner is gone, however it went: children and the socket's folder go too."""
        for pid, child in self.children.items():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            self.copy_output(child, last=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def owner_watched(server: Server):
    """While we import, which takes seconds: end at once where the owner goes or asks us to stop, for nothing runs yet.
    No thread is left when the first fork comes."""
    imported, poller = threading.Event(), select.poll()
    poller.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)

    def watch():
        while not imported.wait(0.1):
            if poller.poll(0):
                server.close()
                os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        imported.set()
        watcher.join()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        request = json.loads(sys.stdin.buffer.read())
        record.KNOWN.update(request.pop("secrets"))
        redirect(1)
        die_with(int(sys.argv[2]))
        sys.exit(guarded(request))
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("slots", type=int)
    parser.add_argument(
        "--devices", default="", help="GPUs to hand out, one per slot; members are then spawned, not forked"
    )
    parser.add_argument("--bare", action="store_true", help="preload nothing (tests)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle; it closes our standard input
    devices = [d for d in arguments.devices.split(",") if d]
    with open(0, "rb", buffering=0, closefd=False) as owner:  # its first line: what no log may hold
        record.KNOWN.update(json.loads(owner.readline() or b"{}"))
    server = Server(arguments.socket, arguments.slots, devices)  # clients may queue while we import
    if not arguments.bare and not devices:
        with owner_watched(server):
            preload()
        if sys.platform == "darwin":
            server.spawn = not fork_works()
    server.serve()


if __name__ == "__main__":
    main()
