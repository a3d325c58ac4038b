"""A gate between two optimizer steps, where a process tells its parent what the last one took and waits for the next
word."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lib import models


class End(Exception):
    """The parent has seen enough: what is left of training (a checkpoint) is not run."""


class Parts:
    """Seconds per part of a step and tokens through the policy's backbone, while `on`; edges wait for the device."""

    def __init__(self):
        self.on, self.seconds, self.tokens, self.started = False, Counter(), 0, {}

    def begin(self, name: str) -> None:
        if self.on:
            self.started[name] = now()

    def end(self, name: str) -> None:
        if self.on:
            self.seconds[name] += now() - self.started.pop(name)

    @contextlib.contextmanager
    def measured(self, name: str):
        self.begin(name)
        yield
        self.end(name)

    def watch(self, module: nn.Module, name: str, count: bool = False) -> None:
        def before(_, args, kwargs):
            if self.on and count:
                found = kwargs.get("input_ids", args[0] if args else None)
                self.tokens += (found if found is not None else kwargs["inputs_embeds"][..., 0]).numel()
            self.begin(name)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(lambda *_: self.end(name))

    def watch_policy(self, model: nn.Module) -> None:
        self.watch(model, "model")
        self.watch(models.unwrapped(model).base_model, "backbone", count=True)

    def watch_training(self) -> None:
        """Backward passes, gradient clipping and optimizer steps of this process, whoever calls them."""
        backward, clip = Tensor.backward, nn.utils.clip_grad_norm_

        def timed(function: Callable, name: str) -> Callable:
            def call(*args, **kwargs):
                with self.measured(name):
                    return function(*args, **kwargs)

            return call

        Tensor.backward, nn.utils.clip_grad_norm_ = timed(backward, "backward"), timed(clip, "clipping")
        register_optimizer_step_pre_hook(lambda *_: self.begin("optimizer"))
        register_optimizer_step_post_hook(lambda *_: self.end("optimizer"))


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _resident(key: str) -> float:
    """MB of this process: 'VmRSS' now, 'VmHWM' at most. Where there is no /proc both are the most since the process
    began."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


class Peak:
    """Peak memory in MB from `restart` on: allocated on the GPU, or resident beyond what the process held before its
    model."""

    def __init__(self, device: torch.device):
        self.cuda, self.before = device.type == "cuda", _resident("VmRSS")

    def restart(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # Linux: the peak becomes what is resident now
                Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e6 if self.cuda else _resident("VmHWM") - self.before


class Gate:
    """Between two steps: tell the parent what the last one took, and wait for the word to go on."""

    def __init__(self, pipe, device: torch.device):
        self.pipe, self.parts, self.peak = pipe, Parts(), Peak(device)
        self.steps, self.started, self.cpu_started = 0, 0.0, 0.0

    def ready(self, reference_seconds: float | None) -> None:
        self.pipe.send({"reference_seconds": reference_seconds})
        self._wait()

    def passed(self, loss: float) -> None:
        seconds, cpu = now() - self.started, time.process_time() - self.cpu_started
        self.steps += 1
        self.pipe.send(
            {
                "seconds": seconds,
                "cpu_seconds": cpu,
                "loss": float(loss),
                "peak": self.peak.now(),
                "parts": dict(self.parts.seconds),
                "tokens": self.parts.tokens,
            }
        )
        if self.steps == 1:  # loading, the reference and the first allocations are behind it
            self.peak.restart()
        self._wait()

    def _wait(self) -> None:
        word = self.pipe.recv()
        if word == "end":
            raise End
        self.parts.on, self.parts.seconds, self.parts.tokens = word == "profile", Counter(), 0
        self.started, self.cpu_started = now(), time.process_time()
