"""Figures: their style, plots over members and seeds, and their record (PDF, PNG, CSV and alternative text).

A plot is a function DataFrame -> Drawing; `save(drawing, folder, name)` writes its files and returns a Figure that
shows itself in a notebook with its alternative text kept. Figures are made without pyplot: no global state and no
display is needed.
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
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
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
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "figure.facecolor": "white",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
}
housestyle = matplotlib.rc_context(STYLE)  # as a decorator: titles and labels made inside take the style


@dataclass(frozen=True)
class Look:
    """How one series is drawn wherever it appears."""

    label: str
    colour: str
    marker: str = "o"


@dataclass
class Drawing:
    """A drawn figure with the numbers it shows and those numbers in words."""

    canvas: Canvas
    title: str
    alt: str
    data: pd.DataFrame


def canvas(
    rows: int = 1, columns: int = 1, *, height: float = 4.0, title: str = "", **options
) -> tuple[Canvas, np.ndarray]:
    """An empty figure and its (rows, columns) axes; `options` go to matplotlib's Figure.subplots."""
    drawn = Canvas(figsize=(WIDTH, height), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False, **options)
    if title:
        drawn.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    return drawn, axes


@dataclass(frozen=True)
class Mark:
    """Where in a figure a member is drawn. `left`, `top`: fractions of its width and height; `folder`: the member's."""

    left: float
    top: float
    folder: str
    words: str


def mark(axes: Axes, x: float, y: float, member: Mapping, transform=None) -> None:
    """Remember that the point (x, y) stands for this member (a row with its `folder`); see `marks`."""
    if isinstance(member.get("folder"), str):
        made = axes.figure.__dict__.setdefault("member_marks", [])
        made.append((transform or axes.transData, float(x), float(y), dict(member)))


def marks(drawn: Canvas) -> list[Mark]:
    """The marked points where they lie once everything is laid out; call it after drawing."""
    found, (width, height) = [], (drawn.bbox.width, drawn.bbox.height)
    for transform, x, y, member in drawn.__dict__.get("member_marks", ()):
        across, up = transform.transform((x, y))
        if 0 <= across <= width and 0 <= up <= height:
            value = "diverged" if member.get("diverged") else number(member.get("value"))
            words = f"{member.get('run_id')}, {member.get('cell')}, seed {member.get('seed')}: {value}"
            found.append(
                Mark(round(float(across / width), 4), round(1 - float(up / height), 4), member["folder"], words)
            )
    return found


def looks(names: Iterable[str], known: Mapping[str, Look] | None = None) -> dict[str, Look]:
    """A look for every name, in the study's own order and looks where it has them, else the next free colour and
    marker."""
    known, names = known or {}, list(dict.fromkeys(names))
    names = [name for name in known if name in names] + [name for name in names if name not in known]
    taken = {known[name].colour for name in names if name in known}
    free = [i for i, colour in enumerate(PALETTE) if colour not in taken] or list(range(len(PALETTE)))
    new = {name: free[i % len(free)] for i, name in enumerate(n for n in names if n not in known)}
    return {n: known[n] if n in known else Look(str(n), PALETTE[new[n]], MARKERS[new[n]]) for n in names}


def number(value: float | None, digits: int = 3) -> str:
    """A number as figures and alternative texts write it: `digits` significant ones, a true minus sign."""
    if value is None or not np.isfinite(value):
        return "none"
    text = f"{value:.{digits}g}"
    return (f"{value:.0f}" if "e+0" in text else text).replace("-", "−")


def ordered(values: Iterable) -> list:
    """The distinct values, sorted, without missing ones."""
    return sorted(pd.unique(pd.Series(list(values)).dropna()))


def spread(count: int, width: float) -> np.ndarray:
    """`count` offsets around 0 over `width`."""
    return np.linspace(-width / 2, width / 2, count) if count > 1 else np.zeros(count)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.075) -> None:
    """Names of series at the right edge instead of a legend: (y in data units, text, colour), pushed apart to `gap` of
    the height. Call it when everything else is drawn: it reads the limits."""
    axes.get_ylim()  # autoscales now, so that the transform below is the final one
    to_fraction = axes.transData + axes.transAxes.inverted()
    at = [(float(to_fraction.transform((1, y))[1]), text, colour) for y, text, colour in ends if np.isfinite(y)]
    at.sort(key=lambda item: item[0])
    heights = np.array([min(1.0, max(0.0, item[0])) for item in at])
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in range(len(heights) - 1, -1, -1):  # what was pushed over the top moves down again
        heights[i] = min(heights[i], 1.0 - gap * (len(heights) - 1 - i))
    for height, (_, text, colour) in zip(heights, at, strict=True):
        axes.annotate(
            text, (1.015, height), xycoords="axes fraction", color=colour, va="center", fontsize=9.5, fontweight="bold"
        )


def label_points(drawn: Canvas, axes: Axes, labels: Sequence[tuple[float, float, str, str]], size: float = 8.5) -> None:
    """Names beside points, (x, y, text, colour), each at the first of eight sides where it covers no point and no other
    name; a name with no room is left out (the words have it). Call it when everything else is drawn."""
    drawn.draw_without_rendering()  # lays the axes out, so that the places below are the final ones
    places = axes.transData.transform([(x, y) for x, y, _, _ in labels]) if labels else []
    unit, names = drawn.dpi / 72, []
    for i, ((px, py), (x, y, text, colour)) in enumerate(zip(places, labels, strict=True)):
        width, height, near = (
            0.62 * size * len(text),
            1.1 * size,
            9 * unit,
        )  # a name nearer to another point would mislead
        taken = [(qx - near, qy - near, qx + near, qy + near) for j, (qx, qy) in enumerate(places) if j != i] + names
        for dx, dy in (
            (6, 3),
            (6, -3 - height),
            (-6 - width, 3),
            (-6 - width, -3 - height),
            (-width / 2, 7),
            (-width / 2, -7 - height),
            (9, -height / 2),
            (-9 - width, -height / 2),
        ):
            left, low = px + dx * unit, py + dy * unit
            right, high = left + width * unit, low + height * unit
            if left > axes.bbox.x0 and not any(
                left < b[2] and b[0] < right and low < b[3] and b[1] < high for b in taken
            ):
                axes.annotate(
                    text,
                    (x, y),
                    xytext=(dx, dy),
                    textcoords="offset points",
                    fontsize=size,
                    color=colour,
                    zorder=5,
                    annotation_clip=False,
                )
                names.append((left, low, right, high))
                break


def legend_below(drawn: Canvas, extra: Sequence[tuple[object, str]] = ()) -> None:
    """One legend for all panels, under them; `extra` are further (handle, label)."""
    named = {
        label: handle for axes in drawn.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    named |= {label: handle for handle, label in extra}
    if named:
        wide = 0.085 * (max(map(len, named)) + 6)  # inches of the widest entry at 9.5 pt
        rows = -(-len(named) // max(1, int(WIDTH / wide)))
        drawn.legend(list(named.values()), list(named), loc="outside lower left", ncols=-(-len(named) // rows))


def reference_line(axes: Axes, value: float, label: str = "") -> None:
    """A dashed line at `value`, named at the right edge."""
    axes.axhline(value, color=SOFT, linewidth=1, linestyle=DASH)
    if label:
        axes.annotate(
            f"{label} {number(value)}",
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=SOFT,
        )


def outcomes(members: pd.DataFrame, metric: str, diverged_value: float | None = None) -> pd.DataFrame:
    """Members with `value` (the metric) and `diverged`. A diverged member counts as `diverged_value`; with None it is
    a mark without a value. A table without members, or a metric that no member has, draws as nothing."""
    table = members.copy() if len(members) else members.reindex(columns=dict.fromkeys([*IDENTITY, *members.columns]))
    table["diverged"] = table["status"].eq("diverged") if "status" in table else False
    values = table[metric] if metric in table else pd.Series(np.nan, index=table.index)
    table["value"] = pd.to_numeric(values, errors="coerce").astype(float).replace([np.inf, -np.inf], np.nan)
    table.loc[table["diverged"], "value"] = np.nan if diverged_value is None else float(diverged_value)
    return table


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student interval of a mean over seeds; (nan, nan) with fewer than two."""
    from scipy import stats

    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


DIVERGED = (Line2D([], [], linestyle="", marker="x", color=BAD, markeredgewidth=2), "diverged seed")
Reference = tuple[float, str] | None  # a level to draw, and its name


@housestyle
def box_over_seeds(
    members: pd.DataFrame,
    metric: str,
    *,
    title: str,
    ylabel: str = "",
    x: str = "beta",
    xlabel: str = "",
    by: str = "method",
    known: Mapping[str, Look] | None = None,
    diverged_value: float | None = None,
    reference: Reference = None,
) -> Drawing:
    """`metric` per `x` and `by`: a box from three seeds on, every seed as a point, a diverged seed as a cross."""
    ylabel, xlabel = ylabel or metric.replace("_", " "), xlabel or x
    table = outcomes(members, metric, diverged_value)
    drawn, axes = canvas(height=4.2, title=title)
    place, words = axes[0, 0], {}
    for own, value, at, width, cell in _cells(table, by, x, known, 0.8):
        values = cell["value"].dropna().to_numpy()
        if len(values) >= 3:
            line = {"color": own.colour}
            place.boxplot(
                values,
                positions=[at],
                widths=width * 0.8,
                showfliers=False,
                patch_artist=True,
                manage_ticks=False,
                boxprops={"facecolor": own.colour + "2e", "edgecolor": own.colour},
                medianprops={**line, "linewidth": 2},
                whiskerprops=line,
                capprops=line,
            )
        points(place, at + spread(len(cell), width * 0.5), cell, own)
        words.setdefault(own.label, []).append(f"{xlabel} {_name(value)} {_summary(cell)}")
    _finish(drawn, place, table, by, x, xlabel, ylabel, known, reference)
    alt = f"{title}: {ylabel} of every seed by {xlabel}. {_sentences(words)}{_reference_words(reference)}"
    return Drawing(drawn, title, alt, table[_columns(table, by, x)])


@housestyle
def bars(
    members: pd.DataFrame,
    metric: str,
    *,
    title: str,
    ylabel: str = "",
    x: str = "beta",
    xlabel: str = "",
    by: str = "method",
    known: Mapping[str, Look] | None = None,
    diverged_value: float | None = None,
    intervals: pd.DataFrame | None = None,
    floor: float = 0.0,
    reference: Reference = None,
) -> Drawing:
    """Mean of `metric` per `x` and `by` with its 95 % interval and every seed as a point.

    `intervals`: columns `by`, `x`, low, high (from lib.stats: seeds and questions crossed); without it Student's
    over seeds. `floor`: the lowest possible value of the metric, where the bars start.
    """
    ylabel, xlabel = ylabel or metric.replace("_", " "), xlabel or x
    table = outcomes(members, metric, diverged_value)
    drawn, axes = canvas(height=4.2, title=title)
    place, words, data = axes[0, 0], {}, []
    for own, value, at, width, cell in _cells(table, by, x, known, 0.84):
        name, values = cell[by].iloc[0], cell["value"].dropna().to_numpy()
        mean, (low, high) = (values.mean() if len(values) else np.nan), t_interval(values)
        if intervals is not None:
            row = intervals[(intervals[by] == name) & (intervals[x] == value)]
            low, high = (float(row["low"].iloc[0]), float(row["high"].iloc[0])) if len(row) else (np.nan, np.nan)
        if len(values):
            place.bar(at, mean - floor, width * 0.92, bottom=floor, color=own.colour + "59", edgecolor=own.colour)
            place.annotate(
                number(mean),
                (at, np.nanmax([mean, high, *values])),
                xytext=(0, 3),
                ha="center",
                textcoords="offset points",
                fontsize=9,
                zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            )
        if np.isfinite(low):
            place.plot([at, at], [max(low, floor), high], color=INK, linewidth=1.3)
        points(place, at + spread(len(cell), width * 0.4), cell, own)
        interval = f", 95 % interval {number(low)} to {number(high)}" if np.isfinite(low) else ""
        words.setdefault(own.label, []).append(f"{xlabel} {_name(value)} {_summary(cell)}{interval}")
        data.append({by: name, x: value, "mean": mean, "low": low, "high": high, "seeds": len(cell)})
    place.set_ylim(bottom=floor)
    _finish(drawn, place, table, by, x, xlabel, ylabel, known, reference)
    alt = f"{title}: mean {ylabel} by {xlabel}. {_sentences(words)}{_reference_words(reference)}"
    table = table[_columns(table, by, x)]
    return Drawing(drawn, title, alt, table.merge(pd.DataFrame(data), on=[by, x], how="left") if data else table)


def points(place: Axes, positions: np.ndarray, cell: pd.DataFrame, look: Look) -> None:
    """Every member of a cell: a filled point, or a cross where it diverged (at the foot where it has no value). Each is
    marked, so that a page can link it to the member's own."""
    rows = cell.to_dict("records")
    for position, value, diverged, row in zip(positions, cell["value"], cell["diverged"], rows, strict=True):
        valued = np.isfinite(value)
        if valued or diverged:
            mark(
                place,
                position,
                value if valued else 0.025,
                row,
                place.transData if valued else place.get_xaxis_transform(),
            )
        if diverged:
            place.plot(
                [position],
                [value if valued else 0.025],
                "x",
                color=BAD,
                markersize=7,
                markeredgewidth=2,
                zorder=4,
                clip_on=False,
                transform=place.transData if valued else place.get_xaxis_transform(),
            )
        elif valued:
            place.plot(
                [position],
                [value],
                look.marker,
                color=look.colour,
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3,
                clip_on=False,
            )


def _cells(table: pd.DataFrame, by: str, x: str, known: Mapping[str, Look] | None, room: float):
    """(look, value of x, position, width, members) of every cell that has members: side by side within a category, and
    in its middle where each category has one."""
    look = looks(table[by], known)
    alone = table.groupby(x)[by].nunique().max() == 1
    width = room / (3 if alone else max(1, len(look)))
    for offset, (name, own) in zip(spread(len(look), 0 if alone else room - width), look.items(), strict=True):
        for position, value in enumerate(ordered(table[x])):
            cell = table[(table[by] == name) & (table[x] == value)]
            if len(cell):
                yield own, value, position + offset, width, cell


def _finish(
    drawn: Canvas,
    place: Axes,
    table: pd.DataFrame,
    by: str,
    x: str,
    xlabel: str,
    ylabel: str,
    known: Mapping[str, Look] | None,
    reference: Reference,
) -> None:
    """Ticks for the categories, labels, the reference line and one legend."""
    places = ordered(table[x])
    place.set_xticks(range(len(places)), [_name(value) for value in places])
    place.set_xlim(-0.6, max(0, len(places) - 1) + 0.6)
    place.set(xlabel=xlabel, ylabel=ylabel)
    if reference is not None:
        reference_line(place, *reference)
    extra = [
        (Line2D([], [], linestyle="", marker=own.marker, color=own.colour), own.label)
        for own in looks(table[by], known).values()
    ]
    legend_below(drawn, extra + ([DIVERGED] if table["diverged"].any() else []))


def _summary(cell: pd.DataFrame) -> str:
    values, diverged = cell["value"].dropna(), int(cell["diverged"].sum())
    seeds = ", ".join(number(v) for v in values)
    text = f"mean {number(values.mean())} (seeds {seeds})" if len(values) else "no value"
    return text + (f", {diverged} of {len(cell)} diverged" if diverged else "")


def _sentences(words: Mapping[str, Sequence[str]]) -> str:
    return " ".join(f"{label}: {'; '.join(said)}." for label, said in words.items())


def _name(value: object) -> str:
    return number(value) if isinstance(value, float | int) else str(value)


def _columns(table: pd.DataFrame, by: str, x: str) -> list[str]:
    wanted = dict.fromkeys(("run_id", by, "cell", x, "seed", "status", "diverged", "value"))
    return [column for column in wanted if column in table]


def _reference_words(reference: Reference) -> str:
    return "" if reference is None else f" {reference[1]}: {number(reference[0])}."


MARGIN_SIGNS = {"non_inferiority": (-1,), "equivalence": (-1, 1)}
VERDICT_COLOURS = {"supported": "#0072B2", "refuted": "#B34700"}


@dataclass(frozen=True)
class Figure:
    """A saved figure. Its HTML form embeds the image, so that an executed notebook and its page need no other file."""

    name: str
    title: str
    alt: str
    folder: Path
    png: bytes = field(repr=False)
    links: tuple[dict, ...] = ()  # {left, top, href, words}: the members that its points stand for

    @property
    def files(self) -> dict[str, Path]:
        return {kind: self.folder / f"{self.name}.{kind}" for kind in ("pdf", "png", "csv", "alt.txt", "links.json")}

    def _repr_html_(self) -> str:
        return embedded(self.png, self.alt, self.links)

    def __repr__(self) -> str:
        return self.alt


@housestyle
def save(
    drawing: Drawing | Canvas,
    folder: str | Path,
    name: str,
    *,
    data: pd.DataFrame | None = None,
    alt: str | None = None,
    title: str | None = None,
) -> Figure:
    """Write <name>.pdf, .png, .csv, .alt.txt and .links.json, each atomically and free of dates; return the record that
    shows itself. Links are relative to the folder that holds `folder`, where the page lies.

    A Drawing brings its numbers and words; a matplotlib figure of one's own needs `data`, `alt` and `title`.
    """
    if isinstance(drawing, Canvas):
        if data is None or not alt or not title:
            raise ValueError(f"figure {name}: a matplotlib figure is saved with its data, alt and title")
        drawing = Drawing(drawing, title, alt, data)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "pdf": {"CreationDate": None, "Title": drawing.title},
        "png": {"Software": None, "Description": drawing.alt},
    }
    contents = {"csv": drawing.data.to_csv(index=False).encode(), "alt.txt": (drawing.alt + "\n").encode()}
    for kind, metadata in about.items():
        buffer = io.BytesIO()
        drawing.canvas.savefig(buffer, format=kind, dpi=160, metadata=metadata)
        contents[kind] = buffer.getvalue()
    links = [
        {
            "left": m.left,
            "top": m.top,
            "words": m.words,
            "href": quote(os.path.relpath(Path(m.folder) / "member.html", folder.absolute().parent)),
        }
        for m in marks(drawing.canvas)
    ]  # after drawing, when everything has its place
    contents["links.json"] = (json.dumps(links, indent=1, ensure_ascii=False) + "\n").encode()
    figure = Figure(name, drawing.title, drawing.alt, folder, contents["png"], tuple(links))
    for kind, path in figure.files.items():
        write_bytes(path, contents[kind])
    return figure


@housestyle
def learning_curves(
    history: pd.DataFrame,
    y: str,
    *,
    title: str,
    ylabel: str = "",
    x: str = "step",
    xlabel: str = "optimiser step",
    by: str = "method",
    panel: str | None = None,
    panel_label: Callable[[object], str] = str,
    known: Mapping[str, Look] | None = None,
    smooth: int = 1,
    columns: int = 2,
    reference: float | None = None,
) -> Drawing:
    """`y` over `x`: the mean over seeds bold where all seeds are there, each seed faint, a cross where one ends early.

    One line per value of `by` in each `panel`; the rows of one line must differ in nothing but seed and step, so that
    no mean hides a choice. `smooth`: rolling mean over so many points.
    """
    ylabel = ylabel or y.replace("_", " ")
    rows = history.reindex(columns=dict.fromkeys([*history.columns, x, y, by, "seed", *([panel] if panel else [])]))
    rows = rows.dropna(subset=[y])
    panels = ordered(rows[panel]) if panel else [None]
    columns = min(columns, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    drawn, axes = canvas(
        lines, columns, height=1.1 + (3.4 if lines == 1 else 2.5 * lines), title=title, sharex=True, sharey=True
    )
    look, words, data = looks(rows[by], known), [], []
    own_legends = panel is not None and len(look) > 6  # too many to tell apart by colour: each panel has its own
    for place, value in zip(axes.flat, panels, strict=False):
        here, ends, said = rows if panel is None else rows[rows[panel] == value], [], []
        present = [name for name in look if (here[by] == name).any()]
        for name, own in (
            looks(sorted(present, key=str), known) if own_legends else {n: look[n] for n in present}
        ).items():
            group = here[here[by] == name]
            if group.duplicated([x, "seed"]).any():
                raise ValueError(f"learning_curves: {by} {name} has several members per seed; choose one cell first")
            end, text = _curve(
                place, group.pivot(index=x, columns="seed", values=y).sort_index(), own, smooth, here[x].max(), xlabel
            )
            ends += [end] if end else []
            said.append(text)
            data.append(group[[c for c in (by, panel, "cell", "seed", x, y) if c and c in group]])
        if reference is not None:
            reference_line(place, reference)
        if own_legends:
            place.legend(fontsize=8.5)
        if panel:
            place.set_title(panel_label(value))
        else:
            label_ends(place, ends)
        words.append((f"{panel_label(value)}: " if panel else "") + ("; ".join(said) or "no data") + ".")
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    for place in axes[-1]:
        place.set_xlabel(xlabel)
        place.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=pd.api.types.is_integer_dtype(rows[x])))
    for place in axes[:, 0]:
        place.set_ylabel(ylabel)
    if panel and not own_legends:
        legend_below(drawn)
    alt = (
        f"{title}: {ylabel} over {xlabel}, mean over seeds with each seed faint"
        + (f", smoothed over {smooth} points" if smooth > 1 else "")
        + ". "
        + " ".join(words)
    )
    return Drawing(drawn, title, alt, pd.concat(data) if data else rows)


def _curve(place, wide: pd.DataFrame, own: Look, smooth: int, last: float, xlabel: str) -> tuple[tuple | None, str]:
    """One line of learning_curves; `wide` is steps x seeds. Returns the label for its end, and its numbers in words."""
    shown = wide.rolling(smooth, min_periods=1).mean().where(wide.notna()) if smooth > 1 else wide
    stops = {seed: wide[seed].last_valid_index() for seed in wide}
    early = {seed: stop for seed, stop in stops.items() if stop < last}
    for seed in wide:
        place.plot(shown[seed].dropna(), color=own.colour, alpha=0.35, linewidth=0.9)
    for seed, stop in early.items():
        place.plot([stop], [shown[seed][stop]], "x", color=own.colour, markersize=8, markeredgewidth=2, zorder=4)
    mean = shown.dropna().mean(axis=1)
    place.plot(mean, color=own.colour, label=own.label)
    text = f"{own.label} has no step that all {wide.shape[1]} seeds reached"
    if len(mean):
        at_end = shown.loc[mean.index[-1]]
        text = (
            f"{own.label} from {number(mean.iloc[0])} at {xlabel} {mean.index[0]} to {number(mean.iloc[-1])} at "
            f"{mean.index[-1]} (seeds {number(at_end.min())} to {number(at_end.max())})"
        )
    if early:
        text += f", {len(early)} of {wide.shape[1]} seeds end early, the first at {min(early.values())}"
    if not len(mean):
        return None, text
    note = f" (to {mean.index[-1]})" if mean.index[-1] < last else ""
    return (float(mean.iloc[-1]), own.label + note, own.colour), text


@housestyle
def claims(records: Sequence[Mapping], *, title: str = "The claims") -> Drawing:
    """Each claim's estimate and 95 % interval against the margin that decides it: one row and one axis per claim,
    since their units differ.

    `records`: the entries of claims.json (id, verdict, estimate, interval95, test, margin, estimand). A
    non-inferiority margin lies below zero, an equivalence margin on both sides.
    """
    drawn, axes = canvas(max(1, len(records)), 1, height=0.7 + 1.05 * max(1, len(records)), title=title)
    words, data = [], []
    for place, record in zip(axes[:, 0], records, strict=False):
        low, high = (record.get("interval95") or [None, None])[:2]
        estimate, verdict = record.get("estimate"), str(record.get("verdict", "")).replace("_", " ")
        margins = [
            sign * record["margin"]
            for sign in MARGIN_SIGNS.get(record.get("test"), (1,))
            if isinstance(record.get("margin"), int | float)
        ]
        _claim(
            place, str(record.get("id", "")), str(record.get("estimand") or ""), verdict, estimate, low, high, margins
        )
        words.append(
            f"{record.get('id')}: {verdict}, estimate {number(estimate)}, 95 % interval {_bound(low)} to "
            f"{_bound(high)}" + (f", margin {', '.join(map(number, margins))}" if margins else "") + "."
        )
        data.append(
            {
                "id": record.get("id"),
                "verdict": verdict,
                "estimate": estimate,
                "low": low,
                "high": high,
                "margins": " ".join(map(str, margins)),
            }
        )
    return Drawing(drawn, title, f"{title}: " + " ".join(words), pd.DataFrame(data))


def _bound(value: float | None) -> str:
    return "no bound" if value is None else number(value)


def _claim(
    place,
    name: str,
    quantity: str,
    verdict: str,
    estimate: float | None,
    low: float | None,
    high: float | None,
    margins: Sequence[float],
) -> None:
    colour = VERDICT_COLOURS.get(verdict, SOFT)
    place.set(yticks=[], ylim=(-1, 1))
    place.spines["left"].set_visible(False)
    for margin in margins:
        place.axvline(margin, ymax=0.94, linewidth=1.2, linestyle=DASH, color=INK)
    if margins:  # the two of an equivalence claim may be too close for a label each
        told = number(margins[0]) if len(margins) == 1 else f"±{number(max(margins))}"
        place.annotate(
            f"margin {told}",
            (sum(margins) / len(margins), 0.97),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=8.5,
        )
    if low is not None and high is not None:
        place.plot([low, high], [0, 0], color=colour, linewidth=5, solid_capstyle="round", alpha=0.5)
    if estimate is not None:
        place.plot([estimate], [0], "D", color=colour, markersize=8)
        place.annotate(
            number(estimate),
            (estimate, 0.3),
            ha="center",
            va="bottom",
            fontsize=9.5,
            fontweight="bold",
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
        )
    shown = [v for v in (estimate, low, high, *margins) if v is not None]
    if shown:
        pad = 0.12 * (max(shown) - min(shown)) or 0.5
        place.set_xlim(min(shown) - pad, max(shown) + pad)
        if (low is None) != (high is None):  # an interval without an end on one side, drawn to the edge
            bound, edge = (low, max(shown) + pad) if high is None else (high, min(shown) - pad)
            place.plot([bound, edge], [0, 0], color=colour, linewidth=5, alpha=0.5, solid_capstyle="butt")
            place.plot([edge], [0], ">" if high is None else "<", color=colour, markersize=10, clip_on=False)
    else:
        place.set_xticks([])
        place.annotate("no estimate", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=SOFT)
    place.annotate(
        name, (-0.02, 0.62), xycoords="axes fraction", ha="right", va="center", fontsize=12, fontweight="bold"
    )
    place.annotate(
        verdict, (-0.02, 0.25), xycoords="axes fraction", ha="right", va="center", fontsize=9.5, color=colour
    )
    place.tick_params(labelsize=8.5)
    place.set_xlabel(quantity, fontsize=9, loc="left")


def embedded(png: bytes, alt: str, links: Sequence[Mapping] = ()) -> str:
    """A figure as HTML that needs no other file; over each point of a member lies a link to the member's page. Places
    are written as classes in thousandths (`x123 y456`), which `placed` turns into positions: `clean` lets no style
    in."""
    source = base64.b64encode(png).decode("ascii")
    points = "".join(
        f'<a class="point x{round(1000 * link["left"])} y{round(1000 * link["top"])}" href="{html.escape(link["href"])}" '
        f'title="{html.escape(link["words"])}">{html.escape(link["words"])}</a>'
        for link in links
    )
    return (
        f'<figure><div class="drawn"><img src="data:image/png;base64,{source}" alt="{html.escape(alt, quote=True)}">'
        f"{points}</div></figure>"
    )


class Picture:
    """A drawing as it stands, for the screen alone: `figures.save` makes its files."""

    @housestyle
    def __init__(self, drawing: Drawing):
        buffer = io.BytesIO()
        drawing.canvas.savefig(buffer, format="png", dpi=128)
        self.alt, self.html = drawing.alt, embedded(buffer.getvalue(), drawing.alt)

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.alt


@contextlib.contextmanager
def redrawn(draw: Callable[[], Drawing], every: float = 1.0) -> Iterator[None]:
    """Show `draw()`, again every so many seconds while the body runs, and once more when it has ended, however it
    ended.

    The drawing is done beside the body, which keeps the kernel's main thread: an interrupt reaches it.
    """
    from IPython.display import display

    handle, ended = display(Picture(draw()), display_id=True), threading.Event()

    def redraw() -> None:
        while not ended.wait(every):
            handle.update(Picture(draw()))

    # In a copy of this context, because a kernel finds the cell that an output belongs to in it.
    beside = threading.Thread(target=contextvars.copy_context().run, args=(redraw,), daemon=True)
    beside.start()
    try:
        yield
    finally:
        ended.set()
        beside.join()
        handle.update(Picture(draw()))
