"""What can be asked of a machine before a run: its GPUs, the hub, free disk. A `Machine` answers, so that tests can
too."""

from __future__ import annotations

import json
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

SECONDS = 3.0  # that the hub is waited for


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gb: float
    capability: tuple[int, int]


def visible_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that CUDA would show, by NVML (which does not initialise CUDA); [] without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        named = environ.get("CUDA_VISIBLE_DEVICES")
        wanted = [str(i) for i in range(count)] if named is None else [d.strip() for d in named.split(",") if d.strip()]
        found = []
        for device in wanted:
            if device.lstrip("-").isdigit():
                if not 0 <= int(device) < count:
                    break  # as CUDA does: a bad index hides it and all that follow
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(device))
            else:
                handle = pynvml.nvmlDeviceGetHandleByUUID(device)
            found.append(
                Gpu(
                    pynvml.nvmlDeviceGetName(handle),
                    pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9,
                    tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                )
            )
        return found
    except pynvml.NVMLError:
        return []


def ask_hub(url: str, token: str | None) -> tuple[int | None, str]:
    """(HTTP status, the hub's error code) of a GET within SECONDS; (None, "") where nothing answers."""
    return _get(url, token)[:2]


def read_hub(url: str, token: str | None) -> object:
    """The JSON that the hub answers; None where it does not."""
    try:
        return json.loads(_get(url, token)[2] or b"null")
    except ValueError:
        return None


@lru_cache(maxsize=32)
def _get(url: str, token: str | None) -> tuple[int | None, str, bytes]:
    answer: list[tuple[int | None, str, bytes]] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url)
            if token:  # not sent on to where a redirect leads
                request.add_unredirected_header("Authorization", f"Bearer {token}")
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                answer.append((response.status, "", response.read(1 << 22)))
        except urllib.error.HTTPError as error:
            hub = error.headers.get("X-Request-Id") is not None or error.headers.get("X-Error-Code") is not None
            # a refusal that is not the hub's is a proxy's
            answer.append((error.code, error.headers.get("X-Error-Code") or "", b"") if hub else (None, "", b""))
        except (OSError, ValueError):
            answer.append((None, "", b""))

    # In a thread, because urlopen's time-out does not cover name resolution.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answer[0] if answer else (None, "", b"")


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@dataclass(frozen=True)
class Machine:
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    gpus: Callable[[Mapping[str, str]], list[Gpu]] = visible_gpus
    hub: Callable[[str, str | None], tuple[int | None, str]] = ask_hub
    read: Callable[[str, str | None], object] = read_hub
    free_bytes: Callable[[Path], int] = _free_bytes
