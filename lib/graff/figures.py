"""Figures of the GRAFF study: what the schedulers did over the budget and what came of it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from lib.plots import BAD, SOFT, Drawing, canvas, housestyle, legend_below, looks, number


def _over_budget(rows: pd.DataFrame, column: str, places: np.ndarray) -> np.ndarray:
    """Mean over members of `column` at `places` of the budget's fraction, by linear interpolation."""
    rows = rows.dropna(subset=[column])
    members = [g.sort_values("x") for _, g in rows.groupby(["cell", "seed"])]
    found = [np.interp(places, g["x"], g[column].astype(float)) for g in members]
    return np.mean(found, axis=0) if found else places * np.nan


def _lines(
    rows: pd.DataFrame, column: str, places: np.ndarray, title: str, label: str, scale: str = "linear"
) -> Drawing:
    """One line per run: the mean over seeds of `column` over the budget's fraction `x`."""
    drawn, axes = canvas(title=title, height=4.6)
    place, found = axes[0, 0], {}
    for name, look in looks(list(dict.fromkeys(rows["run_id"]))).items():
        found[name] = _over_budget(rows[rows["run_id"] == name], column, places)
        place.plot(places, found[name], color=look.colour, label=name)
    place.set_yscale(scale)
    place.set_xlabel("share of the budget used")
    place.set_ylabel(label)
    legend_below(drawn)
    words = "; ".join(f"{n} from {number(v[0])} to {number(v[-1])}" for n, v in found.items())
    return Drawing(drawn, title, f"{title}: {words}.", pd.DataFrame({"fraction": places, **found}))


@housestyle
def rates(steps: pd.DataFrame, *, title: str = "Learning rate over the budget") -> Drawing:
    """One line per run: the mean over seeds of the applied rate, log scale."""
    return _lines(
        steps.assign(x=steps["fraction"]), "eta", np.linspace(0.02, 0.98, 49), title, "applied learning rate", "log"
    )


@housestyle
def exact_match(rows: pd.DataFrame, budget: float, *, title: str = "Exact match over time") -> Drawing:
    """A panel a run, the area under its line shaded, which is AUC/B; the fixed rate's line in grey behind the others.
    The first point is the base model's."""
    names = list(dict.fromkeys(rows["run_id"]))
    columns, grey = min(4, len(names)), "fixed" if "fixed" in names else names[0]
    drawn, axes = canvas(
        -(-len(names) // columns),
        columns,
        title=title,
        height=max(4, 0.6 + 2.2 * -(-len(names) // columns)),
        sharex=True,
        sharey=True,
    )
    places, rows = np.linspace(0, 1, 51), rows.assign(x=rows["used"] / budget)
    found = {name: _over_budget(rows[rows["run_id"] == name], "exact_match_subset", places) for name in names}
    for place, (name, look) in zip(axes.flat, looks(names).items(), strict=False):
        if name != grey:
            place.plot(places, found[grey], color=SOFT, linewidth=1)
        place.plot(places, found[name], color=look.colour)
        place.fill_between(places, found[name], color=look.colour, alpha=0.25, linewidth=0)
        place.set_title(f"{name}: {number(np.trapezoid(found[name], places))}", fontsize=10)
    axes.flat[0].set_ylim(bottom=0)  # shared by all
    for place in axes.flat[len(names) :]:
        place.set_axis_off()
    drawn.supxlabel("share of the budget used" + (f" (grey: {grey})" if len(names) > 1 else ""), fontsize=10)
    drawn.supylabel("exact match, dev subset", fontsize=10)
    words = "; ".join(
        f"{n} ends at {number(v[-1])} with area {number(np.trapezoid(v, places))}" for n, v in found.items()
    )
    return Drawing(drawn, title, f"{title}: {words}.", pd.DataFrame({"fraction": places, **found}))


@housestyle
def loss(rows: pd.DataFrame, budget: float, *, title: str = "Dev loss over time") -> Drawing:
    """One line per run: the mean over seeds of the loss on the dev subset, from the base model's on."""
    return _lines(
        rows.assign(x=rows["used"] / budget),
        "dev_loss",
        np.linspace(0, 1, 51),
        title,
        "loss on the dev subset, nats per token",
    )


@housestyle
def energy(rows: pd.DataFrame, level: float, *, title: str = "Exact match over energy") -> Drawing:
    """One line per run over the joules used (mean over seeds at the same share of them), and the level counted to."""
    drawn, axes = canvas(title=title, height=4.6)
    place, places, found = axes[0, 0], np.linspace(0, 1, 51), {}
    rows = rows.dropna(subset=["joules"])
    whole = rows.groupby(["run_id", "cell", "seed"])["joules"].transform("max").clip(lower=1e-9)
    rows = rows.assign(x=rows["joules"].astype(float) / whole.astype(float))
    for name, look in looks(list(dict.fromkeys(rows["run_id"]))).items():
        mine = rows[rows["run_id"] == name]
        joules = float(mine.groupby(["cell", "seed"])["joules"].max().mean())
        found[name] = _over_budget(mine, "exact_match_subset", places)
        place.plot(places * joules / 1e3, found[name], color=look.colour, label=name)
    place.axhline(level, color=BAD, linestyle="--", linewidth=1)
    place.set_xlabel("energy used, kJ")
    place.set_ylabel("exact match, dev subset")
    legend_below(drawn)
    words = "; ".join(f"{n} ends at {number(v[-1])}" for n, v in found.items())
    return Drawing(drawn, title, f"{title}: {words}.", pd.DataFrame({"share of the energy": places, **found}))


@housestyle
def gaps(table: pd.DataFrame, *, title: str = "EM(GSM8K test) less EM(GSM1k)") -> Drawing:
    """A run a line: the gap and its bootstrap interval over models and problems."""
    drawn, axes = canvas(title=title, height=1.2 + 0.4 * len(table))
    place, rows = axes[0, 0], range(len(table))
    place.errorbar(
        table["gap"], rows, xerr=[table["gap"] - table["low"], table["high"] - table["gap"]], fmt="o", capsize=3
    )
    place.axvline(0, color=SOFT, linewidth=1)
    place.set_yticks(rows, table["run_id"])
    place.set_xlabel("gap (above 0: better on the public problems)")
    words = "; ".join(f"{r.run_id} {number(r.gap)} [{number(r.low)}, {number(r.high)}]" for r in table.itertuples())
    return Drawing(drawn, title, f"{title}: {words}.", table)


@housestyle
def multipliers(steps: pd.DataFrame, *, title: str = "Block multipliers over the budget") -> Drawing:
    """Heat map of mean log2 m_i: blocks (depth) down, time across."""
    drawn, axes = canvas(title=title, height=3.6)
    place = axes[0, 0]
    place.grid(False)
    cells = np.minimum((steps["fraction"] * 20).astype(int), 19)
    log_m = pd.DataFrame(steps["log_m"].tolist(), index=steps.index) / math.log(2)
    table = log_m.groupby(cells).mean().T
    table.index = [f"layer {i // 2} {'mlp' if i % 2 else 'attention'}" for i in table.index]
    top = max(0.01, float(table.abs().max().max()))
    image = place.imshow(table, aspect="auto", cmap="PuOr", vmin=-top, vmax=top, extent=(0, 1, len(table) - 0.5, -0.5))
    drawn.colorbar(image, ax=place).set_label("log2 of the multiplier")
    place.set_yticks(range(len(table)), table.index)
    place.set_xlabel("share of the budget used")
    last = "; ".join(f"{name} {number(value)}" for name, value in table.iloc[:, -1].items())
    return Drawing(drawn, title, f"{title}; log2 at the end: {last}.", table.reset_index())


@housestyle
def guard(steps: pd.DataFrame, beta1: float, *, title: str = "eta lambda against the guard") -> Drawing:
    """Every step of every member with an estimate, and the two limits. The estimate is made after the step, so that a
    step may lie above the limit that caps the next."""
    drawn, axes = canvas(title=title)
    place, rows = axes[0, 0], steps.dropna(subset=["lambda"])
    values = rows["eta"].astype(float) * rows["lambda"].astype(float)
    place.plot(rows["fraction"], values, ".", markersize=3, color=SOFT)
    for limit, name in ((1.9, "literal 1.9"), (1.9 * (1 + beta1) / (1 - beta1), "Adam's edge")):
        place.axhline(limit, color=BAD, linestyle="--", linewidth=1)
        place.annotate(name, (0.01, limit), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
    place.set_yscale("log")
    place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    place.yaxis.set_major_formatter(ScalarFormatter())
    place.yaxis.set_minor_formatter(NullFormatter())
    place.set_xlabel("share of the budget used")
    place.set_ylabel("eta × lambda")
    largest = float(values.max()) if len(values) else float("nan")
    return Drawing(
        drawn,
        title,
        f"{title}: largest {number(largest)}.",
        rows[["run_id", "seed", "step", "fraction"]].assign(product=values),
    )


@housestyle
def graph(edges: np.ndarray, *, title: str = "The planner's graph") -> Drawing:
    """Blocks by layer (across) and kind (down), an edge between each two that exchange messages."""
    drawn, axes = canvas(title=title, height=2.6)
    place = axes[0, 0]
    place.grid(False)
    place.spines[:].set_visible(False)
    for source, target in edges.T.tolist():
        if source < target:
            place.plot([source // 2, target // 2], [source % 2, target % 2], color=SOFT, linewidth=2, zorder=1)
    nodes = sorted(set(edges.ravel().tolist()))
    place.scatter([i // 2 for i in nodes], [i % 2 for i in nodes], s=350, zorder=2, color="#4477aa")
    place.set_yticks([0, 1], ["attention", "mlp"])
    place.set_ylim(-0.6, 1.6)
    place.set_xticks(sorted({i // 2 for i in nodes}))
    place.set_xlabel("layer")
    alt = f"{title}: {len(nodes)} blocks, {int((edges[0] < edges[1]).sum())} edges besides each block's own."
    return Drawing(drawn, title, alt, pd.DataFrame(edges.T, columns=["source", "target"]))
