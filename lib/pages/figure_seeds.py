"""Plots that show every seed: boxes and bars of one metric over the cells of a study, several methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from lib.pages.figure_style import (
    BAD,
    INK,
    Drawing,
    Look,
    canvas,
    housestyle,
    legend_below,
    looks,
    mark,
    number,
    ordered,
    outcomes,
    reference_line,
    spread,
    t_interval,
)

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
