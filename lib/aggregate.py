"""comparison/aggregated_metrics.json, in the form that the studies' experiment contract asks for."""

from pathlib import Path

from lib import config, record


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
