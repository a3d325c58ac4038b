"""Preference losses: what a step minimizes, from the log-probabilities of its pairs, and what it records.

Symbols: log p+- = log pi_theta(y+-) (`chosen`, `rejected`), log q+- = log pi_0(y+-) (reference);
r+- = log p+- - log q+-; rho = r+ - r- (implicit margin); Delta = log p+ - log p- (raw margin); z = beta rho;
sp = softplus. All are (B,) tensors in nats; a loss names those that it reads and returns its term of preference and its
anchor (or None), each (B,).
sp(-x) is written -logsigmoid(x): torch's softplus turns linear above 20, an error of 2e-9 that float64 tests see.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

DISCOPOP_TEMPERATURE = 0.05  # arXiv:2406.08414, equation 5

Terms = tuple[Tensor, Tensor | None]


def dpo(*, rho: Tensor, beta: float, **_) -> Terms:
    """sp(-beta rho) (arXiv:2305.18290, equation 7)."""
    return -logsigmoid(beta * rho), None


def _discopop(z: Tensor, gate: Tensor) -> Tensor:
    """(1-m) sp(-z) + m exp(-z) with m = sigma(gate).

    m exp(-z) is exp(logsigmoid(gate) - z): the plain product is 0 * inf = NaN below z about -89 in float32.
    """
    return torch.sigmoid(-gate) * -logsigmoid(z) + torch.exp(logsigmoid(gate) - z)


def discopop(*, rho: Tensor, beta: float, **_) -> Terms:
    """DiscoPOP as its paper and TRL have it: gate sigma(z/.05) (arXiv:2406.08414, equation 5)."""
    z = beta * rho
    return _discopop(z, z / DISCOPOP_TEMPERATURE), None


def discopop_card(*, rho: Tensor, beta: float, **_) -> Terms:
    """DiscoPOP as the released model's card has it: gate sigma(rho). It equals the paper's form only at beta = .05.

    At beta > 1 it grows like exp(-(beta - 1) rho) on wrongly ordered pairs. That is left to overflow: a divergence is
    a result of the method, recorded by the trainer, not something to clamp away here.
    """
    return _discopop(beta * rho, rho), None


def _anchor(r_chosen: Tensor, r_rejected: Tensor, beta: float) -> Tensor:
    """beta/2 (r+^2 + r-^2), the squared-log-ratio (k2) anchor on the two answers. It is not KL(pi_theta||pi_0)."""
    return 0.5 * beta * (r_chosen.square() + r_rejected.square())


def td_dpo(*, delta: Tensor, r_chosen: Tensor, r_rejected: Tensor, beta: float, tau: float, **_) -> Terms:
    """sp(-Delta/tau) + beta/2 (r+^2 + r-^2): the margin's temperature tau is free of the anchor's weight beta."""
    return -logsigmoid(delta / tau), _anchor(r_chosen, r_rejected, beta)


def td_dpo_anchored(*, rho: Tensor, r_chosen: Tensor, r_rejected: Tensor, beta: float, tau: float, **_) -> Terms:
    """td_dpo with the margin taken against the reference: sp(-rho/tau) + beta/2 (r+^2 + r-^2)."""
    return -logsigmoid(rho / tau), _anchor(r_chosen, r_rejected, beta)


def trl_loss(name: str, *, chosen, rejected, ref_chosen, ref_rejected, lengths, beta, label_smoothing, **_) -> Terms:
    """TRL's own `_compute_loss` run on a stand-in model whose tokens sum to the given log-probabilities.

    TRL gives only the batch mean (some of its losses sort the batch), so the mean is repeated B times. The losses read
    sums over tokens and token counts, never single tokens; so each sequence's sum is laid on its first scored position.
    """
    from trl import DPOTrainer  # not at import time: the losses alone should not cost TRL's import

    tokens, sums = torch.cat(lengths), torch.cat([chosen, rejected])
    width = int(tokens.max())
    mask = (torch.arange(width + 1, device=tokens.device) <= tokens[:, None]).long()
    mask[:, 0] = 0  # one prompt token
    log_probs = torch.cat([sums[:, None], sums.new_zeros(len(sums), width - 1)], dim=1)
    blank = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device=sums.device, gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},  # TRL's own log entries, which this engine replaces
        _total_train_tokens=0,
        args=SimpleNamespace(discopop_tau=DISCOPOP_TEMPERATURE),
    )
    inputs = dict.fromkeys(("input_ids", "completion_mask", "attention_mask"), mask)
    inputs |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    loss = DPOTrainer._compute_loss(stand_in, lambda **_: outputs, inputs, return_outputs=False)
    return loss.expand(len(chosen)), None


LOSSES: dict[str, Callable[..., Terms]] = {
    "dpo": dpo,
    "discopop": discopop,
    "discopop_card": discopop_card,
    "td_dpo": td_dpo,
    "td_dpo_anchored": td_dpo_anchored,
}


def preference_loss(
    name: str, chosen, rejected, ref_chosen, ref_rejected, *, beta, tau=None, label_smoothing=0.0, lengths=None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss `name`, one of LOSSES or else a loss_type of TRL, and its two terms (preference, anchor), each (B,), from
    four (B,) log-probabilities.

    `lengths`, two (B,) tensors of the chosen and the rejected answers' tokens, matter only to TRL losses that average
    over tokens.
    """
    r_chosen, r_rejected = chosen - ref_chosen, rejected - ref_rejected
    sides = {"chosen": chosen, "rejected": rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    ratios = {"r_chosen": r_chosen, "r_rejected": r_rejected, "rho": r_chosen - r_rejected, "delta": chosen - rejected}
    lengths = lengths or (torch.ones_like(chosen, dtype=torch.long),) * 2
    options = {"beta": beta, "tau": tau, "label_smoothing": label_smoothing}
    terms = LOSSES[name] if name in LOSSES else partial(trl_loss, name)
    found = terms(**sides, **ratios, lengths=lengths, **options)
    if not (isinstance(found, tuple) and len(found) == 2):
        raise TypeError(
            f"{name} returns a {type(found).__name__}; expected its two terms, (preference, anchor or None)"
        )
    preference, anchor = found
    if anchor is None:
        return preference, preference, torch.zeros_like(preference)
    return preference + anchor, preference, anchor


def objective(loss: dict, chosen: Tensor, rejected: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss (B,) of a batch's pairs, and the (B, 8) columns that `summary` reads; `loss` is the YAML's section."""
    four = (chosen, rejected, batch["ref_chosen_logps"], batch["ref_rejected_logps"])
    lengths = batch["chosen_length"], batch["rejected_length"]
    scaled = four
    if loss.get("average_log_probs"):  # a flagged ablation: means over tokens instead of sums
        scaled = tuple(x / length for x, length in zip(four, lengths * 2, strict=True))
    options = {key: loss[key] for key in ("beta", "tau", "label_smoothing") if loss.get(key) is not None}
    values, preference, anchor = preference_loss(loss["name"], *scaled, **options, lengths=lengths)
    r_chosen, r_rejected = chosen - four[2], rejected - four[3]
    columns = (values, preference, anchor, r_chosen, r_rejected, chosen - rejected, *lengths)
    return values, torch.stack([column.detach().to(values.dtype) for column in columns], dim=1)


# what `objective` gives of each pair
COLUMNS = ("loss", "preference_loss", "anchor_loss", "chosen_log_ratio", "rejected_log_ratio", "raw_margin")
COLUMNS += ("chosen_length", "rejected_length")


def summary(columns: Tensor) -> dict[str, float]:
    """Means over pairs of what a step records, from (N, 8) columns of `objective`."""
    named = dict(zip(COLUMNS, columns.double().unbind(dim=1), strict=True))
    named["margin"] = named["chosen_log_ratio"] - named["rejected_log_ratio"]
    named["implicit_accuracy"] = (named["margin"] > 0).double()
    named["raw_accuracy"] = (named["raw_margin"] > 0).double()
    return dict(zip(named, torch.stack(list(named.values())).mean(dim=1).tolist(), strict=True))
