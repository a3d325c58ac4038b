"""What a person should know of run YAMLs, claims and notebooks before a run starts; an error keeps it from starting.

Nothing is run here: lib/run/ready.py adds what this machine lacks and what a watched trial shows.
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from lib import config, record
from lib.config import Finding, Run, did_you_mean
from lib.errors import StudyError
from lib.run import storage

NOT_RUNS = {"claims.yaml", "design.yaml", "judge.yaml", "wandb.yaml"}
TEXT = (".jsonl", ".json", ".csv", ".tsv")
Loaded = tuple[Path, Run | StudyError, list[Finding]]


# ---- run YAMLs


def load_folder(
    folder: str | Path,
    scale: str,
    mode: str,
    overrides: Mapping[str, str] | None = None,
    results_dir: str | Path | None = None,
) -> list[Loaded]:
    """Every run YAML under a folder (params/<study>/<scale>/ or flat) with its findings, checked in its full form."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise StudyError(str(folder), "no such folder", "a folder of run YAMLs", "check --params")
    other, loaded = {"laptop", "paper"} - {scale}, []
    for path in sorted(folder.rglob("*")):
        elsewhere = other & set(path.relative_to(folder).parts[:-1])
        if path.suffix not in (".yaml", ".yml") or path.name in NOT_RUNS or elsewhere:
            continue
        try:
            run = config.load_run(path, scale=scale, mode="full", overrides=overrides, results_dir=results_dir)
            found = findings(run)
            if mode == "trial" and not any(finding.level == "error" for finding in found):
                run = config.trial(run)
            loaded.append((path, run, found))
        except StudyError as error:
            loaded.append((path, error, []))
    between = _between_files([(path, run) for path, run, _ in loaded if isinstance(run, Run)])
    return [(path, run, found + between.get(path, [])) for path, run, found in loaded]


def findings(run: Run) -> list[Finding]:
    """Of one run: what holds for every study, then what its own study says of its first member."""
    found = [*_search(run), *_grid(run), *_files(run)]
    try:
        typical = config.apply(run, config.first_cell(run))
    except StudyError:  # what is wrong with the cell is among the findings already
        return found
    return found + ([] if typical.searched else config.study_module(run.study).check(typical))


def _refused(key: str, error: StudyError, what: str = "") -> Finding:
    return Finding("error", key, f"{what}{error.found}; expected {error.expected}", error.fix)


def _search(run: Run) -> Iterator[Finding]:
    """The metric exists and the search goes its way; no password stands in the YAML, where records and pages would show
    it; every name is a key of the YAML and every end of its range is a value that the key takes."""
    metrics, name, search = config.study_module(run.study).METRICS, run.optuna.objective_metric, run.optuna
    if name not in metrics:
        what = f"{name} is not a metric of {run.study} ({', '.join(metrics)})"
        yield Finding("error", "optuna.objective_metric", what, did_you_mean(name, list(metrics), "name one of them"))
    elif search.direction != metrics[name]:
        better = "more" if metrics[name] == "maximize" else "less"
        what = f"the search would {search.direction} {name}, of which {better} is better"
        yield Finding("error", "optuna.direction", what, f"direction: {metrics[name]}")
    try:
        if search.storage is not None:
            storage.check_url(search.storage)
    except StudyError as error:
        yield _refused("optuna.storage", error)
    if search.n_trials and not search.search_space:
        fix = "n_trials: 0, or name keys to search"
        yield Finding("error", "optuna.search_space", f"empty, with {search.n_trials} trials", fix)
    for name, entry in search.search_space.items():
        key = f"optuna.search_space.{name}"
        try:
            dotted = config.resolve(run.study, name)
            if dotted.split(".")[0] not in config.TUNABLE:
                fix = "search keys of " + ", ".join(config.TUNABLE)
                yield Finding("error", key, f"{dotted} is not a key to search", fix)
                continue
            for value in entry.choices or (entry.low, entry.high):
                config.apply(run, {dotted: int(value) if entry.type == "int" else value}, where=f"{key}:")
        except StudyError as error:
            yield _refused(key, error)


def _grid(run: Run) -> Iterator[Finding]:
    """The cells are valid, supply what the search leaves open, and can be enqueued in the search."""
    try:
        members = config.members(run)
    except StudyError as error:
        yield _refused("grid", error, f"{error.where}: ")
        return
    if not run.grid and run.searched:
        count = len({member.cell_name for member in members})
        what = f"none: the {count} combinations of the choices of {', '.join(run.searched)} are its cells"
        yield Finding("warning", "grid", what, "grid: [{product: {...}}] says it")
    for name, entry in run.optuna.search_space.items() if run.optuna.n_trials else ():
        dotted = config.study_module(run.study).ALIASES.get(name, name)
        values = sorted({member.cell[dotted] for member in members if dotted in member.cell}, key=str)
        if entry.choices:
            outside = [value for value in values if value not in entry.choices]
        else:
            outside = [value for value in values if not entry.low <= value <= entry.high]
        if outside:
            what = f"does not hold the grid's {outside}: these cells cannot count as trials"
            yield Finding("warning", f"optuna.search_space.{name}", what, "widen the search space")


def _files(run: Run) -> Iterator[Finding]:
    """Local files that the run names are there, and its data is text."""
    raw, module = config.dump(run), config.study_module(run.study)
    for key in module.PATHS:
        value = config.get(raw, key)
        if not config.is_local(value):
            continue
        path = Path(value)
        if path.is_symlink() and not path.exists():
            yield Finding("error", key, f"{value} is a link that leads nowhere or to itself", "name the file itself")
        elif not path.exists():
            fix = getattr(module, "MADE_BY", {}).get(key, f"--set {key}=<path>, or a hub id")
            yield Finding("error", key, f"{value} does not exist", fix)
        elif key.startswith("dataset."):
            files = [path] if path.is_file() else sorted(p for part in (path, path / "data") for p in part.glob("*"))
            for file in files:
                if file.suffix in TEXT and file.is_file() and (wrong := _not_text(file)):
                    yield Finding("error", key, *wrong)


def _not_text(path: Path) -> tuple[str, str] | None:
    """(fault, fix) of a data file that is not UTF-8 or cannot be read: said before anything has started."""
    number = 1
    try:
        with open(path, "rb") as file:
            for line in file:  # no character of several bytes has a line break in it
                line.decode("utf-8")
                number += 1
    except UnicodeDecodeError as error:
        fix = f"iconv -f LATIN1 -t UTF-8 '{path}' > converted{path.suffix} (where it is Latin-1)"
        return f"{path}, line {number}: byte 0x{error.object[error.start]:02x} is not UTF-8", fix
    except OSError as error:
        return f"{path}: {error.strerror}", "a readable file"
    return None


def _between_files(runs: list[tuple[Path, Run]]) -> dict[Path, list[Finding]]:
    """What only shows between files: one run_id twice, methods that get unequal numbers of trials, and runs of one
    method, cell and seed, which are one and the same to claims that do not name runs."""
    found, owner, cells, most = defaultdict(list), {}, {}, defaultdict(int)
    for _, run in runs:
        most[run.study] = max(most[run.study], run.optuna.n_trials)
    for path, run in runs:
        if (first := owner.setdefault((run.study, run.run_id), path)) != path:
            what = f"{run.run_id} is also the run_id of {first}"
            found[path].append(Finding("error", "run_id", what, "rename one of them"))
        if 0 < run.optuna.n_trials < most[run.study]:
            what = f"{run.optuna.n_trials}, where another method of the study gets {most[run.study]}: it is tuned less"
            found[path].append(Finding("warning", "optuna.n_trials", what, f"n_trials: {most[run.study]}"))
    for path, run in sorted(runs, key=lambda item: item[1].run_id):
        with contextlib.suppress(StudyError):  # a wrong grid is a finding of its own
            own = {(run.study, run.method, member.cell_name, member.seed) for member in config.members(run)}
            if (shared := sorted(own & cells.keys())) and not _claims_name_runs(run.study):
                _, method, cell, seed = shared[0]
                what = f"{method} trains {cell} with seed {seed} as {cells[shared[0]]} does: no claim about it can be evaluated"
                fix = "claims.yaml: run_id among `keys`, and in the claim's cell"
                found[path].append(Finding("warning", "method", what, fix))
            cells |= dict.fromkeys(own - cells.keys(), run.run_id)
    return found


def _claims_name_runs(study: str) -> bool:
    """Whether claims tell runs of one method apart; so they do where there are none."""
    try:
        return "run_id" in config.load_yaml(config.ROOT / "params" / study / "claims.yaml").get("keys", ())
    except StudyError:
        return True


def display_path(path: str | Path) -> str:
    """A path as a person types it here: relative to the repository where it lies in it."""
    path = Path(path)
    return path.relative_to(config.ROOT).as_posix() if path.is_relative_to(config.ROOT) else str(path)


def finding_from(error: StudyError, file: str) -> Finding:
    """A file that was refused, as a finding."""
    place = error.where.removeprefix(f"{config.ROOT}/").removeprefix(file).lstrip(": ")
    return Finding("error", place, f"{error.found}; expected {error.expected}", error.fix, file)


def yaml_findings(loaded: list[Loaded]) -> Iterator[Finding]:
    """Of run YAMLs as `load_folder` gives them; each is also shrunk to its trial form and split into its members."""
    for path, run, found in loaded:
        if isinstance(run, StudyError):
            yield finding_from(run, display_path(path))
            continue
        yield from (replace(finding, file=display_path(path)) for finding in found)
        try:
            config.members(run)
            config.trial(run)
        except StudyError as error:
            if not any(finding.level == "error" for finding in found):
                yield finding_from(error, display_path(path))


# ---- claims


def claims_findings(study: str, runs: list[Run], scale: str, path: Path | None = None) -> Iterator[Finding]:
    """The study's claims (in `path`, or as shipped): they load, their metrics exist and, where `runs` are the study's
    own as they lie beside it, at this scale their cells are trained. Of somebody's own runs, or with --set, claims may
    stay open: that is a warning, and their analysis says so too."""
    import pandas as pd

    from lib import claims

    path, module = path or config.ROOT / "params" / study / "claims.yaml", config.study_module(study)
    file = display_path(path)
    try:
        published = claims.load(path)
    except StudyError as error:
        yield finding_from(error, file)
        return
    if published.choose_on and published.choose_on not in module.METRICS:
        what = f"{published.choose_on} is no metric of {study}"
        yield Finding("error", "choose_on", what, ", ".join(module.METRICS), file)
    asked = [claim for claim in published.claims if scale in claim.scales and not claim.not_evaluated]
    used = [("chance.metric", published.chance.metric)] if published.chance else []
    for place, metric in used + [(f"{claim.id}.metric", claim.metric) for claim in asked]:
        if metric not in module.CLAIM_METRICS:
            what, fix = f"{metric} is in no table of {study}'s analysis", "one of: " + ", ".join(module.CLAIM_METRICS)
            yield Finding("error", place, what, fix, file)
    members = pd.DataFrame([row for run in runs for row in _rows(run)])
    shipped = all(run.source and run.source.is_relative_to(path.parent) and not run.overrides for run in runs)
    absent: dict[str, str] = {}  # claim -> the first cell of it that nobody trains
    for claim, side in ((claim, side) for claim in asked for side in ("treatment", "baseline") if getattr(claim, side)):
        for cell in published.levels(claim, side):
            known = {key: value for key, value in cell.items() if value != claims.BEST}
            if members.empty or not claims.select(members, known).empty:
                continue
            label = published.label(cell)
            absent.setdefault(claim.id, label)
            if shipped:
                fix = f"a run in params/{study}/{scale}/ with this cell, or scales: of the claim without {scale}"
                yield Finding("error", f"{claim.id}.{side}", f"no run at {scale} scale trains {label}", fix, file)
    if absent and not shipped:
        first, others = next(iter(absent.values())), " and others" if len(absent) > 1 else ""
        what = f"not decided by these runs, of which none trains {first}{others}"
        yield Finding("warning", ", ".join(absent), what, "nothing, if they are not what these runs are for", file)


def _rows(run: Run) -> Iterator[dict]:
    """A run's members as the tables of an analysis name them: the cell's keys by their own names and the short ones."""
    aliases = config.study_module(run.study).ALIASES.items()
    with contextlib.suppress(StudyError):  # a wrong grid is a finding of its YAML
        for member in config.members(run):
            spec = {"run_id": run.run_id, "config": config.dump(member.run), "study": run.study}
            spec |= {"cell": member.cell, "cell_name": member.cell_name, "seed": member.seed}
            short = {alias: member.cell[dotted] for alias, dotted in aliases if dotted in member.cell}
            yield short | record.identity(spec)


# ---- notebooks


def notebook_findings(path: Path) -> Iterator[Finding]:
    """A notebook is source, not record: it parses, holds no outputs, and has one cell for papermill's parameters."""
    file, tagged = display_path(path), 0
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [(n, cell, "".join(cell["source"])) for n, cell in enumerate(cells, 1) if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Finding("error", "", f"not a notebook: {error}", "git checkout -- it", file)
        return
    for number, cell, text in code:
        tagged += "parameters" in cell.get("metadata", {}).get("tags", ())
        if cell.get("outputs") or cell.get("execution_count") is not None:
            what = "holds outputs: a notebook here is source, its executed copy is the record"
            yield Finding("error", f"cell {number}", what, f".venv/bin/nbstripout --keep-id {file}", file)
        try:
            ast.parse(text)
        except SyntaxError as error:
            what = f"does not parse: {error.msg} (line {error.lineno})"
            yield Finding("error", f"cell {number}", what, "correct the cell", file)
    if tagged != 1:
        what = f"{tagged} cells tagged `parameters`, expected one"
        yield Finding("error", "", what, "tag the one that papermill is to replace", file)
