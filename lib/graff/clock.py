"""The budget: one clock of two kinds, what an action costs on the virtual one, and energy with its source or none."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

from lib.errors import StudyError

UNIT_SECONDS = (
    5e-4  # virtual seconds per unit; a forward pass is 1 unit per token, forward and backward 3, a decoded token 1
)
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class Clock:
    """Consumed seconds of a budget. `monotonic`: the wall clock between ticks; `virtual`: what was charged. Saved with
    each checkpoint; a resumed run goes on from what was used."""

    def __init__(self, kind: str, budget: float, now=time.monotonic):
        self.kind, self.budget, self.used, self.now = kind, budget, 0.0, now
        self.last: float | None = None

    def start(self) -> None:
        self.last = self.now()

    def charge(self, units: float) -> None:
        """Work of so many units was done; the wall clock knows by itself."""
        if self.kind == "virtual":
            self.used += units * UNIT_SECONDS

    def tick(self) -> float:
        """Consumed seconds by now. Raises StudyError where the clock went backwards."""
        if self.kind == "monotonic":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = self.now()
            if now < self.last:
                raise StudyError(
                    "the run's clock",
                    f"it went back by {self.last - now:.3f} s",
                    "a monotonic clock",
                    "run again; a machine that was suspended or migrated may do this",
                )
            self.used, self.last = self.used + now - self.last, now
        return self.used

    @property
    def fraction(self) -> float:
        return min(1.0, self.used / self.budget)


class Energy:
    """Joules since `start`, accumulated over resumes, with their source: nvml, polled, rapl; or null with its
    reason."""

    def __init__(self, joules: float | None = 0.0):
        self.source, self._read, self.reason = _source()
        self.joules = joules if self.source else None
        self._last = self._read() if self.source else None

    def update(self) -> None:
        if self.source:
            now = self._read()
            if now >= self._last:  # RAPL's counter wraps
                self.joules = (self.joules or 0.0) + now - self._last
            self._last = now


class Polled:
    """Power in watts, read twice a second by a thread of its own and integrated by the trapezoid rule; a call reads it
    once more and gives the joules so far."""

    INTERVAL = 0.5

    def __init__(self, watts, now=time.monotonic, thread: bool = True):
        self.watts, self.now, self.joules, self.lock = watts, now, 0.0, threading.Lock()
        self.at, self.power, self.ended = now(), watts(), threading.Event()
        if thread:
            threading.Thread(target=self._forever, daemon=True).start()

    def __call__(self) -> float:
        with self.lock:
            at, power = self.now(), self.watts()
            self.joules += (at - self.at) * (power + self.power) / 2
            self.at, self.power = at, power
            return self.joules

    def _forever(self) -> None:
        while not self.ended.wait(self.INTERVAL):
            self()


def nvml(library, uuid: str, poll=Polled):
    """(source, joules so far, reason for none): NVML's total energy counter, else its power, polled."""
    try:
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByUUID(uuid)  # an index would not heed CUDA_VISIBLE_DEVICES
    except Exception as error:
        return None, None, f"NVML could not be asked: {error}"
    try:
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
        return "nvml", lambda: library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, None
    except Exception as error:  # older than Volta, or a virtual device
        total = error
    try:
        return "polled", poll(lambda: library.nvmlDeviceGetPowerUsage(handle) / 1e3), None
    except Exception as error:
        return None, None, f"NVML gives neither total energy ({total}) nor power ({error})"


def _source():
    if torch.cuda.is_available():
        try:
            import pynvml
        except ImportError:
            return None, None, "pynvml is not installed"
        return nvml(pynvml, f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
    try:
        RAPL.read_text()
        return "rapl", lambda: int(RAPL.read_text()) / 1e6, None
    except OSError as error:
        return None, None, f"no GPU, and {RAPL} cannot be read ({error.strerror})"
