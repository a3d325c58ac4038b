"""Notebooks through papermill: its engine, with kernels forked by the pool, and no secret in what a notebook keeps.

The kernel provisioner is registered in pyproject.toml under `jupyter_client.kernel_provisioners`; the runner selects it
by JUPYTER_DEFAULT_PROVISIONER_NAME, so that JupyterLab and plain papermill keep their own kernels.
"""

import asyncio
import contextlib
import json
import os
import signal
import uuid
from pathlib import Path
from typing import Any

from jupyter_client.provisioning import LocalProvisioner
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from lib import record
from lib.run import pool


class Process:
    """A kernel in the pool, over the pool's connection: of subprocess.Popen what a LocalProvisioner asks."""

    stdin = stdout = stderr = None
    pid: int | None = None
    returncode: int | None = None

    def __init__(self, request: dict):
        self.connection = pool.connect(os.environ["STUDY_POOL"])
        self.connection.send(request)

    def poll(self) -> int | None:
        while self.returncode is None and self.connection.poll():
            event, value = pool.receive(self.connection)
            if event == "started":
                self.pid = value
            else:
                self.returncode = -signal.SIGKILL if value is None else value
        return self.returncode

    wait = poll  # it is called when the kernel has ended

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(OSError):  # where the pool is gone, `poll` says so
            self.connection.send(int(number))


class PoolProvisioner(LocalProvisioner):
    """Launches the kernel through the pool."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any):
        given = {k: v for k, v in (kwargs.get("env") or {}).items() if os.environ.get(k) != v}
        argument = {"connection_file": cmd[cmd.index("-f") + 1], "cwd": str(kwargs.get("cwd") or os.getcwd())}
        work = {"target": "lib.run.pool:launch_kernel", "argument": argument, "log": os.devnull}
        self.process = Process({**work, "env": {**given, "STUDY_POOL": os.environ["STUDY_POOL"]}})
        while self.process.pid is None and self.process.poll() is None:
            await asyncio.sleep(0.01)
        self.pid = self.process.pid
        return self.connection_info


class Client(PapermillNotebookClient):
    """Replaces secrets in every message before it becomes an output that papermill saves."""

    def create_kernel_manager(self):
        """The kernel's connection file holds a key: it lies in the pool's folder and goes with it. So do its sockets:
        a port on which it does not listen yet can be the very one that an attempt to connect comes from, and ZeroMQ,
        connected to itself, tries no more; a kernel that starts slowly would never be reached."""
        manager, name = super().create_kernel_manager(), uuid.uuid4().hex
        manager.connection_file = str(Path(os.environ["STUDY_POOL"]).with_name(f"kernel-{name}.json"))
        manager.transport, manager.ip = "ipc", str(Path(os.environ["STUDY_POOL"]).with_name(f"k{name[:8]}"))
        return manager

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] in ("stream", "error", "display_data", "execute_result", "update_display_data"):
            msg["content"] = json.loads(record.redact(json.dumps(msg["content"])))
        return super().process_message(msg, cell, cell_index)


class Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, log_output=False, start_timeout=600, **_):
        """`start_timeout` is also for what a cell has shown, which 4 s after its reply would be left out without a
        word; a kernel that dies ends both."""
        client = Client(nb_man, kernel_name=kernel_name, log_output=log_output)
        client.startup_timeout = client.iopub_timeout = start_timeout
        save = nb_man.save
        # Papermill writes all of a notebook twice per cell, which takes longer than most cells; every 5 s will do.
        nb_man.save = lambda **_: (nb_man.now() - nb_man.last_save_time).total_seconds() > 5 and save()
        try:
            return client.execute()
        finally:
            nb_man.save = save


def register() -> None:
    """Make the engine known to papermill and the pool's kernels the default of this process."""
    papermill_engines.register("study", Engine)
    os.environ["JUPYTER_DEFAULT_PROVISIONER_NAME"] = "study-pool"
