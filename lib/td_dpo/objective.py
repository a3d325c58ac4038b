"""From log-probabilities to what a step minimises and what it records: the objective and the columns of the record."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lib.errors import StudyError
from lib.td_dpo.logprobs import sequence_logprobs
from lib.td_dpo.losses import log_ratios, preference_loss

LOSS_OPTIONS = ("beta", "tau", "label_smoothing")


def objective(loss: dict, chosen: Tensor, rejected: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict, Tensor]:
    """Loss (B,), its parts, and the (B, 8) columns that `summary` reads; `loss` is the YAML's section."""
    four = (chosen, rejected, batch["ref_chosen_logps"], batch["ref_rejected_logps"])
    lengths = batch["chosen_length"], batch["rejected_length"]
    scaled = four
    if loss.get("average_log_probs"):  # a flagged ablation: means over tokens instead of sums
        scaled = tuple(x / length for x, length in zip(four, lengths * 2, strict=True))
    options = {k: loss[k] for k in LOSS_OPTIONS if loss.get(k) is not None}
    values, parts = preference_loss(
        loss["name"], *scaled, **options, chosen_length=lengths[0], rejected_length=lengths[1]
    )
    r_chosen, r_rejected = log_ratios(*(x.detach() for x in four))
    columns = (
        values,
        parts["preference_loss"],
        parts["anchor_loss"],
        r_chosen,
        r_rejected,
        (chosen - rejected),
        *lengths,
    )
    return values, parts, torch.stack([c.detach().to(values.dtype) for c in columns], dim=1)


def summary(columns: Tensor) -> dict[str, float]:
    """Means over pairs of what a step records, from (N, 8) columns of `objective`."""
    loss, preference, anchor, r_chosen, r_rejected, raw, chosen_length, rejected_length = columns.double().unbind(dim=1)
    rho = r_chosen - r_rejected
    means = (
        torch.stack(
            [
                loss,
                preference,
                anchor,
                (rho > 0).double(),
                (raw > 0).double(),
                rho,
                raw,
                r_chosen,
                r_rejected,
                chosen_length,
                rejected_length,
            ]
        )
        .mean(dim=1)
        .tolist()
    )
    names = (
        "loss",
        "preference_loss",
        "anchor_loss",
        "implicit_accuracy",
        "raw_accuracy",
        "margin",
        "raw_margin",
        "chosen_log_ratio",
        "rejected_log_ratio",
        "chosen_length",
        "rejected_length",
    )
    return dict(zip(names, means, strict=True))


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def with_reference(rows: list[dict], reference: Tensor) -> list[dict]:
    """Rows with their two columns of reference log-probabilities."""
    if reference.shape != (len(rows), 2):
        raise StudyError("reference log-probabilities", f"shape {tuple(reference.shape)}", f"({len(rows)}, 2)")
    return [
        {**row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        for row, (chosen, rejected) in zip(rows, reference.tolist(), strict=True)
    ]


def reference_columns(rows: list[dict], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The columns of a batch that the objective needs besides the policy's log-probabilities."""
    return {
        "ref_chosen_logps": torch.tensor([r["ref_chosen_logps"] for r in rows], dtype=dtype),
        "ref_rejected_logps": torch.tensor([r["ref_rejected_logps"] for r in rows], dtype=dtype),
        "chosen_length": torch.tensor([len(r["chosen_ids"]) for r in rows]),
        "rejected_length": torch.tensor([len(r["rejected_ids"]) for r in rows]),
    }


def pair_scores(
    model: torch.nn.Module, rows: list[dict], reference: Tensor, *, pad: int = 0, layout: str | None = None
) -> list[dict]:
    """Per pair, in nats: rho (implicit margin), delta (raw margin) and the two log-ratios; None where not finite."""
    table = sequence_logprobs(model, rows, pad=pad, layout=layout)
    r = table - reference.to(table.dtype)
    columns = torch.stack([r[:, 0] - r[:, 1], table[:, 0] - table[:, 1], r[:, 0], r[:, 1]], dim=1).tolist()
    names = ("rho", "delta", "chosen_log_ratio", "rejected_log_ratio")
    return [dict(zip(names, map(finite_or_none, row), strict=True)) for row in columns]
