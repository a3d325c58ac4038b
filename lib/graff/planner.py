"""The planner of GRAFF, how it learns, and the Adam whose step it plans.

Notation, here and in train.ipynb: eta learning rate, m_i multiplier of block i, a exponent of the token weights, u
Adam direction, g gradient of the next fresh batch, delta = -eta m u. N blocks, P trained tensors (arguments named `g`,
`delta`, `s`, `y` are lists of P tensors, `blocks` the block of each). Tensor mathematics: no model, no clock.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

LOG_ETA = (-math.log(100), math.log(30))
LOG_M, WIDTH, FEATURES = math.log(4), 16, 5


class Plan(NamedTuple):
    log_eta: Tensor  # () log of eta / eta_0
    log_m: Tensor  # (N,) centered over blocks
    a: Tensor  # () in [-1, 1]


def edges(layers: int, graph: bool = True) -> Tensor:
    """(2, E) source and target: self, same kind at layer +-1, other kind at the same layer. Block = 2 layer + kind."""
    pairs = [(i, i) for i in range(2 * layers)]
    if graph:
        pairs += [(i, j) for i in range(2 * layers) for j in (i - 2, i + 2, i ^ 1) if 0 <= j < 2 * layers]
    return torch.tensor(pairs).T


class Bounded(torch.autograd.Function):
    """clamp whose gradient passes unless descent would go further out: clamp's own is 0 beyond the bound, so that a
    value that once ran out never came back."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.out = (x <= low).to(x.dtype) - (x >= high).to(x.dtype)  # 1 below, -1 above
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient.masked_fill(gradient * ctx.out > 0, 0.0), None, None


class Planner(nn.Module):
    """About 3k parameters whose sizes do not depend on N. The decoder starts at 0, so that step 0 is exactly eta_0."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, WIDTH)
        self.messages = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.memory = nn.GRUCell(WIDTH, WIDTH)
        self.decoder = nn.Linear(WIDTH, 3)  # W and b; rows: log eta, log m, a
        nn.init.zeros_(self.decoder.weight)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor, h: Tensor, edge: Tensor) -> tuple[Plan, Tensor]:
        """Features (N, 5) and state (N, 16) -> the plan and the next state."""
        source, target = edge
        z = torch.tanh(self.encoder(x))
        degree = torch.zeros(len(x), 1, dtype=x.dtype).index_add(0, target, torch.ones(len(target), 1, dtype=x.dtype))
        for message in self.messages:
            sent = torch.tanh(message(torch.cat([z[source], z[target]], -1)))
            z = z + torch.zeros_like(z).index_add(0, target, sent) / degree
        h = self.memory(z, h)
        log_eta, _, a = self.decoder(h.mean(0))
        log_m = self.decoder(h)[:, 1]
        log_m = Bounded.apply(log_m - log_m.mean(), -LOG_M, LOG_M)
        return Plan(Bounded.apply(log_eta, *LOG_ETA), log_m, Bounded.apply(a, -1.0, 1.0)), h


def features(log_lambda: Tensor, entropy: float, remaining: float) -> Tensor:
    """(N, 5) what the planner reads of each block: curvature, entropy, remaining budget, depth, kind."""
    n = len(log_lambda)
    depth = torch.arange(n) // 2 / max(1, n // 2 - 1)
    columns = [log_lambda, torch.full((n,), entropy), torch.full((n,), remaining), depth, torch.arange(n) % 2]
    return torch.stack(columns, 1).float()


# ---- hypergradients: how the next loss depends on the last plan


def block_sums(x: list[Tensor], y: list[Tensor], blocks: Tensor, n: int) -> Tensor:
    """(N,) inner products <x, y> summed per block."""
    dots = torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(x, y, strict=True)])
    return torch.zeros(n, dtype=dots.dtype, device=dots.device).index_add(0, blocks.to(dots.device), dots).cpu()


def token_weights(a: Tensor | float, z: Tensor) -> tuple[Tensor, Tensor]:
    """(w, dw/da) of w_k = exp(a z_k) / mean exp(a z); z (K,) the standardized entropies."""
    w = torch.exp(a * z)
    w = w / w.mean()
    return w, w * (z - (w * z).mean())


def token_credit(eta: float, dw: Tensor, slopes: Tensor) -> Tensor:
    """c_a = -eta (1/K) sum_k (dw_k/da) <grad l_k, v>; slopes (K,) are the <grad l_k, v> with v = m J g."""
    return -eta * (dw * slopes).mean()


def adam_jacobian(g: Tensor, m_hat: Tensor, v_hat: Tensor, corrections: tuple, betas: tuple, eps: float) -> Tensor:
    """J = du/dg, elementwise, of u = m_hat / (sqrt(v_hat) + eps); `corrections`: k1, k2 of the bias."""
    (k1, k2), (b1, b2) = corrections, betas
    root = v_hat.sqrt().clamp_min(eps * 1e-4)
    p = root + eps
    return (1 - b1) / k1 / p - m_hat / p**2 * ((1 - b2) / k2) * g / root


def cotangents(
    c: Tensor, c_a: float, g: list[Tensor], delta: list[Tensor], norm: str, weight: float
) -> tuple[Tensor, ...]:
    """(c_eta, c, c_a), divided by |g| |delta| (`cos`) and weighted by regret's weight."""
    scale = weight
    if norm == "cos":
        scale = weight / max(float(nn.utils.get_total_norm(g) * nn.utils.get_total_norm(delta)), 1e-30)
    return c.sum() * scale, c * scale, torch.tensor(c_a * scale, dtype=c.dtype)


class Outer:
    """The outer Adam: trains W alone online (the encoder collapses otherwise), all of it in the warm start, where what
    lies before W has the rate `encoder_lr`: at W's own the states h_i run into +-1 alike, and no multiplier can differ
    any more."""

    def __init__(self, planner: Planner, lr: float, encoder_lr: float | None = None):
        groups = [{"params": list(planner.decoder.parameters()), "lr": lr}]
        if encoder_lr is not None:
            rest = [p for name, p in planner.named_parameters() if not name.startswith("decoder")]
            groups.append({"params": rest, "lr": encoder_lr})
        self.planner, self.adam = planner, torch.optim.Adam(groups)

    def step(self, kept: tuple[Tensor, Tensor, Tensor], gradients: tuple[Tensor, ...]) -> Tensor:
        """Replay the planner on the inputs (x, h, edges) it was given, send the hypergradients through it, take one
        step; returns h."""
        plan, h = self.planner(*kept)
        self.adam.zero_grad()
        torch.autograd.backward(list(plan), list(gradients))
        self.adam.step()
        return h.detach()


def gain(planner: Planner, layers: int, steps: int = 100) -> float:
    """Mean |(mean h, 1)|_1 over a budget of `steps` with neutral features: what one outer step of W multiplies by
    outer_lr."""
    edge, h, total = edges(layers), torch.zeros(2 * layers, WIDTH), 0.0
    with torch.no_grad():
        for step in range(steps):
            h = planner(features(torch.zeros(2 * layers), 0.5, 1 - step / steps), h, edge)[1]
            total += float(h.mean(0).abs().sum()) + 1
    return total / steps


# ---- curvature and the stability guard


def curvature(s: list[Tensor], y: list[Tensor], p: list[Tensor], m: Tensor, blocks: Tensor) -> tuple[Tensor, float]:
    """Per block (N,) and global lambda of the Adam-preconditioned Hessian, from the secant y of step s on the SAME
    batch."""
    n = len(m)
    top = m * block_sums(y, torch._foreach_div(y, p), blocks, n).to(m)
    bottom = block_sums(s, torch._foreach_mul(s, p), blocks, n).to(m) / m
    return (top / bottom.clamp_min(1e-30)).sqrt(), float((top.sum() / bottom.sum().clamp_min(1e-30)).sqrt())


def edge_of_stability(guard: str, bound: float, beta1: float) -> float:
    """The largest eta lambda: 1.9 (1 + b1)/(1 - b1) for Adam, the bare bound for `literal`, none for `off`."""
    return {"adam": bound * (1 + beta1) / (1 - beta1), "literal": bound, "off": math.inf}[guard]


def project(decoder: nn.Linear, h: Tensor, c: float) -> float:
    """Move (W_0, b_0) onto W_0 . mean h + b_0 <= c where it lies beyond; returns the distance moved."""
    ht = torch.cat([h.mean(0), torch.ones(1, dtype=h.dtype)])
    with torch.no_grad():
        beyond = float(torch.cat([decoder.weight[0], decoder.bias[:1]]) @ ht) - c
        if not beyond > 0:
            return 0.0
        step = beyond / float(ht @ ht) * ht
        decoder.weight[0] -= step[:-1]
        decoder.bias[0] -= step[-1]
    return beyond / float(ht.norm())


class BlockAdam(torch.optim.Optimizer):
    """AdamW with one multiplier per block: delta = -eta m_i u, u the bias-corrected Adam direction of the clipped
    gradient plus weight decay. The direction and the step are kept for the planner. With m = 1 it is AdamW."""

    def __init__(self, parameters, lr: float, betas, weight_decay: float, blocks: Tensor, n: int, clip: float):
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "eps": 1e-8, "count": 0}
        super().__init__(list(parameters), defaults)
        self.blocks, self.n, self.clip = blocks, n, clip
        self.eta, self.m = lr, torch.ones(n)
        self.delta: list[Tensor] | None = None  # of the last step, for the hypergradient of the next

    @property
    def parameters(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters]

    @torch.no_grad()
    def step(self, closure=None):
        group, ps = self.param_groups[0], self.parameters
        (b1, b2), eps = group["betas"], group["eps"]
        group["count"] += 1
        for p in ps:
            if not self.state[p]:
                self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        norm = torch.nn.utils.get_total_norm(self.gradients())
        self.coefficient = float(torch.clamp(self.clip / (norm + 1e-6), max=1.0))
        g = torch._foreach_mul(self.gradients(), self.coefficient)
        m, v = ([self.state[p][k] for p in ps] for k in "mv")
        torch._foreach_lerp_(m, g, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, g, g, 1 - b2)
        k1, k2 = 1 - b1 ** group["count"], 1 - b2 ** group["count"]
        p_ = torch._foreach_sqrt(torch._foreach_div(v, k2))
        torch._foreach_add_(p_, eps)
        u = torch._foreach_div(torch._foreach_div(m, k1), p_)
        if group["weight_decay"]:
            torch._foreach_add_(u, ps, alpha=group["weight_decay"])
        factors = (-self.eta * self.m).tolist()
        self.delta = torch._foreach_mul(u, [factors[b] for b in self.blocks.tolist()])
        self.p, self.u, self.g, self.k = p_, u, g, (k1, k2)
        torch._foreach_add_(ps, self.delta)

    @torch.no_grad()
    def jacobian(self) -> list[Tensor]:
        """m J c of the last step, c the clipping coefficient: what the next gradient is multiplied by to give v."""
        group, (k1, k2), m = self.param_groups[0], self.k, self.m.tolist()
        out = []
        for p, g, b in zip(self.parameters, self.g, self.blocks.tolist(), strict=True):
            m_hat, v_hat = self.state[p]["m"] / k1, self.state[p]["v"] / k2
            out.append(m[b] * self.coefficient * adam_jacobian(g, m_hat, v_hat, self.k, group["betas"], group["eps"]))
        return out
