"""What a step looks at in the model: token losses, entropies, the secant on one micro-batch, probes along a
direction."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.graff import methods, planner as pl

BLOCK = re.compile(r"\.layers\.(\d+)\.(self_attn|mlp)\.")


def blocks_of(names: Iterable[str]) -> Tensor:
    """(P,) the block of each trained tensor: 2 layer + (1 for mlp)."""
    found = [BLOCK.search(name) for name in names]
    return torch.tensor([2 * int(f.group(1)) + (f.group(2) == "mlp") for f in found])


class Probes:
    """Around one model with adapters; `frequent` (V',) are the vocabulary rows that entropies are over."""

    def __init__(self, model, frequent: Tensor, subset_share: float):
        self.base: PreTrainedModel = model.get_base_model()
        self.named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.blocks = blocks_of(n for n, _ in self.named)
        self.layers, self.subset_share = self.base.config.num_hidden_layers, subset_share
        self.frequent = frequent.to(self.base.device)
        self.size = sum(p.numel() for p in model.parameters())
        self.hidden: Tensor | None = None
        self.base.model.layers[0].register_forward_hook(self._keep)
        # logits_to_keep hands the head a slice; in bfloat16 on a CPU that takes a hundred times as long as a copy of it
        copy = torch.contiguous_format
        self.base.get_output_embeddings().register_forward_pre_hook(
            lambda _, given: (given[0].clone(memory_format=copy),)
        )

    def _keep(self, _module, _inputs, output) -> None:
        self.hidden = (output[0] if isinstance(output, tuple) else output).detach()

    @property
    def parameters(self) -> list[Tensor]:
        return [p for _, p in self.named]

    # ---- what the probes cost on the virtual clock, in units (forward passes of a token)

    def entropy_units(self, inputs: dict, wanted: bool) -> float:
        share = len(self.frequent) * self.base.config.hidden_size / self.size
        return share * int((inputs["labels"] != -100).sum()) if wanted else 0.0

    def planner_units(self, method) -> float:
        """A forward of the planner per block and, with learning, its replay; three times a forward with backward."""
        if not isinstance(method, methods.Graff):
            return 0.0
        trained = sum(p.numel() for p in self.parameters)
        return (2 * self.layers * 3000 * (4 if method.outer else 1) + (trained if method.outer else 0)) / self.size

    # ---- the loss, token by token

    def token_losses(self, model, inputs: dict, entropies: bool) -> tuple[Tensor, Tensor, float]:
        """((K,) losses of the label tokens in nats, (K,) standardised entropies, mean entropy over log |V'|)."""
        labels = inputs["labels"][:, 1:]
        start = int((labels != -100).any(0).int().argmax())  # no logits where every row has its prompt
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=labels.shape[1] + 1 - start,
        ).logits[:, :-1]
        labels = labels[:, start:]
        there = labels != -100
        exact = torch.promote_types(logits.dtype, torch.float32)
        losses = nn.functional.cross_entropy(logits[there].to(exact), labels[there], reduction="none")
        h = self.entropy(self.hidden[:, start:-1][there]) if entropies else None
        if h is None:
            return losses, torch.zeros_like(losses), 0.0
        z = (h - h.mean()) / h.std().clamp_min(1e-6)
        return losses, z, float(h.mean() / torch.log(torch.tensor(float(len(self.frequent)))))

    @torch.no_grad()
    def entropy(self, hidden: Tensor) -> Tensor:
        """(K,) entropy in nats of lm_head(norm(hidden)) over the frequent rows."""
        head = self.base.get_output_embeddings().weight[self.frequent]
        log_p = (self.base.model.norm(hidden).to(head.dtype) @ head.T).float().log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    # ---- two gradients of the same micro-batch

    def before_last_micro(self, model) -> None:
        """Remember the sum of gradients so far and the dropout's state, for `secant`."""
        self.so_far = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]
        self.rng = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def secant(self, model, held: tuple, optimizer, m: Tensor) -> tuple[Tensor, float]:
        """(lambda per block (N,), global lambda) from the last micro-batch at theta_t (its share of the summed
        gradient) and at theta_{t+1}, with the same dropout mask and weights."""
        inputs, w, _, tokens = held
        first = [p.grad if s is None else p.grad - s for p, s in zip(self.parameters, self.so_far, strict=True)]
        with torch.random.fork_rng():
            torch.set_rng_state(self.rng[0])
            torch.cuda.set_rng_state_all(self.rng[1])  # a GPU's dropout draws from its own generator
            losses = self.token_losses(model, inputs, False)[0]
            second = torch.autograd.grad((w * losses).sum() / tokens, self.parameters)
        y = torch._foreach_sub(list(second), first)
        share = tokens / len(losses)  # the micro-batch's own mean, not its part of the global batch
        return pl.curvature(optimizer.delta, torch._foreach_mul(y, share), optimizer.p, m, self.blocks)

    @torch.no_grad()
    def along(self, model, inputs: dict, direction: list[Tensor], size: float) -> Tensor:
        """(K,) token losses at theta + size * direction; the parameters come back bit for bit."""
        before = [p.detach().clone() for p in self.parameters]
        torch._foreach_add_(self.parameters, direction, alpha=size)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses = self.token_losses(model, inputs, False)[0]
        for p, old in zip(self.parameters, before, strict=True):
            p.copy_(old)
        return losses

    def token_credit(self, model, credit: dict, g: list[Tensor]) -> float:
        """c_a by a central difference along v = m J g of the held micro-batch's token losses."""
        v = torch._foreach_mul(credit["jacobian"], g)
        norm = float(torch.stack(torch._foreach_norm(v)).norm())
        if not norm > 0:
            return 0.0
        size = 1e-2 / norm  # the step that rounding and curvature leave most digits at, in float32
        slopes = (self.along(model, credit["inputs"], v, size) - self.along(model, credit["inputs"], v, -size)) / (
            2 * size
        )
        return float(pl.token_credit(credit["eta"], pl.token_weights(credit["a"], credit["z"])[1], slopes))

    def range(self, model, inputs: dict, optimizer, rho: float) -> float:
        """Largest less smallest mean loss at theta and theta +- rho u / |u|, for salelr_reconstructed."""
        size = rho * float(torch.stack(torch._foreach_norm(self.parameters)).norm())
        size /= max(float(torch.stack(torch._foreach_norm(optimizer.u)).norm()), 1e-30)
        found = [float(self.along(model, inputs, optimizer.u, x).mean()) for x in (0.0, size, -size)]
        return max(found) - min(found)
