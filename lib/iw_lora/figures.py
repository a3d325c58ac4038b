"""Figures of the IW-LoRA study: sensitivities over layers and projections, what is made of them, and what training
did."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lib.plots import SOFT, Drawing, canvas, housestyle, legend_below, looks, number

MATRIX = r"(?P<layer>\d+)\.(?:.*\.)?(?P<projection>\w+)$"


def placed(matrices: pd.DataFrame) -> pd.DataFrame:
    """The rows of tables.adapters with `layer` (number) and `projection` (short name) read off the matrix's name."""
    parts = matrices["matrix"].str.extract(MATRIX)
    short = parts["projection"].str.removesuffix("_proj")
    return matrices.assign(layer=pd.to_numeric(parts["layer"]), projection=short.fillna(matrices["matrix"]))


@housestyle
def sensitivity_map(matrices: pd.DataFrame, *, title: str = "Sensitivity of the frozen matrices") -> Drawing:
    """Mean over members of s_k / sum s (the weights w_k) with layers across and projections down; K times w is 1 where
    all matrices are alike."""
    rows = placed(matrices.dropna(subset=["w"]))
    table = (
        rows.groupby(["projection", "layer"])["w"].mean().mul(rows["matrix"].nunique()).unstack()
        if len(rows)
        else pd.DataFrame()
    )
    drawn, axes = canvas(height=1.6 + 0.5 * max(1, len(table)), title=title)
    place, words = axes[0, 0], []
    place.grid(False)
    place.spines[:].set_visible(False)
    if len(table):
        image = place.imshow(table.to_numpy(), cmap="cividis", aspect="auto")
        bar = drawn.colorbar(image, ax=place, pad=0.02)
        bar.set_label("K × w (1: alike)")
        bar.outline.set_visible(False)
        place.set_xticks(range(table.shape[1]), [f"{layer:g}" for layer in table.columns])
        place.set_yticks(range(len(table)), table.index)
        place.set_xlabel("layer")
        middle = (table.min().min() + table.max().max()) / 2
        for (i, name), (j, layer) in ((a, b) for a in enumerate(table.index) for b in enumerate(table.columns)):
            value = table.iloc[i, j]
            place.annotate(
                number(value),
                (j, i),
                ha="center",
                va="center",
                fontsize=9 if table.shape[1] < 9 else 7,
                color="black" if value > middle else "white",
            )
            words.append(f"{name} of layer {layer:g} {number(value)}")
    alt = f"{title}: K times the weight of each matrix, mean over members. {'; '.join(words) or 'no sensitivities'}."
    return Drawing(drawn, title, alt, table.reset_index() if len(table) else rows)


@housestyle
def coefficient_spread(
    matrices: pd.DataFrame, *, title: str = "How much the penalty's coefficients discriminate"
) -> Drawing:
    """Every matrix's coefficient over the mean of its member's, one row per run: points far from 1 are
    discriminated."""
    rows = matrices.dropna(subset=["coefficient"])
    rows = rows.assign(
        relative=rows["coefficient"] / rows.groupby(["run_id", "cell", "seed"])["coefficient"].transform("mean")
    )
    names = list(dict.fromkeys(rows["run_id"]))
    drawn, axes = canvas(height=1.4 + 0.42 * max(1, len(names)), title=title)
    place, words = axes[0, 0], []
    look = looks(names)
    place.axvline(1, color=SOFT, linewidth=1)
    for level, name in enumerate(names):
        values = rows.loc[rows["run_id"] == name, "relative"].to_numpy()
        jitter = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(1)
        place.plot(values, level + jitter, look[name].marker, color=look[name].colour, markersize=4, alpha=0.7)
        least, most = float(values.min()), float(values.max())
        ratio = number(most / least) if least > 0 else "unbounded"
        place.annotate(f"max/min {ratio}", (1.01, level), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        words.append(f"{name} {number(least)} to {number(most)}, max/min {ratio}")
    place.set_yticks(range(len(names)), names)
    place.set_xlabel("coefficient over its member's mean")
    place.invert_yaxis()
    alt = (
        f"{title}: coefficients relative to their mean, of every matrix and member. {'; '.join(words) or 'no penalty'}."
    )
    return Drawing(drawn, title, alt, rows[["run_id", "cell", "seed", "matrix", "coefficient", "relative"]])


@housestyle
def update_norms(matrices: pd.DataFrame, *, title: str = "Size of the update with the penalty and without") -> Drawing:
    """|| Delta_k ||_F at the end of training per matrix, mean over seeds with their range, one series per run."""
    rows = placed(matrices.dropna(subset=["delta_norm"]))
    rows = rows.sort_values(["layer", "projection"], kind="stable")
    order, look = list(dict.fromkeys(rows["matrix"])), looks(list(dict.fromkeys(rows["label_of_run"])))
    drawn, axes = canvas(height=4.0, title=title)
    place, words = axes[0, 0], []
    for offset, (name, own) in zip(np.linspace(-0.3, 0.3, max(1, len(look))), look.items(), strict=False):
        seeds = rows[rows["label_of_run"] == name].groupby("matrix")["delta_norm"]
        mean, low, high = (getattr(seeds, f)().reindex(order) for f in ("mean", "min", "max"))
        at = np.arange(len(order)) + offset
        place.vlines(at, low, high, color=own.colour, linewidth=1)
        place.plot(at, mean, own.marker, color=own.colour, label=own.label, markersize=5)
        words.append(
            f"{name} {number(float(mean.min()))} to {number(float(mean.max()))}, mean {number(float(mean.mean()))}"
        )
    place.set_xticks(
        range(len(order)),
        [m.replace("attention.self.", "") for m in order],
        rotation=90 if len(order) > 8 else 0,
        fontsize=8.5,
    )
    place.set(ylabel="‖Δ‖ (Frobenius)", ylim=(0, None))
    legend_below(drawn)
    alt = f"{title}: Frobenius norm of every matrix's update at the end. {'; '.join(words) or 'no adapters'}."
    return Drawing(drawn, title, alt, rows[["run_id", "cell", "seed", "matrix", "delta_norm"]])


@housestyle
def rank_against_sensitivity(
    matrices: pd.DataFrame, *, title: str = "AdaLoRA's kept ranks against the sensitivity"
) -> Drawing:
    """Where AdaLoRA put its rank (mean over seeds, per matrix) against the same matrix's K w (mean over who measured
    it)."""
    weight = matrices.dropna(subset=["w"]).groupby("matrix")["w"].mean()
    rank = matrices.dropna(subset=["rank"]).groupby("matrix")["rank"].mean()
    table = pd.DataFrame({"weight": weight * max(1, len(weight)), "rank": rank}).dropna()
    drawn, axes = canvas(height=3.8, title=title)
    place = axes[0, 0]
    place.plot(table["weight"], table["rank"], "o", color="#0072B2")
    for name, row in table.iterrows():
        place.annotate(
            str(name).replace("attention.self.", ""),
            (row["weight"], row["rank"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8.5,
        )
    place.set(xlabel="K × w of the frozen matrix, before training", ylabel="triplets that AdaLoRA kept")
    place.margins(x=0.25, y=0.2)
    correlation = table["weight"].corr(table["rank"], method="spearman") if len(table) > 2 else float("nan")
    words = "; ".join(f"{name}: {number(row['weight'])}, rank {number(row['rank'])}" for name, row in table.iterrows())
    alt = f"{title}, rank correlation {number(correlation)} over {len(table)} matrices. {words or 'no AdaLoRA record'}."
    return Drawing(drawn, title, alt, table.reset_index())


@housestyle
def confusions(examples: pd.DataFrame, labels: list[str], *, title: str = "Confusion matrices") -> Drawing:
    """One matrix per run, over its seeds: the share of each true label that was said to be each label."""
    names = list(dict.fromkeys(examples["label_of_run"])) if len(examples) else []
    columns = min(5, max(1, len(names)))
    lines = -(-max(1, len(names)) // columns)
    drawn, axes = canvas(lines, columns, height=0.8 + 2.0 * lines, title=title)
    words, data = [], []
    for place in axes.flat:
        place.set_axis_off()
    for place, name in zip(axes.flat, names, strict=False):
        rows = examples[examples["label_of_run"] == name]
        counts = pd.crosstab(rows["label"], rows["prediction"]).reindex(
            index=range(len(labels)), columns=range(len(labels)), fill_value=0
        )
        share = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
        place.set_axis_on()
        place.grid(False)
        place.imshow(share, cmap="Blues", vmin=0, vmax=1)
        place.set_title(name, fontsize=9)
        short = [label[:7] for label in labels]
        place.set_xticks(range(len(labels)), short, fontsize=7)
        place.set_yticks(range(len(labels)), short, fontsize=7)
        for i in range(len(labels)):
            for j in range(len(labels)):
                place.annotate(
                    f"{share.iloc[i, j]:.2f}",
                    (j, i),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if share.iloc[i, j] > 0.55 else "black",
                )
        right = (f"{label} right {number(float(share.iloc[i, i]))}" for i, label in enumerate(labels))
        words.append(f"{name}: {', '.join(right)}")
        data.append(counts.stack().rename("count").reset_index().assign(run=name))
    alt = f"{title}: rows are the true labels, columns what was said, shares of a row. {'; '.join(words) or 'none'}."
    empty = pd.DataFrame(columns=["label", "prediction", "count", "run"])
    return Drawing(drawn, title, alt, pd.concat(data) if data else empty)


@housestyle
def times(costs: pd.DataFrame, *, title: str = "Seconds of a step, measured in turns") -> Drawing:
    """Step times of IW-LoRA over LoRA's and over AdaLoRA's, of every interleaved round, with the median."""
    series = {"over LoRA": ("seconds", "seconds_baseline"), "over AdaLoRA": ("step_seconds", "step_seconds_baseline")}
    drawn, axes = canvas(height=2.2, title=title)
    place, words, data = axes[0, 0], [], []
    place.axvline(1, color=SOFT, linewidth=1)
    for level, (name, (own, other)) in enumerate(series.items()):
        ratio = (costs[own] / costs[other]).to_numpy() if own in costs else np.array([])
        if len(ratio):
            place.plot(ratio, level + np.linspace(-0.2, 0.2, len(ratio)), "o", markersize=3, alpha=0.6, color="#0072B2")
            place.plot([np.median(ratio)] * 2, [level - 0.3, level + 0.3], color="#C44F00", linewidth=2.5)
            words.append(f"{name} median {number(float(np.median(ratio)))} of {len(ratio)} rounds")
            data.append(pd.DataFrame({"ratio": ratio, "against": name}))
    place.set_yticks(range(len(series)), list(series))
    place.set(xlabel="IW-LoRA's step, as a multiple", ylim=(-0.5, len(series) - 0.5))
    alt = f"{title}. {'; '.join(words) or 'not measured'}."
    return Drawing(drawn, title, alt, pd.concat(data) if data else pd.DataFrame(columns=["ratio", "against"]))
