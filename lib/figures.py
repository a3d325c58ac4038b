"""Figures: generic plots over members and seeds, and their record (PDF, PNG, CSV and alternative text).

A plot is a function DataFrame -> Drawing; `save(drawing, folder, name)` writes its files and returns a Figure that
shows itself in a notebook with its alternative text kept.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from lib.pages.figure_seeds import bars, box_over_seeds, points
from lib.pages.figure_style import (
    DASH,
    INK,
    SOFT,
    STYLE,
    Drawing,
    Look,
    canvas,
    housestyle,
    label_ends,
    legend_below,
    looks,
    marks,
    number,
    ordered,
    reference_line,
)
from lib.pages.member_page import NAME as MEMBER_PAGE
from lib.pages.notebook_html import embedded
from lib.record import write_bytes

__all__ = [
    "STYLE",
    "Drawing",
    "Figure",
    "Look",
    "bars",
    "box_over_seeds",
    "claims",
    "learning_curves",
    "points",
    "save",
]
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
            "href": quote(os.path.relpath(Path(m.folder) / MEMBER_PAGE, folder.absolute().parent)),
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
