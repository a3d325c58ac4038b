"""What keeps runs from being started: faults of their YAMLs, what this machine lacks, and what `check` finds."""

import contextlib
import os

from lib import config, record
from lib.errors import StudyError
from lib.run import keys, members, plan


def built(loaded) -> bool:
    return (plan.NOTEBOOKS / loaded.study / "train.ipynb").exists()


def able(found: list[tuple]) -> list[tuple]:
    """Without the runs of studies that have no notebooks yet."""
    return [
        (path, loaded, findings) for path, loaded, findings in found if isinstance(loaded, StudyError) or built(loaded)
    ]


def wide_enough(options, found: list[tuple]) -> None:
    """Refuse --jobs below what one member takes: a slot of the pool is one GPU."""
    for _, run, _ in found:
        if options.mode != "full" or options.cluster or not options.jobs or isinstance(run, StudyError):
            continue
        if run.compute.gpus and run.compute.devices > options.jobs:
            raise StudyError(
                f"--jobs {options.jobs}",
                f"{run.run_id} trains one member on {run.compute.devices} GPUs (compute.gpus), and a slot is one GPU",
                f"--jobs {run.compute.devices} or more",
                "leave --jobs out: as many members as the GPUs allow are trained at a time",
            )


def obstacles(options, found: list[tuple]) -> tuple[dict[str, list], int]:
    """{YAML (or 'this machine'): findings}, and the exit code that their errors mean: 2 for a YAML's, else 3, else
    0."""
    from lib.run import preflight

    told: dict[str, list] = {}
    for path, loaded, findings in found:
        name = path.name if options.params else os.path.relpath(path, config.ROOT)
        if isinstance(loaded, StudyError):
            told[name] = [config.Finding("error", "configuration", str(loaded))]
            continue
        told[name] = list(findings)
        if not built(loaded):
            told[name] += [config.Finding("error", f"notebooks/{loaded.study}", "this study has no notebooks yet")]
    code = 2 if any(f.level == "error" for findings in told.values() for f in findings) else 0
    if options.mode == "full":
        machine = preflight.of_cluster(options.cluster) if options.cluster else preflight.Machine()
        needs = preflight.missing_for([loaded for _, loaded, _ in found if not isinstance(loaded, StudyError)], machine)
        told["this machine"] = needs
        code = code or 3 * any(f.level == "error" for f in needs)
    return told, code


def unready(options, found: list[tuple], whole: list[tuple], root, told: dict[str, list]) -> int:
    """Before a full run: what `check` finds in code, notebooks and claims and, at paper scale, in a trial, unless one
    has passed with these very settings and code. 2 where there is an error, which is added to `told`. `whole`: `found`
    with all runs of its studies; `root`: where their results go."""
    from lib.commands.check import command

    fit, seen, place = able(found), stamps(found, whole), members.CACHE / "checked.json"
    findings = []
    if record.read_json(place) != seen:
        findings = [
            f
            for f in command.static(fit, options.scale, able(whole))
            if not f.file.endswith(".yaml") or f.file.endswith("claims.yaml")
        ]
        if not findings:
            with contextlib.suppress(OSError):  # a cache that cannot be written costs time and no more
                record.write_json(place, seen)
    if options.scale == "paper" and not any(f.severity == "error" for f in findings) and not command.passed(fit, root):
        print("no trial of these runs has passed yet: trying them before anything long starts", flush=True)
        findings += command.dynamic(fit, options.scale, command.told_again(options), root)
    told["check"] = [config.Finding(f.severity, f"{f.file} {f.place}".strip(), f.what, f.fix) for f in findings]
    return 2 * any(f.severity == "error" for f in findings)


def stamps(found: list[tuple], whole: list[tuple]) -> dict:
    """All that the static findings depend on: what found nothing need not be looked at again (2 s of every command)."""
    files = [
        path
        for folder in ("lib", "notebooks", "params")
        for path in (config.ROOT / folder).rglob("*")
        if path.suffix in (".py", ".ipynb", ".yaml")
    ]
    files += [path for path, _, _ in whole]
    runs = [loaded if isinstance(loaded, StudyError) else [loaded.study, config.dump(loaded)] for _, loaded, _ in whole]
    return {
        "found": [str(path) for path, _, _ in found],
        "runs": keys.digest(runs),
        "versions": keys.digest(keys.versions()),
        "files": keys.digest(
            [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(set(files)) if p.is_file()]
        ),
    }
