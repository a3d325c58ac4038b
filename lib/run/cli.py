"""The command line behind ./run_all.sh.

Exit codes: 0 all done, 1 some run failed, 2 bad configuration (nothing started), 3 something needed is missing (nothing
started), 4 something was left for lack of time (--max-hours), 130 interrupted, 141 nobody read the output to its end (|
head). A refuted claim is a result, not a failure.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from lib import config, errors, hub, record
from lib.errors import StudyError
from lib.run import check, cluster, keys, plan, pool, progress, ready
from lib.run.options import parser, short, wants

LONGEST = 180  # bytes of what --set changed in a folder's name
OUTPUTS = Path(os.environ.get("STUDY_OUTPUTS", config.ROOT / "outputs")).absolute()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["test"]:
        # One process more than cores: some wait. Files in their order: what takes longest (tests/chaos) is not to come
        # last.
        several = ["-n", str(min(4, pool.cores() + 1)), "--dist", "loadfile", "--no-loadscope-reorder"]
        return subprocess.call([sys.executable, "-m", "pytest", *several, *(argv[1:] or ["tests"])], cwd=config.ROOT)
    if argv[:1] == ["lab"]:
        from lib.run import lab

        return lab.lab(argv[1:])
    if argv[:1] == ["compose"]:
        from lib.run import compose

        return guarded(lambda: compose.main(argv[1:]))
    options = parser().parse_args(argv)
    options.everywhere = options.scale is None and not options.sets and not options.grid
    options.mode = options.mode or ("trial" if options.command == "trial" else "full")
    options.scale = options.scale or ("paper" if options.command == "full" else "laptop")
    os.environ.pop("STUDY_CLUSTER", None)
    hub.keep_downloads_here()
    if options.jobs is not None and options.jobs < 1:
        print(f"--jobs: found {options.jobs}; expected 1 or more", file=sys.stderr)
        return 2
    return guarded(lambda: dispatch(options))


def dispatch(options) -> int:
    if options.command == "status":
        return progress.status(root_of(options), options.study)
    if options.command == "report":
        return rebuild(options)
    if options.command in ("sync", "pull"):
        return mirror(options)
    if options.command == "judge":
        return judge(options)
    return run(options)


def guarded(work) -> int:
    """The exit code of `work()`, or of what it raised, which is told to the person and not as a traceback."""
    try:
        code = work()
        sys.stdout.flush()  # not at the interpreter's end, where nobody could catch what comes of it
        return code
    except StudyError as error:
        print(record.escape_controls(record.redact(str(error))), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        told, code = errors.describe_os_error(error)
        if told:
            print(record.escape_controls(record.redact(told)), file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on from the last checkpoints", file=sys.stderr)
        return 130


def root_of(options) -> Path:
    """outputs/<scale>-<mode>, with what --set changed and the folder of --params behind it, so that a variation never
    overwrites the study. Where a run is mirrored or searched is no variation of it."""
    sets = sorted(s.partition("=") for s in options.sets if not s.startswith(("wandb.", "optuna.storage")))
    changed = ",".join(f"{key}={short(value)}" for key, _, value in sets)
    if options.params and "STUDY_OUTPUTS" not in os.environ:  # who names the outputs has chosen a place already
        changed += f",params={short(os.path.abspath(options.params))}"
    if options.grid:
        changed += ",grid=all"
    suffix = "," + re.sub(r"[^\w.=,+-]", "_", changed.strip(",")) if changed else ""
    if (
        len(os.fsencode(suffix)) > LONGEST
    ):  # a folder's name has 255 bytes at most: many changes are told apart by their digest
        suffix = f"{os.fsencode(suffix)[:LONGEST].decode(errors='ignore')}...{keys.digest(suffix)[:8]}"
    return OUTPUTS / f"{options.scale}-{options.mode}{suffix}"


def chosen(options) -> list[tuple]:
    """(path, Run or StudyError, findings) of every run YAML that the options name."""
    overrides = {}
    for text in options.sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise StudyError(f"--set {text}", "no '='", "--set key=value", f"--set {text}=…")
        overrides[key] = value
    for study in options.study or []:
        config.study_module(study)
    folders = (
        [Path(options.params)]
        if options.params
        else [config.ROOT / "params" / s / options.scale for s in config.studies()]
    )
    found = []
    for folder in folders:
        if not options.params and (not folder.is_dir() or (options.study and folder.parent.name not in options.study)):
            continue
        results = root_of(options)
        for path, loaded, findings in check.load_folder(folder, options.scale, options.mode, overrides):
            if isinstance(loaded, StudyError):
                if wants(options, path.stem):
                    found.append((path, loaded, findings))
                continue
            if (options.study and loaded.study not in options.study) or not wants(options, loaded.run_id):
                continue
            loaded = loaded.model_copy(update={"results_dir": results / loaded.study})
            if options.grid:
                loaded = config.apply(
                    loaded, {"grid": [{**b, "seeds": None} for b in config.dump(loaded)["grid"] or []] or None}
                )
            found.append((path, loaded, findings))
    if not found:
        raise StudyError(
            "the run YAMLs",
            f"none for --study {options.study or 'any'} --run {' '.join(options.run or '*')} --scale {options.scale}",
            f"files below {', '.join(map(str, folders))}",
            "./run_all.sh plan lists them",
        )
    return found


def every_run(options) -> list[tuple]:
    """`chosen` without --run."""
    return chosen(argparse.Namespace(**{**vars(options), "run": "*"}))


def run(options) -> int:
    if options.cluster:  # its GPUs are asked first: they are part of what a record depends on
        try:
            kinds = cluster.gpus(options.cluster)
        except errors.MissingError as error:
            print(config.Finding("error", error.where, error.found, error.fix), file=sys.stderr)
            return error.exit_code
        os.environ |= {"STUDY_CLUSTER": options.cluster, "STUDY_DEVICES": ",".join(dict.fromkeys(kinds))}
    found = chosen(options)
    # An analysis judges its whole study, whichever of its runs --run picked for this time.
    whole = every_run(options) if options.run else found
    ready.require_slots(options, found)
    if options.command == "check":
        from lib.run import compose

        return ready.command(found, whole, options, root_of(options), slots_of(options), list(compose.findings(found)))
    told, code = ready.find_obstacles(options, found)
    if options.mode == "full" and options.command != "plan":
        code = code or ready.check_before_full(options, found, whole, root_of(options), told)
    if options.command == "plan":
        loaded = [(r, findings) for _, r, findings in found if not isinstance(r, StudyError) and ready.has_notebooks(r)]
        fit = [r for r, findings in loaded if all(f.level != "error" for f in findings)]
        steps = plan.steps(fit, options.scale, options.mode, force=options.force) if fit else []
        progress.planned(steps, slots_of(options), options.price)
        progress.findings(told)
        return code if code == 2 else 0
    progress.findings(told, sys.stderr if code else sys.stdout)
    if code:
        print("\nnothing was started", file=sys.stderr)
        return code
    return execute(options, [loaded for _, loaded, _ in found], [loaded for _, loaded, _ in whole])


def slots_of(options) -> int:
    if options.cluster:
        return options.jobs or cluster.slots(options.cluster)
    return options.jobs or len(pool.gpus()) or pool.cores()


def execute(options, runs: list, whole: list) -> int:
    from lib.run import pages, runner

    root = root_of(options)
    # A shell's background job ignores Ctrl-C, and a scheduler says SIGTERM: both end a run in the same orderly way.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.default_int_handler)
    with runner.locked(root):
        runner.free_space(root)
        runner.remove_leftovers(root)
        listed = [r for r in whole if not isinstance(r, StudyError)]
        write_run_lists([r for r in listed if r.study in {run.study for run in runs}])
        steps = plan.steps(runs, options.scale, options.mode, force=options.force)
        runner.stay_inside(root, steps)
        slots = slots_of(options)
        to_do, predicted = [s for s in steps if s.reason], plan.forecast(steps, slots)
        print(
            f"{len(runs)} runs, {len(to_do)} of {len(steps)} notebooks to execute, {slots} members at a time; "
            + (progress.predicted(predicted, "about ") if to_do else "nothing to do"),
            flush=True,
        )
        for step in steps:
            print(f"  {step.title:32} {step.reason or 'cached: up to date'}", flush=True)
        finished, ok = None, True
        if to_do:
            finished = runner.Runner(
                steps,
                slots,
                fail_fast=options.fail_fast,
                force=options.force,
                keep_secrets=options.mode == "full"
                and (options.scale == "paper" or any(r.optuna.storage for r in runs)),
                max_hours=options.max_hours,
                cell_timeout=int(os.environ.get("STUDY_CELL_TIMEOUT", 0)) or None,
                on_end=lambda step, state: (
                    progress.verdicts([step]) if state == "succeeded" and options.mode == "full" else None
                ),
            )
            started = time.time()
            try:
                ok = finished.run()
            finally:
                with contextlib.suppress(OSError):  # a full or read-only disk has been told of already
                    runner.remove_leftovers(root)
                print(f"ended after {progress.duration(time.time() - started)}")
                progress.table(steps, finished)
    index = pages.index_html(OUTPUTS)
    if options.mode == "full":
        progress.verdicts(steps)
    print(f"\n{os.path.relpath(index, os.getcwd())}")
    if not ok and set(finished.state.values()) <= {"cached", "succeeded", "postponed"}:
        print("--max-hours left something to do: the same command goes on with it")
        return 4
    return 0 if ok else 1


def write_run_lists(runs: list) -> None:
    """For the analysis: which runs its study has, whether or not they leave a record."""
    for results in dict.fromkeys(run.results_dir for run in runs):
        record.write_json(
            Path(results) / "comparison" / "runs.json",
            [
                {**config.dump(r), "study": r.study, "scale": r.scale, "mode": r.mode}
                for r in runs
                if r.results_dir == results
            ],
        )


def rebuild(options) -> int:
    from lib.run import pages

    for notebook in sorted((OUTPUTS).glob("*/*/*/*.ipynb")) + sorted((OUTPUTS).glob("*/*/*/sweep/*.ipynb")):
        pages.notebook_html(notebook, notebook.with_suffix(".html"))
    print(os.path.relpath(pages.index_html(OUTPUTS), os.getcwd()))
    return 0


def mirror(options) -> int:
    """`sync`: every scale's records, or those that --scale, --set and --grid name; `pull`: the YAMLs' runs."""
    from lib.run import sync

    if options.command == "sync":
        return sync.sync(roots_of(options), options)
    runs = [r for _, r, _ in chosen(options) if not isinstance(r, StudyError) and ready.has_notebooks(r)]
    return sync.pull(runs, OUTPUTS, root_of(options).name, options)


def roots_of(options) -> list[Path]:
    """Every scale's records, or those that --scale, --set and --grid name."""
    return [
        root
        for root in (sorted(OUTPUTS.glob("*-full*")) if options.everywhere else [root_of(options)])
        if root.is_dir()
    ]


def judge(options) -> int:
    """Have saved answers graded; --params: those of its YAMLs' runs."""
    from lib.run import judge

    named = (
        {(r.study, r.run_id) for _, r, _ in chosen(options) if not isinstance(r, StudyError)}
        if options.params
        else None
    )
    return judge.judge(options, roots_of(options), named, OUTPUTS)
