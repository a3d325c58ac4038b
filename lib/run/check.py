"""May these runs start? Findings from a few sources: run YAMLs, claims, notebooks, this machine, a watched trial.

Nothing runs before the trial does, which is of one run per method and watched from inside (lib/run/watch.py). An error
among the findings keeps all of a command's runs from starting.
"""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from lib import config, hub, record
from lib.config import Finding, Run, did_you_mean
from lib.errors import StudyError
from lib.run import cluster, keys, members, plan, preflight, watch
from lib.run.preflight import error, refused, warning

NOT_RUNS = {"claims.yaml", "design.yaml", "judge.yaml", "wandb.yaml"}
Loaded = tuple[Path, Run | StudyError, list[Finding]]
MACHINE, WHOLE_TRIAL = "this machine", "the trial"  # what a finding is about, where it is no file
MOST_BATCHES = 2  # of a phase in a trial
# Variables that may name a place of downloads and settings.
CACHES = re.compile("(?<!STUDY_)CACHE|CONFIG|IPYTHONDIR|^HF_|^TORCH_HOME")


def has_error(findings: list[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def display_path(path: str | Path) -> str:
    """A path as a person types it here: relative to the repository where it lies in it."""
    path = Path(path)
    return path.relative_to(config.ROOT).as_posix() if path.is_relative_to(config.ROOT) else str(path)


def print_findings(findings: list[Finding], out=None) -> None:
    """A line each, errors first."""
    for finding in sorted(findings, key=lambda f: (f.level, f.file)):
        print(record.escape_controls(str(finding)), file=out)


# ---- run YAMLs


def load_folder(folder: str | Path, scale: str, mode: str, overrides: Mapping[str, str] | None = None) -> list[Loaded]:
    """Every run YAML under a folder (params/<study>/<scale>/ or flat) with its findings: checked in its full form, and
    whether it has a trial form. Of one that is refused, the StudyError in the run's place is its only finding."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise StudyError(str(folder), "no such folder", "a folder of run YAMLs", "correct --params")
    other, loaded, owner = {*config.SCALES} - {scale}, [], {}
    for path in sorted(folder.rglob("*.y*ml")):
        if path.name in NOT_RUNS or other & set(path.relative_to(folder).parts[:-1]):
            continue
        file = display_path(path)
        try:
            run = config.load_run(path, scale=scale, mode="full", overrides=overrides)
            found = [finding._replace(file=file) for finding in findings(run)]
            loaded.append((path, config.trial(run) if mode == "trial" and not has_error(found) else run, found))
            if (first := owner.setdefault((run.study, run.run_id), file)) != file:
                found.append(error("run_id", f"{run.run_id} is also the run_id of {first}", "rename one of them", file))
        except StudyError as fault:
            loaded.append((path, fault, [finding_from(fault, file)]))
    return loaded


def findings(run: Run) -> list[Finding]:
    """Of one run: what holds for every study, then what its own study says of its first member."""
    found = [*_search(run), *_grid(run), *_files(run)]
    try:
        typical = config.apply(run, config.first_cell(run))
    except StudyError:  # what is wrong with the cell is among the findings already
        return found
    return found if typical.searched else [*found, *_unread(typical), *config.study_module(run.study).check(typical)]


def _unread(run: Run) -> Iterator[Finding]:
    """Settings of --set that would change nothing in this run, and those for real data that its YAML names by itself."""
    values, model, name = config.dump(run), getattr(run.model, "name", "made"), getattr(run.dataset, "name", "made")
    if getattr(run.dataset, "real", None) and name not in hub.MADE and "dataset.name" not in run.overrides:
        fix = "--set dataset.name=..., or its values in their sections"
        yield warning("dataset.real", f"not read: the YAML itself names {name}", fix)
    unread = config.study_module(run.study).unread(run)
    unread |= {} if model == "made" else {"model.recipe": f"the model is {model}"}
    for key in (config.resolve(run.study, name) for name in run.overrides):
        why = next((unread[part] for part in unread if f"{key}.".startswith(f"{part}.")), None)
        if why and config.get(values, key) is not None:
            yield error(key, f"--set of it changes nothing here: {why}", "leave it out, or --run the runs that read it")


def _search(run: Run) -> Iterator[Finding]:
    """The metric exists and the search goes its way; every name is a key of the YAML and every end of its range is a value
    that the key takes."""
    metrics, name, search = config.study_module(run.study).METRICS, run.optuna.objective_metric, run.optuna
    if name not in metrics:
        yield error("optuna.objective_metric", f"{name} is no metric", did_you_mean(name, metrics, ", ".join(metrics)))
    elif search.direction != metrics[name]:
        yield error("optuna.direction", f"would {search.direction} {name}", f"direction: {metrics[name]}")
    if search.n_trials and not search.search_space:
        yield error("optuna.search_space", f"empty, with {search.n_trials} trials", "n_trials: 0, or keys to search")
    for name, entry in search.search_space.items():
        key = f"optuna.search_space.{name}"
        try:
            dotted = config.resolve(run.study, name)
            if dotted.split(".")[0] not in config.TUNABLE:
                raise StudyError(key, f"{dotted} is not a key to search", f"a key of {', '.join(config.TUNABLE)}")
            for value in entry.choices or (entry.low, entry.high):
                config.apply(run, {dotted: int(value) if entry.type == "int" else value}, where=f"{key}:")
        except StudyError as fault:
            yield refused(fault, key)


def _grid(run: Run) -> Iterator[Finding]:
    """The cells are valid, supply what the search leaves open, and can be enqueued in the search."""
    try:
        members = config.members(run)
    except StudyError as fault:
        yield refused(fault, f"grid: {fault.where}")
        return
    if run.has_tuned:
        if not run.optuna.n_trials:
            yield error("grid: tuned", "no search finds it", "optuna.n_trials, or a grid without it")
        if not run.pilot_seeds:
            yield error("pilot_seeds", "missing", "pilot_seeds: [40], with which the search's trials are trained")
    for name, entry in run.optuna.search_space.items() if run.optuna.n_trials else ():
        dotted = config.study_module(run.study).ALIASES.get(name, name)
        values = sorted({member.cell[dotted] for member in members if dotted in member.cell}, key=str)
        if beyond := [v for v in values if not (v in entry.choices if entry.choices else entry.low <= v <= entry.high)]:
            yield warning(f"optuna.search_space.{name}", f"does not hold the grid's {beyond}", "widen the space")


def _files(run: Run) -> Iterator[Finding]:
    """Local files that the run names are there."""
    module = config.study_module(run.study)
    paths = {key: config.get(config.dump(run), key) for key in module.PATHS}
    for key, path in {key: Path(path) for key, path in paths.items() if config.is_local(path)}.items():
        if not path.exists():
            fix = module.MADE_BY.get(key, f"--set {key}=<path>, or a hub id")
            yield error(key, f"{path} does not exist{', or is a link to itself' * path.is_symlink()}", fix)


def finding_from(fault: StudyError, file: str) -> Finding:
    """A file that was refused, as a finding."""
    return refused(fault, fault.where.removeprefix(f"{config.ROOT}/").removeprefix(file).lstrip(": "), file)


def runs_of(loaded: list[Loaded]) -> list[Run]:
    return [run for _, run, _ in loaded if isinstance(run, Run)]


# ---- claims


def claims_findings(study: str, runs: list[Run], scale: str, path: Path | None = None) -> Iterator[Finding]:
    """The study's claims (in `path`, or as shipped): they load, their metrics exist and, where `runs` are the study's
    own as they lie beside it, at this scale their cells are trained. Of somebody's own runs, or with --set, claims may
    stay open: that is a warning, and their analysis says so too."""
    import pandas as pd

    from lib import claims, power

    path, module = path or plan.claims_of(study, runs[0].results_dir), config.study_module(study)
    file = display_path(path)
    try:
        published = claims.load(path)
    except StudyError as fault:
        yield finding_from(fault, file)
        return
    asked = [claim for claim in published.claims if scale in claim.scales and not claim.not_evaluated]
    used = [(f"{claim.id}.metric", claim.metric, module.CLAIM_METRICS) for claim in asked]
    used.append(("chance.metric", published.chance and published.chance.metric, module.CLAIM_METRICS))
    for place, metric, known in [*used, ("choose_on", published.choose_on, module.METRICS)]:
        if metric and metric not in known:
            yield error(place, f"{metric} is in no table of {study}'s analysis", "one of: " + ", ".join(known), file)
    for claim in asked:
        if why := power.undecidable(published, claim, scale):
            told = warning if scale == "paper" else error  # published claims stay as they are
            fix = "a claim that seeds up to the last look can decide, or other `noise` (assumed in this file)"
            yield told(claim.id, why, fix, file)
    members = pd.DataFrame([row for run in runs for row in member_rows(run)])
    if members.empty:
        return
    twice = members[members.duplicated(["method", "cell", "seed"])]
    if len(twice) and "run_id" not in published.keys:
        method, cell = twice.iloc[0][["method", "cell"]]
        what = f"several runs train {method} {cell}: no claim about it can be evaluated"
        yield warning("keys", what, "run_id among `keys`, and in the claim's cell", file)
    is_own = all(run.source and run.source.is_relative_to(path.parent) and not run.overrides for run in runs)
    level, fix = error if is_own else warning, f"a run of it in params/{study}/{scale}/, or scales: without {scale}"
    trials = {run.run_id: run.optuna.n_trials for run in runs}
    for claim in asked:
        cells = [(side, cell) for side in claims.SIDES for cell in published.levels(claim, side)]
        found = [(side, cell, claims.select_any(members, claim, cell)) for side, cell in cells]
        tuned = {i: trials[i] for _, cell, rows in found if claims.TUNED in cell.values() for i in rows["run_id"]}
        if len({*tuned.values()}) > 1:
            what = "tuned with unequal trials: " + ", ".join(f"{name} {number}" for name, number in tuned.items())
            yield error(claim.id, what, "the same optuna.n_trials for all that it compares", file)
        picked = [(cell, rows[rows["pilot"]]) for _, cell, rows in found if claims.BEST in cell.values()]
        piloted = {published.label(cell): pilots["cell"].nunique() for cell, pilots in picked}
        if len({*piloted.values()}) > 1:
            what = "`best` of unequal grids: " + ", ".join(f"{name} {number} cells" for name, number in piloted.items())
            yield level(claim.id, what, "as many pilot cells for all that it compares", file)
        for side, cell in ((side, cell) for side, cell, rows in found if rows.empty):
            yield level(f"{claim.id}.{side}", f"no run at {scale} scale trains {published.label(cell)}", fix, file)


def member_rows(run: Run) -> Iterator[dict]:
    """A run's members as the tables of an analysis name them: the cell's keys by their own names and the short ones."""
    aliases = config.study_module(run.study).ALIASES.items()
    with contextlib.suppress(StudyError):  # a wrong grid is a finding of its YAML
        for member in config.members(config.tune(run)):
            spec = {"run_id": run.run_id, "config": config.dump(member.run), "study": run.study}
            spec |= {"cell": member.cell, "cell_name": member.cell_name, "seed": member.seed}
            short = {alias: member.cell[dotted] for alias, dotted in aliases if dotted in member.cell}
            yield short | record.identity(spec)


# ---- notebooks


def notebook_findings(path: Path) -> Iterator[Finding]:
    """A notebook is source, not record: it parses, holds no outputs, and has one cell for papermill's parameters."""
    import nbformat

    file = display_path(path)
    stripped = f".venv/bin/nbstripout --keep-id {file}"
    try:
        cells = nbformat.read(path, as_version=4).cells
    except Exception as fault:  # whatever nbformat makes of a file that is no notebook
        yield error("", f"not a notebook: {fault}", f"git checkout -- {file}", file)
        return
    for place, cell in ((f"cell {n}", cell) for n, cell in enumerate(cells, 1) if cell.cell_type == "code"):
        if cell.outputs or cell.execution_count is not None:
            yield error(place, "holds outputs, which its executed copy is for", stripped, file)
        try:
            ast.parse(cell.source)
        except SyntaxError as fault:
            yield error(place, f"does not parse: {fault.msg} (line {fault.lineno})", "correct the cell", file)
    if (tagged := sum("parameters" in cell.metadata.get("tags", ()) for cell in cells)) != 1:
        yield error("", f"{tagged} cells tagged `parameters`, expected one", "tag the parameters' cell", file)


# ---- all of it


def dry_fault(run: Run) -> str:
    """What is wrong with the tensors that a study's dry call returns, each to be (4,) and finite; "" where nothing is."""
    import torch

    try:
        for value in config.study_module(run.study).dry_call(run):
            if not torch.is_tensor(value) or value.shape != (4,):
                shape = f"of shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
                return f"returns a value {shape}, not a tensor of shape (4,), a number for each of four"
            if not torch.isfinite(value).all():
                return f"returns {value.tolist()}, or has a gradient of it"
    except Exception as fault:  # whatever code of somebody's own may raise
        return f"raises {type(fault).__name__}: {fault}"
    return ""


def dry_findings(runs: list[Run]) -> Iterator[Finding]:
    """What a call on four small tensors shows of the loss, penalty or scheduler that runs name, once for each."""
    called = set()
    for run in (config.apply(run, config.first_cell(run)) for run in runs):
        module = config.study_module(run.study)
        for key in module.BY_NAME.values():
            name = config.get(config.dump(run), key)
            if (run.study, name) not in called and (fault := dry_fault(run)):
                fix = "CONTRIBUTING.md says what it takes and returns"
                yield error(key, f"{name} {fault}", fix, f"lib/{run.study}")
            called.add((run.study, name))


def unread_keys(study: str) -> Iterator[Finding]:
    """Keys of the study's own sections whose name stands nowhere in code that could read it. Not of the sections that
    lib/config.py defines: the runner, the search and W&B read those."""
    module, lib = config.study_module(study), config.ROOT / "lib"
    files = [*(lib / study).glob("*.py"), *lib.glob("*.py")]
    nodes = [(path.stem, node) for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = {node.attr for _, node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.value for stem, node in nodes if isinstance(node, ast.Constant) and stem != "study"}
    sections = {key.rpartition(".")[0] for key in config.keys(module.Run)}
    for key in config.keys(module.Run):
        section, _, name = key.rpartition(".")
        is_leaf = section.split(".")[0] in config.TUNABLE and key not in sections
        if is_leaf and name not in names and key not in module.UNREAD:
            yield error(key, "no code reads it", "read it, or take it out of sections and YAMLs", f"lib/{study}")


def find_obstacles(options, found: list[Loaded], whole: list[Loaded], root: Path) -> list[Finding]:
    """What keeps `options.command` from starting, as far as it depends on it. `whole`: `found` with all runs of its
    studies, which the claims are about; `root`: where the results go.

    Before a full run this machine is asked too and, at paper scale, a trial tells, unless one has passed with these
    very settings and code.
    """
    findings, is_check, runs = [f for _, _, own in found for f in own], options.command == "check", runs_of(found)
    if options.mode == "full" and not is_check:
        missing = preflight.find_missing(runs, gpus_of(options.cluster), options.jobs)
        findings += [finding._replace(file=MACHINE) for finding in missing]
    if is_check or options.mode == "full" and options.command != "plan":
        for study in dict.fromkeys(run.study for run in runs):
            findings += claims_findings(study, [run for run in runs_of(whole) if run.study == study], options.scale)
            for notebook in plan.notebooks(study, root / study).values():
                findings += notebook_findings(notebook)
            pages = [plan.NOTEBOOKS / study / name for name in ("README.md", "METHOD.md") if is_check]
            lacks = [display_path(page) for page in pages if not page.exists()]
            findings += [warning("", "is missing, and linked", "write it", page) for page in lacks]
            findings += unread_keys(study)
        findings += dry_findings(runs) if is_check and not has_error(findings) else ()
        if options.mode == "full" and not has_error(findings):
            findings += audit_findings(runs)
        passed = record.read_json(root / ".check.json", {}).get("passed")
        needs_trial = not options.static if is_check else options.scale == "paper" and passed != trial_digest(found)
        if needs_trial and not has_error(findings):
            findings += check_trial(found, options, root)
    return list(dict.fromkeys(findings))


def audit_findings(runs: list[Run]) -> Iterator[Finding]:
    """What is wrong with given data that is on this machine, read as a whole; what it holds is printed."""
    printed = set()
    for run in runs:
        name, key = run.dataset.name, "dataset.name"
        is_cached = hub.is_hub_id(name) and hub.is_cached(name, "dataset", run.dataset.revision)
        if not (config.is_local(name) or is_cached):
            continue
        try:
            found = members.audit(run)
        except StudyError as fault:
            yield error(key, f"{fault.where}: {fault.found}; expected {fault.expected}", fault.fix, run.study)
            continue
        if (lines := "\n  ".join(found["summary"])) not in printed:
            print(f"data of {run.study}: {lines}", file=sys.stderr, flush=True)
        printed.add(lines)
        yield from (warning(key, text, file=run.study) for text in found["warnings"])


def gpus_of(address: str | None) -> list[preflight.Gpu]:
    """This machine's GPUs; those of a Ray cluster at an address, of which only number and kind are known here."""
    if address is None:
        return preflight.visible_gpus()
    return [preflight.Gpu("", kind, float("inf"), (99, 0)) for kind in cluster.gpus(address)]


def exit_code(findings: list[Finding]) -> int:
    """0 without an error, 3 where only this machine lacks something, else 2."""
    files = {finding.file for finding in findings if finding.level == "error"}
    return 0 if not files else 3 if files == {MACHINE} else 2


def report(findings: list[Finding], options) -> None:
    """What `check` prints: the findings, and whether the runs may start."""
    errors = [str(finding).removeprefix("error: ") for finding in findings if finding.level == "error"]
    if options.json:
        rows = [{"severity": f.level, "file": f.file, "place": f.key, "what": f.what, "fix": f.fix} for f in findings]
        answer = {"is_code_ready": not errors, "code_issue": errors[0] if errors else "", "findings": rows}
        print(json.dumps(answer, indent=1, ensure_ascii=False))
        return
    print_findings(findings)
    state = f"{'NOT ready' if errors else 'ready'}: {len(errors)} errors, {len(findings) - len(errors)} warnings"
    print(f"\n{state}{'; no trial was run (--static)' * bool(options.static)}")


# ---- a watched trial


def choose_tried(runs: list[Run]) -> dict[str, list[str]]:
    """{the run that is tried: the others that it stands for}: one of each method of a study. The others differ in
    values, which the static findings look at."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.study, run.method].append(run.run_id)
    return {first: others for first, *others in groups.values()}


def trial_digest(found: list[Loaded]) -> str:
    """What a passing trial vouches for: these runs, the code, these versions."""
    runs = sorted(runs_of(found), key=lambda run: (run.study, run.run_id))
    code = [path.read_text() for path in sorted((config.ROOT / "lib").rglob("*.py"))]
    studies = sorted({run.study for run in runs})
    cells = [keys.notebook_code(path) for study in studies for path in plan.notebooks(study).values()]
    return record.digest([[config.dump(run) for run in runs], code, cells, keys.versions()])


def check_trial(found: list[Loaded], options, root: Path) -> list[Finding]:
    """A watched trial of one run per method; that it gave no error is noted in `root`, for `find_obstacles`."""
    chosen = choose_tried(runs_of(found))
    names = [name + f" (for {', '.join(others)})" * bool(others) for name, others in chosen.items()]
    print(f"trying before anything long starts: {', '.join(names)}", file=sys.stderr, flush=True)
    tried = [run for run in runs_of(found) if run.run_id in chosen]
    findings = list(trial_findings(tried, options.scale, trial_arguments(options, list(chosen))))
    if not has_error(findings):
        record.write_json(root / ".check.json", {"passed": trial_digest(found)})
    return findings


def trial_arguments(options, run_ids: list[str]) -> list[str]:
    """The options that choose the runs, and how many members at a time."""
    chosen = [("--study", study) for study in options.study or []] + [("--run", run_id) for run_id in run_ids]
    chosen += [("--params", os.path.abspath(options.params))] if options.params else []
    chosen += [("--jobs", str(options.jobs))] if options.jobs else []
    return [word for pair in (*chosen, *(("--set", text) for text in options.sets)) for word in pair]


def trial_findings(runs: list[Run], scale: str, arguments: list[str]) -> Iterator[Finding]:
    """Run the trial of these runs in a place of its own, from nothing (so that preparation is watched too), and judge
    what its processes did."""
    with tempfile.TemporaryDirectory(prefix="study-check-") as place:
        outputs, folder = Path(place, "outputs"), Path(place, "watch")
        for each in (folder, Path(place, "tmp"), Path(place, "cache")):
            each.mkdir()
        Path(place, "cache", "models").symlink_to(hub.cache_folder() / "models")  # that were fetched
        caches = [os.path.abspath(path) for name, path in os.environ.items() if CACHES.search(name) and path]
        caches.append(f"{Path.home()}/.")  # .cache, .config, .triton and their like
        places = {"STUDY_OUTPUTS": str(outputs), "STUDY_CACHE": f"{place}/cache", "TMPDIR": f"{place}/tmp"}
        environ = {**os.environ, **places, **watch.environment(folder, [place, "/dev", "/proc", sys.prefix, *caches])}
        command = [sys.executable, "-P", "-m", "lib", "trial", "--scale", scale, *arguments]
        done = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True, env=environ)
        results = next(outputs.glob(f"{scale}-trial*"), outputs)  # named after what --set and --params changed
        failed = list(_failures(results, done))
        yield from failed
        if any(finding.file == WHOLE_TRIAL for finding in failed):  # all else would follow from it
            return
        seen = watch.evidence(folder)
        for study in dict.fromkeys(run.study for run in runs):
            yield from _unlogged_metrics(study, results)
            yield from _empty_columns(study, results)
        if runs and not failed and not seen["batch"]:
            yield error("", "no phase counts its batches", "take them through record.batches(phase, items)", "lib")
        for phase, number in seen["batch"]:
            if number == MOST_BATCHES + 1:
                what = f"more than {MOST_BATCHES} batches in a trial"
                yield error(phase, what, "shrink what sets its length", "trial_changes in lib/<study>")
        for (path,) in seen["write"]:
            yield error("", "was written by a trial, outside its results_dir", "write below it", display_path(path))
        for (address,) in seen["connect"] if scale == "laptop" else ():
            if not address.startswith(("127.", "::1", "localhost")):
                yield error(address, "a connection, and laptop scale touches no network", "ship the file", WHOLE_TRIAL)


def _failures(results: Path, done: subprocess.CompletedProcess) -> Iterator[Finding]:
    """Notebooks of the trial that did not succeed, each with the exception that stopped it."""
    paths = [*results.glob("*/*/status.json"), *results.glob("*/*/sweep/status.json")]
    states = [record.read_json(path, {}) for path in sorted(paths)]
    failed = [state for state in states if state.get("status") != "succeeded"]
    for state in failed:
        fault, file = state.get("error") or {}, f"notebooks of {state.get('study')}/{state.get('run_id')}"
        what = f"the trial failed: {fault.get('exception', state.get('status'))}"
        yield error(f"cell {fault['cell']}" if fault.get("cell") else "", what, str(fault.get("again", "")), file)
    if done.returncode and not failed:
        output = record.redact((done.stderr or done.stdout)[-800:]).strip()
        yield error("", f"ended with {done.returncode}: {output}", "./run_all.sh trial", WHOLE_TRIAL)


def _unlogged_metrics(study: str, results: Path) -> Iterator[Finding]:
    """Metrics that the search, the analysis and the claims read by name, and that no member logged under that name."""
    logged = {name for path in results.glob(f"{study}/*/members/*/metrics.json") for name in record.read_json(path, {})}
    module = config.study_module(study)
    for name in module.METRICS if logged else ():
        if name not in logged | set(module.UNREAD):
            fix = did_you_mean(name, sorted(logged), "return it from train()")
            yield error(name, "is read by this name and logged by none of the members", fix, f"lib/{study}")


def _empty_columns(study: str, results: Path) -> Iterator[Finding]:
    """Columns of predictions.jsonl that are null or empty in every row of a kind: an answer key lost on the way."""
    rows = [row for path in results.glob(f"{study}/*/members/*/predictions.jsonl") for row in record.read_jsonl(path)]
    cells = [((str(row.get("kind")), name), value) for row in rows for name, value in row.items()]
    filled = {column for column, value in cells if value not in (None, "", [])}
    for kind, name in sorted({column for column, _ in cells} - filled):
        if f"predictions.{name}" not in config.study_module(study).UNREAD:
            what, fix = f"empty in all rows ({kind})", "carry it through the preprocessing"
            yield error(f"predictions.jsonl: {name}", what, fix, f"lib/{study}")
