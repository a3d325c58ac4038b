"""Tables for people: a DataFrame as HTML with a caption and header scopes, and the metrics of runs against their
baselines."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lib import config, record
from lib.plots import number, outcomes


@dataclass(frozen=True)
class Table:
    """A table that shows itself in a notebook. The first column names the rows."""

    frame: pd.DataFrame
    caption: str

    def _repr_html_(self) -> str:
        return table_html(self.frame, self.caption)

    def __repr__(self) -> str:
        return f"{self.caption}\n{self.frame.to_string(index=False)}"


def table_html(frame: pd.DataFrame, caption: str) -> str:
    """HTML with every value escaped, `scope` on the headers, numbers to the right; a missing value is a dash."""
    numeric = [pd.api.types.is_numeric_dtype(frame.iloc[:, i]) for i in range(frame.shape[1])]
    head = "".join(
        f'<th scope="col"{_class(n)}>{html.escape(str(c))}</th>' for c, n in zip(frame, numeric, strict=True)
    )
    rows = []
    for values in frame.itertuples(index=False, name=None):
        first, *rest = (html.escape(_text(value)) for value in values)
        cells = "".join(f"<td{_class(n)}>{value}</td>" for value, n in zip(rest, numeric[1:], strict=True))
        rows.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _class(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)) or value is pd.NA:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return number(value, 4) if isinstance(value, float | np.floating) else str(value)


def metrics_table(
    members: pd.DataFrame,
    metrics: Mapping[str, str],
    *,
    chosen: Mapping[str, str],
    baselines: Sequence[str],
    diverged_values: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """One row per run and metric, of the run's cell in `chosen` (run_id -> cell, chosen on validation): mean and
    standard deviation over seeds, and the improvement over each baseline in percent of it (positive is better, also for
    metrics to minimise).

    metrics: name -> "maximize" or "minimize"; diverged_values: what a diverged member counts as, per metric.
    """
    rows = []
    for metric, aim in metrics.items():
        means = {}
        for run_id, cell in chosen.items():
            own = members[(members["run_id"] == run_id) & (members["cell"] == cell)]
            table = outcomes(own, metric, (diverged_values or {}).get(metric))
            means[run_id] = table["value"].mean()
            rows.append(
                {
                    "run_id": run_id,
                    "cell": cell,
                    "metric": metric,
                    "mean": means[run_id],
                    "sd": table["value"].std(ddof=1),
                    "seeds": len(own),
                    "diverged": int(table["diverged"].sum()),
                }
            )
        for row in rows[-len(chosen) :]:
            for baseline in baselines:
                base = means.get(baseline, np.nan)
                sign = 1 if aim == "maximize" else -1
                gain = 100 * sign * (row["mean"] - base) / abs(base) if base else np.nan
                row[f"improvement_over_{baseline}"] = np.nan if baseline == row["run_id"] else gain
    return (
        pd.DataFrame(rows)
        if rows
        else pd.DataFrame(columns=["run_id", "cell", "metric", "mean", "sd", "seeds", "diverged"])
    )


def show_metrics(table: pd.DataFrame, caption: str) -> Table:
    """metrics_table for people: a row per run, and under each metric its mean ± sd and its gain over each baseline."""
    shown = []
    for (run_id, cell), group in table.groupby(["run_id", "cell"], sort=False):
        first = group.iloc[0]
        lost = f", {first['diverged']} diverged" if first["diverged"] else ""
        row = {"run": run_id, "cell": cell, "seeds": f"{first['seeds']}{lost}"}
        for values in group.to_dict("records"):
            name = values["metric"].replace("_", " ")
            spread = f" ± {number(values['sd'], 2)}" if np.isfinite(values["sd"]) else ""
            row[name] = f"{number(values['mean'], 4)}{spread}" if np.isfinite(values["mean"]) else "–"
            for column in (c for c in table if c.startswith("improvement_over_")):
                gain = values[column]
                row[f"{name} vs {column.removeprefix('improvement_over_')}"] = (
                    f"{gain:+.1f} %".replace("-", "−") if np.isfinite(gain) else "–"
                )
        shown.append(row)
    return Table(pd.DataFrame(shown), caption)


def run_metrics(results_dir: Path) -> dict[str, dict]:
    """{run_id: its metrics.json} of every run with a finished record."""
    found = {path.parent.name: record.read_json(path) for path in sorted(Path(results_dir).glob("*/metrics.json"))}
    return {run_id: made for run_id, made in found.items() if made and "chosen_cell" in made}


def aggregated(study: str, results_dir: Path) -> dict:
    """primary_metric; metrics {name: {run_id: value}}, value being the mean over seeds of the run's cell chosen on
    validation; best_proposed and best_baseline {run_id, value}; gap in percent of the best baseline, positive where the
    proposed method is better; members {run_id: {cell, members}} beside it.
    """
    directions, runs = config.study_module(study).METRICS, run_metrics(results_dir)
    names = [n for n in directions if any(r["metrics"].get(n) is not None for r in runs.values())]
    shared = {r["key_metric"]["name"] for r in runs.values()}
    primary = next(iter(shared)) if len(shared) == 1 else next((n for n in names), None)
    sign = -1 if directions.get(primary) == "minimize" else 1

    def best(role: str) -> dict | None:
        values = {i: r["metrics"].get(primary) for i, r in runs.items() if r["role"] == role}
        values = {i: v for i, v in values.items() if v is not None}
        run_id = max(values, key=lambda i: sign * values[i], default=None)
        return None if run_id is None else {"run_id": run_id, "value": values[run_id]}

    proposed, baseline = best("proposed"), best("comparative")
    gap = None
    if proposed and baseline and baseline["value"]:
        gap = sign * (proposed["value"] - baseline["value"]) / abs(baseline["value"]) * 100
    return {
        "primary_metric": primary,
        "metrics": {n: {i: r["metrics"].get(n) for i, r in runs.items()} for n in names},
        "best_proposed": proposed,
        "best_baseline": baseline,
        "gap": gap,
        "members": {
            i: {"cell": r["chosen_cell"], "chosen_on": r["chosen_on"], "members": r["members"]} for i, r in runs.items()
        },
    }
