"""The record of a run as a whole: provenance at its start, a summary and the sentinel at its end."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path

from lib import config, hub, record
from lib.errors import MissingError
from lib.run import keys


def provenance(run) -> dict:
    """What made this record: versions, git state, hardware, data and model fingerprints. Holds no secret and no
    name."""

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError):  # no git here
            done = subprocess.run(["git", "-C", str(config.ROOT), *arguments], capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else None

    dirty = git("status", "--porcelain")
    code = {"versions": keys.versions(), "code": record.digest(keys.reach(run.study, "prepare", "train"))}
    code |= {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if dirty is None else bool(dirty)}
    machine = {"machine": platform.machine(), "system": platform.system(), "processor": _processor()}
    machine |= {"cores": os.cpu_count(), "device": keys.device_kind(run.compute.gpus)}
    sources = {part: digits for part, digits in keys.sources(run).items() if part != "files"}
    if folder := hub.fetched(run.model.name):
        sources["model_from"] = ", ".join(f"{k} {v}" for k, v in record.read_json(folder / "provenance.json").items())
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
    """Mean over seeds of each cell's metrics, its pilots apart, in the grid's order; `seeds` says over how many."""
    table, of = [], lambda row: (row["cell"], row.get("pilot", False))
    for cell, pilot in dict.fromkeys(map(of, records)):
        rows = [row for row in records if of(row) == (cell, pilot)]
        diverged = sum(row["status"] == "diverged" for row in rows)
        about = {"cell": cell, "pilot": pilot, "seeds": len(rows), "diverged": diverged}
        table.append(about | {metric: record.mean(row.get(metric) for row in rows) for metric in metrics})
    return table


def chosen_cell(run, records: list[dict]) -> str:
    """The cell that a search found; else the one with the best mean validation metric, of the pilots where there are any,
    among those with the most seeds: a cell seen once is not chosen over cells seen three times for a lucky seed."""
    metric = run.optuna.objective_metric
    if any(row["cell"] == config.TUNED for row in records):
        return config.TUNED
    every = by_cell(counted(run, records), [metric])
    rows = [row for row in every if row["pilot"]] or every
    most = max(row["seeds"] for row in rows)
    sign = -1 if config.study_module(run.study).METRICS.get(metric) == "minimize" else 1
    values = {row["cell"]: row[metric] for row in rows if row["seeds"] == most}
    return max(values, key=lambda cell: float("-inf") if values[cell] is None else sign * values[cell])


def counted(run, records: list[dict]) -> list[dict]:
    """The records, a diverged member with the study's DIVERGED values, as in its claims: leaving it out would flatter its
    cell."""
    worst = config.study_module(run.study).DIVERGED
    return [{**row, **worst} if row["status"] == "diverged" else row for row in records]


def settle(run, guess: bool = False):
    """The run with what its pilots have chosen: of each pilot block whose pilots are all finished the chosen cell, to be
    trained with the block's seeds, as a further block; in its tuned block what its search found. The record of the pilots
    decides, so that it is the same choice however many seeds follow. `guess`: the first cell stands in for a choice that
    is still to come."""
    found = found_by_search(run)
    run = config.tune(run, found) if found or guess else run
    folder, chosen = Path(run.results_dir) / run.run_id / "members", []
    for block in (block for block in run.grid or () if block.pilot):
        pilots = config.members(run.model_copy(update={"grid": [block]}))
        rows = []
        for m in pilots:
            metrics, done = (record.read_json(folder / m.id / f"{name}.json", {}) for name in ("metrics", "done"))
            rows.append({"cell": m.cell_name, **metrics, "status": done.get("status")})
        finished = all(row["status"] in record.FINISHED for row in rows)
        name = chosen_cell(run, rows) if finished else pilots[0].cell_name
        if finished or guess:
            cell = next(m.cell for m in pilots if m.cell_name == name)
            chosen.append(config.Block(cells=[cell], seeds=block.seeds))
    more = [block for block in chosen if block not in run.grid]
    return run.model_copy(update={"grid": [*run.grid, *more]}) if more else run


def found_by_search(run) -> dict | None:
    """The cell of the best trial, {dotted key: value}; None until the search has ended that the run asks for."""
    searched = record.read_json(Path(run.results_dir) / run.run_id / "sweep" / "metrics.json", {})
    return searched.get("cell") if searched.get("search") == search_of(run) else None


def search_of(run) -> str:
    """What tells one search of a run from another: a digest of its space, objective, seed and number of trials."""
    return record.digest(config.dump(run)["optuna"])


def summary(run, records: list[dict]) -> dict:
    """The run's metrics.json: the mean over judged seeds of its chosen cell, its members beside it, and where its settings
    and histories are. A key metric that is not graded yet is null, with the command that grades it."""
    study, records = config.study_module(run.study), counted(run, records)
    numbers = {name: None for r in records for name, x in r.items() if type(x) in (int, float) and name != "seed"}
    metrics = [m for m in dict.fromkeys([*study.METRICS, *numbers]) if m in numbers]
    cell = chosen_cell(run, records)
    rows = [r for r in records if r["cell"] == cell and not r.get("pilot")]
    means, primary = {m: record.mean(row.get(m) for row in rows) for m in metrics}, study.primary_metric(run)
    key = {"name": primary, "value": means.get(primary)}
    graded_by = study.GRADED_BY.get(primary)
    if graded_by and any(r.get(primary) is None for r in rows):
        key |= {"value": None, "graded_by": graded_by}
    return {
        "run_id": run.run_id,
        "method": run.method,
        "role": run.role,
        "chosen_cell": cell,
        "chosen_on": run.optuna.objective_metric,
        "key_metric": key,
        "metrics": means,
        "members": {r["member"]: {m: r.get(m) for m in ["status", *metrics]} for r in records},
        "configuration": "config.yaml",
        "history": {r["member"]: f"members/{r['member']}/history.jsonl" for r in records},
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
    every = {m.id: {"cell": m.cell_name, "seed": m.seed, "pilot": m.pilot} for m in config.members(settle(run))}
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
    """The runs of a study as the runner planned them and their pilots chose, whether or not they left a record."""
    listed = record.read_json(Path(results_dir) / "comparison" / "runs.json")
    if listed is None:
        raise MissingError(str(results_dir), "no runs here", "the results of a study", "run them: ./run_all.sh")
    of = ("study", "scale", "mode")
    return [settle(config.restore(run, **{key: run[key] for key in of}, results_dir=results_dir)) for run in listed]
