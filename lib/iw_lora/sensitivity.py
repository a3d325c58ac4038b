"""How sensitive the task loss is to each frozen matrix under a LoRA pair, and the weights made of it.

    s_k = (1/N) sum_b || dL_b / dW_k ||_F        w_k = s_k / sum_j s_j

over N calibration batches b, L_b the batch-mean loss: norms are averaged, not their squares. W_k is the frozen base
weight. lora_A's own gradient is exactly zero at LoRA's initialisation (B = 0) and tells nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lib import record
from lib.errors import StudyError

KINDS = ("importance", "max", "inv_mean", "uniform", "shuffled", "factor_l2")


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of every layer with a LoRA pair, in the model's order."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    }


@contextmanager
def undisturbed(model: nn.Module):
    """Training mode, flags, gradients and random state are afterwards what they were."""
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    devices = [p.device for p in list(model.parameters())[:1] if p.device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices):
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
        random.setstate(python)
        np.random.set_state(numpy)


def gradient_norms(
    model: nn.Module, batches: Iterable, loss: Callable[[nn.Module, dict], Tensor]
) -> tuple[Tensor, int]:
    """(norms (N, K) in float32, skipped): one row per finite batch, in the order of `adapted`; the model is left as it
    was.

    Raises StudyError for sharded weights, where a gradient is only a part of the matrix's."""
    layers = adapted(model)
    weights = [layer.base_layer.weight for layer in layers.values()]
    if not weights:
        raise StudyError(
            "model.adapter", "no LoRA pair in the model", "at least one adapted matrix", "check target_modules"
        )
    if any(hasattr(w, "ds_id") or type(w).__name__ == "DTensor" for w in weights):
        raise StudyError(
            "compute.strategy",
            "sharded weights",
            "whole matrices: sensitivities cannot be read from shards",
            "strategy: none",
        )
    rows, skipped = [], 0
    with undisturbed(model):
        seen = torch.zeros(len(weights))

        def hook(k: int):
            def hook(parameter: Tensor) -> None:
                seen[k] = parameter.grad.float().norm().cpu()  # all uses of a shared projection are in it
                parameter.grad = None

            return hook

        handles = [w.requires_grad_(True).register_post_accumulate_grad_hook(hook(k)) for k, w in enumerate(weights)]
        try:
            for batch in record.batches("calibration", batches):
                seen.zero_()
                value = loss(model, batch)
                value.backward()
                if bool(torch.isfinite(value)) and bool(torch.isfinite(seen).all()):
                    rows.append(seen.clone())
                else:
                    skipped += 1
        finally:
            for handle in handles:
                handle.remove()
    return (torch.stack(rows) if rows else torch.zeros(0, len(weights))), skipped


def gram_norm(inputs: Tensor, gradients: Tensor) -> Tensor:
    """|| G^T X ||_F from X (T, d_in) and G (T, d_out), by the smaller of d_out x d_in and T x T: < G G^T, X X^T >."""
    tokens, wide, high = len(inputs), inputs.shape[1], gradients.shape[1]
    x, g = inputs.float(), gradients.float()
    if tokens < wide * high / (wide + high):
        return ((g @ g.T) * (x @ x.T)).sum().clamp_min(0).sqrt()
    return (g.T @ x).norm()


def hooked_norms(model: nn.Module, batches: Iterable, loss: Callable[[nn.Module, dict], Tensor]) -> Tensor:
    """The same norms (N, K) from inputs and output gradients: for quantised bases, whose weights have no gradient.
    Calls of a matrix that runs more than once per forward are concatenated before the norm."""
    layers, rows = [layer.base_layer for layer in adapted(model).values()], []
    with undisturbed(model):
        calls: list[list] = [[] for _ in layers]

        def watch(k: int):
            def hook(_, arguments, output: Tensor) -> None:
                x = arguments[0].detach().flatten(0, -2)
                output.register_hook(lambda g, x=x: calls[k].append((x, g.detach().flatten(0, -2))))

            return hook

        handles = [layer.register_forward_hook(watch(k)) for k, layer in enumerate(layers)]
        # something must ask for a gradient, or none flows: the words, or the table of relative positions
        handles += [
            layer.register_forward_pre_hook(
                lambda _, x: (x[0] if x[0].requires_grad else x[0].detach().requires_grad_(True), *x[1:])
            )
            for layer in layers
        ]
        try:
            for batch in batches:
                for mine in calls:
                    mine.clear()
                loss(model, batch).backward()
                rows.append(
                    torch.stack(
                        [
                            gram_norm(torch.cat([x for x, _ in mine]), torch.cat([g for _, g in mine])).cpu()
                            if mine
                            else torch.zeros(())
                            for mine in calls
                        ]
                    )
                )
        finally:
            for handle in handles:
                handle.remove()
    return torch.stack(rows)


def sensitivities(norms: Tensor, buffer: int | None = None) -> Tensor:
    """s (K,) as the mean over batches of norms (N, K), over the last `buffer` of them where one is given.
    Raises StudyError where s is not finite and positive somewhere."""
    s = (norms[-buffer:] if buffer else norms).mean(0) if len(norms) else torch.full((norms.shape[1],), math.nan)
    if not bool(torch.isfinite(s).all()) or not bool((s > 0).any()):
        raise StudyError(
            "sensitivities",
            "all zero" if bool((s == 0).all()) else "not finite",
            "finite gradients of the base weights",
            "look at the calibration batches' loss",
        )
    return s


def coefficients(kind: str, s: Tensor, beta: float, seed: int = 0) -> Tensor:
    """What weights || Delta_k ||^2 in the penalty, (K,): `importance` (1 - w_k)^beta, `max` (1 - s_k/s_max)^beta,
    `inv_mean` (mean s / s_k)^beta over its mean; controls: `uniform` has importance's mean everywhere, `shuffled` its
    values on other matrices, `factor_l2` ones."""
    importance = (1 - s / s.sum()) ** beta
    if kind == "importance":
        return importance
    if kind == "max":
        return (1 - s / s.max()) ** beta
    if kind == "inv_mean":
        inverse = (s.mean() / s.clamp_min(torch.finfo(s.dtype).tiny)) ** beta
        return inverse / inverse.mean()
    if kind == "uniform":
        return importance.mean().expand_as(importance).clone()
    if kind == "shuffled":
        return importance[torch.randperm(len(s), generator=torch.Generator().manual_seed(seed))]
    if kind == "factor_l2":
        return torch.ones_like(importance)
    raise StudyError("loss.penalty", repr(kind), f"one of {', '.join(KINDS)}")


def rank_pattern(names: list[str], s: Tensor, rank: int) -> dict[str, int]:
    """A suggestion for PEFT's `rank_pattern`: K times `rank` shared out in proportion to s, at least 1 each."""
    share = s / s.sum() * rank * len(names)
    ranks = share.floor().clamp_min(1).int()
    for k in torch.argsort(share - share.floor(), descending=True)[: max(0, rank * len(names) - int(ranks.sum()))]:
        ranks[k] += 1
    return {name: int(r) for name, r in zip(names, ranks, strict=True)}
