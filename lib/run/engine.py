"""The papermill engine of the runner: kernels from the pool, and no secret in what a notebook keeps."""

import os
import uuid
from pathlib import Path

from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from lib import record


def _redacted(value):
    if isinstance(value, str):
        return record.redact(value)
    if isinstance(value, dict):
        return {k: _redacted(v) for k, v in value.items()}
    return [_redacted(v) for v in value] if isinstance(value, list) else value


class Client(PapermillNotebookClient):
    """Replaces secrets in every message before it becomes an output that papermill saves."""

    def create_kernel_manager(self):
        """The kernel's connection file holds a key: it stands in the pool's folder and goes with it. So do its sockets:
        a port on which it does not listen yet can be the very one that an attempt to connect comes from, and ZeroMQ,
        connected to itself, tries no more; who waits for a kernel that starts slowly then waits in vain."""
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
    def execute_managed_notebook(
        cls, nb_man, kernel_name, log_output=False, start_timeout=600, execution_timeout=None, **_
    ):
        """`start_timeout` is also for what a cell has shown, which 4 s after its reply would be left out without a
        word; a kernel that dies ends both."""
        client = Client(
            nb_man,
            kernel_name=kernel_name,
            timeout=execution_timeout,
            startup_timeout=start_timeout,
            iopub_timeout=start_timeout,
            log_output=log_output,
        )
        return client.execute()


def register() -> None:
    """Make the engine known to papermill and the pool's kernels the default of this process."""
    papermill_engines.register("study", Engine)
    os.environ["JUPYTER_DEFAULT_PROVISIONER_NAME"] = "study-pool"
