"""Figures: what they write, that their words say their numbers, and that no member is hidden."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib import figures
from lib.figure_style import PALETTE, looks, number
from lib.td_dpo import figures as study
from lib.td_dpo import landscape

FIXED = {0.01: 0.5, 0.05: 1.0, 0.5: 1.0, 2.5: 2.0}
LEVEL = {"dpo": {0.01: 2.5, 0.05: 6.1, 0.5: 7.9, 2.5: 7.6}, "discopop": {0.01: 1.9, 0.05: 3.5, 0.5: 7.6, 2.5: 7.0}}
TD = {0.5: (5.7, 6.6, 6.8, 6.6), 1.0: (6.6, 6.8, 6.8, 6.6), 2.0: (7.1, 7.0, 6.7, 6.5)}


def make_members() -> pd.DataFrame:
    """The laptop study's members: 12 claim cells with 3 seeds, the other cells with one; dpo at .01 has a diverged seed, one td_dpo cell is missing."""
    draw, rows = np.random.default_rng(0), []

    def add(method, beta, tau, seed, level, status="completed"):
        cell = f"beta{beta:g}" + (f"-tau{tau:g}" if tau is not None else "")
        done = status == "completed"
        rows.append({
            "run_id": method, "method": method, "role": "proposed" if method == "td_dpo" else "comparative", "cell": cell, "beta": beta, "tau": tau,
            "seed": seed, "status": status, "oracle_score": level + draw.normal(0, 0.25) if done else None,
            "validation_implicit_accuracy": float(np.clip(0.5 + level / 25 + draw.normal(0, 0.01), 0, 1)) if done else None,
            "implicit_accuracy": float(np.clip(0.5 + level / 25 + draw.normal(0, 0.01), 0, 1)) if done else None,
            "sampled_kl": float(np.exp(draw.normal(0, 0.15)) * 4 / (0.05 + beta)) if done else None,
            "answer_length": 24 + 6 / (0.2 + beta) + draw.normal(0, 1.5) if done else None,
        })  # fmt: skip

    for j, beta in enumerate(FIXED):
        for seed in (42, 43, 44):
            for method in LEVEL:
                add(method, beta, None, seed, LEVEL[method][beta], "diverged" if (method, beta, seed) == ("dpo", 0.01, 44) else "completed")
            add("td_dpo", beta, FIXED[beta], seed, TD[FIXED[beta]][j])
        for tau in TD:
            if tau != FIXED[beta] and (beta, tau) != (2.5, 0.5):
                add("td_dpo", beta, tau, 42, TD[tau][j])
    add("td_dpo_anchored", 0.01, 0.5, 42, 6.2)
    add("discopop_card", 2.5, None, 42, 1.0, "diverged")
    return pd.DataFrame(rows)


def make_history(members: pd.DataFrame, steps: int = 120) -> pd.DataFrame:
    """Step rows and evaluation rows of every member, as the record keeps them; a diverged member stops at step 40."""
    draw, parts = np.random.default_rng(1), []
    for member in members.to_dict("records"):
        last = 40 if member["status"] == "diverged" else steps
        step = np.arange(1, last + 1)
        reach = (1 - np.exp(-step / 30)) * min(60, 1.5 / member["beta"])
        own = {k: member[k] for k in ("run_id", "method", "cell", "beta", "tau", "seed")}
        parts.append(pd.DataFrame({**own, "step": step, "loss": 0.7 - 0.3 * (1 - np.exp(-step / 25)) + draw.normal(0, 0.04, last),
                                   "chosen_log_ratio": -0.4 * reach + draw.normal(0, 0.3, last), "rejected_log_ratio": -1.1 * reach + draw.normal(0, 0.3, last)}))  # fmt: skip
        at = np.array([s for s in (40, 80, 120) if s <= last])
        parts.append(pd.DataFrame({**own, "step": at, "validation_implicit_accuracy": 0.5 + 0.25 * (1 - np.exp(-at / 40)) + draw.normal(0, 0.01, len(at))}))
    return pd.concat(parts, ignore_index=True)


def softplus(x):
    return np.logaddexp(0, x)


def dpo_z(z):
    return softplus(-z)


def discopop_z(z):
    gate = 1 / (1 + np.exp(-z / 0.05))
    return (1 - gate) * softplus(-z) + np.exp(-softplus(-z / 0.05) - z)


def card(rho, beta):
    return softplus(rho) * 0 + (1 / (1 + np.exp(rho))) * softplus(-beta * rho) + np.exp(-softplus(-rho) - beta * rho)
