"""A child of the pool, from its first moment to its target's return. Imported by the server
(lib/run/forkserver.py).

Like it, this knows no study code: what a target imports of `lib` is read from disk by each child.
"""

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from lib.run.importing import importing

ROOT = Path(__file__).resolve().parents[2]
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
)


def preload() -> None:
    """Import what members and kernels need. One thread only: a fork copies no other thread, but keeps its locks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names optional kernels that are not installed
    with importing():
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


def redirect(out: int | None) -> None:
    """Nothing to read, and stdout and stderr to `out` (a pipe to the server) or nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for stream in (1, 2):
        os.dup2(null if out is None else out, stream)


def die_with(lifeline: int) -> None:
    """End this process when the pipe's other end closes, that is when the server is gone, however it went.

    On Linux the kernel sees to it as well: our thread cannot run while a long call into C holds the interpreter's lock.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

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


def fork_works() -> bool:
    """One forked matrix product, within 20 s: some accelerated libraries (macOS) hang or die after a fork."""
    import torch

    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        os._exit(0 if float((torch.ones(256, 256) @ torch.ones(256, 256)).sum()) == 256**3 else 1)
    return os.waitpid(pid, 0)[1] == 0
