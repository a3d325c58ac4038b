"""Notebooks through papermill: its engine, with kernels forked by the pool, and no secret in what a notebook keeps.

The kernel provisioner is registered in pyproject.toml under `jupyter_client.kernel_provisioners`; the runner selects it
by JUPYTER_DEFAULT_PROVISIONER_NAME, so that JupyterLab and plain papermill keep their own kernels.
"""

import asyncio
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


class PoolProvisioner(LocalProvisioner):
    """Launches the kernel through the pool and speaks of it over the pool's connection."""

    connection = None
    code: int | None = None

    @property
    def has_process(self) -> bool:
        return self.connection is not None

    async def launch_kernel(self, cmd: list[str], **kwargs: Any):
        given = {k: v for k, v in (kwargs.get("env") or {}).items() if os.environ.get(k) != v}
        environment = {"env": {**given, "STUDY_POOL": os.environ["STUDY_POOL"]}, "unset": ["JPY_PARENT_PID"]}
        argument, here = {"connection_file": cmd[cmd.index("-f") + 1]}, str(kwargs.get("cwd") or os.getcwd())
        work = {"kind": "kernel", "target": "lib.run.pool:launch_kernel", "argument": argument, "log": None}
        self.code, self.connection = None, pool.connect(os.environ["STUDY_POOL"])
        self.connection.send({**work, **environment, "cwd": here})
        while self.pid is None and await self.poll() is None:
            await asyncio.sleep(0.01)
        return self.connection_info

    async def poll(self) -> int | None:
        if self.connection is None:
            return self.code if self.code is not None else 0
        while self.code is None and self.connection.poll():
            event, value = pool.receive(self.connection)
            if event == "started":
                self.pid = value
            else:
                self.code = -signal.SIGKILL if value is None else value
        return self.code

    async def wait(self) -> int | None:
        while await self.poll() is None:
            await asyncio.sleep(0.05)
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        return self.code

    async def send_signal(self, signum: int) -> None:
        if self.connection is not None and self.code is None:
            try:
                self.connection.send(int(signum))
            except OSError:
                self.code = -signal.SIGKILL

    async def kill(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGKILL)

    async def terminate(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGTERM)


def _redacted(value):
    if isinstance(value, str):
        return record.redact(value)
    if isinstance(value, dict):
        return {k: _redacted(v) for k, v in value.items()}
    return [_redacted(v) for v in value] if isinstance(value, list) else value


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
            msg["content"] = _redacted(msg["content"])
        return super().process_message(msg, cell, cell_index)


class Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, log_output=False, start_timeout=600, **_):
        """`start_timeout` is also for what a cell has shown, which 4 s after its reply would be left out without a
        word; a kernel that dies ends both."""
        client = Client(nb_man, kernel_name=kernel_name, log_output=log_output)
        client.startup_timeout = client.iopub_timeout = start_timeout
        return client.execute()


def register() -> None:
    """Make the engine known to papermill and the pool's kernels the default of this process."""
    papermill_engines.register("study", Engine)
    os.environ["JUPYTER_DEFAULT_PROVISIONER_NAME"] = "study-pool"
