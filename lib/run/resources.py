"""What a member really used, measured in its own process: `resources.json` beside its record, for
`lib/run/forecast.py`.

Kept apart from metrics.json because no two executions use the same: a record is compared byte for byte, this is not.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lib import record

NAME = "resources.json"


@contextlib.contextmanager
def measured(folder: Path, expected_seconds: float) -> Iterator[None]:
    """Write {seconds, expected_seconds, base_memory_bytes, memory_bytes, device_memory_bytes, resumed} at the end of
    the block.

    `base_memory_bytes`: resident when it began, which a forked member shares with its pool; `memory_bytes`: by how much
    it grew at its peak, which it shares with nobody; `device_memory_bytes`: the CUDA allocator's peak, null without
    CUDA.
    `expected_seconds`: what the run's YAML says, so that the ratio tells how fast this machine is; null where it says
    nothing. `resumed`: the seconds are of a part only.
    """
    import psutil

    resumed = any(folder.glob("checkpoints/*/complete.json"))
    base, started = psutil.Process().memory_info().rss, time.monotonic()
    yield
    peak = peak_bytes()
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_initialized()
    record.write_json(
        folder / NAME,
        {
            "seconds": round(time.monotonic() - started, 3),
            "expected_seconds": expected_seconds or None,
            "base_memory_bytes": base,
            "memory_bytes": max(0, peak - base),
            "device_memory_bytes": torch.cuda.max_memory_reserved() if cuda else None,
            "resumed": resumed,
        },
    )


def peak_bytes() -> int:
    """The most that this process has had resident. Not ru_maxrss on Linux: a process started by exec inherits that of
    who started it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a running member replaces its files
            total += path.lstat().st_size
    return total
