"""The record of a run as a whole: provenance at its start, a summary and the sentinel at its end."""

import contextlib
import os
import platform
import statistics
import subprocess
from pathlib import Path

from lib import config, record
from lib.errors import MissingError
from lib.run import keys


def provenance(run) -> dict:
    """What made this record: versions, git state, hardware, data and model fingerprints. Holds no secret and no
    name."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(config.ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    dirty = git("status", "--porcelain")
    code = {"versions": keys.versions(), "code": keys.digest(keys.reach(run.study, "prepare", "train"))}
    code |= {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if dirty is None else bool(dirty)}
    machine = {"machine": platform.machine(), "system": platform.system(), "processor": _processor()}
    machine |= {"cores": os.cpu_count(), "device": keys.device_kind(run.compute.gpus)}
    sources = {part: digits for part, digits in keys.sources(run).items() if part != "files"}
    return {**code, **machine, "threads_per_member": run.compute.threads, **sources}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def begin(run) -> dict:
    """Write config.yaml and provenance.json; returns the provenance for the notebook to show."""
    import yaml

    folder, made = Path(run.results_dir) / run.run_id, provenance(run)
    record.write_text(folder / "config.yaml", yaml.safe_dump(config.dump(run), sort_keys=False, allow_unicode=True))
    record.write_json(folder / "provenance.json", made)
    return made


def by_cell(records: list[dict], metrics: list[str]) -> list[dict]:
    """Mean over seeds of each cell's metrics, in the grid's order; `seeds` says over how many."""
    table = []
    for cell in dict.fromkeys(row["cell"] for row in records):
        rows = [row for row in records if row["cell"] == cell]
        diverged = sum(row["status"] == "diverged" for row in rows)
        table.append({"cell": cell, "seeds": len(rows), "diverged": diverged, **_means(rows, metrics)})
    return table


def _means(rows: list[dict], metrics: list[str]) -> dict[str, float | None]:
    values = {m: [row[m] for row in rows if row.get(m) is not None] for m in metrics}
    return {m: statistics.fmean(present) if present else None for m, present in values.items()}


def chosen_cell(run, records: list[dict]) -> str:
    """The cell with the best mean validation metric among those with the most seeds: a cell seen once is not chosen
    over cells seen three times for a lucky seed."""
    metric = run.optuna.objective_metric
    rows = by_cell(records, [metric])
    most = max(row["seeds"] for row in rows)
    sign = -1 if config.study_module(run.study).METRICS.get(metric) == "minimize" else 1
    values = {row["cell"]: row[metric] for row in rows if row["seeds"] == most}
    return max(values, key=lambda cell: float("-inf") if values[cell] is None else sign * values[cell])


def summary(run, records: list[dict]) -> dict:
    """The run's metrics.json: the mean over seeds of its chosen cell, and its members beside it. A diverged member
    counts with the study's DIVERGED values, as in its claims: leaving it out would flatter its cell."""
    study = config.study_module(run.study)
    records = [{**r, **study.DIVERGED} if r["status"] == "diverged" else r for r in records]
    metrics = [m for m in study.METRICS if any(r.get(m) is not None for r in records)]
    cell = chosen_cell(run, records)
    means = _means([r for r in records if r["cell"] == cell], metrics)
    primary = study.primary_metric(run)
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

    def graded(members: list) -> list[dict]:
        read = {m: record.read_json(folder / "members" / m / "metrics.json") for m in members}
        return [{"member": m, **metrics} for m, metrics in read.items() if metrics]

    before, status = record.read_json(folder / "metrics.json"), record.read_json(folder / "status.json")
    every = {m.id: {"cell": m.cell_name, "seed": m.seed} for m in config.members(run)}
    if before and (found := [{**every[row["member"]], **row} for row in graded(list(every))]):
        made = before | summary(run, found)
        record.write_json(folder / "metrics.json", made)
        if status:
            record.write_json(folder / "status.json", {**status, "key_metric": made["key_metric"]})
    searched = record.read_json(folder / "sweep" / "metrics.json") or {}
    if searched.get("final"):
        rows = [{**row, "cell": searched["final"]["cell"]} for row in graded(searched["final_members"])]
        final = by_cell(rows, list(config.study_module(run.study).METRICS))[0]
        record.write_json(folder / "sweep" / "metrics.json", {**searched, "final": final})


def planned(results_dir: Path) -> list:
    """The runs of a study as the runner planned them, whether or not they left a record."""
    listed = record.read_json(Path(results_dir) / "comparison" / "runs.json")
    if listed is None:
        fix = "./run_all.sh (it runs the studies first)"
        raise MissingError(str(results_dir), "no runs here", "the results of a study", fix)
    of = ("study", "scale", "mode")
    return [config.restore(run, **{key: run[key] for key in of}, results_dir=results_dir) for run in listed]
