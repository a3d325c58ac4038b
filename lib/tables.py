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
        """Every value escaped, `scope` on the headers, numbers to the right; a missing value is a dash."""
        numeric = [pd.api.types.is_numeric_dtype(self.frame.iloc[:, i]) for i in range(self.frame.shape[1])]
        kinds = [' class="number"' if each else "" for each in numeric]
        head = "".join(
            f'<th scope="col"{kind}>{html.escape(str(c))}</th>' for c, kind in zip(self.frame, kinds, strict=True)
        )
        body = ""
        for values in self.frame.itertuples(index=False, name=None):
            first, *rest = (html.escape(_text(value)) for value in values)
            cells = "".join(f"<td{kind}>{value}</td>" for value, kind in zip(rest, kinds[1:], strict=True))
            body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
        caption = html.escape(self.caption)
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        return f"{self.caption}\n{self.frame.to_string(index=False)}"


def _text(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value)):
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
    caption: str,
    diverged_values: Mapping[str, float] | None = None,
) -> Table:
    """A row per run, of its cell in `chosen` (run_id -> cell, chosen on validation): mean ± standard deviation over
    seeds of each metric, and its improvement over each baseline in percent of it (positive is better, also for metrics
    to minimize).

    metrics: name -> "maximize" or "minimize"; diverged_values: what a diverged member counts as, per metric.
    """
    own = {i: members[(members["run_id"] == i) & (members["cell"] == cell)] for i, cell in chosen.items()}
    lost = {i: int(outcomes(rows, "")["diverged"].sum()) for i, rows in own.items()}
    table = pd.DataFrame({"run": list(chosen), "cell": list(chosen.values())})
    table["seeds"] = [f"{len(rows)}{f', {lost[i]} diverged' if lost[i] else ''}" for i, rows in own.items()]
    for metric, aim in metrics.items():
        name, worst = metric.replace("_", " "), (diverged_values or {}).get(metric)
        values = {i: outcomes(rows, metric, worst)["value"] for i, rows in own.items()}
        means = {i: each.mean() for i, each in values.items()}
        spreads = [f" ± {number(each.std(), 2)}" if each.count() > 1 else "" for each in values.values()]
        table[name] = [_text(mean) + more for mean, more in zip(means.values(), spreads, strict=True)]
        for baseline in baselines:
            base, sign = means.get(baseline, np.nan), 1 if aim == "maximize" else -1
            gains = [
                100 * sign * (mean - base) / abs(base) if base and i != baseline else np.nan
                for i, mean in means.items()
            ]
            table[f"{name} vs {baseline}"] = [f"{g:+.1f} %".replace("-", "−") if np.isfinite(g) else "–" for g in gains]
    return Table(table, caption)


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
