"""May these runs start? What their YAMLs, claims and notebooks show, what this machine lacks, what a watched trial does.

`load_folder` and the findings of single files run nothing; an error among them keeps a run from starting. `./run_all.sh
check` adds a trial of one run per method, watched from inside (lib/run/watch.py).
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from lib import config, record
from lib.config import Finding, Run, did_you_mean
from lib.errors import StudyError
from lib.run import cluster, keys, plan, preflight, progress, reach, storage, watch

NOT_RUNS = {"claims.yaml", "design.yaml", "judge.yaml", "wandb.yaml"}
TEXT = (".jsonl", ".json", ".csv", ".tsv")
Loaded = tuple[Path, Run | StudyError, list[Finding]]
MOST_BATCHES = 2  # of a phase in a trial
NEVER_BEGAN = "the trial"  # where a finding is about all of it: no notebook of it has failed by itself
ENTRY_MODULES = ("cli", "runner", "sweep", "work", "pool", "kernels")  # of lib.run: what a trial executes
HOME_CACHES = (".cache", ".config", ".ipython", ".jupyter", ".local", ".nv", ".triton")
CACHES = (  # variables that name a place of this kind; the first two are our own `.cache` where nobody named another
    "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME", "MPLCONFIGDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "NUMBA_CACHE_DIR",
)  # fmt: skip


# ---- run YAMLs


def load_folder(folder: str | Path, scale: str, mode: str, overrides: Mapping[str, str] | None = None) -> list[Loaded]:
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
            run = config.load_run(path, scale=scale, mode="full", overrides=overrides)
            found = findings(run)
            if mode == "trial" and not has_error(found):
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
    """Of run YAMLs as `load_folder` gives them; each is also shrunk to its trial form."""
    for path, run, found in loaded:
        if isinstance(run, StudyError):
            yield finding_from(run, display_path(path))
            continue
        yield from (replace(finding, file=display_path(path)) for finding in found)
        try:
            config.trial(run)
        except StudyError as error:
            if not has_error(found):
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


# ---- before every command


def has_notebooks(run: Run) -> bool:
    return (plan.NOTEBOOKS / run.study / "train.ipynb").exists()


def require_slots(options, found: list[Loaded]) -> None:
    """Refuse --jobs below what one member takes: a slot of the pool is one GPU."""
    if options.mode != "full" or not options.jobs or options.cluster:
        return
    for run in runs_of(found):
        if run.compute.gpus and run.compute.devices > options.jobs:
            what = f"{run.run_id} trains one member on {run.compute.devices} GPUs (compute.gpus), and a slot is one GPU"
            fix = "leave --jobs out: as many members as the GPUs allow are trained at a time"
            raise StudyError(f"--jobs {options.jobs}", what, f"--jobs {run.compute.devices} or more", fix)


def find_obstacles(options, found: list[Loaded]) -> tuple[dict[str, list[Finding]], int]:
    """{YAML (or 'this machine'): findings}, and the exit code that their errors mean: 2 for a YAML's, else 3, else
    0."""
    said: dict[str, list[Finding]] = {}
    for path, run, findings in found:
        name = path.name if options.params else os.path.relpath(path, config.ROOT)
        if isinstance(run, StudyError):
            said[name] = [Finding("error", "configuration", str(run))]
            continue
        said[name] = list(findings)
        if not has_notebooks(run):
            said[name].append(Finding("error", f"notebooks/{run.study}", "this study has no notebooks yet"))
    code = 2 if any(map(has_error, said.values())) else 0
    if options.mode == "full":
        gpus = cluster_gpus(options.cluster) if options.cluster else None
        said["this machine"] = preflight.find_missing(runs_of(found), gpus)
        code = code or 3 * has_error(said["this machine"])
    return said, code


def cluster_gpus(address: str) -> list[preflight.Gpu]:
    """The GPUs of a Ray cluster, of which only number and kind are known here."""
    return [preflight.Gpu("", kind, float("inf"), (99, 0)) for kind in cluster.gpus(address)]


def check_before_full(
    options, found: list[Loaded], whole: list[Loaded], root: Path, said: dict[str, list[Finding]]
) -> int:
    """Before a full run: what `check` finds in notebooks and claims and, at paper scale, in a trial, unless one has
    passed with these very settings and code. 2 where there is an error, which is added to `said`. `whole`: `found` with
    all runs of its studies; `root`: where their results go."""
    findings = [f for f in check_files(found, options.scale, whole) if f.file.endswith((".ipynb", "claims.yaml"))]
    if options.scale == "paper" and not has_error(findings) and not trial_has_passed(found, root):
        print("no trial of these runs has passed yet: trying them before anything long starts", flush=True)
        findings += check_trial(found, options, root)
    said["check"] = findings
    return 2 * has_error(findings)


def runs_of(found: list[Loaded]) -> list[Run]:
    return [run for _, run, _ in found if not isinstance(run, StudyError) and has_notebooks(run)]


def has_error(findings: list[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


# ---- ./run_all.sh check


def command(found: list[Loaded], whole: list[Loaded], options, root: Path, slots: int, extra: list[Finding]) -> int:
    """Print what there is to say; 0 ready, 2 not. `extra`: findings of designs."""
    findings = check_files(found, options.scale, whole) + extra
    if has_error(findings):
        note = "no trial was run: fix these first"
    elif options.static:
        note = "static findings only (--static): no trial was run"
    else:
        note = describe_tried(found)
        findings += check_trial(found, options, root)
    errors = [finding for finding in findings if finding.level == "error"]
    cost = {} if errors else cost_of(runs_of(found), options.scale, slots)
    if options.json:
        first = str(errors[0]).removeprefix("error: ") if errors else ""
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        rows = [{"severity": f.level, "file": f.file, "place": f.key, "what": f.what, "fix": f.fix} for f in findings]
        answer = {"is_code_ready": not errors, "code_issue": first + more, "findings": rows, "cost": cost}
        print(json.dumps(answer, indent=1, ensure_ascii=False))
        return 2 if errors else 0
    for finding in sorted(findings, key=lambda f: (f.level, f.file)):
        print(record.escape_controls(str(finding)))
    print(
        f"{note}\n\n{'NOT ready' if errors else 'ready'}: {len(errors)} errors, {len(findings) - len(errors)} warnings"
    )
    if cost:
        words = {name.replace("_", " "): "?" if value is None else value for name, value in cost.items()}
        print("cost: " + ", ".join(f"{name} {value}" for name, value in words.items()))
    return 2 if errors else 0


def check_files(found: list[Loaded], scale: str, whole: list[Loaded]) -> list[Finding]:
    """What can be seen without running anything: YAMLs, claims and notebooks of the studies in `found`. `whole`: the
    same with all runs of these studies, which the claims are about whichever runs are picked."""
    findings = list(yaml_findings(found))
    for study in dict.fromkeys(run.study for run in runs_of(found)):
        findings += claims_findings(study, [run for run in runs_of(whole) if run.study == study], scale)
        for notebook in notebooks_of(study):
            findings += notebook_findings(notebook)
    return list(dict.fromkeys(findings))


def notebooks_of(study: str) -> list[Path]:
    return [plan.NOTEBOOKS / name for name in (f"{study}/train.ipynb", f"{study}/analysis.ipynb", "sweep.ipynb")]


def cost_of(runs: list[Run], scale: str, slots: int) -> dict:
    """What the full run is predicted to take, in words; `?` where no record tells."""
    predicted = plan.forecast(plan.steps(runs, scale, "full"), slots)
    names = {name for run in runs for name in (run.model.name, run.dataset.name)}
    return {
        "wall_clock": progress.format_forecast(predicted),
        "device_hours": None if predicted.at_least else round(predicted.device_hours, 2),
        "downloads": ", ".join(sorted(filter(config.is_hub_id, names))) or "none",
    }


# ---- a watched trial


def choose_tried(runs: list[Run]) -> dict[str, list[str]]:
    """{the run that is tried: those that it stands for}: one of each method of a study. The others differ in values,
    which the static findings look at."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.study, run.method].append(run.run_id)
    return {run_ids[0]: run_ids for run_ids in groups.values()}


def describe_tried(found: list[Loaded]) -> str:
    groups = choose_tried(runs_of(found)).values()
    return "tried: " + ", ".join(run + f" (for {', '.join(others)})" * bool(others) for run, *others in groups)


def _vouched(found: list[Loaded], root: Path) -> tuple[Path, str]:
    """(where a passing trial is noted, what it vouches for): these runs, this code, these versions."""
    runs = sorted(runs_of(found), key=lambda run: (run.study, run.run_id))
    studies = list(dict.fromkeys(run.study for run in runs))
    modules = [f"lib.{study}.{path.stem}" for study in studies for path in (config.ROOT / "lib" / study).glob("*.py")]
    code = reach.modules(*(f"lib.run.{name}" for name in ENTRY_MODULES), *modules)
    cells = [keys.notebook_code(notebook) for study in studies for notebook in notebooks_of(study)]
    return root / ".check.json", record.digest([[config.dump(run) for run in runs], code, cells, keys.versions()])


def trial_has_passed(found: list[Loaded], root: Path) -> bool:
    place, digest = _vouched(found, root)
    return record.read_json(place, {}).get("passed") == digest


def check_trial(found: list[Loaded], options, root: Path) -> list[Finding]:
    """A watched trial of one run per method; a trial that gave no error is noted in `root` for `trial_has_passed`."""
    chosen = list(choose_tried(runs_of(found)))
    tried = [(path, run) for path, run, _ in found if not isinstance(run, StudyError) and run.run_id in chosen]
    findings = list(dict.fromkeys(trial_findings(tried, options.scale, trial_arguments(options, chosen))))
    if not has_error(findings):
        place, digest = _vouched(found, root)
        record.write_json(place, {"passed": digest})
    return findings


def trial_arguments(options, run_ids: list[str]) -> list[str]:
    """The options that choose the runs, and how many members at a time."""
    chosen = [part for study in options.study or [] for part in ("--study", study)]
    chosen += [part for run_id in run_ids for part in ("--run", run_id)]
    chosen += ["--params", os.path.abspath(options.params)] if options.params else []
    chosen += ["--jobs", str(options.jobs)] if options.jobs else []
    return chosen + [part for text in options.sets for part in ("--set", text)]


def trial_findings(found: list[tuple[Path, Run]], scale: str, arguments: list[str]) -> Iterator[Finding]:
    """Run the trial of these YAMLs in a place of its own, from nothing (so that preparation is watched too), and judge
    what its processes did."""
    with tempfile.TemporaryDirectory(prefix="study-check-") as place:
        outputs, folder = Path(place, "outputs"), Path(place, "watch")
        folder.mkdir()
        Path(place, "tmp").mkdir()
        caches = [os.path.abspath(os.environ[name]) for name in CACHES if os.environ.get(name)]
        caches += [str(Path.home() / name) for name in HOME_CACHES]
        places = {"STUDY_OUTPUTS": str(outputs), "STUDY_CACHE": f"{place}/cache", "TMPDIR": f"{place}/tmp"}
        environ = {**os.environ, **places, **watch.environment(folder, [place, "/dev", "/proc", sys.prefix, *caches])}
        command = [sys.executable, "-P", "-m", "lib", "trial", "--scale", scale, *arguments]
        done = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True, env=environ)
        evidence = watch.evidence(folder)
        results = next(outputs.glob(f"{scale}-trial*"), outputs)  # named after what --set and --params changed
        failed = list(_failures(results, done))
        yield from failed
        if any(finding.file == NEVER_BEGAN for finding in failed):  # all else would follow from it
            return
        succeeded = [(path, run) for path, run in found if _succeeded(results, run)]
        for study in dict.fromkeys(run.study for _, run in found):
            yield from _unread_keys(study, [(path, run) for path, run in succeeded if run.study == study], evidence)
            yield from _unlogged_metrics(study, results, scale)
            yield from _empty_columns(study, results)
        yield from _long_phases(evidence, [] if failed else found)
        yield from _strays(evidence, scale)


def _failures(results: Path, done: subprocess.CompletedProcess) -> Iterator[Finding]:
    """Notebooks of the trial that did not succeed, each with the exception that stopped it."""
    paths = [*results.glob("*/*/status.json"), *results.glob("*/*/sweep/status.json")]
    states = [record.read_json(path, {}) for path in sorted(paths)]
    failed = [state for state in states if state.get("status") != "succeeded"]
    for state in failed:
        error, file = state.get("error") or {}, f"notebooks of {state.get('study')}/{state.get('run_id')}"
        cell = f"cell {error['cell']}" if error.get("cell") else ""
        what = f"the trial failed: {error.get('exception', state.get('status'))}"
        yield Finding("error", cell, what, str(error.get("again", "")), file)
    if done.returncode and not failed:
        output = record.redact((done.stderr or done.stdout)[-800:]).strip()
        yield Finding("error", "", f"ended with {done.returncode}: {output}", "./run_all.sh trial", NEVER_BEGAN)


def _succeeded(results: Path, run: Run) -> bool:
    """What a run that failed did not come to read is no fault of its YAML."""
    return record.read_json(results / run.study / run.run_id / "status.json", {}).get("status") == "succeeded"


def _unread_keys(study: str, found: list[tuple[Path, Run]], evidence: list[dict]) -> Iterator[Finding]:
    """Keys with a value that no process asked for, in any run of the study. Not of the sections that lib/config.py
    itself defines: the runner, the search and W&B read those, much of it where a trial does not lead."""
    module, runs = config.study_module(study), {run.run_id for _, run in found}
    read = {row["key"] for row in evidence if row["kind"] == "read" and row["run_id"] in runs}
    known = config.keys(module.Run)
    for key in known:
        parents = {key[:i] for i, letter in enumerate(key) if letter == "."}
        is_section = any(other.startswith(f"{key}.") for other in known)
        if key.split(".")[0] not in config.TUNABLE or not parents or is_section:
            continue
        holders = [path for path, run in found if config.get(config.dump(run), key) is not None]
        if holders and key not in read and not {key, *parents} & set(module.UNREAD):
            fix = f"read it where it belongs, or take it out of the sections in lib/{study} and the YAMLs"
            what = "no code reads it: whatever it says, the run is the same"
            yield Finding("error", key, what, fix, display_path(holders[0]))


def _long_phases(evidence: list[dict], found: list) -> Iterator[Finding]:
    most: dict[str, int] = {}
    for row in evidence:
        if row["kind"] == "batch":
            most[row["phase"]] = max(row["number"], most.get(row["phase"], 0))
    if found and not most:
        fix = "take them through record.batches(phase, items)"
        yield Finding("error", "", "no phase counts its batches", fix, "lib")
    for phase, number in sorted(most.items()):
        if number > MOST_BATCHES:
            what, fix = (
                f"{number} batches in a trial, at most {MOST_BATCHES} are allowed",
                "shrink what sets its length",
            )
            yield Finding("error", phase, what, fix, "trial_changes in lib/<study>")


def _strays(evidence: list[dict], scale: str) -> Iterator[Finding]:
    """Files written outside results_dir (and caches), and, at laptop scale, addresses asked."""
    for path in sorted({row["path"] for row in evidence if row["kind"] == "write"}):
        what = "was written by a trial, outside its results_dir"
        yield Finding("error", "", what, "write below run.results_dir", display_path(path))
    for address in sorted({row["address"] for row in evidence if row["kind"] == "connect"}):
        if scale == "laptop" and not address.startswith(("127.", "::1", "localhost")):
            what = "a connection was opened at laptop scale, which touches no network"
            yield Finding("error", address, what, "make or ship what it wanted", "the trial")


def _unlogged_metrics(study: str, results: Path, scale: str) -> Iterator[Finding]:
    """Metrics that the search, the analysis and the claims read by name, and that no member logged under that name.
    What is primary at another scale only is not asked of this one."""
    logged = {name for path in results.glob(f"{study}/*/members/*/metrics.json") for name in record.read_json(path, {})}
    module = config.study_module(study)
    elsewhere = {name for name in module.PRIMARY_METRIC.values() if name != module.PRIMARY_METRIC[scale]}
    for name in (*module.METRICS, module.VALIDATION_METRIC, module.SECOND_METRIC) if logged else ():
        if name not in logged | elsewhere | set(module.UNREAD):
            fix = did_you_mean(name, sorted(logged), "return it from train()")
            yield Finding("error", name, "is read by this name and logged by none of the members", fix, f"lib/{study}")


def _empty_columns(study: str, results: Path) -> Iterator[Finding]:
    """Columns of predictions.jsonl that are null or empty in every row: an answer key lost on the way."""
    rows = [row for path in results.glob(f"{study}/*/members/*/predictions.jsonl") for row in record.read_jsonl(path)]
    for kind in {row.get("kind") for row in rows}:
        mine = [row for row in rows if row.get("kind") == kind]
        for name in sorted(set().union(*mine)):
            lost = all(row.get(name) in (None, "", []) for row in mine)
            if lost and f"predictions.{name}" not in config.study_module(study).UNREAD:
                what = f"empty in all {len(mine)} rows ({kind})"
                fix = "carry it through the preprocessing: without it nothing can be scored"
                yield Finding("error", f"predictions.jsonl: {name}", what, fix, f"lib/{study}")
