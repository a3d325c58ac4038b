"""The house style of figures: colours, markers, canvas, labels at the ends of lines, numbers in words.

Figures are made without pyplot: no global state and no display is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

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
