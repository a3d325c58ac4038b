"""May these runs start? What their files show, what this machine lacks, what a watched trial does; `./run_all.sh check`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib import config, record
from lib.config import Finding, Run, did_you_mean
from lib.errors import StudyError
from lib.run import check, keys, plan, preflight, progress, reach, watch
from lib.run.check import Loaded, display_path

MOST_BATCHES = 2  # of a phase in a trial
NEVER_BEGAN = "the trial"  # where a finding is about all of it: no notebook of it has failed by itself
ENTRY_MODULES = ("cli", "runner", "sweep", "work", "pool", "kernels")  # of lib.run: what a trial executes
HOME_CACHES = (".cache", ".config", ".ipython", ".jupyter", ".local", ".nv", ".triton")
CACHES = (  # variables that name a place of this kind; the first two are our own `.cache` where nobody named another
    "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME", "MPLCONFIGDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "NUMBA_CACHE_DIR",
)  # fmt: skip


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
        machine = preflight.cluster_machine(options.cluster) if options.cluster else preflight.Machine()
        said["this machine"] = preflight.find_missing(runs_of(found), machine)
        code = code or 3 * has_error(said["this machine"])
    return said, code


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
    print(note, end="\n\n" if note else "\n")
    print(f"{'NOT ready' if errors else 'ready'}: {len(errors)} errors, {len(findings) - len(errors)} warnings")
    if cost:
        words = {name.replace("_", " "): "?" if value is None else value for name, value in cost.items()}
        print("cost: " + ", ".join(f"{name} {value}" for name, value in words.items()))
    return 2 if errors else 0


def check_files(found: list[Loaded], scale: str, whole: list[Loaded]) -> list[Finding]:
    """What can be seen without running anything: YAMLs, claims and notebooks of the studies in `found`. `whole`: the
    same with all runs of these studies, which the claims are about whichever runs are picked."""
    findings = list(check.yaml_findings(found))
    for study in dict.fromkeys(run.study for run in runs_of(found)):
        findings += check.claims_findings(study, [run for run in runs_of(whole) if run.study == study], scale)
        for notebook in notebooks_of(study):
            findings += check.notebook_findings(notebook)
    return list(dict.fromkeys(findings))


def notebooks_of(study: str) -> list[Path]:
    return [plan.NOTEBOOKS / name for name in (f"{study}/train.ipynb", f"{study}/analysis.ipynb", "sweep.ipynb")]


def cost_of(runs: list[Run], scale: str, slots: int) -> dict:
    """What the full run is predicted to take, in words; `?` where no record tells."""
    predicted = plan.forecast(plan.steps(runs, scale, "full"), slots)
    judged = [run for run in runs if getattr(run.evaluation, "judge", None) == "mt_bench"]
    names = {name for run in runs for name in (run.model.name, run.dataset.name)}
    return {
        "wall_clock": progress.predicted(predicted),
        "device_hours": None if predicted.at_least else round(predicted.device_hours, 2),
        "downloads": ", ".join(sorted(filter(config.is_hub_id, names))) or "none",
        "judge_calls": sum(2 * run.evaluation.questions * len(config.members(run)) for run in judged),
    }


# ---- a watched trial


def choose_tried(runs: list[Run]) -> dict[str, list[str]]:
    """{the run that is tried: those that it stands for}: one of each method of a study. The others differ in values,
    which the static findings look at."""
    first, groups = {}, {}
    for run in runs:
        tried = first.setdefault((run.study, run.method), run.run_id)
        groups.setdefault(tried, []).append(run.run_id)
    return groups


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
