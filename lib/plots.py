"""Figures: the house style, plots over members and seeds drawn with seaborn, and their files.

A plot is a function DataFrame -> Drawing: a figure with its numbers and the same numbers in words, its alternative
text. `save` writes its files. Figures are made without pyplot where that is possible: no global state, no display.
"""

from __future__ import annotations

import base64
import contextlib
import contextvars
import html
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lib.record import write_bytes

# Hues of Okabe-Ito and Tol, darkened until text in them has 4.5:1 on white; markers double them.
PALETTE = ("#0072B2", "#AA3377", "#C44F00", "#00805C", "#555555", "#7A4FBF", "#8A6100", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
INK, SOFT, GRID, BAD = "#1b1f24", "#59636e", "#d9dde2", "#b3261e"
DASH = (0, (4, 3))
IDENTITY = ("run_id", "method", "cell", "beta", "tau", "seed", "status")  # of a member
WIDTH = 8.0  # inches; shown at about 900 px, so 10.5 pt stays readable
STYLE = sns.axes_style("whitegrid") | {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "xtick.bottom": True,
    "ytick.left": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "pdf.fonttype": 42,
}
housestyle = matplotlib.rc_context(STYLE)  # as a decorator: titles and labels made inside take the style
DIVERGED = (Line2D([], [], linestyle="", marker="x", color=BAD, markeredgewidth=2), "diverged seed")
MARGIN_SIGNS = {"non_inferiority": (-1,), "equivalence": (-1, 1)}
VERDICT_COLORS = {"supported": "#0072B2", "refuted": "#B34700"}


@dataclass(frozen=True)
class Look:
    """How one series is drawn wherever it appears."""

    label: str
    color: str
    marker: str = "o"


@dataclass
class Drawing:
    """A figure with the numbers it shows and those numbers in words. It shows itself in a notebook with its alternative
    text, and needs no other file there; `save` adds the links from its points to their members."""

    canvas: Figure
    title: str
    alt: str
    data: pd.DataFrame
    links: Sequence[Mapping] = ()  # {left, top: fractions of width and height, href, words}

    @housestyle
    def render(self, kind: str = "png", **metadata) -> bytes:
        buffer = io.BytesIO()
        self.canvas.savefig(buffer, format=kind, dpi=160, metadata=metadata)
        return buffer.getvalue()

    def _repr_html_(self) -> str:
        return embed(self.render(), self.alt, self.links)

    def __repr__(self) -> str:
        return self.alt


def save(drawing: Drawing, folder: str | Path, name: str) -> Drawing:
    """Write <name>.pdf, .png, .csv, .alt.txt and .links.json, each atomically and free of dates. The links lead to each
    member's row on the page of its run, relative to the folder that holds `folder`, where the analysis' page lies."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "pdf": drawing.render("pdf", CreationDate=None, Title=drawing.title),
        "png": drawing.render("png", Software=None, Description=drawing.alt),
        "csv": drawing.data.to_csv(index=False).encode(),
        "alt.txt": f"{drawing.alt}\n".encode(),
    }
    drawing.links = _links(drawing.canvas, folder.absolute().parent)
    files["links.json"] = (json.dumps(drawing.links, indent=1, ensure_ascii=False) + "\n").encode()
    for kind, content in files.items():
        write_bytes(folder / f"{name}.{kind}", content)
    return drawing


def embed(png: bytes, alt: str, links: Sequence[Mapping] = ()) -> str:
    """A figure as HTML that needs no other file; over each point of a member lies a link."""
    points = "".join(
        f'<a class="point" style="left:{link["left"]:.1%};top:{link["top"]:.1%}" href="{html.escape(link["href"])}" '
        f'title="{html.escape(link["words"])}">{html.escape(link["words"])}</a>'
        for link in links
    )
    image = f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html.escape(alt)}">'
    return f'<figure><div class="drawn">{image}{points}</div></figure>'


@contextlib.contextmanager
def redraw_during(draw: Callable[[], Drawing], every: float = 1.0) -> Iterator[None]:
    """Show `draw()` in a notebook, again every so many seconds while the body runs and once more at its end. It is
    drawn in a thread, so that an interrupt reaches the body."""
    from IPython.display import display

    handle, ended = display(draw(), display_id=True), threading.Event()

    def redraw() -> None:
        while not ended.wait(every):
            handle.update(draw())

    # In a copy of this context, because a kernel finds the cell that an output belongs to in it.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(redraw,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        handle.update(draw())


# ---- parts of figures


def canvas(rows: int = 1, columns: int = 1, *, height: float = 4.0, title: str = "", **options):
    """An empty figure and its (rows, columns) axes; `options` go to matplotlib's Figure.subplots."""
    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False, **options)
    if title:
        drawn.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    return drawn, axes


def looks(names: Iterable[str], known: Mapping[str, Look] | None = None) -> dict[str, Look]:
    """A look for every name, in the study's own order and looks where it has them, else the next free color and
    marker."""
    known, names = known or {}, list(dict.fromkeys(names))
    chosen = {name: known[name] for name in known if name in names}
    taken = {look.color for look in chosen.values()}
    free = [i for i, color in enumerate(PALETTE) if color not in taken] or list(range(len(PALETTE)))
    for i, name in enumerate(name for name in names if name not in known):
        place = free[i % len(free)]
        chosen[name] = Look(str(name), PALETTE[place], MARKERS[place])
    return chosen


def number(value: float | None, digits: int = 3) -> str:
    """A number as figures and alternative texts write it: `digits` significant ones, a true minus sign."""
    if value is None or not np.isfinite(value):
        return "none"
    text = f"{value:.{digits}g}"
    return (f"{value:.0f}" if "e+0" in text else text).replace("-", "−")


def name_of(value: object) -> str:
    return number(value) if isinstance(value, float | int) else str(value)


def sort_distinct(values: Iterable) -> list:
    """The distinct values, sorted, without missing ones."""
    return sorted(pd.unique(pd.Series(list(values)).dropna()))


def spread(count: int, width: float) -> np.ndarray:
    """`count` offsets around 0 over `width`."""
    return np.linspace(-width / 2, width / 2, count) if count > 1 else np.zeros(count)


def outcomes(members: pd.DataFrame, metric: str, diverged_value: float | None = None) -> pd.DataFrame:
    """Members with `value` (the metric) and `diverged`. A diverged member counts as `diverged_value`; with None it is
    a mark without a value. A table without members, or a metric that no member has, draws as nothing."""
    table = members.copy() if len(members) else members.reindex(columns=dict.fromkeys([*IDENTITY, *members.columns]))
    table["diverged"] = table["status"].eq("diverged") if "status" in table else False
    values = table[metric] if metric in table else pd.Series(np.nan, index=table.index)
    table["value"] = pd.to_numeric(values, errors="coerce").astype(float).replace([np.inf, -np.inf], np.nan)
    table.loc[table["diverged"], "value"] = np.nan if diverged_value is None else float(diverged_value)
    return table


def t_interval(values: Iterable[float]) -> tuple[float, float]:
    """Student's 95 % interval of a mean over seeds; (nan, nan) with fewer than two."""
    from scipy import stats

    seeds = pd.Series(values, dtype=float).dropna()
    if len(seeds) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(seeds) - 1) * seeds.sem()
    return float(seeds.mean() - half), float(seeds.mean() + half)


def points(place: Axes, positions: np.ndarray, cell: pd.DataFrame, look: Look) -> None:
    """Every member of a cell: a filled point, or a cross where it diverged (at the foot where it has no value). Each is
    remembered, so that a page can link it to its member."""
    members = place.figure.__dict__.setdefault("members", [])
    for position, row in zip(positions, cell.to_dict("records"), strict=True):
        valued = np.isfinite(row["value"])
        if not valued and not row["diverged"]:
            continue
        value, transform = (row["value"], place.transData) if valued else (0.025, place.get_xaxis_transform())
        members.append((transform, position, value, row))
        style = {"marker": look.marker, "color": look.color, "markersize": 5, "markeredgecolor": "white", "zorder": 3}
        if row["diverged"]:
            style = {"marker": "x", "color": BAD, "markersize": 7, "markeredgewidth": 2, "zorder": 4}
        place.plot([position], [value], linestyle="", clip_on=False, transform=transform, **style)


def _links(drawn: Figure, page_folder: Path) -> list[dict]:
    """Where the members' points lie once everything is drawn, and the places on pages that they stand for."""
    links, (width, height) = [], (drawn.bbox.width, drawn.bbox.height)
    for transform, x, y, row in drawn.__dict__.get("members", ()):
        across, up = transform.transform((x, y))
        if isinstance(row.get("folder"), str) and 0 <= across <= width and 0 <= up <= height:
            member = Path(row["folder"])
            value = "diverged" if row["diverged"] else number(row["value"])
            href = quote(os.path.relpath(member.parents[1] / "run.html", page_folder)) + f"#{quote(member.name)}"
            links.append(
                {
                    "left": round(float(across / width), 4),
                    "top": round(1 - float(up / height), 4),
                    "words": f"{row.get('run_id')}, {row.get('cell')}, seed {row.get('seed')}: {value}",
                    "href": href,
                }
            )
    return links


def legend_below(drawn: Figure, extra: Sequence[tuple[object, str]] = ()) -> None:
    """One legend for all panels, under them; `extra` are further (handle, label)."""
    pairs = [pair for axes in drawn.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    named = {label: handle for handle, label in [*pairs, *extra]}
    if named:
        wide = 0.085 * (max(map(len, named)) + 6)  # inches of the widest entry at 9.5 pt
        rows = -(-len(named) // max(1, int(WIDTH / wide)))
        drawn.legend(list(named.values()), list(named), loc="outside lower left", ncols=-(-len(named) // rows))


def reference_line(axes: Axes, value: float, label: str = "") -> None:
    """A dashed line at `value`, named at the right edge."""
    axes.axhline(value, color=SOFT, linewidth=1, linestyle=DASH)
    if label:
        style = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(f"{label} {number(value)}", (1.0, value), (4, 0), color=SOFT, **style)


# ---- plots over members and seeds


@housestyle
def box_over_seeds(members: pd.DataFrame, metric: str, **options) -> Drawing:
    """`metric` per `x` and `by`: a box from three seeds on, every seed as a point, a diverged seed as a cross. Options
    are those of `_over_cells`."""

    def draw(place, table, style):
        several = table.groupby(["category", style["hue"]])["value"].transform("count") >= 3
        if several.any():
            sns.boxplot(table[several], showfliers=False, fill=False, gap=0.2, linewidth=1.3, ax=place, **style)

    return _over_cells(members, metric, draw, words="{ylabel} of every seed by {xlabel}", **options)


@housestyle
def bars(members: pd.DataFrame, metric: str, *, floor: float = 0.0, **options) -> Drawing:
    """Mean of `metric` per `x` and `by` with Student's 95 % interval over seeds, and every seed as a point. `floor`: the
    lowest possible value of the metric, where the bars start. Options are those of `_over_cells`."""

    def draw(place, table, style):
        if table["value"].notna().any():
            line = {"color": INK, "linewidth": 1.3}
            sns.barplot(table, errorbar=t_interval, gap=0.08, alpha=0.4, err_kws=line, ax=place, **style)
            place.set_ylim(bottom=floor)

    return _over_cells(members, metric, draw, words="mean {ylabel} by {xlabel}", interval=True, **options)


def _over_cells(
    members: pd.DataFrame,
    metric: str,
    draw: Callable[[Axes, pd.DataFrame, dict], None],
    *,
    title: str,
    words: str,
    ylabel: str = "",
    x: str = "beta",
    xlabel: str = "",
    by: str = "method",
    known: Mapping[str, Look] | None = None,
    diverged_value: float | None = None,
    reference: tuple[float, str] | None = None,
    interval: bool = False,
) -> Drawing:
    """What boxes and bars share: categories of `x`, the series of `by` side by side in each (in its middle where each
    category has one), every member's point, one legend, a `reference` level with its name, and the words."""
    ylabel, xlabel = ylabel or metric.replace("_", " "), xlabel or x
    table = outcomes(members, metric, diverged_value)
    table["category"] = table[x].map(name_of) if len(table) else None
    places, look = [name_of(value) for value in sort_distinct(table[x])], looks(table[by], known)
    alone = table.groupby(x)[by].nunique().max() == 1
    width = 0.27 if alone else 0.8
    drawn, axes = canvas(height=4.2, title=title)
    place, said, rows = axes[0, 0], {}, []
    colors = {name: own.color for name, own in look.items()}
    style = {"x": "category", "y": "value", "hue": by, "order": places, "hue_order": list(look), "palette": colors}
    draw(place, table, style | {"dodge": not alone, "width": width, "saturation": 1, "legend": False})
    for i, (name, own) in enumerate(look.items()):
        offset = 0 if alone else width / len(look) * (i - (len(look) - 1) / 2)
        for j, category in enumerate(places):
            cell = table[(table[by] == name) & (table["category"] == category)]
            if cell.empty:
                continue
            points(place, j + offset + spread(len(cell), width / (2 if alone else 2 * len(look))), cell, own)
            text, (low, high), mean = _cell_words(cell), t_interval(cell["value"]), cell["value"].mean()
            if interval and np.isfinite(mean):
                top = np.nanmax([high, *cell["value"]])
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
                put = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "zorder": 5, "bbox": box}
                place.annotate(number(mean), (j + offset, top), (0, 3), **put)
            if interval and np.isfinite(low):
                text += f", 95 % interval {number(low)} to {number(high)}"
            said.setdefault(own.label, []).append(f"{xlabel} {category} {text}")
            rows.append({by: name, "category": category, "mean": mean, "low": low, "high": high, "seeds": len(cell)})
    place.set_xticks(range(len(places)), places)
    place.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.6, max(0, len(places) - 1) + 0.6))
    alt = f"{title}: {words.format(ylabel=ylabel, xlabel=xlabel)}. "
    alt += " ".join(f"{label}: {'; '.join(cells)}." for label, cells in said.items())
    if reference is not None:
        reference_line(place, *reference)
        alt += f" {reference[1]}: {number(reference[0])}."
    handles = [(Line2D([], [], linestyle="", marker=o.marker, color=o.color), o.label) for o in look.values()]
    legend_below(drawn, handles + ([DIVERGED] if table["diverged"].any() else []))
    if interval and rows:
        table = table.merge(pd.DataFrame(rows), on=[by, "category"], how="left")
    shown = ("run_id", by, "cell", x, "seed", "status", "diverged", "value", "mean", "low", "high", "seeds")
    return Drawing(drawn, title, alt, table[[column for column in dict.fromkeys(shown) if column in table]])


def _cell_words(cell: pd.DataFrame) -> str:
    values, diverged = cell["value"].dropna(), int(cell["diverged"].sum())
    text = f"mean {number(values.mean())} (seeds {', '.join(map(number, values))})" if len(values) else "no value"
    return text + (f", {diverged} of {len(cell)} diverged" if diverged else "")


@housestyle
def learning_curves(
    history: pd.DataFrame,
    y: str,
    *,
    title: str,
    ylabel: str = "",
    by: str = "method",
    panel: str | None = None,
    panel_label: Callable[[object], str] = str,
    known: Mapping[str, Look] | None = None,
    smooth: int = 1,
    reference: float | None = None,
) -> Drawing:
    """`y` over the steps: the mean over seeds bold where all seeds are there, each seed faint, a cross where one ends
    early.

    One line per value of `by` in each `panel`; the rows of one line must differ in nothing but seed and step, so that
    no mean hides a choice. `smooth`: rolling mean over so many points.
    """
    ylabel, line = ylabel or y.replace("_", " "), [by] if panel is None else [panel, by]
    rows = history.reindex(columns=dict.fromkeys([*history.columns, "step", y, "seed", *line])).dropna(subset=[y])
    if rows.duplicated([*line, "step", "seed"]).any():
        raise ValueError(f"learning_curves: a {by} has several members per seed; choose one cell first")
    rows = rows.sort_values("step")
    shown = rows.groupby([*line, "seed"])[y].transform(lambda values: values.rolling(smooth, min_periods=1).mean())
    there, all_seeds = (rows.groupby(group)["seed"].transform("nunique") for group in ([*line, "step"], line))
    rows = rows.assign(shown=shown, everyone=there == all_seeds)
    panels, look, words = sort_distinct(rows[panel]) if panel else [None], looks(rows[by], known), []
    columns = min(2, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    height = 1.1 + (3.4 if lines == 1 else 2.5 * lines)
    drawn, axes = canvas(lines, columns, height=height, title=title, sharex=True, sharey=True)
    colors = {name: own.color for name, own in look.items()}
    faint = {"units": "seed", "estimator": None, "alpha": 0.35, "linewidth": 0.9, "legend": False}
    for place, value in zip(axes.flat, panels, strict=False):
        here = rows if panel is None else rows[rows[panel] == value]
        if len(here):
            sns.lineplot(here, x="step", y="shown", hue=by, palette=colors, hue_order=list(look), ax=place, **faint)
        present = [(own, here[here[by] == name]) for name, own in look.items() if (here[by] == name).any()]
        said = "; ".join(_curve(place, group, own, here["step"].max()) for own, group in present) or "no data"
        words.append((f"{panel_label(value)}: " if panel else "") + said + ".")
        if reference is not None:
            reference_line(place, reference)
        place.set(xlabel="optimizer step", ylabel=ylabel, title=panel_label(value) if panel else "")
        place.label_outer()
        place.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    legend_below(drawn)
    smoothed = f", smoothed over {smooth} points" if smooth > 1 else ""
    alt = f"{title}: {ylabel} over optimizer steps, mean over seeds with each seed faint{smoothed}. {' '.join(words)}"
    return Drawing(drawn, title, alt, rows[[c for c in (by, panel, "cell", "seed", "step", y) if c and c in rows]])


def _curve(place: Axes, rows: pd.DataFrame, own: Look, last: float) -> str:
    """The mean of one line, and crosses where its seeds end early; returns its numbers in words."""
    mean, ends = rows[rows["everyone"]].groupby("step")["shown"].mean(), rows.groupby("seed").last()
    place.plot(mean, color=own.color, label=own.label)
    early = ends[ends["step"] < last]
    place.plot(early["step"], early["shown"], "x", color=own.color, markersize=8, markeredgewidth=2, zorder=4)
    text = f"{own.label} has no step that all {len(ends)} seeds reached"
    if len(mean):
        (first, stop), (start, end) = mean.index[[0, -1]], mean.iloc[[0, -1]]
        final = rows[rows["step"] == stop]["shown"]
        seeds = f"(seeds {number(final.min())} to {number(final.max())})"
        text = f"{own.label} from {number(start)} at step {first} to {number(end)} at {stop} {seeds}"
    if len(early):
        text += f", {len(early)} of {len(ends)} seeds end early, the first at {early['step'].min()}"
    return text


@housestyle
def claims(records: Sequence[Mapping], *, title: str = "The claims") -> Drawing:
    """Each claim's estimate and 95 % interval against the margin that decides it: one row and one axis per claim,
    since their units differ.

    `records`: the entries of claims.json (id, verdict, estimate, interval95, test, margin, estimand). A
    non-inferiority margin lies below zero, an equivalence margin on both sides.
    """
    drawn, axes = canvas(max(1, len(records)), 1, height=0.7 + 1.05 * max(1, len(records)), title=title)
    words, data = [], []
    bound = lambda value: "no bound" if value is None else number(value)  # noqa: E731
    for place, record in zip(axes[:, 0], records, strict=False):
        low, high = (record.get("interval95") or [None, None])[:2]
        estimate, margin = record.get("estimate"), record.get("margin")
        verdict = str(record.get("verdict", "")).replace("_", " ")
        signs = MARGIN_SIGNS.get(str(record.get("test")), (1,)) if isinstance(margin, int | float) else ()
        margins = [sign * margin for sign in signs]
        _claim(place, record, verdict, estimate, low, high, margins)
        margin_words = f", margin {', '.join(map(number, margins))}" if margins else ""
        interval = f"95 % interval {bound(low)} to {bound(high)}"
        words.append(f"{record.get('id')}: {verdict}, estimate {number(estimate)}, {interval}{margin_words}.")
        row = {"id": record.get("id"), "verdict": verdict, "estimate": estimate, "low": low, "high": high}
        data.append(row | {"margins": " ".join(map(str, margins))})
    return Drawing(drawn, title, f"{title}: " + " ".join(words), pd.DataFrame(data))


def _claim(place: Axes, record: Mapping, verdict: str, estimate, low, high, margins: Sequence[float]) -> None:
    color = VERDICT_COLORS.get(verdict, SOFT)
    place.set(yticks=[], ylim=(-1, 1))
    place.spines["left"].set_visible(False)
    for margin in margins:
        place.axvline(margin, ymax=0.94, linewidth=1.2, linestyle=DASH, color=INK)
    if margins:  # the two of an equivalence claim may be too close for a label each
        text = f"margin {number(margins[0]) if len(margins) == 1 else '±' + number(max(margins))}"
        at = (sum(margins) / len(margins), 0.97)
        place.annotate(text, at, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8.5)
    shown = [v for v in (estimate, low, high, *margins) if v is not None]
    pad = 0.12 * (max(shown) - min(shown)) or 0.5 if shown else 0.5
    left, right = (min(shown) - pad, max(shown) + pad) if shown else (-1, 1)
    place.set_xlim(left, right)
    if low is not None or high is not None:  # an interval without an end on one side is drawn to the edge
        ends = [left if low is None else low, right if high is None else high]
        place.plot(ends, [0, 0], color=color, linewidth=5, alpha=0.5, solid_capstyle="round")
        for value, edge, marker in ((low, left, "<"), (high, right, ">")):
            if value is None:
                place.plot([edge], [0], marker, color=color, markersize=10, clip_on=False)
    if estimate is not None:
        place.plot([estimate], [0], "D", color=color, markersize=8)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
        style = {"ha": "center", "va": "bottom", "fontsize": 9.5, "fontweight": "bold", "color": color, "bbox": box}
        place.annotate(number(estimate), (estimate, 0.3), **style)
    if not shown:
        place.set_xticks([])
        place.annotate("no estimate", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=SOFT)
    edge = {"xycoords": "axes fraction", "ha": "right", "va": "center"}
    place.annotate(str(record.get("id", "")), (-0.02, 0.62), fontsize=12, fontweight="bold", **edge)
    place.annotate(verdict, (-0.02, 0.25), fontsize=9.5, color=color, **edge)
    place.tick_params(labelsize=8.5)
    place.set_xlabel(str(record.get("estimand") or ""), fontsize=9, loc="left")


# ---- a search


@housestyle
def search(study, objective: str, title: str, seed: int = 0) -> dict[str, Drawing]:
    """{topic: drawing} of an Optuna study: the objective by trial, over each setting by itself, and the share of its
    variance that each setting explains (fANOVA), which needs two settings and a spread of values.

    (optuna.visualization.matplotlib has the same three. Its color bar covers a panel, its style is one of its own, and
    it draws with pyplot, whose figures a notebook would show a second time.)
    """
    import optuna

    done = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    table = pd.DataFrame([{"trial": trial.number, "value": trial.value, **trial.params} for trial in done])
    space, label, best = done[0].distributions, objective.replace("_", " "), study.best_trial
    table["best so far"] = table["value"].cummin() if study.direction.name == "MINIMIZE" else table["value"].cummax()

    history, axes = canvas(height=3.6, title=f"{title}: {label} by trial")
    place = axes[0, 0]
    sns.scatterplot(table, x="trial", y="value", color=PALETTE[0], label="trial", ax=place)
    place.step(table["trial"], table["best so far"], where="post", color=PALETTE[2], label="best so far")
    place.legend()
    place.set(ylabel=label)
    place.xaxis.set_major_locator(MaxNLocator(integer=True))
    first = f"{len(done)} trials; the best value is {number(best.value)}, the first {number(done[0].value)}."
    drawings = {"history": Drawing(history, f"{title}: {label} by trial", first, table)}

    slices, axes = canvas(1, len(space), height=3.4, title=f"{title}: where the trials lie", sharey=True)
    for place, (name, distribution) in zip(axes[0], space.items(), strict=True):
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            names = table[name].map(name_of)
            order = [name_of(choice) for choice in distribution.choices if (table[name] == choice).any()]
            sns.stripplot(x=names, y=table["value"], order=order, color=PALETTE[0], jitter=False, ax=place)
        else:
            sns.scatterplot(table, x=name, y="value", color=PALETTE[0], ax=place)
            place.set_xscale("log" if getattr(distribution, "log", False) else "linear")
        place.set(xlabel=name.replace("_", " "), ylabel=label)
    words = "; ".join(f"best at {name} {name_of(value)}" for name, value in best.params.items()) + "."
    drawings["slices"] = Drawing(slices, f"{title}: where the trials lie", words, table)

    if len(done) > 3 and len(space) > 1 and table["value"].nunique() > 1:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
        parts = optuna.importance.get_param_importances(study, evaluator=evaluator)
        shares = pd.DataFrame({"setting": list(parts), "importance": list(parts.values())})
        heading = f"{title}: what the objective depends on"
        importance, axes = canvas(height=1.2 + 0.5 * len(shares), title=heading)
        sns.barplot(shares, x="importance", y="setting", color=PALETTE[0], ax=axes[0, 0])
        axes[0, 0].set(xlabel="share of the variance (fANOVA)", ylabel="", xlim=(0, 1))
        words = "; ".join(f"{name}: {number(share)}" for name, share in parts.items()) + " of the objective's variance."
        drawings["importance"] = Drawing(importance, heading, words, shares)
    return drawings
