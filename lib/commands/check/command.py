"""`./run_all.sh check`: may this study spend GPU hours? Static findings, then a watched trial, then what it will
cost."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lib import config, record
from lib.commands.check import designs, notebooks, sources, trial, yamls
from lib.commands.check.finding import Finding
from lib.errors import StudyError
from lib.run import forecast, keys, plan, progress, show

Found = list[tuple[Path, "config.Run | StudyError", list]]


def reached(studies: list[str]) -> list[str]:
    """The modules of `lib` that a run of these studies reaches: the runner's, the studies', their notebooks'."""
    started = (
        "run.work",
        "run.forkserver",
        "run.kernels",
        "run.wandb_sync",
    )  # by name, not by an import
    modules = keys.closure("lib.run.cli", "lib.run.runner", "lib.run.sweep", *(f"lib.{name}" for name in started))
    for study in studies:
        modules |= keys.closure(*(f"lib.{study}.{part}" for part in ("study", "config", "inputs", "member", "judge")))
        for notebook in notebooks_of(study):
            cells, wrong = notebooks.read(notebook)
            text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
            modules |= keys.imported_by(text) if not wrong else {}
    return sorted(modules)


def notebooks_of(study: str) -> list[Path]:
    return [
        plan.NOTEBOOKS / study / "train.ipynb",
        plan.NOTEBOOKS / study / "analysis.ipynb",
        plan.NOTEBOOKS / "sweep.ipynb",
    ]


def static(found: Found, scale: str, whole: Found) -> list[Finding]:
    """What can be seen without running anything: YAMLs, claims, notebooks and code of the studies in `found`. `whole`:
    the same with all runs of these studies, which the claims are about whichever runs are picked."""
    told = [*yamls.findings(found), *designs.findings(found)]
    runs = [run for _, run, _ in whole if not isinstance(run, StudyError)]
    studies = list(dict.fromkeys(run.study for _, run, _ in found if not isinstance(run, StudyError)))
    try:
        files = sources.module_files(reached(studies))
    except SyntaxError as error:  # of one of them: its imports cannot be followed, so all are read
        files = {
            p.relative_to(config.ROOT).with_suffix("").as_posix().replace("/", "."): p
            for p in (config.ROOT / "lib").rglob("*.py")
        }
        del error
    types = {study: config.study_module(study).Run for study in studies}
    code, known = sources.findings(files, types)
    told += code
    for study in studies:
        told += yamls.claims(study, [run for run in runs if run.study == study], scale)
    for notebook in dict.fromkeys(n for study in studies for n in notebooks_of(study)):
        told += notebooks.findings(notebook, known, types.get(notebook.parent.name))
    return list(dict.fromkeys(told))


def vouched(found: Found, root: Path) -> tuple[Path, str]:
    """(where a passing trial is noted, what it vouches for): these runs, this code, these versions."""
    runs = sorted((r for _, r, _ in found if not isinstance(r, StudyError)), key=lambda run: (run.study, run.run_id))
    code = keys.closure(*reached(list(dict.fromkeys(r.study for r in runs))))
    cells = [keys.notebook_code(n) for study in dict.fromkeys(r.study for r in runs) for n in notebooks_of(study)]
    return root / ".check.json", keys.digest([[config.dump(r) for r in runs], code, cells, keys.versions()])


def dynamic(found: Found, scale: str, arguments: list[str], root: Path) -> list[Finding]:
    """A watched trial of these runs; a trial that gave no error is noted in `root` for `passed`."""
    runs = [(path, run) for path, run, _ in found if not isinstance(run, StudyError)]
    told = list(dict.fromkeys(trial.findings(runs, scale, arguments)))
    if not any(f.severity == "error" for f in told):
        place, digest = vouched(found, root)
        record.write_json(place, {"passed": digest})
    return told


def passed(found: Found, root: Path) -> bool:
    place, digest = vouched(found, root)
    return (record.read_json(place) or {}).get("passed") == digest


def verdict(findings: list[Finding]) -> dict:
    """The one JSON object of `check --json`."""
    errors = [f for f in findings if f.severity == "error"]
    first = f"{errors[0].file}: {errors[0].place}: {errors[0].what}".replace(": : ", ": ") if errors else ""
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return {"is_code_ready": not errors, "code_issue": first + more, "findings": [f.to_json() for f in findings]}


def report(findings: list[Finding], as_json: bool, notes: list[str], cost: dict) -> int:
    """Print and return the exit code: 0 ready, 2 not."""
    made = verdict(findings)
    if as_json:
        print(json.dumps({**made, "cost": cost}, indent=1, ensure_ascii=False))
        return 0 if made["is_code_ready"] else 2
    for finding in sorted(findings, key=lambda f: (f.severity, f.file)):
        print(finding)
    for note in notes:
        print(note)
    errors = sum(f.severity == "error" for f in findings)
    print(f"\n{'ready' if made['is_code_ready'] else 'NOT ready'}: {errors} errors, {len(findings) - errors} warnings")
    if cost:
        told = {name.replace("_", " "): "?" if value is None else value for name, value in cost.items()}
        print("cost: " + ", ".join(f"{name} {value}" for name, value in told.items()))
    return 0 if made["is_code_ready"] else 2


def cost_of(found: Found, scale: str, slots: int) -> dict:
    """What the full run is predicted to take, in words; `?` where no record tells."""
    runs = [run for _, run, _ in found if not isinstance(run, StudyError)]
    steps = plan.steps(runs, scale, "full")
    told = forecast.forecast(steps, slots)
    judge = sum(
        2 * run.evaluation.questions * len(config.members(run))
        for run in runs
        if getattr(run.evaluation, "judge", None) == "mt_bench"
    )
    downloads = sorted({n for run in runs for n in (run.model.name, run.dataset.name) if config.is_hub_id(n)})
    return {
        "wall_clock": progress.predicted(told),
        "device_hours": None if told.at_least else round(told.device_hours, 2),
        "memory": show.size(told.memory_bytes),
        "disk": show.size(told.disk_bytes),
        "downloads": ", ".join(downloads) or "none",
        "judge_calls": judge,
    }


def check(found: Found, whole: Found, options, root: Path, slots: int) -> int:
    """The command. `options`: the command line's; `found`, `whole`: as for `static`."""
    findings, notes = static(found, options.scale, whole), []
    if any(f.severity == "error" for f in findings):
        notes.append("no trial was run: mend these first")
    elif options.static:
        notes.append("static findings only (--static): no trial was run")
    else:
        findings += dynamic(found, options.scale, told_again(options), root)
    fit = not any(f.severity == "error" for f in findings)
    return report(findings, options.json, notes, cost_of(found, options.scale, slots) if fit else {})


def told_again(options) -> list[str]:
    """The options that choose the runs, and how many members at a time, for the trial."""
    chosen = [
        part for name in ("study", "run") for value in getattr(options, name) or [] for part in (f"--{name}", value)
    ]
    chosen += ["--params", os.path.abspath(options.params)] if options.params else []
    chosen += ["--jobs", str(options.jobs)] if options.jobs else []
    return chosen + [part for text in options.sets for part in ("--set", text)]
