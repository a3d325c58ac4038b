"""The method: how sensitive the task loss is to each frozen matrix under a LoRA pair, the weights made of it, and the
extra L2 term.

    s_k = (1/N) sum_b || dL_b / dW_k ||_F        over N calibration batches b, L_b the batch-mean loss
    w_k = s_k / sum_j s_j
    R = sum_k c_k || Delta_k ||_F^2              Delta_k = scaling B_k A_k, c_k = (1 - w_k)^beta

Norms are averaged, not their squares. W_k is the frozen base weight: lora_A's own gradient is exactly zero at LoRA's
initialization (B = 0) and tells nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lib import record
from lib.errors import StudyError
from lib.training import preserve_rng


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of every layer with a LoRA pair, in the model's order."""
    layers = model.named_modules()
    return {name: layer for name, layer in layers if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")}


# ---- sensitivities


@contextmanager
def preserve_state(model: nn.Module):
    """Evaluation mode without gradients inside; afterwards modes, flags, gradients and random state are what they
    were."""
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    try:
        with preserve_rng(next(iter(flags)).device):
            model.eval()
            for parameter in flags:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
    finally:
        for parameter, (flag, gradient) in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in modes.items():
            module.training = mode


def gradient_norms(
    model: nn.Module, batches: Iterable, loss: Callable[[nn.Module, dict], Tensor]
) -> tuple[Tensor, int]:
    """(|| dL_b / dW_k ||_F as (N, K) in float32, number of batches left out because they were not finite), in the order
    of `lora_layers`; the model is left as it was."""
    weights = [layer.base_layer.weight for layer in lora_layers(model).values()]
    if not weights:
        raise StudyError("model.adapter", "no LoRA pair in the model", "an adapted matrix", "check target_modules")
    if any(hasattr(w, "ds_id") or type(w).__name__ == "DTensor" for w in weights):
        expected = "whole matrices: sensitivities cannot be read from shards"
        raise StudyError("compute.strategy", "sharded weights", expected, "strategy: none")
    rows, skipped = [], 0
    with preserve_state(model):
        norms = torch.zeros(len(weights))

        def read_norm(k: int):
            def hook(parameter: Tensor) -> None:
                norms[k] = parameter.grad.float().norm().cpu()  # all uses of a shared projection are in it
                parameter.grad = None

            return hook

        handles = [
            w.requires_grad_(True).register_post_accumulate_grad_hook(read_norm(k)) for k, w in enumerate(weights)
        ]
        try:
            for batch in record.batches("calibration", batches):
                norms.zero_()
                value = loss(model, batch)
                value.backward()
                if bool(torch.isfinite(value)) and bool(torch.isfinite(norms).all()):
                    rows.append(norms.clone())
                else:
                    skipped += 1
        finally:
            for handle in handles:
                handle.remove()
    return (torch.stack(rows) if rows else torch.zeros(0, len(weights))), skipped


def sensitivities(norms: Tensor, buffer: int | None = None) -> Tensor:
    """s (K,): the mean over batches of norms (N, K), over the last `buffer` of them where one is given.
    Raises StudyError where s is not finite or zero everywhere."""
    s = (norms[-buffer:] if buffer else norms).mean(0) if len(norms) else torch.full((norms.shape[1],), math.nan)
    if not bool(torch.isfinite(s).all()) or not bool((s > 0).any()):
        found, expected = "all zero" if bool((s == 0).all()) else "not finite", "finite gradients of the base weights"
        raise StudyError("sensitivities", found, expected, "look at the calibration batches' loss")
    return s


# ---- coefficients: what weights || Delta_k ||^2, (K,), from s (K,), beta and the member's seed


def importance(s: Tensor, beta: float, seed: int = 0) -> Tensor:
    """(1 - w_k)^beta: the study's formula. The mean is 1 - 1/K at beta = 1."""
    return (1 - s / s.sum()) ** beta


def below_largest(s: Tensor, beta: float, seed: int = 0) -> Tensor:
    """(1 - s_k / s_max)^beta: nothing on the most sensitive matrix."""
    return (1 - s / s.max()) ** beta


def inverse(s: Tensor, beta: float, seed: int = 0) -> Tensor:
    """(mean s / s_k)^beta over its mean."""
    ratio = (s.mean() / s.clamp_min(torch.finfo(s.dtype).tiny)) ** beta
    return ratio / ratio.mean()


def uniform(s: Tensor, beta: float, seed: int = 0) -> Tensor:
    """A control: importance's mean on every matrix."""
    return importance(s, beta).mean().expand_as(s).clone()


def shuffled(s: Tensor, beta: float, seed: int = 0) -> Tensor:
    """A control: importance's values on other matrices."""
    return importance(s, beta)[torch.randperm(len(s), generator=torch.Generator().manual_seed(seed))]


def ones(s: Tensor, beta: float, seed: int = 0) -> Tensor:
    """A control, for the penalty on the factors: |A|^2 + |B|^2, unweighted."""
    return torch.ones_like(s)


COEFFICIENTS = {
    "importance": importance,
    "max": below_largest,
    "inv_mean": inverse,
    "uniform": uniform,
    "shuffled": shuffled,
    "factor_l2": ones,
}


def rank_pattern(names: list[str], s: Tensor, rank: int) -> dict[str, int]:
    """A suggestion for PEFT's `rank_pattern`: K times `rank` shared out in proportion to s, at least 1 each."""
    share = s / s.sum() * rank * len(names)
    ranks = share.floor().clamp_min(1).int()
    for k in torch.argsort(share - share.floor(), descending=True)[: max(0, rank * len(names) - int(ranks.sum()))]:
        ranks[k] += 1
    return {name: int(r) for name, r in zip(names, ranks, strict=True)}


# ---- the term


def squared_norm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """|| scaling B A ||_F^2 = scaling^2 tr((B^T B)(A A^T)) for A (r, d_in) and B (d_out, r), without forming B A."""
    return scaling**2 * ((b.T @ b) * (a @ a.T)).sum()


def lora_pairs(model: nn.Module) -> list[tuple[Tensor, Tensor, float]]:
    """(A, B, scaling) of every LoRA pair, in the order of `lora_layers`. PEFT keeps A and B in float32."""
    return [
        (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
        for layer in lora_layers(model).values()
    ]


def penalty(model: nn.Module, coefficients: Tensor, factors: bool = False) -> Tensor:
    """R outside autocast; `factors`: |A|^2 + |B|^2 in place of |Delta|^2."""
    pairs = lora_pairs(model)
    with torch.autocast(pairs[0][0].device.type, enabled=False):
        norms = [(a**2).sum() + (b**2).sum() if factors else squared_norm(a, b, scaling) for a, b, scaling in pairs]
        terms = torch.stack(norms)
        return (coefficients.to(terms) * terms).sum()


@torch.no_grad()
def delta_norms(model: nn.Module) -> list[float]:
    """|| Delta_k ||_F of every pair, of AdaLoRA's triplets B diag(E) A too."""
    norms = []
    for layer in lora_layers(model).values():
        a, b, scaling = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
        if isinstance(layer.lora_A, nn.ParameterDict):  # AdaLoRA: parameters, with E between them
            a, scaling = a * layer.lora_E["default"], scaling / (float(layer.ranknum["default"]) + 1e-5)
        else:
            a, b = a.weight, b.weight
        norms.append(float(squared_norm(a.float(), b.float(), scaling).clamp_min(0).sqrt()))
    return norms
