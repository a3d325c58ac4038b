"""Figures: the house style, plots over members and seeds drawn with seaborn, and their files.

A plot is a function DataFrame -> Drawing: a figure with its numbers and the same numbers in words, its alternative
text. `save` writes its files. Figures are made without pyplot where that is possible: no global state, no display.
"""

import base64
import functools
import html
import io
import itertools
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from fontTools.subset import Options
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lib.record import write_bytes

# Hues of Okabe-Ito and Tol, darkened until text in them has 4.5:1 on white; markers double them.
PALETTE = ("#0072B2", "#AA3377", "#C44F00", "#00805C", "#555555", "#7A4FBF", "#8A6100", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
INK, SOFT, BAD = "#1b1f24", "#59636e", "#b3261e"
DASH = (0, (4, 3))
WIDTH = 8.0  # inches; shown at about 900 px, so 10.5 pt stays readable
WIDE = 0.8  # of a category of bars or boxes, whose distance is 1
SHEET = Path(__file__).with_name("house.mplstyle")
STYLE = sns.axes_style("ticks") | matplotlib.rc_params_from_file(SHEET, use_default_template=False)
# A PDF's letters are in their places: without the tables that would place them, its fonts take half the time.
Options._drop_tables_default = [*Options._drop_tables_default, "GSUB", "GPOS", "GDEF"]
housestyle = matplotlib.rc_context(STYLE)  # as a decorator: titles and labels made inside take the style
MARGIN_SIGNS = {"non_inferiority": (-1,), "absolute": (-1,), "equivalence": (-1, 1)}
VERDICT_COLORS = {"supported": "#0072B2", "refuted": "#B34700"}


class Look(NamedTuple):
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
    points: Sequence[tuple] = ()  # of members: (transform, x, y, the member's row)
    links: Sequence[Mapping] = ()  # {left, top: fractions of width and height, href, words}
    png: bytes = b""  # as `save` wrote it

    @housestyle
    def render(self, kind: str = "png", **metadata) -> bytes:
        buffer = io.BytesIO()
        self.canvas.savefig(buffer, format=kind, dpi=160, metadata=metadata)
        return buffer.getvalue()

    def _repr_html_(self) -> str:
        return embed(self.png or self.render(), self.alt, self.links)

    def __repr__(self) -> str:
        return self.alt


def save(drawing: Drawing, folder: str | Path, name: str) -> Drawing:
    """Write <name>.pdf, .png, .csv, .alt.txt and .links.json, each atomically and free of dates. The links lead to each
    member's row on the page of its run, relative to the folder that holds `folder`, where the analysis' page lies."""
    files = {
        "pdf": drawing.render("pdf", CreationDate=None, Title=drawing.title),
        "csv": drawing.data.to_csv(index=False).encode(),
        "alt.txt": f"{drawing.alt}\n".encode(),
    }
    drawing.canvas.set_layout_engine("none")  # it is laid out now: drawing it again takes two thirds of the time
    files["png"] = drawing.png = drawing.render("png", Software=None, Description=drawing.alt)
    drawing.links = _links(drawing, Path(folder).absolute().parent)  # their places are known once it is rendered
    files["links.json"] = (json.dumps(drawing.links, indent=1, ensure_ascii=False) + "\n").encode()
    for kind, content in files.items():
        write_bytes(Path(folder) / f"{name}.{kind}", content)
    return drawing


def _links(drawing: Drawing, page_folder: Path) -> list[dict]:
    links, size = [], drawing.canvas.bbox
    for transform, x, y, row in drawing.points:
        across, up = transform.transform((x, y)) / (size.width, size.height)
        if isinstance(row.get("folder"), str) and 0 <= across <= 1 and 0 <= up <= 1:
            member = Path(row["folder"])
            page = quote(os.path.relpath(member.parents[1] / "run.html", page_folder))
            value = "diverged" if row["diverged"] else number(row["value"])
            words = f"{row.get('run_id')}, {row.get('cell')}, seed {row.get('seed')}: {value}"
            place = {"left": round(float(across), 4), "top": round(1 - float(up), 4)}
            links.append(place | {"words": words, "href": f"{page}#{quote(member.name)}"})
    return links


def embed(png: bytes, alt: str, links: Sequence[Mapping] = ()) -> str:
    """A figure as HTML that needs no other file; over each point of a member lies a link."""
    points = "".join(
        f'<a class="point" style="left:{link["left"]:.1%};top:{link["top"]:.1%}" href="{html.escape(link["href"])}" '
        f'title="{html.escape(link["words"])}">{html.escape(link["words"])}</a>'
        for link in links
    )
    image = f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html.escape(alt)}">'
    return f'<figure><div class="drawn">{image}{points}</div></figure>'


# ---- parts of figures


def canvas(rows: int = 1, columns: int = 1, *, height: float = 4.0, title: str = "", **options):
    """An empty figure and its (rows, columns) axes; `options` go to matplotlib's Figure.subplots."""
    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False, **options)
    if title:
        drawn.suptitle(textwrap.fill(title, 75), x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    return drawn, axes


def looks(names: Iterable[str], known: Mapping[str, Look] | None = None) -> dict[str, Look]:
    """A look for every name, in the study's own order and looks where it has them, else the next free color and
    marker."""
    known, names = known or {}, list(dict.fromkeys(names))
    chosen = {name: look for name, look in known.items() if name in names}
    taken = {look.color for look in chosen.values()}
    free = [(color, marker) for color, marker in zip(PALETTE, MARKERS, strict=True) if color not in taken]
    new = zip((name for name in names if name not in known), itertools.cycle(free or [(INK, "o")]), strict=False)
    return chosen | {name: Look(short(str(name)), *style) for name, style in new}


def short(run_id: str) -> str:
    """A run's name without its role, with which the ids of published runs begin (proposed-..., comparative-1-...)."""
    return re.sub(r"^(proposed|comparative-\d+|ablation|control)-", "", run_id)


def number(value: float | None, digits: int = 3) -> str:
    """A number as figures and alternative texts write it: `digits` significant ones, a true minus sign."""
    if value is None or not np.isfinite(value):
        return "none"
    text = f"{value:.{digits}g}"
    return (f"{value:.0f}" if "e+0" in text else text).replace("-", "−")


def outcomes(members: pd.DataFrame, metric: str, diverged_value: float | None = None, *columns: str) -> pd.DataFrame:
    """Members with `value` (the metric) and `diverged`. A diverged member counts as `diverged_value`; with None it is
    a mark without a value. `columns` are there even where no member is; a metric that no member has draws as nothing."""
    table = members.reindex(columns=list(dict.fromkeys([*members.columns, *columns, "status", metric])))
    values = pd.to_numeric(table[metric], errors="coerce").astype(float).replace([np.inf, -np.inf], np.nan)
    diverged = table["status"].eq("diverged")
    return table.assign(diverged=diverged, value=values.mask(diverged, diverged_value))


def t_interval(values: Iterable[float], limits: tuple[float, float] = (-np.inf, np.inf)) -> tuple[float, float]:
    """Student's 95 % interval of a mean over seeds, within `limits`; (nan, nan) with fewer than two."""
    from lib import stats  # with scipy

    seeds = pd.Series(values, dtype=float).dropna().to_numpy()
    if len(seeds) < 2:
        return np.nan, np.nan
    low, high = np.clip(stats.look_at(seeds[:, None]).interval(stats.bound_of((len(seeds),))), *limits)
    return float(low), float(high)


def legend_below(drawn: Figure) -> None:
    """One legend for all panels, under them."""
    pairs = [pair for axes in drawn.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if named := {label: handle for handle, label in pairs}:
        drawn.legend(list(named.values()), list(named), loc="outside lower left", ncols=min(4, len(named)))


def reference_line(axes: Axes, value: float, label: str = "") -> None:
    """A dashed line at `value`, named at the right edge."""
    axes.axhline(value, color=SOFT, linewidth=1, linestyle=DASH)
    if label:
        style = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9, "color": SOFT}
        axes.text(1.01, value, f"{label} {number(value)}", **style)


# ---- plots over members and seeds


@housestyle
def bars(
    members: pd.DataFrame,
    metric: str,
    *,
    title: str,
    x: str,
    by: str,
    xlabel: str = "",
    ylabel: str = "",
    known: Mapping[str, Look] | None = None,
    diverged_value: float | None = None,
    limits: tuple[float, float] = (0.0, np.inf),
    reference: tuple[float, str] | None = None,
    boxes: bool = False,
) -> Drawing:
    """`metric` by categories of `x`, with the series of `by` side by side in each (in its middle where each category
    has one): the mean with Student's 95 % interval over seeds, or with `boxes` a box from three seeds on; every seed as
    a point, a diverged seed as a cross.

    limits: the lowest possible value of the metric, where bars start, and the highest; no interval is drawn beyond them.
    reference: a level and its name.
    """
    xlabel, ylabel = xlabel or x, ylabel or metric.replace("_", " ")
    table = outcomes(members, metric, diverged_value, x, by, "seed")
    table["category"] = [value if isinstance(value, str) else number(value) for value in table[x]]
    places, look = list(table.sort_values(x)["category"].unique()), looks(table[by], known)
    alone = table.groupby(x)[by].nunique().max() == 1
    colors = {name: own.color for name, own in look.items()}
    drawn, axes = canvas(height=4.2, title=title)
    place, words, points = axes[0, 0], [], []
    interval = functools.partial(t_interval, limits=limits)
    style = {"x": "category", "y": "value", "hue": by, "order": places, "hue_order": list(look), "palette": colors}
    style |= {"saturation": 1, "width": WIDE, "dodge": not alone, "legend": False, "ax": place}
    several = table[table.groupby(["category", by])["value"].transform("count") >= 3]
    if boxes and len(several):
        sns.boxplot(several, showfliers=False, fill=False, gap=0.2, linewidth=1.3, **style)
    elif not boxes and table["value"].notna().any():
        line = {"color": INK, "linewidth": 1.3}
        sns.barplot(table, errorbar=interval, gap=0.08, alpha=0.4, err_kws=line, **style)
    for i, (name, own) in enumerate(look.items()):
        for category, cell in table[table[by] == name].groupby("category", sort=False):
            middle = places.index(category) + (0 if alone else WIDE * ((i + 0.5) / len(look) - 0.5))
            across = middle + WIDE / 4 / len(look) * (np.linspace(-1, 1, len(cell)) if len(cell) > 1 else np.zeros(1))
            points += [_mark(place, at, row, own) for at, row in zip(across, cell.to_dict("records"), strict=True)]
            seeds, diverged, (low, high) = cell["value"].dropna(), cell["diverged"].sum(), interval(cell["value"])
            text = f"mean {number(seeds.mean())} (seeds {', '.join(map(number, seeds))})" if len(seeds) else "no value"
            text += f", 95 % interval {number(low)} to {number(high)}" if np.isfinite(low) else ""
            text += f", {diverged} of {len(cell)} diverged" if diverged else ""
            words.append(f"{own.label} at {xlabel} {category}: {text}.")
            if len(seeds) and not boxes:
                over = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
                place.annotate(number(seeds.mean()), (middle, np.nanmax([high, *seeds])), (0, 3), **over)
    place.set(xlabel=xlabel, ylabel=ylabel, xticks=range(len(places)), xticklabels=map(short, places))
    place.set_xlim(-0.5, len(places) - 0.5)  # the same room for a series that a category lacks
    if not boxes and table["value"].notna().any():
        place.set_ylim(bottom=limits[0])  # its top is where the highest point is
    if reference is not None:
        reference_line(place, *reference)
        words.append(f"{reference[1]}: {number(reference[0])}.")
    legend_below(drawn)
    columns = list(dict.fromkeys(["run_id", by, "cell", x, "seed", "status", "diverged", "value"]))
    alt = f"{title}: {ylabel} of every seed by {xlabel}. {' '.join(words)}"
    return Drawing(drawn, title, alt, table.reindex(columns=columns), points=points)


def _mark(place: Axes, at: float, member: dict, look: Look) -> tuple:
    """Draw a member: a filled point, or a cross where it diverged (at the foot where it has no value). Returns what
    `save` needs to place a link over it."""
    value, transform = member["value"], place.transData
    style = {"label": look.label, "marker": look.marker, "color": look.color, "markeredgecolor": "white", "zorder": 3}
    if member["diverged"]:
        style = {"label": "diverged seed", "marker": "x", "color": BAD, "markeredgewidth": 2, "zorder": 4}
        if not np.isfinite(value):
            value, transform = 0.025, place.get_xaxis_transform()
    place.plot([at], [value], linestyle="", clip_on=False, transform=transform, **style)
    return transform, at, value, member


@housestyle
def learning_curves(
    history: pd.DataFrame,
    y: str,
    *,
    title: str,
    by: str,
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
    ylabel, line = y.replace("_", " "), [by] if panel is None else [panel, by]
    rows = history.reindex(columns=list(dict.fromkeys([*history.columns, "step", "seed", y, *line]))).dropna(subset=[y])
    if rows.duplicated([*line, "seed", "step"]).any():
        raise ValueError(f"learning_curves: a {by} has several members per seed; choose one cell first")
    look, words = looks(rows[by], known), []
    panels = list(rows.groupby(panel)) if panel else [("", rows)]
    lines, columns = -(-len(panels) // 2) or 1, 1 if len(panels) < 2 else 2
    drawn, axes = canvas(lines, columns, height=1.5 + 2.5 * lines, title=title, sharex=True, sharey=True)
    for place, (value, here) in zip(axes.flat, panels, strict=False):
        groups = [(own, here[here[by] == name]) for name, own in look.items() if (here[by] == name).any()]
        said = [_curve(place, group, y, smooth, own, here["step"].max()) for own, group in groups]
        words.append((f"{panel_label(value)}: " if panel else "") + ("; ".join(said) or "no data") + ".")
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


def _curve(place: Axes, rows: pd.DataFrame, y: str, smooth: int, own: Look, last: float) -> str:
    """Draw one line: its seeds, their mean, and crosses where seeds end early; returns its numbers in words."""
    raw = rows.pivot(index="step", columns="seed", values=y)
    seeds = raw.rolling(smooth, min_periods=1).mean().where(raw.notna())
    every = seeds.dropna()  # steps that all seeds reached
    place.plot(seeds, color=own.color, alpha=0.35, linewidth=0.9)
    place.plot(every.mean(axis=1), color=own.color, label=own.label)
    ends = seeds.apply(pd.Series.last_valid_index)
    early = ends[ends < last]
    place.plot(early, [seeds.at[step, seed] for seed, step in early.items()], "x", color=own.color, markeredgewidth=2)
    text = f"{own.label} has no step that all {len(ends)} seeds reached"
    if len(every):
        (first, stop), (start, end) = every.index[[0, -1]], every.mean(axis=1).iloc[[0, -1]]
        spread = f"(seeds {number(every.iloc[-1].min())} to {number(every.iloc[-1].max())})"
        text = f"{own.label} from {number(start)} at step {first} to {number(end)} at {stop} {spread}"
    return text + (f", {len(early)} of {len(ends)} seeds end early, the first at {early.min()}" if len(early) else "")


@housestyle
def claims(records: Sequence[Mapping], *, title: str = "The claims") -> Drawing:
    """Each claim's estimate and 95 % interval, after every look from top to bottom, against what is tested: one row and
    one axis per claim, since their units differ.

    `records`: the entries of claims.json (id, verdict, estimate, interval95, looks, test, tested, estimand). A
    non-inferiority margin lies below zero, an equivalence margin on both sides.
    """
    drawn, axes = canvas(max(1, len(records)), 1, height=0.7 + 1.3 * max(1, len(records)), title=title)
    words, data = [], []
    for place, claim in zip(axes[:, 0], records, strict=False):
        verdict, estimate, margin = claim["verdict"].replace("_", " "), claim.get("estimate"), claim.get("tested")
        low, high = claim.get("interval95") or (None, None)
        margins = [] if margin is None else [sign * margin for sign in MARGIN_SIGNS.get(str(claim.get("test")), (1,))]
        ends = " to ".join("no bound" if bound is None else number(bound) for bound in (low, high))
        text = "no estimate" if estimate is None else f"estimate {number(estimate)}, 95 % interval {ends}"
        text += f", tested {', '.join(map(number, margins))}" if margins else ""
        words.append(f"{claim['id']}: {verdict}, {text}")
        row = {"id": claim["id"], "verdict": verdict, "estimate": estimate, "low": low, "high": high}
        data.append(row | {"margins": " ".join(map(str, margins))})
        looks, color = claim.get("looks") or [], VERDICT_COLORS.get(verdict, SOFT)
        place.margins(x=0.08)
        place.set(xlabel=textwrap.fill(claim.get("estimand") or "", 95), ylim=(-1, 1), yticks=[])
        place.set_title(words[-1], fontsize=9.5, color=color)
        place.spines["left"].set_visible(False)
        for bound in margins:
            place.axvline(bound, linewidth=1.2, linestyle=DASH, color=INK)
        for y, look in zip(np.linspace(0.6, -0.6, len(looks)) if len(looks) > 1 else [0.0], looks, strict=False):
            last = look is looks[-1]
            place.plot([look["low"], look["high"]], [y, y], color=color, linewidth=5 if last else 2, alpha=0.5)
            place.plot([look["estimate"]], [y], "D", color=color, markersize=8 if last else 4)
            free = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of the lines behind it
            beside = {"textcoords": "offset points", "va": "center", "fontsize": 8, "bbox": free}
            unit = "processes" if claim["test"] == "cost_ratio" else "seeds"
            place.annotate(f"{look['seeds']} {unit}", (look["high"], y), (4, 0), **beside)
    return Drawing(drawn, title, f"{title}: {'. '.join(words)}.", pd.DataFrame(data))
