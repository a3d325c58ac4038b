"""Notebook kernels from the pool: a jupyter kernel provisioner that forks the kernel instead of importing torch again.

Registered in pyproject.toml under `jupyter_client.kernel_provisioners`; the runner selects it by
JUPYTER_DEFAULT_PROVISIONER_NAME, so that JupyterLab and plain papermill keep their own kernels.
"""

import asyncio
import json
import os
import signal
import sys
from typing import Any

from jupyter_client.provisioning import LocalProvisioner

from lib.run import pool


def launch(argument: dict) -> None:
    """In the forked child: become an IPython kernel."""
    from ipykernel.kernelapp import IPKernelApp

    sys.argv = ["ipykernel_launcher", "-f", argument["connection_file"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if transformers := sys.modules.get("transformers"):  # how it loads is for a member's log, not for a page
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    IPKernelApp.launch_instance()


class PoolProvisioner(LocalProvisioner):
    """Launches the kernel through the pool and speaks of it over the pool's connection."""

    connection = None
    code: int | None = None

    @property
    def has_process(self) -> bool:
        return self.connection is not None

    async def launch_kernel(self, cmd: list[str], **kwargs: Any):
        environment = kwargs.get("env") or {}
        here = {k: v for k, v in environment.items() if os.environ.get(k) != v}
        self.code, self.buffer = None, b""
        self.connection = pool.connect(os.environ["STUDY_POOL"])
        request = {
            "kind": "kernel",
            "target": "lib.run.kernels:launch",
            "argument": {"connection_file": cmd[cmd.index("-f") + 1]},
            "env": {**here, "STUDY_POOL": os.environ["STUDY_POOL"]},
            "unset": ["JPY_PARENT_PID"],
            "cwd": str(kwargs.get("cwd") or os.getcwd()),
            "log": os.environ.get("STUDY_KERNEL_LOG"),
        }
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        self.connection.setblocking(False)
        while self.pid is None and await self.poll() is None:
            await asyncio.sleep(0.01)
        return self.connection_info

    async def poll(self) -> int | None:
        if self.connection is None:
            return self.code if self.code is not None else 0
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return self.code
        except OSError:
            data = b""
        if not data:
            self.code = -signal.SIGKILL if self.code is None else self.code
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for event in map(json.loads, lines):
            if event["event"] == "started":
                self.pid = event["pid"]
            else:
                self.code = event["code"]
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
                self.connection.sendall(json.dumps({"signal": int(signum)}).encode() + b"\n")
            except OSError:
                self.code = -signal.SIGKILL

    async def kill(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGKILL)

    async def terminate(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGTERM)
