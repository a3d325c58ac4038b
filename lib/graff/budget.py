"""The budget: one clock of two kinds, energy with its source or none, and what a curve over the budget comes to."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

from lib.errors import StudyError

# Virtual seconds per unit: a forward pass is 1 unit per token, forward and backward 3, a decoded token 1.
UNIT_SECONDS = 5e-4
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
        """Work of so many units was done; only the virtual clock has to be told."""
        if self.kind == "virtual":
            self.used += units * UNIT_SECONDS

    def tick(self) -> float:
        """Consumed seconds by now. Raises StudyError where the clock went backwards."""
        if self.kind == "monotonic":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = self.now()
            if now < self.last:
                back, fix = self.last - now, "run again; a machine that was suspended or migrated may do this"
                raise StudyError("the run's clock", f"it went back by {back:.3f} s", "a monotonic clock", fix)
            self.used, self.last = self.used + now - self.last, now
        return self.used

    @property
    def fraction(self) -> float:
        return min(1.0, self.used / self.budget)


class Energy:
    """Joules since the start, accumulated over resumes, with their source (nvml, polled, rapl), or None with the
    reason."""

    def __init__(self) -> None:
        self.source, self._read, self.reason = _source()
        self.joules = 0.0 if self.source else None
        self._last = self._read() if self.source else None

    def update(self) -> None:
        if self.source:
            now = self._read()
            if now >= self._last:  # RAPL's counter wraps
                self.joules = (self.joules or 0.0) + now - self._last
            self._last = now


class Polled:
    """Power in watts, read twice a second by a thread and integrated by the trapezoid rule; a call reads it once more
    and returns the joules so far."""

    INTERVAL = 0.5

    def __init__(self, watts, now=time.monotonic, thread: bool = True):
        self.watts, self.now, self.joules, self.lock = watts, now, 0.0, threading.Lock()
        self.at, self.power, self.ended = now(), watts(), threading.Event()
        if thread:
            threading.Thread(target=self._poll, daemon=True).start()

    def __call__(self) -> float:
        with self.lock:
            at, power = self.now(), self.watts()
            self.joules += (at - self.at) * (power + self.power) / 2
            self.at, self.power = at, power
            return self.joules

    def _poll(self) -> None:
        while not self.ended.wait(self.INTERVAL):
            self()


def nvml(library, uuid: str, poll=Polled):
    """(source, function that returns joules so far, reason for none): NVML's total energy counter, else its power,
    polled."""
    try:
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByUUID(uuid)  # an index would ignore CUDA_VISIBLE_DEVICES
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


def area(times: list[float], values: list[float], budget: float) -> float:
    """Area under `values` over time by the trapezoid rule, from t = 0 to the budget (the last value holds), over the
    budget."""
    times, values = [*times, budget], [*values, values[-1]]
    spans = zip(times, times[1:], values, values[1:], strict=False)
    return sum((t1 - t0) * (v0 + v1) / 2 for t0, t1, v0, v1 in spans) / budget


def energy_to_level(joules: list, exact_match: list, level: float | None) -> float | None:
    """Joules when exact match first reaches `level`, between two evaluations by linear interpolation. None where no
    level is stated, nothing was read, it is never reached, or the base model (the first evaluation) is there already:
    then nothing was spent on reaching it."""
    if level is None or any(j is None or j != j for j in joules) or exact_match[0] >= level:
        return None
    for j0, j1, e0, e1 in zip(joules, joules[1:], exact_match, exact_match[1:], strict=False):
        if e1 >= level:
            return j0 + (j1 - j0) * (level - e0) / (e1 - e0)
    return None
