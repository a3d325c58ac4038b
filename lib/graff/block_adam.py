"""AdamW with one multiplier per block, in the order the planner needs: direction first, then the step, both kept."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.graff import planner


class BlockAdam(torch.optim.Optimizer):
    """delta = - eta m_i u; u = bias-corrected Adam direction of the clipped gradient + weight decay. With m = 1 it is
    AdamW."""

    def __init__(
        self,
        parameters,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        blocks: Tensor,
        n: int,
        clip: float,
    ):
        super().__init__(
            list(parameters), {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8, "count": 0}
        )
        self.blocks, self.n, self.clip = blocks, n, clip
        self.eta, self.m = lr, torch.ones(n)
        self.delta: list[Tensor] | None = None  # of the last step, for the hypergradient of the next
        self.before: list[Tensor] | None = None
        self.keep = False  # whether the next step keeps what a secant, a probe and a hypergradient need

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
        norm = torch.nn.utils.get_total_norm([p.grad for p in ps])
        self.coefficient = float(torch.clamp(self.clip / (norm + 1e-6), max=1.0))
        g = torch._foreach_mul([p.grad for p in ps], self.coefficient)
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
        return [
            m[b]
            * self.coefficient
            * planner.adam_jacobian(
                g, self.state[p]["m"] / k1, self.state[p]["v"] / k2, k1, k2, *group["betas"], group["eps"]
            )
            for p, g, b in zip(self.parameters, self.g, self.blocks.tolist(), strict=True)
        ]
