"""The extra L2 term: R = sum_k c_k || Delta_k ||_F^2, Delta_k = scaling B_k A_k, without forming Delta."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lib.iw_lora.sensitivity import adapted


def squared_norm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """|| scaling B A ||_F^2 = scaling^2 tr((B^T B)(A A^T)) for A (r, d_in) and B (d_out, r)."""
    return scaling**2 * ((b.T @ b) * (a @ a.T)).sum()


def pairs(model: nn.Module, adapter: str = "default") -> list[tuple[Tensor, Tensor, float]]:
    """(A, B, scaling) of every LoRA pair, in the order of `adapted`."""
    return [
        (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])
        for layer in adapted(model).values()
    ]


def penalty(model: nn.Module, coefficients: Tensor, factors: bool = False) -> Tensor:
    """R in float32, outside autocast; `factors`: |A|^2 + |B|^2 in place of |Delta|^2."""
    found = pairs(model)
    with torch.autocast(found[0][0].device.type, enabled=False):
        wide = [
            (a if a.dtype == torch.float64 else a.float(), b if b.dtype == torch.float64 else b.float(), scaling)
            for a, b, scaling in found
        ]
        terms = torch.stack(
            [(a**2).sum() + (b**2).sum() if factors else squared_norm(a, b, scaling) for a, b, scaling in wide]
        )
        return (coefficients.to(terms) * terms).sum()


@torch.no_grad()
def delta_norms(model: nn.Module) -> list[float]:
    """|| Delta_k ||_F of every pair, of AdaLoRA's triplets B diag(E) A too."""
    found = []
    for layer in adapted(model).values():
        if isinstance(layer.lora_A, nn.ParameterDict):  # AdaLoRA: parameters, with E between them
            a, b = layer.lora_A["default"] * layer.lora_E["default"], layer.lora_B["default"]
            scaling = layer.scaling["default"] / (float(layer.ranknum["default"]) + 1e-5)
        else:
            a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        found.append(float(squared_norm(a.float(), b.float(), scaling).clamp_min(0).sqrt()))
    return found
