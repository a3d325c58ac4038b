"""Preference losses as pure functions of four (B,) tensors of sequence log-probabilities, in nats.

Symbols: log p+- = log pi_theta(y+-), log q+- = log pi_0(y+-) (reference); r+- = log p+- - log q+-;
rho = r+ - r- (implicit margin); Delta = log p+ - log p- (raw margin); z = beta rho; sp = softplus.
sp(-x) is written -logsigmoid(x): torch's softplus turns linear above 20, an error of 2e-9 that float64 tests see.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lib.errors import StudyError

DISCOPOP_TEMPERATURE = 0.05  # arXiv:2406.08414, equation 5
Parts = dict[str, Tensor]


def log_ratios(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """r+ and r-, each (B,), in nats."""
    return policy_chosen - reference_chosen, policy_rejected - reference_rejected


def _without_anchor(loss: Tensor) -> tuple[Tensor, Parts]:
    return loss, {"preference_loss": loss, "anchor_loss": torch.zeros_like(loss)}


def _with_anchor(preference: Tensor, r_chosen: Tensor, r_rejected: Tensor, beta: float) -> tuple[Tensor, Parts]:
    """Adds beta/2 (r+^2 + r-^2), the squared-log-ratio (k2) anchor on the two answers. It is not KL(pi_theta||pi_0)."""
    anchor = 0.5 * beta * (r_chosen.square() + r_rejected.square())
    return preference + anchor, {"preference_loss": preference, "anchor_loss": anchor}


def dpo(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> tuple[Tensor, Parts]:
    """sp(-beta rho) (arXiv:2305.18290, equation 7)."""
    r_chosen, r_rejected = log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return _without_anchor(-logsigmoid(beta * (r_chosen - r_rejected)))


def _discopop(z: Tensor, gate: Tensor) -> Tensor:
    """(1-m) sp(-z) + m exp(-z) with m = sigma(gate).

    m exp(-z) is exp(logsigmoid(gate) - z): the plain product is 0 * inf = NaN below z about -89 in float32.
    """
    return torch.sigmoid(-gate) * -logsigmoid(z) + torch.exp(logsigmoid(gate) - z)


def discopop(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> tuple[Tensor, Parts]:
    """DiscoPOP as its paper and TRL have it: gate sigma(z/.05) (arXiv:2406.08414, equation 5)."""
    r_chosen, r_rejected = log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    z = beta * (r_chosen - r_rejected)
    return _without_anchor(_discopop(z, z / DISCOPOP_TEMPERATURE))


def discopop_card(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> tuple[Tensor, Parts]:
    """DiscoPOP as the released model's card has it: gate sigma(rho). It equals the paper's form only at beta = .05.

    At beta > 1 it grows like exp(-(beta - 1) rho) on wrongly ordered pairs. That is left to overflow: a divergence is
    a result of the method, recorded by the trainer, not something to clamp away here.
    """
    r_chosen, r_rejected = log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    rho = r_chosen - r_rejected
    return _without_anchor(_discopop(beta * rho, rho))


def td_dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    tau: float,
) -> tuple[Tensor, Parts]:
    """sp(-Delta/tau) + beta/2 (r+^2 + r-^2): the margin's temperature tau is free of the anchor's weight beta."""
    r_chosen, r_rejected = log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    preference = -logsigmoid((policy_chosen - policy_rejected) / tau)
    return _with_anchor(preference, r_chosen, r_rejected, beta)


def td_dpo_anchored(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    tau: float,
) -> tuple[Tensor, Parts]:
    """td_dpo with the margin taken against the reference: sp(-rho/tau) + beta/2 (r+^2 + r-^2)."""
    r_chosen, r_rejected = log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return _with_anchor(-logsigmoid((r_chosen - r_rejected) / tau), r_chosen, r_rejected, beta)


LOSSES: dict[str, Callable[..., tuple[Tensor, Parts]]] = {
    "dpo": dpo,
    "discopop": discopop,
    "discopop_card": discopop_card,
    "td_dpo": td_dpo,
    "td_dpo_anchored": td_dpo_anchored,
}
TEMPERED = ("td_dpo", "td_dpo_anchored")  # the losses that take tau
# trl 1.16's loss_type values, in the order of its own error message; `dpo` and `discopop` are ours under these names.
TRL_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "sft",
    "sigmoid_norm",
)


def preference_loss(
    name: str,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
) -> tuple[Tensor, Parts]:
    """Loss (B,) and its two terms for one of LOSSES, or for a TRL loss_type by TRL's own code.

    `chosen_length` and `rejected_length` (B,), in tokens, are needed only by TRL losses that average over tokens.
    """
    four = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    if name in LOSSES:
        return LOSSES[name](*four, beta=beta, **({"tau": tau} if name in TEMPERED else {}))
    if name in TRL_LOSSES:
        loss = _trl_loss(name, *four, beta, label_smoothing, chosen_length, rejected_length)
        return _without_anchor(loss)
    raise StudyError("loss.name", repr(name), f"one of {', '.join([*LOSSES, *TRL_LOSSES])}")


def _trl_loss(
    name: str,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float,
    chosen_length: Tensor | None,
    rejected_length: Tensor | None,
) -> Tensor:
    """TRL's own `_compute_loss` run on a stand-in model whose tokens sum to the given log-probabilities.

    TRL gives only the batch mean (some of its losses sort the batch), so the mean is repeated B times. The losses read
    sums over tokens and token counts, never single tokens; so each sequence's sum is laid on its first scored position.
    """
    from trl import DPOTrainer  # not at import time: the losses alone should not cost TRL's import

    ones = torch.ones_like(policy_chosen, dtype=torch.long)
    lengths = torch.cat(
        [ones if chosen_length is None else chosen_length, ones if rejected_length is None else rejected_length]
    )
    width = int(lengths.max())
    mask = (torch.arange(width + 1, device=lengths.device) <= lengths[:, None]).long()
    mask[:, 0] = 0  # one prompt token
    sums = torch.cat([policy_chosen, policy_rejected])
    log_probs = torch.cat([sums[:, None], sums.new_zeros(len(sums), width - 1)], dim=1)
    blank = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    metrics = SimpleNamespace(append=lambda value: None)  # TRL's own log entries, which this engine replaces
    bucket = type("Discard", (dict,), {"__missing__": lambda self, key: metrics})
    accelerator = SimpleNamespace(device=sums.device, gather=lambda x: x, gather_for_metrics=lambda x: x)
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"eval": bucket()},
        _total_train_tokens=0,
        args=SimpleNamespace(discopop_tau=DISCOPOP_TEMPERATURE),
    )
    inputs = {
        "input_ids": mask,
        "completion_mask": mask,
        "attention_mask": mask,
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    loss = DPOTrainer._compute_loss(stand_in, lambda **_: outputs, inputs, return_outputs=False)
    return loss.expand(len(policy_chosen))


# --- the loss landscape (a notebook section) ---------------------------------------------------------------------


def slope(name: str, rho: Tensor, *, beta: float, tau: float = 1.0) -> Tensor:
    """d loss / d rho along log p+ with log p- and the reference held at 0; shape of `rho`, per nat."""
    with torch.enable_grad():
        chosen = rho.detach().clone().requires_grad_()
        zero = torch.zeros_like(chosen)
        loss, _ = preference_loss(name, chosen, zero, zero, zero, beta=beta, tau=tau)
        return torch.autograd.grad(loss.sum(), chosen)[0]


def hessian(
    name: str,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    tau: float = 1.0,
) -> Tensor:
    """(B, 2, 2) second derivatives of each pair's loss in (log p+, log p-).

    For td_dpo: sigma(Delta/tau) sigma(-Delta/tau) / tau^2 [[1,-1],[-1,1]] + beta I, so the common mode (1,1)/sqrt 2 has
    curvature beta (0 in DPO) and the margin mode (1,-1)/sqrt 2 has 2 sigma sigma'/tau^2 + beta.
    """
    with torch.enable_grad():
        p = torch.stack([policy_chosen, policy_rejected], dim=1).detach().requires_grad_()
        loss, _ = preference_loss(name, p[:, 0], p[:, 1], reference_chosen, reference_rejected, beta=beta, tau=tau)
        gradient = torch.autograd.grad(loss.sum(), p, create_graph=True)[0]
        rows = [torch.autograd.grad(gradient[:, i].sum(), p, retain_graph=True)[0] for i in range(2)]
    return torch.stack(rows, dim=1)


def discopop_barrier() -> dict[str, float]:
    """Where DiscoPOP's slope in z has the wrong sign: slope at 0, and the z of its local minimum and of its barrier.

    Pairs with rho between minimum/beta and barrier/beta are pushed the wrong way.
    """
    from scipy.optimize import brentq

    def in_z(z: float) -> float:
        return float(slope("discopop", torch.tensor([z], dtype=torch.float64), beta=1.0))

    return {"slope_at_zero": in_z(0.0), "minimum": brentq(in_z, -0.5, 0.0), "barrier": brentq(in_z, 0.0, 0.5)}
