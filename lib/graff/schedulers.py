"""The schedulers: what each makes of the budget's fraction and what it has seen. One object per run, saved with it.

plan = scheduler.decide(seen)   eta / eta_0, multipliers per block, exponent of the token weights
scheduler.learn(...)            with the gradient of the fresh batch, before the step is taken
"""

import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib.graff import planner as pl

WARM_UP = 0.03  # of the budget, shared by all methods
EVERY = 10  # steps between secants and between token-weight probes
BOUND = 1.9  # of eta lambda, before Adam's factor
CONTROLLER_CLIP = 2.0  # of REACTOR's log eta


class Seen(NamedTuple):
    """What a scheduler may know when it decides."""

    fraction: float  # of the budget that is used
    entropy: float  # mean over the batch's label tokens, over log |V'|
    log_lambda: Tensor  # (N,) less its running mean, clipped to +-2; 0 before the first secant


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


class Fixed:
    """eta_0 throughout. `section`: training.scheduler of the run. What a subclass `wants` is computed for it; whatever it
    keeps besides NOT_STATE is in a checkpoint, of modules and optimizers their state."""

    NOT_STATE = ("section", "layers", "idea", "outer")  # the parts of `outer` are `planner` and `adam`
    wants_gradient = wants_secant = wants_probe = wants_entropy = wants_range = False

    def __init__(self, section, layers: int):
        self.section, self.layers, self.log_eta = section, layers, 0.0
        self.log: dict = {}  # more columns for the history

    def decide(self, seen: Seen) -> pl.Plan:
        return pl.Plan(torch.tensor(self.log_eta), torch.zeros(2 * self.layers), torch.tensor(0.0))

    def learn(self, loss: float, c: tuple | None, lam: float, eta0: float, beta1: float) -> None:
        """After the backward pass: the loss, the cotangents (c_eta, c, c_a) or None, the largest curvature seen."""

    def token_weights(self, plan: pl.Plan, losses: Tensor, z: Tensor) -> Tensor:
        """(K,) weights, mean 1, of the label tokens' `losses` (K,), whose standardized entropies are z (K,)."""
        return torch.ones_like(losses)

    def after(self, losses: Tensor) -> None:
        """After the step: the token losses (K,) of its whole batch."""

    def cap(self, lam: float, beta1: float) -> float:
        """The largest eta that may be applied."""
        return math.inf

    def work(self, trained: int) -> float:
        """Multiplications per step of the planner and of learning it, with `trained` adapter weights."""
        return 0.0

    def state(self) -> dict:
        values = {name: x for name, x in vars(self).items() if name not in self.NOT_STATE}
        return {name: x.state_dict() if hasattr(x, "state_dict") else x for name, x in values.items()}

    def restore(self, state: dict) -> None:
        for name, value in state.items():
            if hasattr(getattr(self, name), "state_dict"):
                getattr(self, name).load_state_dict(value)
            else:
                setattr(self, name, value)


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
    m, v, count = 0.0, 0.0, 0

    def learn(self, loss, c, lam, eta0, beta1):
        if c is None:
            return
        g, self.count = float(c[0]), self.count + 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        step = self.m / (1 - 0.9**self.count) / (math.sqrt(self.v / (1 - 0.999**self.count)) + 1e-8)
        self.log_eta = clamp(self.log_eta - self.gain * self.section.outer_lr * step, *pl.LOG_ETA)
        self.log["gain"] = self.gain


class Reactor(Fixed):
    """REACTOR as reconstructed from its one-line description: REINFORCE over log eta, held for 5 steps."""

    HOLD, wants_entropy = 5, True

    def __init__(self, section, layers: int):
        super().__init__(section, layers)
        self.policy = nn.ParameterDict({"omega": torch.zeros(4), "log_sigma": torch.tensor(math.log(0.3))})
        self.adam = torch.optim.Adam(self.policy.values(), lr=self.section.controller_lr)
        self.random_state = torch.Generator().manual_seed(torch.initial_seed()).get_state()  # the member's
        self.s, self.a, self.count, self.losses, self.last, self.mean, self.var = None, 0.0, 0, [], None, 0.0, 0.0
        self.trend = 0.0  # tanh of the last window's relative loss drop

    def decide(self, seen):
        if self.count % self.HOLD == 0:
            self.act(torch.tensor([1.0, 1 - seen.fraction, self.trend, seen.entropy]))
        self.log_eta = clamp(self.a, -CONTROLLER_CLIP, CONTROLLER_CLIP)
        return super().decide(seen)

    @torch.no_grad()
    def act(self, s: Tensor) -> float:
        """Draw log eta from the policy in state `s` (4,)."""
        generator = torch.Generator().set_state(self.random_state)
        sigma = float(self.policy["log_sigma"].exp().clamp(0.05, 0.7))
        self.s, self.a = s, float(self.policy["omega"] @ s + sigma * torch.randn((), generator=generator))
        self.random_state = generator.get_state()
        return self.a

    def reward(self, r: float) -> None:
        """One policy-gradient step for the last action's reward, with a running baseline."""
        advantage = clamp((r - self.mean) / max(math.sqrt(self.var), 1e-6), -3.0, 3.0) if self.var else 0.0
        decay = self.section.baseline_decay
        self.var = decay * self.var + (1 - decay) * (r - self.mean) ** 2
        self.mean = decay * self.mean + (1 - decay) * r
        sigma = self.policy["log_sigma"].exp().clamp(0.05, 0.7)
        log_pi = -0.5 * ((self.a - self.policy["omega"] @ self.s) / sigma) ** 2 - sigma.log()
        self.adam.zero_grad()
        (-(advantage * log_pi + self.section.entropy_bonus * sigma.log())).backward()
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


class Salelr(Fixed):
    """salelr_reconstructed: eta = eta_0 S_t / median(S), S the range of the loss under a probe of +-rho u."""

    RHO, wants_range = 1e-3, True
    ranges = ()

    def observe_range(self, s: float) -> None:
        self.ranges = [*self.ranges, s][-50:]
        middle = statistics.median(self.ranges)
        self.log_eta = clamp(math.log(max(s, 1e-12) / max(middle, 1e-12)), *pl.LOG_ETA)


class Bats(Fixed):
    """bats_reconstructed: token weights from bins between running quantiles of the previous steps' token losses."""

    QUANTILES, edges = (0.25, 0.5, 0.75), None

    def token_weights(self, plan, losses, z):
        """Rising with the bin, with GRAFF's clip; all 1 before the first step."""
        if self.edges is None:
            return torch.ones_like(losses)
        place = torch.bucketize(losses.detach(), self.edges.to(losses))
        return pl.token_weights(1.0, (place.to(losses) - 1.5) / 1.5)[0]

    def after(self, losses):
        now = torch.quantile(losses.detach().float().cpu(), torch.tensor(self.QUANTILES))
        self.edges = now if self.edges is None else 0.9 * self.edges + 0.1 * now


class Graff(Fixed):
    """The planner. `frozen`: no outer step; `encoder_lr`: the warm start's, which learns the encoder too."""

    wants_entropy = True

    def __init__(self, section, layers: int, encoder_lr: float | None = None):
        super().__init__(section, layers)
        self.planner = pl.Planner()
        self.outer = None if section.frozen else pl.Outer(self.planner, section.outer_lr, encoder_lr)
        self.adam = self.outer.adam if self.outer else None
        self.edges = pl.edges(layers, section.graph)
        self.h = torch.zeros(2 * layers, pl.WIDTH)
        # inputs of this step's plan, and of the last one's, whose effect this batch's gradient shows
        self.pending = self.kept = None
        self.wants_gradient = not section.frozen
        self.wants_secant = section.guard != "off" or section.graph
        self.wants_probe = section.token_weights

    def decide(self, seen):
        remaining = 1 - seen.fraction if self.section.budget_feature else 0.0
        self.pending = (pl.features(seen.log_lambda, seen.entropy, remaining), self.h, self.edges)
        with torch.no_grad():
            plan, self.h = self.planner(*self.pending)
        return plan if self.wants_probe else plan._replace(a=torch.tensor(0.0))

    def learn(self, loss, c, lam, eta0, beta1):
        if self.outer and c is not None and self.kept is not None:
            h = self.outer.step(self.kept, c)
            edge = self.edge_of_stability(beta1)
            if lam > 0 and math.isfinite(edge):
                self.log["projected"] = pl.project(self.planner.decoder, h, math.log(edge / (lam * eta0)))
            self.log["gain"] = float(h.mean(0).abs().sum()) + 1
        self.kept = self.pending

    def token_weights(self, plan, losses, z):
        return pl.token_weights(float(plan.a), z)[0] if self.wants_probe else torch.ones_like(losses)

    def work(self, trained):
        """A forward of the planner per block and, with learning, its replay: three times a forward with backward."""
        return 2 * self.layers * 3000 * (4 if self.outer else 1) + (trained if self.outer else 0)

    def edge_of_stability(self, beta1: float) -> float:
        return pl.edge_of_stability(self.section.guard, self.section.stability_guard or BOUND, beta1)

    def cap(self, lam, beta1):
        return self.edge_of_stability(beta1) / lam if lam > 0 else math.inf


class Given(Fixed):
    """A function of the user's own, called before each step: idea(fraction, state) -> multiplier of eta_0, 1e-4 at the
    least. `state` is a dictionary of its own, kept in checkpoints, with the number of steps taken (`step`) and the loss
    of the last one (`loss`, None before it)."""

    def __init__(self, section, layers: int, idea):
        self.idea, self.memory = idea, {"step": 0, "loss": None}
        super().__init__(section, layers)

    def decide(self, seen):
        self.log_eta = math.log(max(1e-4, self.multiplier(seen.fraction)))
        return super().decide(seen)

    def multiplier(self, fraction: float) -> float:
        found = self.idea(fraction, self.memory)
        if not (isinstance(found, int | float | Tensor) and 0 <= float(found) < math.inf):
            raise ValueError(f"returns {found!r} at fraction {fraction:g}; expected a finite number, 0 or above")
        return float(found)

    def learn(self, loss, c, lam, eta0, beta1):
        self.memory |= {"step": self.memory["step"] + 1, "loss": loss}


SCHEDULERS = {
    "fixed": Fixed,
    "cosine": Cosine,
    "hypergradient": Hypergradient,
    "reactor": Reactor,
    "graff": Graff,
    "salelr_reconstructed": Salelr,
    "bats_reconstructed": Bats,
}
