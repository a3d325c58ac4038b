"""The record of a run as a whole: provenance at its start, a summary and the sentinel at its end."""

import os
import platform
import statistics
import subprocess
from pathlib import Path

from lib import config, record
from lib.errors import MissingError
from lib.run import keys, reach


def provenance(run) -> dict:
    """What made this record: versions, git state, hardware, data and model fingerprints. Holds no secret and no
    name."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(config.ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    dirty = git("status", "--porcelain")
    return {
        "versions": keys.versions(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if dirty is None else bool(dirty),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "device": keys.device_kind(run.compute.gpus),
        "processor": _processor(),
        "threads_per_member": run.compute.threads,
        "data": keys.source(run.dataset.name, run.dataset.revision),
        "model": keys.source(run.model.name, run.model.revision),
        "code": keys.digest(reach.reach(run.study, "prepare", "train")),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def begin(run) -> dict:
    """Write config.yaml and provenance.json; returns the provenance for the notebook to show."""
    import yaml

    folder = Path(run.results_dir) / run.run_id
    record.write_text(folder / "config.yaml", yaml.safe_dump(config.dump(run), sort_keys=False, allow_unicode=True))
    made = provenance(run)
    record.write_json(folder / "provenance.json", made)
    return made


def by_cell(records: list[dict], metrics: list[str]) -> list[dict]:
    """Mean over seeds of each cell's metrics, in the grid's order; `seeds` says over how many."""
    cells = {}
    for row in records:
        cells.setdefault(row["cell"], []).append(row)
    return [
        {
            "cell": cell,
            "seeds": len(rows),
            "diverged": sum(r["status"] == "diverged" for r in rows),
            **{m: _mean([r.get(m) for r in rows]) for m in metrics},
        }
        for cell, rows in cells.items()
    ]


def _mean(values: list) -> float | None:
    present = [v for v in values if v is not None]
    return statistics.fmean(present) if present else None


def chosen_cell(run, records: list[dict]) -> str:
    """The cell with the best mean validation metric among those with the most seeds: a cell seen once is not chosen
    over cells seen three times for a lucky seed."""
    metric = run.optuna.objective_metric
    rows = by_cell(records, [metric])
    most = max(row["seeds"] for row in rows)
    rows = [row for row in rows if row["seeds"] == most]
    sign = -1 if config.study_module(run.study).METRICS.get(metric) == "minimize" else 1
    return max(rows, key=lambda row: sign * row[metric] if row[metric] is not None else float("-inf"))["cell"]


def summary(run, records: list[dict]) -> dict:
    """The run's metrics.json: the mean over seeds of its chosen cell, and its members beside it. A diverged member
    counts with the study's DIVERGED values, as in its claims: leaving it out would flatter its cell."""
    study = config.study_module(run.study)
    records = [{**r, **study.DIVERGED} if r["status"] == "diverged" else r for r in records]
    metrics = [m for m in study.METRICS if any(r.get(m) is not None for r in records)]
    cell = chosen_cell(run, records)
    mine = [r for r in records if r["cell"] == cell]
    means = {m: _mean([r.get(m) for r in mine]) for m in metrics}
    primary = getattr(study, "primary_metric", lambda run: study.PRIMARY_METRIC[run.scale])(run)
    primary = primary if means.get(primary) is not None else study.SECOND_METRIC
    return {
        "run_id": run.run_id,
        "method": run.method,
        "role": run.role,
        "chosen_cell": cell,
        "chosen_on": run.optuna.objective_metric,
        "key_metric": {"name": primary, "value": means.get(primary)},
        "metrics": means,
        "members": {r["member"]: {m: r.get(m) for m in ["status", *metrics]} for r in records},
    }


def finish(folder: Path, metrics: dict, nonce: str | None) -> None:
    """The notebook's last act: its metrics, then the sentinel that carries this attempt's nonce."""
    record.write_json(Path(folder) / "metrics.json", metrics)
    (Path(folder) / "progress.json").unlink(missing_ok=True)
    record.write_json(Path(folder) / "done.json", {"nonce": nonce})


def refresh(run) -> None:
    """A finished run's metrics.json, and what its search says of its best, made again from the members' (a judge has
    graded them since)."""
    folder = Path(run.results_dir) / run.run_id

    def metrics_of(member: str) -> dict:
        return record.read_json(folder / "members" / member / "metrics.json") or {}

    before, status = record.read_json(folder / "metrics.json"), record.read_json(folder / "status.json")
    found = [
        {"member": m.id, "cell": m.cell_name, "seed": m.seed, **made}
        for m in config.members(run)
        if (made := metrics_of(m.id))
    ]
    if before and found:
        made = before | summary(run, found)
        record.write_json(folder / "metrics.json", made)
        if status:
            record.write_json(folder / "status.json", {**status, "key_metric": made["key_metric"]})
    searched = record.read_json(folder / "sweep" / "metrics.json") or {}
    if searched.get("final"):
        rows = [{"cell": searched["final"]["cell"], **metrics_of(member)} for member in searched["final_members"]]
        final = by_cell(rows, list(config.study_module(run.study).METRICS))[0]
        record.write_json(folder / "sweep" / "metrics.json", {**searched, "final": final})


def planned(results_dir: Path) -> list:
    """The runs of a study as the runner planned them, whether or not they left a record."""
    listed = record.read_json(Path(results_dir) / "comparison" / "runs.json")
    if listed is None:
        raise MissingError(
            str(results_dir), "no runs here", "the results of a study", "./run_all.sh (it runs the studies first)"
        )
    return [
        config.restore(
            {k: v for k, v in r.items() if k not in ("study", "scale", "mode")},
            study=r["study"],
            scale=r["scale"],
            mode=r["mode"],
            results_dir=results_dir,
        )
        for r in listed
    ]
