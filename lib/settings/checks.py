"""Checks that hold for the run YAMLs of every study; lib/<study>/config.py adds its own."""

from __future__ import annotations

import codecs
import contextlib
from pathlib import Path

from lib import claims, config
from lib.errors import StudyError
from lib.run import storage
from lib.settings.faults import did_you_mean
from lib.settings.schema import Finding, Run

TEXT = (".jsonl", ".json", ".csv", ".tsv")


def shared_findings(run: Run) -> list[Finding]:
    return [*_objective(run), *_search_space(run), *_storage(run), *_grid(run), *_files(run)]


def _objective(run: Run) -> list[Finding]:
    """The metric exists and the search goes its way."""
    metrics, name = config.study_module(run.study).METRICS, run.optuna.objective_metric
    if name not in metrics:
        near = did_you_mean(name, list(metrics))
        return [
            Finding(
                "error",
                "optuna.objective_metric",
                f"{name} is not a metric of {run.study} ({', '.join(metrics)})",
                near if near != "remove it" else "name one of them",
            )
        ]
    if run.optuna.direction != metrics[name]:
        return [
            Finding(
                "error",
                "optuna.direction",
                f"the search would {run.optuna.direction} {name}, of which "
                f"{'more' if metrics[name] == 'maximize' else 'less'} is better",
                f"direction: {metrics[name]}",
            )
        ]
    return []


def _storage(run: Run) -> list[Finding]:
    """No password stands in the YAML, where records and pages would show it: in a trial, too."""
    if run.optuna.storage is None:
        return []
    try:
        storage.written(run.optuna.storage)
    except StudyError as error:
        return [Finding("error", "optuna.storage", f"{error.found}; expected {error.expected}", error.mend)]
    return []


def _search_space(run: Run) -> list[Finding]:
    """Every name is a key of the YAML and every end of its range is a value that the key takes."""
    found = []
    if run.optuna.n_trials and not run.optuna.search_space:
        found.append(
            Finding(
                "error",
                "optuna.search_space",
                f"empty, with {run.optuna.n_trials} trials",
                "n_trials: 0, or name keys to search",
            )
        )
    for name, entry in run.optuna.search_space.items():
        key = f"optuna.search_space.{name}"
        try:
            dotted = config.resolve(run.study, name)
            if dotted.split(".")[0] not in config.TUNABLE:
                found.append(
                    Finding(
                        "error", key, f"{dotted} is not a key to search", "search keys of " + ", ".join(config.TUNABLE)
                    )
                )
                continue
            for value in entry.choices or (entry.low, entry.high):
                value = int(value) if entry.type == "int" else value
                config.apply(run, {dotted: value}, where=f"{key}:")
        except StudyError as error:
            found.append(Finding("error", key, f"{error.found}; expected {error.expected}", error.mend))
    return found


def _grid(run: Run) -> list[Finding]:
    """The cells are valid, supply what the search leaves open, and can be enqueued in the search."""
    try:
        members = config.members(run)
    except StudyError as error:
        return [Finding("error", "grid", f"{error.where}: {error.found}; expected {error.expected}", error.mend)]
    found = []
    if not run.grid and config.markers(run):
        count = len({member.cell_name for member in members})
        found.append(
            Finding(
                "warning",
                "grid",
                f"none: the {count} combinations of the choices of "
                + ", ".join(config.markers(run))
                + " are its cells",
                "grid: [{product: {...}}] says it",
            )
        )
    for name, entry in run.optuna.search_space.items() if run.optuna.n_trials else ():
        try:
            dotted = config.resolve(run.study, name)
        except StudyError:
            continue
        values = sorted({member.cell[dotted] for member in members if dotted in member.cell}, key=str)
        outside = [
            value
            for value in values
            if (value not in entry.choices if entry.choices else not entry.low <= value <= entry.high)
        ]
        if outside:
            found.append(
                Finding(
                    "warning",
                    f"optuna.search_space.{name}",
                    f"does not hold the grid's {outside}: these cells cannot count as trials",
                    "widen the search space",
                )
            )
    return found


def _files(run: Run) -> list[Finding]:
    raw = config.dump(run)
    found = []
    for key in config.study_module(run.study).PATHS:
        value = config.get(raw, key)
        if not config.is_local(value):
            continue
        if Path(value).is_symlink() and not Path(value).exists():
            found.append(
                Finding("error", key, f"{value} is a link that leads nowhere or to itself", "name the file itself")
            )
        elif not Path(value).exists():
            found.append(Finding("error", key, f"{value} does not exist", _how_to_get(run, key)))
        elif key.startswith("dataset."):
            found += [Finding("error", key, *fault) for path in _data_files(Path(value)) if (fault := _not_text(path))]
    return found


def _data_files(path: Path) -> list[Path]:
    """The text files of a local data set, which may be one file or a folder (as it is, or with `data/`)."""
    files = [path] if path.is_file() else sorted(p for folder in (path, path / "data") for p in folder.glob("*"))
    return [file for file in files if file.suffix in TEXT and file.is_file()]


def _not_text(path: Path) -> tuple[str, str] | None:
    """(fault, how to mend it) of a data file that is not UTF-8 or cannot be read: said before anything has started."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                decoder.decode(block)
                line += block.count(b"\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start) if error.object else 0
        return (
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8",
            f"iconv -f LATIN1 -t UTF-8 '{path}' > converted{path.suffix} (where it is Latin-1)",
        )
    except OSError as error:
        return f"{path}: {error.strerror}", "a readable file"
    return None


def _how_to_get(run: Run, key: str) -> str:
    making = getattr(config.study_module(run.study), "MADE_BY", {})
    return making.get(key, f"--set {key}=<path>, or a hub id")


Loaded = tuple[Path, Run | StudyError, list[Finding]]


def folder_findings(found: list[Loaded]) -> list[Loaded]:
    """What only shows between files: one run_id twice, methods that get unequal numbers of trials."""
    owner: dict[tuple[str, str], Path] = {}
    trials: dict[str, dict[str, int]] = {}
    for path, run, _ in found:
        if isinstance(run, Run):
            owner.setdefault((run.study, run.run_id), path)
            if run.optuna.n_trials:
                trials.setdefault(run.study, {})[run.run_id] = run.optuna.n_trials
    twice = _shared_cells([run for _, run, _ in found if isinstance(run, Run)])
    result = []
    for path, run, findings in found:
        extra = []
        if isinstance(run, Run):
            first = owner[run.study, run.run_id]
            if first != path:
                extra.append(
                    Finding("error", "run_id", f"{run.run_id} is also the run_id of {first}", "rename one of them")
                )
            most = max(trials.get(run.study, {"": 0}).values())
            if 0 < run.optuna.n_trials < most:
                extra.append(
                    Finding(
                        "warning",
                        "optuna.n_trials",
                        f"{run.optuna.n_trials}, where another method of the study gets {most}: it is tuned less",
                        f"n_trials: {most}",
                    )
                )
            extra += twice.get((run.study, run.run_id), [])
        result.append((path, run, findings + extra))
    return result


def _shared_cells(runs: list[Run]) -> dict[tuple[str, str], list[Finding]]:
    """By (study, run_id): runs of one method, cell and seed are one and the same to claims that do not name runs."""
    found, by_method = {}, {}
    for run in sorted(runs, key=lambda run: run.run_id):
        by_method.setdefault((run.study, run.method), []).append(run)
    for (study, method), same in by_method.items():
        with contextlib.suppress(
            StudyError, OSError
        ):  # claims that are absent, or that say themselves what is wrong with them
            if len(same) < 2 or "run_id" in claims.load(config.ROOT / "params" / study / "claims.yaml").keys:
                continue
            owner: dict[tuple[str, int], str] = {}
            for run in same:
                own = {(member.cell_name, member.seed) for member in config.members(run)}
                if shared := sorted(own & owner.keys()):
                    cell, seed = shared[0]
                    found[study, run.run_id] = [
                        Finding(
                            "warning",
                            "method",
                            f"{method} trains {cell} with seed {seed} as {owner[shared[0]]} does: no claim "
                            "about it can be evaluated",
                            "claims.yaml: run_id among `keys`, and in the claim's cell",
                        )
                    ]
                owner |= dict.fromkeys(own - owner.keys(), run.run_id)
    return found
