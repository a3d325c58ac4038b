"""Figures of the TD-DPO study: what beta and the temperature do to score, likelihood, length and KL."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from lib.plots import (
    BAD,
    DIVERGED,
    IDENTITY,
    INK,
    PALETTE,
    SOFT,
    Drawing,
    Look,
    canvas,
    housestyle,
    label_ends,
    label_points,
    legend_below,
    looks,
    number,
    ordered,
    outcomes,
    points,
    reference_line,
    spread,
)

LOOKS = {
    "dpo": Look("DPO", PALETTE[0], "o"),
    "discopop": Look("DiscoPOP", PALETTE[1], "s"),
    "td_dpo": Look("TD-DPO", PALETTE[2], "D"),
    "td_dpo_anchored": Look("TD-DPO anchored", PALETTE[3], "^"),
    "discopop_card": Look("DiscoPOP (card)", PALETTE[4], "v"),
}
TEMPERED = ("td_dpo", "td_dpo_anchored")
BESIDE = ("td_dpo_anchored", "discopop_card")  # trained where one claim looks, not over beta


def claim_arms(table: pd.DataFrame, fixed_tau: Mapping[float, float]) -> pd.DataFrame:
    """The rows of the methods that are compared over beta, those that somebody added included: one cell per method and
    beta, the tempered ones at the tau fixed in advance for each beta (params/td_dpo/claims.yaml). Runs of one method
    (of several models, say) stand under their own names."""
    if table.empty:
        return table
    if "run_id" in table:
        several = table.groupby("method")["run_id"].transform("nunique") > 1
        table = table.assign(method=table["method"].where(~several, table["run_id"]))
    taus = {float(beta): tau for beta, tau in fixed_tau.items()}
    fixed = table["beta"].map(lambda beta: taus.get(beta, np.nan)).astype(float)
    tau = table["tau"].astype(float)
    return table[~table["method"].isin(BESIDE) & (tau.isna() | np.isclose(tau, fixed))]


@housestyle
def heat_maps(
    members: pd.DataFrame,
    metric: str,
    *,
    title: str,
    label: str = "",
    diverged_value: float | None = None,
    centre: float | None = None,
    digits: int = 3,
) -> Drawing:
    """`metric` over beta and tau: the tempered methods as maps, the others as single rows under them on the same beta
    columns and the same colour scale.

    A cell shows the mean over seeds, its standard deviation and what diverged. `centre` (say the reference model's
    score) is white: blue is better, red is worse.
    """
    label = label or metric.replace("_", " ")
    table = outcomes(members, metric, diverged_value)
    betas, methods = ordered(table["beta"]), _methods(table)
    methods.sort(key=lambda m: m not in TEMPERED)
    taus = {m: ordered(table.loc[table["method"] == m, "tau"])[::-1] if m in TEMPERED else [None] for m in methods}
    look, squares = looks(methods, LOOKS), []
    for method in methods:
        for row, tau in enumerate(taus[method]):
            for column, beta in enumerate(betas):
                cell = table[(table["method"] == method) & (table["beta"] == beta)]
                cell = cell if tau is None else cell[cell["tau"] == tau]
                squares.append(
                    {
                        "method": method,
                        "beta": beta,
                        "tau": tau,
                        "mean": cell["value"].mean(),
                        "sd": cell["value"].std(ddof=1),
                        "seeds": len(cell),
                        "diverged": int(cell["diverged"].sum()),
                        "row": row,
                        "column": column,
                    }
                )
    data = pd.DataFrame(squares, columns=["method", "beta", "tau", "mean", "sd", "seeds", "diverged", "row", "column"])
    norm, colours = _colours(data["mean"].dropna(), centre)
    rows = [len(taus[m]) for m in methods]
    drawn, axes = canvas(
        max(1, len(methods)),
        1,
        height=1.2 + 0.62 * sum(rows) + 0.32 * len(rows),
        title=title,
        sharex=True,
        height_ratios=rows or [1],
    )
    words = []
    for place, method in zip(axes[:, 0], methods, strict=False):
        for square in data[data["method"] == method].to_dict("records"):
            tau = f" tau {number(square['tau'])}" if method in TEMPERED else ""
            words.append(
                f"{look[method].label} beta {number(square['beta'])}{tau}: "
                f"{_square(place, square, norm, colours, digits)}."
            )
        place.set(xlim=(-0.5, len(betas) - 0.5), ylim=(len(taus[method]) - 0.5, -0.5), title=look[method].label)
        place.set_yticks(range(len(taus[method])), [f"τ = {number(t)}" if t is not None else "" for t in taus[method]])
        place.grid(False)
        place.tick_params(length=0)
        place.spines[:].set_visible(False)
    axes[-1, 0].set_xticks(range(len(betas)), [f"β = {number(beta)}" for beta in betas])
    bar = drawn.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=list(axes[:, 0]), shrink=0.8, pad=0.02)
    shown = [v for v in (*data["mean"].dropna(), centre) if v is not None]
    if len(set(shown)) > 1:
        bar.ax.set_ylim(min(shown), max(shown))
    bar.set_label(label + (f" (white: the reference, {number(centre)})" if centre is not None else ""))
    bar.outline.set_visible(False)
    alt = f"{title}: mean {label} over seeds. {' '.join(words)}"
    return Drawing(drawn, title, alt, data.drop(columns=["row", "column"]))


def _methods(table: pd.DataFrame) -> list[str]:
    present = set(table["method"])
    return [m for m in LOOKS if m in present] + sorted(present - set(LOOKS))


def _colours(means: pd.Series, centre: float | None):
    low, high = (float(means.min()), float(means.max())) if len(means) else (0.0, 1.0)
    least = 0.02 * max(1.0, abs(low))  # cells that are all alike get one colour and a scale that says so
    if centre is None:
        apart = high - low > least / 100
        low, high = (low, high) if apart else (low - least, high + least)
        return matplotlib.colors.Normalize(low, high), matplotlib.colormaps["cividis"]
    reach = max(abs(low - centre), abs(high - centre), least)
    return matplotlib.colors.Normalize(centre - reach, centre + reach), matplotlib.colormaps["RdBu"]


def _square(place, square: Mapping, norm, colours, digits: int) -> str:
    """One square of a heat map; returns what it says in words."""
    column, row, mean, diverged = square["column"], square["row"], square["mean"], square["diverged"]
    box = {"xy": (column - 0.485, row - 0.475), "width": 0.97, "height": 0.95}
    if not np.isfinite(mean):
        text = f"all {diverged} diverged" if diverged else "no value" if square["seeds"] else "not run"
        place.add_patch(Rectangle(**box, facecolor="#f1f3f5"))
        place.text(column, row, text, ha="center", va="center", fontsize=9.5, color=BAD if diverged else SOFT)
        return text
    face = colours(norm(mean))
    ink = "white" if np.dot(matplotlib.colors.to_rgb(face), (0.299, 0.587, 0.114)) < 0.5 else INK
    place.add_patch(Rectangle(**box, facecolor=face))
    note = f"± {number(square['sd'], 2)}" if np.isfinite(square["sd"]) else f"{square['seeds']} seed"
    note += f", {diverged}/{square['seeds']} diverged" if diverged else ""
    place.text(
        column, row - 0.13, number(mean, digits), ha="center", va="center", color=ink, fontsize=12, fontweight="bold"
    )
    place.text(column, row + 0.26, note, ha="center", va="center", color=ink, fontsize=8.5)
    return f"{number(mean, digits)} ({note})"


@housestyle
def likelihood_displacement(
    history: pd.DataFrame, *, title: str = "Likelihood displacement", smooth: int = 5, prefix: str = ""
) -> Drawing:
    """log(pi_theta/pi_0) of chosen and of rejected answers over the steps, mean over seeds: a column per beta, a row
    per method, one scale per column. Both falling is likelihood displacement.

    `prefix` "validation_" draws the evaluations in place of the training batches. Give it one cell per method and beta.
    """
    answers = (
        ("chosen", f"{prefix}chosen_log_ratio", PALETTE[0], "-"),
        ("rejected", f"{prefix}rejected_log_ratio", PALETTE[2], (0, (4, 1.5))),
    )
    needed = [column for _, column, _, _ in answers]
    rows = history.reindex(columns=[*IDENTITY, "step", *needed]).dropna(subset=needed)
    betas, methods = ordered(rows["beta"]), _methods(rows)
    look, words, data = looks(methods, LOOKS), [], []
    drawn, axes = canvas(
        max(1, len(methods)),
        max(1, len(betas)),
        height=1.2 + 1.75 * max(1, len(methods)),
        title=title,
        sharex=True,
        sharey="col",
    )
    for i, method in enumerate(methods):
        for j, beta in enumerate(betas):
            place, said = axes[i, j], []
            cell = rows[(rows["method"] == method) & (rows["beta"] == beta)]
            if cell.duplicated(["step", "seed"]).any():
                raise ValueError(f"{title}: {method} beta {beta:g} has several members per seed; choose one cell first")
            place.axhline(0, color=SOFT, linewidth=0.8)
            for name, column, colour, dash in answers:
                wide = cell.pivot(index="step", columns="seed", values=column).sort_index()
                shown = wide.rolling(smooth, min_periods=1).mean().where(wide.notna())
                for seed in wide:
                    place.plot(shown[seed].dropna(), color=colour, alpha=0.3, linewidth=0.8)
                mean = shown.dropna().mean(axis=1)
                place.plot(mean, color=colour, label=name, linestyle=dash)
                said.append(f"{name} ends at {number(mean.iloc[-1])}" if len(mean) else f"{name} has no common step")
                data.append(cell[["method", "beta", "seed", "step"]].assign(answer=name, log_ratio=cell[column]))
            words.append(f"{look[method].label} beta {number(beta)}: {', '.join(said) if len(cell) else 'not run'}.")
            place.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
            place.tick_params(labelsize=9)
    for j, beta in enumerate(betas):
        axes[0, j].set_title(f"β = {number(beta)}")
        axes[-1, j].set_xlabel("step")
    for i, method in enumerate(methods):
        axes[i, 0].set_ylabel(f"{look[method].label}\n(nats)")
    legend_below(drawn)
    alt = (
        f"{title}: mean log-ratio to the reference, in nats, of chosen and rejected answers "
        f"(smoothed over {smooth} points). {' '.join(words)}"
    )
    return Drawing(drawn, title, alt, pd.concat(data) if data else rows)


@housestyle
def over_beta(
    members: pd.DataFrame,
    metric: str,
    *,
    title: str,
    ylabel: str,
    reference: tuple[float, str] | None = None,
    diverged_value: float | None = None,
) -> Drawing:
    """`metric` (length, score, accuracy) over beta on a log axis: a line through each method's means, seeds as
    points."""
    table = outcomes(members, metric, diverged_value)
    look = looks(_methods(table), LOOKS)
    drawn, axes = canvas(height=4.0, title=title)
    place, ends, words = axes[0, 0], [], []
    place.set_xscale("log")
    for shift, (name, own) in zip(spread(len(look), 0.12), look.items(), strict=True):
        said, line = [], []
        for beta, cell in table[table["method"] == name].groupby("beta"):
            diverged = int(cell["diverged"].sum())
            points(place, np.full(len(cell), beta * np.exp(shift)), cell, own)
            line.append((beta * np.exp(shift), cell["value"].mean()))
            lost = f" ({diverged} of {len(cell)} diverged)" if diverged else ""
            said.append(f"beta {number(beta)} {number(line[-1][1])}{lost}")
        place.plot(*np.array(line).T, color=own.colour, alpha=0.8)
        ends.append((line[-1][1], own.label, own.colour))
        words.append(f"{own.label}: {', '.join(said)}.")
    betas = ordered(table["beta"])
    place.set_xticks(betas, [number(beta) for beta in betas])
    place.minorticks_off()
    place.set(xlabel="β (log scale)", ylabel=ylabel)
    if reference is not None:
        reference_line(place, reference[0])
        ends.append((reference[0], f"{reference[1]} {number(reference[0])}", SOFT))
        words.append(f"{reference[1]}: {number(reference[0])}.")
    label_ends(place, ends)
    if table["diverged"].any():
        legend_below(drawn, [DIVERGED])
    alt = f"{title}: mean {ylabel} by beta. {' '.join(words)}"
    return Drawing(drawn, title, alt, table[["method", "beta", "tau", "seed", "status", "value"]])


def answer_length(
    members: pd.DataFrame, *, reference: tuple[float, str] | None = None, title: str = "Length of sampled answers"
) -> Drawing:
    """Mean length of the sampled answers over beta; `reference` is the untrained model's."""
    return over_beta(members, "answer_length", title=title, ylabel="answer length (tokens)", reference=reference)


@housestyle
def kl_against_score(
    members: pd.DataFrame,
    score: str,
    *,
    score_label: str,
    reference: float | None = None,
    title: str = "Score against distance from the reference",
) -> Drawing:
    """Sampled KL(pi_theta || pi_0) against the score: seeds faint, the mean of each cell bold and named by its beta.
    A diverged member has no KL and so no point; the words count them."""
    table = outcomes(members, score)
    table["kl"] = outcomes(members, "sampled_kl")["value"]
    shown = table.dropna(subset=["kl", "value"])
    look = looks(_methods(shown), LOOKS)
    drawn, axes = canvas(height=4.6, title=title)
    place, words, names = axes[0, 0], [], []
    if len(shown) and shown["kl"].max() > 20:  # from near 0 to hundreds of nats: linear up to 1, then logarithmic
        place.set_xscale("symlog", linthresh=1.0)
        place.xaxis.set_major_locator(matplotlib.ticker.SymmetricalLogLocator(base=10, linthresh=1.0, subs=[1, 2, 5]))
        place.xaxis.set_major_formatter(lambda value, _: number(value))
    for name, own in look.items():
        group = shown[shown["method"] == name]
        place.scatter(group["kl"], group["value"], color=own.colour, marker=own.marker, s=18, alpha=0.35, linewidths=0)
        keys = ["beta", "tau"] if name in TEMPERED else ["beta"]
        several = len(group.drop_duplicates(keys)) > group["beta"].nunique()
        said = []
        for cell in group.groupby(keys)[["kl", "value"]].mean().reset_index().to_dict("records"):
            place.scatter(
                cell["kl"],
                cell["value"],
                color=own.colour,
                marker=own.marker,
                s=75,
                edgecolors="white",
                linewidths=0.8,
                zorder=3,
                label=own.label,
            )
            if not several:  # a whole grid of beta and tau is too crowded to name; the words and the CSV have it
                names.append((cell["kl"], cell["value"], f"β {number(cell['beta'])}", own.colour))
            said.append(
                " ".join(
                    f"{word} {number(cell[key])}"
                    for word, key in [*((key, key) for key in keys), ("KL", "kl"), ("score", "value")]
                )
            )
        words.append(f"{own.label}: {'; '.join(said)}.")
    if reference is not None:
        reference_line(place, reference, "reference")
        words.append(f"The reference model scores {number(reference)}.")
    place.set(xlabel="sampled KL to the reference (nats per answer)", ylabel=score_label)
    legend_below(drawn)
    label_points(drawn, place, names)
    if table["diverged"].any():
        words.append(f"{int(table['diverged'].sum())} diverged members have no point.")
    alt = f"{title}: {score_label} against sampled KL in nats, mean of each cell. {' '.join(words)}"
    return Drawing(drawn, title, alt, shown[["method", "beta", "tau", "seed", "kl", "value"]])
