"""The schedulers: what each makes of the budget's fraction and what it has seen. One object per run, saved with it.

plan = method.decide(seen)      eta / eta_0, multipliers per block, exponent of the token weights
method.learn(...)               with the gradient of the fresh batch, before the step is taken
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lib.graff import planner as pl

WARM_UP = 0.03  # of the budget, shared by all methods
EVERY = 10  # steps between secants and between token-weight probes
BOUND = 1.9  # of eta lambda, before Adam's factor
CONTROLLER_CLIP = 2.0


@dataclass
class Seen:
    """What a method may know when it decides."""

    fraction: float  # of the budget that is used
    entropy: float  # mean over the batch's label tokens, over log |V'|
    log_lambda: Tensor  # (N,) less its running mean, clipped to +-2; 0 before the first secant


@dataclass
class Fixed:
    """eta_0 throughout."""

    scheduler: object
    layers: int
    log_eta: float = 0.0
    loss_weights: bool = False
    log: dict = field(default_factory=dict)
    wants_gradient = wants_secant = wants_probe = wants_entropy = False

    def __post_init__(self) -> None:
        """What a subclass remembers."""

    def decide(self, seen: Seen) -> pl.Plan:
        return pl.Plan(torch.tensor(self.log_eta), torch.zeros(2 * self.layers), torch.tensor(0.0))

    def learn(self, loss: float, c: tuple | None, lam: float, eta0: float, beta1: float) -> None:
        """After the backward pass: the loss, the cotangents (c_eta, c, c_a) or None, the largest curvature seen."""

    def cap(self, lam: float, beta1: float) -> float:
        """The largest eta that may be applied."""
        return math.inf

    def state(self) -> dict:
        return {"log_eta": self.log_eta}

    def restore(self, state: dict) -> None:
        self.__dict__.update(state)


class Cosine(Fixed):
    """Half a cosine over the budget's fraction, not over steps."""

    def decide(self, seen):
        self.log_eta = math.log(max(1e-4, 0.5 * (1 + math.cos(math.pi * seen.fraction))))
        return super().decide(seen)


class Hypergradient(Fixed):
    """One scalar log eta, moved by its own hypergradient through Adam (Baydin et al. 2018). Matched gain: GRAFF's outer
    step moves log eta by outer_lr * |(mean h, 1)|_1, here by as much at the |h| of the warm start that lies with the
    inputs."""

    gain = 4.0  # where there is no warm start
    wants_gradient = True

    def __post_init__(self):
        self.m = self.v = 0.0
        self.count = 0

    def learn(self, loss, c, lam, eta0, beta1):
        if c is None:
            return
        g, self.count = float(c[0]), self.count + 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        step = self.m / (1 - 0.9**self.count) / (math.sqrt(self.v / (1 - 0.999**self.count)) + 1e-8)
        self.log_eta = min(max(self.log_eta - self.gain * self.scheduler.outer_lr * step, pl.LOG_ETA[0]), pl.LOG_ETA[1])
        self.log["gain"] = self.gain

    def state(self):
        return {k: getattr(self, k) for k in ("log_eta", "m", "v", "count")}


class Reactor(Fixed):
    """REACTOR as reconstructed from its one-line description: REINFORCE over log eta, held for 5 steps."""

    HOLD, wants_entropy = 5, True

    def __post_init__(self):
        self.omega, self.log_sigma = torch.zeros(4, requires_grad=True), torch.tensor(math.log(0.3), requires_grad=True)
        self.adam = torch.optim.Adam([self.omega, self.log_sigma], lr=self.scheduler.controller_lr)
        self.generator = torch.Generator().manual_seed(0)
        self.s, self.a, self.count, self.losses, self.last, self.mean, self.var = None, 0.0, 0, [], None, 0.0, 0.0
        self.trend = 0.0  # tanh of the last window's relative loss drop

    def decide(self, seen):
        if self.count % self.HOLD == 0:
            self.act(torch.tensor([1.0, 1 - seen.fraction, self.trend, seen.entropy]))
        self.log_eta = min(max(self.a, -CONTROLLER_CLIP), CONTROLLER_CLIP)
        return super().decide(seen)

    def act(self, s: Tensor) -> float:
        self.s = s
        with torch.no_grad():
            sigma = float(self.log_sigma.exp().clamp(0.05, 0.7))
            self.a = float(self.omega @ s + sigma * torch.randn((), generator=self.generator))
        return self.a

    def reward(self, r: float) -> None:
        advantage = max(-3.0, min(3.0, (r - self.mean) / max(math.sqrt(self.var), 1e-6))) if self.var else 0.0
        decay = self.scheduler.baseline_decay
        self.var = decay * self.var + (1 - decay) * (r - self.mean) ** 2
        self.mean = decay * self.mean + (1 - decay) * r
        sigma = self.log_sigma.exp().clamp(0.05, 0.7)
        log_pi = -0.5 * ((self.a - self.omega @ self.s) / sigma) ** 2 - sigma.log()
        self.adam.zero_grad()
        (-(advantage * log_pi + self.scheduler.entropy_bonus * sigma.log())).backward()
        self.adam.step()

    def learn(self, loss, c, lam, eta0, beta1):
        self.count, self.losses = self.count + 1, [*self.losses, loss][-self.HOLD :]
        if self.count % self.HOLD == 0:
            now = statistics.fmean(self.losses)
            if self.last is not None:
                drop = (self.last - now) / max(abs(self.last), 1e-8)
                self.reward(drop)
                self.trend = math.tanh(drop)
            self.last = now

    def state(self):
        return {
            "log_eta": self.log_eta,
            "omega": self.omega.detach(),
            "log_sigma": self.log_sigma.detach(),
            "adam": self.adam.state_dict(),
            "generator": self.generator.get_state(),
            "s": self.s,
            **{k: getattr(self, k) for k in ("a", "count", "losses", "last", "trend", "mean", "var")},
        }

    def restore(self, state):
        state = dict(state)
        with torch.no_grad():
            self.omega.copy_(state.pop("omega"))
            self.log_sigma.copy_(state.pop("log_sigma"))
        self.adam.load_state_dict(state.pop("adam"))
        self.generator.set_state(state.pop("generator"))
        self.__dict__.update(state)


class Salelr(Fixed):
    """salelr_reconstructed: eta = eta_0 S_t / median(S), S the range of the loss under a probe of +-rho u."""

    RHO, wants_range = 1e-3, True

    def __post_init__(self):
        self.ranges = []

    def ranged(self, s: float) -> None:
        self.ranges = [*self.ranges, s][-50:]
        middle = statistics.median(self.ranges)
        self.log_eta = min(max(math.log(max(s, 1e-12) / max(middle, 1e-12)), pl.LOG_ETA[0]), pl.LOG_ETA[1])

    def state(self):
        return {"log_eta": self.log_eta, "ranges": self.ranges}


class Bats(Fixed):
    """bats_reconstructed: token weights from bins between running quantiles of the previous steps' token losses."""

    QUANTILES = (0.25, 0.5, 0.75)

    def __post_init__(self):
        self.edges = None

    def weights(self, losses: Tensor) -> Tensor:
        """(K,) mean 1, rising with the bin, with GRAFF's clip; all 1 before the first step."""
        if self.edges is None:
            return torch.ones_like(losses)
        place = torch.bucketize(losses.detach(), self.edges.to(losses))
        return pl.token_weights(1.0, (place.to(losses) - 1.5) / 1.5)[0]

    def after(self, losses: Tensor) -> None:
        found = torch.quantile(losses.detach().float().cpu(), torch.tensor(self.QUANTILES))
        self.edges = found if self.edges is None else 0.9 * self.edges + 0.1 * found

    def state(self):
        return {"edges": self.edges}


class Graff(Fixed):
    """The planner. `frozen`: no outer step; `encoder_lr`: the warm start's, which learns the encoder too."""

    wants_entropy = True

    def __init__(self, scheduler, layers: int, encoder_lr: float | None = None):
        super().__init__(scheduler, layers)
        self.planner = pl.Planner()
        self.outer = None if scheduler.frozen else pl.Outer(self.planner, scheduler.outer_lr, encoder_lr)
        self.edge = pl.edges(layers, scheduler.graph)
        self.h, self.kept = torch.zeros(2 * layers, pl.WIDTH), None
        self.wants_gradient = not scheduler.frozen
        self.wants_secant = scheduler.guard != "off" or scheduler.graph
        self.loss_weights = self.wants_probe = scheduler.token_weights

    def decide(self, seen):
        n, remaining = 2 * self.layers, 1 - seen.fraction if self.scheduler.budget_feature else 0.0
        layer = torch.arange(n) // 2 / max(1, self.layers - 1)
        x = torch.stack(
            [seen.log_lambda, torch.full((n,), seen.entropy), torch.full((n,), remaining), layer, torch.arange(n) % 2],
            1,
        ).float()
        self.pending = (x, self.h, self.edge)
        with torch.no_grad():
            plan, self.h = self.planner(*self.pending)
        return plan if self.loss_weights else plan._replace(a=torch.tensor(0.0))

    def learn(self, loss, c, lam, eta0, beta1):
        # self.kept: what the plan of the LAST step was made of, whose effect this batch's gradient tells
        if self.outer and c is not None and self.kept is not None:
            h = self.outer.step(self.kept, c)
            edge = pl.edge_of_stability(self.scheduler.guard, self.scheduler.stability_guard or BOUND, beta1)
            if lam > 0 and math.isfinite(edge):
                self.log["projected"] = pl.project(self.planner.decoder, h, math.log(edge / (lam * eta0)))
            self.log["gain"] = float(h.mean(0).abs().sum()) + 1
        self.kept = self.pending

    def cap(self, lam, beta1):
        edge = pl.edge_of_stability(self.scheduler.guard, self.scheduler.stability_guard or BOUND, beta1)
        return edge / lam if lam > 0 else math.inf

    def state(self):
        return {
            "planner": self.planner.state_dict(),
            "outer": self.outer.adam.state_dict() if self.outer else None,
            "h": self.h,
            "kept": self.kept,
            "pending": getattr(self, "pending", None),
        }

    def restore(self, state):
        self.planner.load_state_dict(state["planner"])
        if self.outer:
            self.outer.adam.load_state_dict(state["outer"])
        self.h, self.kept, self.pending = state["h"], state["kept"], state["pending"]


KINDS = {
    "fixed": Fixed,
    "cosine": Cosine,
    "hypergradient": Hypergradient,
    "reactor": Reactor,
    "graff": Graff,
    "salelr_reconstructed": Salelr,
    "bats_reconstructed": Bats,
    "schedulefree": Fixed,
    "prodigy": Fixed,
}


def make(scheduler, layers: int) -> Fixed:
    return KINDS[scheduler.type](scheduler, layers)
