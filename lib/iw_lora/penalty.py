"""The method: how sensitive the task loss is to each frozen matrix under a LoRA pair, the weights made of it, and the
extra L2 term.

    s_k = (1/N) sum_b || dL_b / dW_k ||_F        over N calibration batches b, L_b the batch-mean loss
    w_k = s_k / sum_j s_j
    R = sum_k c_k || Delta_k ||_F^2              Delta_k = scaling B_k A_k, c_k = (1 - w_k)^beta

Norms are averaged, not their squares. W_k is the frozen base weight: lora_A's own gradient is exactly zero at LoRA's
initialization (B = 0) and tells nothing.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lib import models, record
from lib.errors import StudyError


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of every layer with a LoRA pair, in the model's order."""
    layers = model.named_modules()
    return {name: layer for name, layer in layers if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")}


# ---- sensitivities


def product_norm(g: Tensor, x: Tensor) -> Tensor:
    """|| G^T X ||_F of G (n, d_out) and X (n, d_in); where the n rows are few, from their Gram matrices, since
    || G^T X ||_F^2 = < G G^T, X X^T >."""
    if len(g) * (g.shape[1] + x.shape[1]) < g.shape[1] * x.shape[1]:
        return ((g @ g.T) * (x @ x.T)).sum().clamp_min(0).sqrt()
    return (g.T @ x).norm()


def quantized_norms(layers: list[nn.Module], loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """`loss()` and || dL/dW_k ||_F (K,) of base matrices that take no gradient (4-bit), from what goes into each and the
    gradient of what comes out. A matrix that runs more than once has its calls laid end to end."""
    calls: list[tuple[int, Tensor, Tensor]] = []

    def keep(k: int, _module, inputs: tuple, output: Tensor) -> None:
        calls.append((k, inputs[0].detach(), output if output.requires_grad else output.requires_grad_()))

    with contextlib.ExitStack() as hooks:
        for k, layer in enumerate(layers):
            hooks.callback(layer.base_layer.register_forward_hook(partial(keep, k)).remove)
        value = loss()
    gradients = torch.autograd.grad(value, [output for _, _, output in calls])
    norms = torch.zeros(len(layers))
    for k in range(len(layers)):
        pairs = [(g.flatten(0, -2), x.flatten(0, -2)) for (i, x, _), g in zip(calls, gradients, strict=True) if i == k]
        g, x = (torch.cat(side).float() for side in zip(*pairs, strict=True))
        norms[k] = product_norm(g, x)
    return value, norms


def gradient_norms(
    model: nn.Module, batches: Iterable, loss: Callable[[nn.Module, dict], Tensor]
) -> tuple[Tensor, int]:
    """(|| dL_b / dW_k ||_F as (N, K) in float32, number of batches left out because they were not finite), in the order
    of `lora_layers`; evaluation mode. Modes, flags, gradients and random state are left as they were."""
    layers = list(lora_layers(model).values())
    weights = [layer.base_layer.weight for layer in layers]
    quantized = any(hasattr(w, "quant_state") for w in weights)
    models.keep_4bit_differentiable(model)
    flags, modes = [w.requires_grad for w in weights], [(module, module.training) for module in model.modules()]
    rows, skipped = [], 0
    try:
        model.eval()
        for weight in weights:
            weight.requires_grad_(not quantized)
        with torch.random.fork_rng([weights[0].device] if weights[0].is_cuda else []):
            for batch in record.batches("calibration", batches):
                if quantized:
                    value, norms = quantized_norms(layers, partial(loss, model, batch))
                else:
                    value = loss(model, batch)
                    gradients = torch.autograd.grad(value, weights)  # all uses of a shared projection are in its own
                    norms = torch.stack([g.float().norm().cpu() for g in gradients])
                if bool(torch.isfinite(value)) and bool(torch.isfinite(norms).all()):
                    rows.append(norms)
                else:
                    skipped += 1
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
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


# ---- the term


def squared_norm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """|| scaling B A ||_F^2 = scaling^2 tr((B^T B)(A A^T)) for A (r, d_in) and B (d_out, r), without forming B A."""
    return scaling**2 * ((b.T @ b) * (a @ a.T)).sum()


def lora_pairs(model: nn.Module) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(A, B, scaling) of every LoRA pair, in the order of `lora_layers`; of AdaLoRA's triplets B diag(E) A, diag(E) A is
    A. PEFT keeps them in float32."""
    for layer in lora_layers(model).values():
        a, b, scaling = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
        if isinstance(layer.lora_A, nn.ParameterDict):  # AdaLoRA's
            yield a * layer.lora_E["default"], b, scaling / (float(layer.ranknum["default"]) + 1e-5)
        else:
            yield a.weight, b.weight, scaling


def penalty(model: nn.Module, coefficients: Tensor, factors: bool = False) -> Tensor:
    """R outside autocast; `factors`: |A|^2 + |B|^2 in place of |Delta|^2."""
    pairs = lora_pairs(model)
    with torch.autocast(model.device.type, enabled=False):
        norms = [(a**2).sum() + (b**2).sum() if factors else squared_norm(a, b, scaling) for a, b, scaling in pairs]
        terms = torch.stack(norms)
        return (coefficients.to(terms) * terms).sum()


@torch.no_grad()
def delta_norms(model: nn.Module) -> list[float]:
    """|| Delta_k ||_F of every pair."""
    return [float(squared_norm(*pair).clamp_min(0).sqrt()) for pair in lora_pairs(model)]
