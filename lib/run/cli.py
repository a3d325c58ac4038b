"""The command line behind ./run_all.sh.

Exit codes: 0 all done, 1 some run failed, 2 bad configuration (nothing started), 3 something needed is missing (nothing
started), 4 something was left for lack of time (--max-hours, --max-minutes), 130 interrupted, 141 the output was closed
early (| head). A refuted claim is a result, not a failure.
"""

import argparse
import contextlib
import fnmatch
import functools
import hashlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib import config, errors, hub, record
from lib.errors import StudyError
from lib.run import check, cluster, compose, decide, fetch, ideas, members, pages, plan, pool, progress, runner, wandb
from lib.run.judge_table import main as judge_table

COMMANDS = {
    "full": "the paper's scale",
    "trial": "does it run",
    "plan": "what would run and why",
    "decide": "more seeds for claims that are open",
    "fetch": "get the models that the runs start from",
    "check": "may it run",
    "compose": "write the run YAMLs of a design",
    "status": "progress, from another terminal",
    "report": "rebuild the pages",
    "sync": "bring W&B up to date with the records",
    "pull": "judge the studies from W&B",
    "judge": "have saved answers graded",
    "judge-table": "verdicts on a table of your own scores",
    "try": "your own idea against a shipped baseline",
    "lab": "JupyterLab, which takes further options",
    "test": "pytest, likewise",
}
LONGEST = 180  # bytes of what --set changed in a folder's name
FIRST = "start_here.ipynb"  # of JupyterLab
OUTPUTS = config.outputs()
# Options that all other commands refuse.
ONLY_FOR = {
    **dict.fromkeys(("idea", "against", "gain", "same_seeds"), ["try"]),
    **dict.fromkeys(("model", "price_in", "price_out", "data", "workers", "dry_run"), ["judge"]),
    **dict.fromkeys(("static", "json"), ["check"]),
    **dict.fromkeys(("entity", "project"), ["sync", "pull"]),
    **{"site": ["report"], "price": ["plan", "judge"], "mode": ["plan", "status"]},
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """In a line, without all the options above it."""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parser() -> argparse.ArgumentParser:
    purpose = "Run the studies; without a command: all of them in full at laptop scale."
    top = Parser(prog="./run_all.sh", description=purpose, epilog=__doc__.split("\n\n")[1])
    add = top.add_argument
    of_commands, of_scales = (functools.partial(one_of, known) for known in (COMMANDS, config.SCALES))
    add("command", nargs="?", type=of_commands, choices=COMMANDS, help="; ".join(map(": ".join, COMMANDS.items())))
    add("idea", nargs="?", metavar="IDEA.py", type=Path, help="for try: a file with a loss, an adapter or a schedule")
    add("--scale", type=of_scales, choices=config.SCALES, help="default: laptop, but paper for `full`")
    add("--mode", choices=("full", "trial"), help="for plan and status (default full)")
    add("--study", action="append", help="only this study (may be repeated)")
    add("--run", metavar="GLOB", action="append", help="only runs whose run_id matches (may be repeated)")
    only = "only what these claims compare (C1: of every study; td_dpo/C1: of one); `plan` says what it costs"
    add("--claims", metavar="C1,C2", type=lambda text: [name.strip() for name in text.split(",")], help=only)
    add("--params", metavar="DIR", help="run YAMLs from this folder instead of params/")
    add("--results-dir", metavar="DIR", help="write and read the results here instead of in outputs/")
    add("--set", metavar="KEY=VALUE", action="append", default=[], dest="sets", help="change a setting of every run")
    add("--grid", choices=("all",), help="all: every cell with every seed")
    add("--jobs", type=count, metavar="N", help="members trained at a time (default: one per GPU, else per core)")
    add("--cluster", nargs="?", const="auto", metavar="ADDRESS", help="train members on the nodes of a Ray cluster")
    add("--entity", help="for sync and pull: the W&B entity (default: the run's own, or the account's)")
    add("--project", help="for sync and pull: the W&B project (default: the run's own)")
    add("--force", action="store_true", help="do again what is done; old records are kept in attempts/")
    add("--max-hours", type=positive, metavar="H", help="start nothing that is predicted to end later than this")
    more = "after the first looks: more seeds, times, ablations (default for `full`: 15 at laptop, 60 at small scale)"
    add("--max-minutes", type=positive, metavar="M", help=more)
    add("--price", type=positive, metavar="P", help="of a GPU or core an hour (plan), of a million tokens (judge)")
    add("--json", action="store_true", help="`check` as one JSON object")
    add("--site", metavar="DIR", help="for `report`: also copy what the pages lead to into DIR, to be published")
    add("--static", action="store_true", help="`check` without its trial")
    add("--fail-fast", action="store_true", help="start nothing more after the first failure")
    add = top.add_argument_group("for judge").add_argument
    add("--model", help="the judge at its endpoint, OPENAI_BASE_URL (default: params/judge.yaml)")
    add("--price-in", type=positive, metavar="P", help="of a million prompt tokens")
    add("--price-out", type=positive, metavar="P", help="of a million reply tokens")
    add("--data", metavar="DIR", help="MT-Bench's files, where not those the members were trained with")
    add("--workers", type=count, default=8, metavar="N", help="calls at a time (default 8)")
    add("--dry-run", action="store_true", help="say what it would take, and send nothing")
    add = top.add_argument_group("for try").add_argument
    add("--against", metavar="RUN", help="the baseline, a shipped run: dpo, lora, fixed ...")
    add("--gain", type=positive, metavar="G", help="claimed, in the study's score; two thirds of it are tested")
    add("--same-seeds", action="store_true", help="the first idea's, in place of fresh ones: quicker, and biased")
    return top


def one_of(known: Iterable[str], text: str) -> str:
    """For a type of argument: refuses what is none of these, naming the nearest."""
    if text not in known:
        near = config.did_you_mean(text, known, f"expected one of {', '.join(known)}")
        raise argparse.ArgumentTypeError(f"found {text!r}; {near}")
    return text


def positive(text: str, kind: type = float):
    """A number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (value := kind(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"found {text!r}; expected a {'whole ' * (kind is int)}number above 0")


count = functools.partial(positive, kind=int)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    # jsonschema, which checks notebooks, would build this package's grammars at import: 2 s of every command, for a format
    # (IRIs) that no notebook has. It goes without.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    command, more = (argv or [""])[0], argv[1:]
    if command == "test":
        # One process more than cores: some wait. Files in their order: what takes longest (tests/chaos) is not to come
        # last.
        several = ["-n", str(min(4, pool.cores() + 1)), "--dist", "loadfile", "--no-loadscope-reorder"]
        return subprocess.call([sys.executable, "-m", "pytest", *several, *(more or ["tests"])], cwd=config.ROOT)
    apart = {"lab": lab, "compose": compose.main, "judge-table": judge_table}  # which have options of their own
    if command in apart:
        return report_errors(lambda: apart[command](more))
    options = (top := parser()).parse_args(argv)
    for name, commands in ONLY_FOR.items():
        if getattr(options, name) != top.get_default(name) and options.command not in commands:
            top.error(f"{'--' * (name != 'idea')}{name.replace('_', '-')} is for {' and '.join(commands)}")
    known = ((name, getattr(options, name)) for name in ("params", "results_dir", "grid"))
    plan.PLACE = "".join(f" --{name.replace('_', '-')} {shlex.quote(value)}" for name, value in known if value)
    global OUTPUTS
    OUTPUTS = Path(options.results_dir).absolute() if options.results_dir else OUTPUTS
    options.everywhere = options.scale is None and not options.sets and not options.grid
    options.mode = options.mode or ("trial" if options.command == "trial" else "full")
    options.scale = options.scale or {"full": "paper", "fetch": "small"}.get(options.command, "laptop")
    os.environ.pop("STUDY_CLUSTER", None)
    hub.keep_downloads_here()
    others = {"fetch": get_models, "status": status, "report": rebuild, "sync": sync, "pull": pull, "judge": judge}
    others["try"] = lambda options: try_idea(options, argv)
    return report_errors(lambda: others.get(options.command, run)(options))


def report_errors(work) -> int:
    """The exit code of `work()`, or of what it raised, printed for a person and not as a traceback."""
    try:
        code = work() or 0  # None where nothing can go wrong without an exception
        sys.stdout.flush()  # not at the interpreter's end, where nobody could catch what comes of it
        return code
    except StudyError as error:
        said, code = str(error), error.exit_code
    except OSError as error:
        said, code = errors.describe_os_error(error)
    except KeyboardInterrupt:
        said, code = "interrupted: rerun the same command to resume from the last checkpoints", 130
    if said:
        print(record.escape_controls(record.redact(said)), file=sys.stderr)
    return code


def root_of(options) -> Path:
    """outputs/<scale>-<mode>, with what --set changed and the folder of --params behind it, so that a variation never
    overwrites the study. Where a run is mirrored is no variation of it."""
    if root := getattr(options, "root", None):  # of a try
        return root
    changes = sorted(text.partition("=")[::2] for text in options.sets if not text.startswith("wandb."))
    named = options.results_dir or "STUDY_OUTPUTS" in os.environ  # who names the outputs has chosen a place already
    if options.params and not named:
        changes.append(("params", os.path.abspath(options.params)))
    if options.grid:
        changes.append(("grid", options.grid))
    suffix = re.sub(r"[^\w.=,+-]", "_", "".join(f",{key}={shorten(value)}" for key, value in changes))
    if len(os.fsencode(suffix)) > LONGEST:  # a folder's name has 255 bytes at most: the digest tells many changes apart
        suffix = f"{os.fsencode(suffix)[:LONGEST].decode(errors='ignore')}...{record.digest(suffix)[:8]}"
    return OUTPUTS / f"{options.scale}-{options.mode}{suffix}"


def shorten(value: str) -> str:
    """A value in a folder's name: of a path its last part, and what tells it from others of that name."""
    if "/" not in value:
        return value[:60]
    whole = os.path.abspath(value) if os.path.exists(value) else value  # a hub id is the same from everywhere
    return f"{Path(value).name[:40]}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def roots_of(options) -> list[Path]:
    """Every scale's records that were made here, or those that --scale, --set and --grid name."""
    roots = sorted(OUTPUTS.glob("*-full*")) if options.everywhere else [root_of(options)]
    return [root for root in roots if root.is_dir() and wandb.FROM not in root.name]


def overrides_of(sets: Iterable[str]) -> dict[str, str]:
    """{key: value} of --set, as written."""
    for text in (text for text in sets if "=" not in text):
        raise StudyError(f"--set {text}", "no '='", "--set key=value", f"--set {text}=…")
    return dict(text.split("=", 1) for text in sets)


def select_runs(options, *, plain: bool = False) -> list[check.Loaded]:
    """(path, Run or StudyError, findings) of every run YAML that the options name; `plain`: without what --set says."""
    overrides = overrides_of(() if plain else options.sets)
    for study in options.study or []:
        config.study_module(study)
    folders = [config.ROOT / "params" / study / options.scale for study in options.study or config.studies()]
    folders = [Path(options.params)] if options.params else [folder for folder in folders if folder.is_dir()]
    every = [entry for folder in folders for entry in check.load_folder(folder, options.scale, options.mode, overrides)]
    selected = []
    for path, run, findings in every:
        if isinstance(run, StudyError):
            wanted = plan.matches(options, path.stem)
        elif wanted := plan.matches(options, run.run_id, run.study):
            run = run.model_copy(update={"results_dir": root_of(options) / run.study})
            if options.grid:
                blocks = [{**block, "seeds": None} for block in config.dump(run)["grid"] or []]
                run = config.apply(run, {"grid": blocks or None})
        if wanted:
            selected.append((path, run, findings))
    names, found = ([getattr(run, "run_id", path.stem) for path, run, _ in those] for those in (every, selected))
    if lost := [glob for glob in options.run or ["*"] if not fnmatch.filter(found, glob)]:
        where = f"run YAMLs below {', '.join(map(check.display_path, folders)) or 'params/<study>/' + options.scale}"
        near = config.did_you_mean(lost[0], names, f"list them: ./run_all.sh plan --scale {options.scale}")
        raise StudyError(f"--run {lost[0]}", f"no such run at {options.scale} scale", where, near)
    return selected


def whole_of(options, selected: list[check.Loaded]) -> list[check.Loaded]:
    """All runs of the studies of these: an analysis judges its whole study, whichever of its runs were picked for this
    time. What --set says holds for these alone, and for those that have a record with it in the same place."""
    every, picked = select_runs(changed(options, run=None)), {path for path, _, _ in selected}
    if not options.sets:
        return every
    picked |= {run.source for run in check.runs_of(every) if (run.results_dir / run.run_id).exists()}
    touched = {entry[0]: entry for entry in every if entry[0] in picked}
    return [touched.get(entry[0], entry) for entry in select_runs(changed(options, run=None), plain=True)]


def changed(options, **given) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **given})


def run(options) -> int:
    if options.cluster:  # its GPUs are asked first: they are part of what a record depends on
        kinds = dict.fromkeys(cluster.gpus(options.cluster))
        os.environ |= {"STUDY_CLUSTER": options.cluster, "STUDY_DEVICES": ",".join(kinds)}
    asked, options.claims = options.claims, None  # until their arms are known
    selected = whole = select_runs(options)
    if asked and len(check.runs_of(selected)) == len(selected):  # else what is refused is reported
        # a trial's runs have one cell
        full = selected if options.mode == "full" else select_runs(changed(options, mode="full"))
        options.claims = decide.select(asked, check.runs_of(full), options.scale)
        named = {(study, arm[0]) for study, own in options.claims.items() for mine in own.values() for arm in mine}
        selected = [e for e in selected if isinstance(e[1], config.Run) and (e[1].study, e[1].run_id) in named]
    whole = whole_of(options, selected) if options.run or (asked and options.sets) else whole
    if not any(each.compute.gpus for each in check.runs_of(selected)):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # members take cores, and notebooks count on the CPU as they do
    if options.scale == "small" and options.mode == "full" and options.command not in ("plan", "check"):
        fetch.fetch(check.runs_of(selected))
    obstacles = check.find_obstacles(options, selected, whole, root_of(options))
    if options.command == "check":
        obstacles += compose.findings(selected)
        check.report(obstacles, options)
        return check.exit_code(obstacles)
    code = check.exit_code(obstacles)
    if options.command == "plan":
        if fit := check.runs_of([entry for entry in selected if not check.has_error(entry[2])]):
            given = options, fit, check.runs_of(whole), slots_of(options)
            spending = decide.Spending(*given)
            progress.print_plan(spending.preview(), spending.slots, spending.minutes, options.price)
            if options.mode == "full" and (options.scale == "paper" or options.claims):
                print(*decide.Spending(*given).prices(), sep="\n")
        check.print_findings(obstacles)
        return code if code == 2 else 0
    check.print_findings(obstacles, sys.stderr if code else sys.stdout)
    if code:
        print("\nnothing was started", file=sys.stderr)
        return code
    if options.command == "try":
        first_look(options, check.runs_of(selected))
    return execute(options, check.runs_of(selected), check.runs_of(whole))


def slots_of(options) -> int:
    return options.jobs or (cluster.slots(options.cluster) if options.cluster else len(pool.gpus()) or pool.cores())


def execute(options, runs: list, whole: list) -> int:
    """Run what is not up to date of these runs' notebooks; `whole`: all runs of their studies."""
    root, full = root_of(options), options.mode == "full"
    # A shell's background job ignores Ctrl-C, and a scheduler says SIGTERM: both end a run in the same orderly way.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.default_int_handler)
    with progress.lock(root):
        runner.remove_leftovers(root)
        slots = slots_of(options)
        spending = decide.Spending(options, runs, whole, slots)
        limits = {"root": root, "fail_fast": options.fail_fast, "max_hours": options.max_hours}
        engine = runner.Runner([], slots, keep_secrets=options.scale == "paper", **limits)
        try:
            engine.run(announced(spending.rounds(), slots))
        finally:
            with contextlib.suppress(OSError):  # a full or read-only disk has been reported already
                runner.remove_leftovers(root)
            if any(step.reason for step in engine.steps):
                print(f"ended after {progress.duration(time.monotonic() - engine.began)}")
                progress.print_table(engine.steps)
    index = pages.index_html(OUTPUTS)
    if full and options.command != "try":
        # a failed one leaves the words of the record before
        last = {s.study: s for s in engine.steps if s.kind == "analysis" and s.state in ("succeeded", "cached")}
        progress.print_verdicts([step.folder for step in last.values()], set(), priced=True)
    if spending.left:
        print("\nleft for lack of time:", *spending.left, sep="\n  ")
    is_left = spending.left or any(step.state == "postponed" for step in engine.steps)
    print(f"\nall results: {os.path.relpath(index, os.getcwd())}")
    states = {step.state for step in engine.steps} - {"succeeded", "cached", "postponed"}
    is_asked = options.max_minutes or options.max_hours  # that the default budget ends is nothing to report
    return 1 if states else 4 if is_left and is_asked else 0


def announced(rounds: Iterable[decide.Round], slots: int) -> Iterator[decide.Round]:
    """The same rounds, each printed as it begins."""
    for each in rounds:
        to_do = sum(bool(step.reason) for step in each.steps)
        long = progress.format_forecast(plan.forecast(each.steps, slots), "about ") if to_do else "nothing to do"
        said = f"{to_do} of {len(each.steps)} notebooks to execute, {slots} members at a time; {long}"
        print(f"{each.what}{': ' * bool(each.what)}{said}")
        why: dict[str, list[str]] = {}
        for step in each.steps:
            why.setdefault(step.reason.partition(": ")[2] or step.reason or "cached", []).append(step.title)
        for reason, titles in why.items():
            print(progress.clip(f"  {reason}: {progress.some(titles)}"), flush=True)
        yield each


def status(options) -> None:
    """Of what was asked for or, where nothing was, of where a runner is at work; else of the usual, else of all."""
    roots = [root_of(options)]
    if options.everywhere:
        every = sorted({path.parents[2] for path in OUTPUTS.glob("*/*/*/status.json")})
        at_work = [lock.parent for lock in sorted(OUTPUTS.glob("*/.lock")) if progress.is_running(lock.parent)]
        roots = at_work or (roots if any(roots[0].glob("*/*/status.json")) else every) or roots
    for root in roots:
        if root != root_of(options):
            print(f"{root.name}:")
        progress.status(root, options.study)


def rebuild(options) -> None:
    """Make the pages anew from the notebooks and the records; with --site, also a folder to publish."""
    for notebook in sorted(OUTPUTS.glob("*/*/*/*.ipynb")) + sorted(OUTPUTS.glob("*/*/*/sweep/*.ipynb")):
        pages.notebook_html(notebook)
    print(os.path.relpath(pages.index_html(OUTPUTS), os.getcwd()))
    if options.site:
        print(f"{pages.site(OUTPUTS, Path(options.site))} files in {options.site}")


def get_models(options) -> None:
    fetch.fetch(check.runs_of(select_runs(options)))


def judge(options) -> int:
    """Have saved answers graded."""
    from lib.run import judge

    named = {(run.study, run.run_id) for run in check.runs_of(select_runs(options))} if options.params else None
    return judge.judge(options, roots_of(options), named, OUTPUTS)


# ---- an idea of one's own


def try_idea(options, argv: list[str]) -> int:
    """It is judged against a shipped baseline, seed by seed until its claim is decided or the minutes are over."""
    needed = {"IDEA.py": options.idea, "--against": options.against, "--gain": options.gain}
    wrong = [f"no {name}" for name, value in needed.items() if not value]
    if wrong := wrong + ["--scale paper"] * (options.scale == "paper") + ["--run"] * bool(options.run):
        expected = "IDEA.py --against RUN --gain G [--scale laptop|small] [--max-minutes M] [--same-seeds] [--set K=V]"
        raise StudyError("try", ", ".join(wrong), expected, "./run_all.sh try idea.py --against dpo --gain 0.3")
    options.root = ideas.prepare(options, OUTPUTS, overrides_of(options.sets), argv, fetch.fetch)
    options.params, options.sets = str(options.root / "params"), []
    progress.say(ideas.announcement(options.root))
    try:
        code = run(options)
    finally:
        if not any(options.root.glob("*/comparison")):  # refused: it does not count as a try
            shutil.rmtree(options.root)
    if options.root.exists():
        first = check.runs_of(select_runs(options))[0]
        print(*ideas.summary(options.root, plan.prepare_seconds(first)), sep="\n")
    return code


def first_look(options, runs: list) -> None:
    """What a try has of the records of others; says what its first look takes where that is more than its minutes.
    Raises StudyError where they were asked for."""
    for each in runs:
        members.take_over(each, OUTPUTS)
    slots = slots_of(options)
    spending = decide.Spending(changed(options, command="plan"), runs, runs, slots)
    cost, minutes = plan.forecast(spending.first_looks().steps, slots).wall_seconds, spending.minutes
    what = f"the first look is predicted to take {progress.duration(cost)} on this machine"
    if cost > 60 * minutes and options.max_minutes:
        fix = f"--max-minutes {math.ceil(cost / 60)}"
        raise StudyError(f"--max-minutes {minutes:g}", what, "minutes that cover it", fix)
    if cost > 60 * minutes:
        print(f"{what}, more than the {minutes:g} minutes that a try has: it is taken, and no other after it")


# ---- W&B brought up to date with the records, and the studies judged from what W&B holds


def sync(options) -> int:
    """Send what W&B lacks of the records. Exit code: 0 W&B is up to date, 1 it is not yet, 3 it cannot be reached or
    there is no key."""
    roots = roots_of(options)
    folders = sorted({done.parents[2] for root in roots for done in root.glob("*/*/members/*/done.json")})
    folders = [folder for folder in folders if plan.matches(options, folder.name, folder.parent.name)]
    folders = [f for f in folders if config.get(config.load_yaml(f / "config.yaml"), "wandb.mode") != "disabled"]
    if not folders:
        where = ", ".join(map(str, roots)) or "outputs/"
        print(f"nothing to send: no finished member in {where}, or wandb.mode: disabled in its YAML")
        return 0
    address = [options.entity or "", options.project or ""]
    with progress.lock(*dict.fromkeys(folder.parents[1] for folder in folders)):  # a runner at work sends by itself
        # A process of its own: the client's core can crash, and some of its calls never return.
        code = subprocess.call([sys.executable, "-P", "-m", "lib.run.wandb", "sync", *address, *map(str, folders)])
    if code == -signal.SIGALRM:
        print(f"W&B kept one call waiting for {wandb.STALL_SECONDS} s; fix: try again later", file=sys.stderr)
    return code if code in (0, 3) else 1


def pull(options) -> int:
    """Fetch the records of the selected runs from W&B, and judge them by the same analysis in a folder of their own."""
    runs, made_in, steps = check.runs_of(select_runs(options)), root_of(options).name, []
    root = OUTPUTS / f"{made_in},{wandb.FROM}"
    for study in dict.fromkeys(run.study for run in runs):
        mine = [run for run in runs if run.study == study]
        address = {"entity": options.entity or mine[0].wandb.entity}
        address["project"] = options.project or mine[0].wandb.project or wandb.PROJECT
        results = wandb.fetch(root, f"{made_in}/{study}", run_ids=[run.run_id for run in mine], **address)
        steps.append(plan.analysis(study, results, options.scale, "full"))
    with progress.lock(root):
        return 0 if runner.Runner(steps, 1).run() else 1


# ---- JupyterLab: start_here open, this environment's kernel and this checkout's `lib` first, nothing from the net


def lab(more: list[str]) -> None:
    """Become JupyterLab, which asks at Ctrl-C and takes its kernels along; `more` are options of its own, which win."""
    place = hub.cache_folder() / "lab"
    # a default, which the reader's own settings win over: do not ask whether news are wanted
    record.write_json(place / "overrides.json", {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}})
    settings = {
        "ServerApp.root_dir": plan.NOTEBOOKS,
        "LabApp.default_url": f"/lab/tree/{FIRST}",
        "LabApp.workspaces_dir": place,
        "LabApp.app_settings_dir": place,
        "LabApp.news_url": None,
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "LabApp.extension_manager": "readonly",
    }
    first = {"JUPYTER_PATH": Path(sys.prefix) / "share" / "jupyter", "PYTHONPATH": config.ROOT}
    first = {key: os.pathsep.join(filter(None, (str(path), os.environ.get(key)))) for key, path in first.items()}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    quiet["PYTHONWARNINGS"] = "ignore:IProgress not found,ignore::FutureWarning"  # of tqdm and of transformers
    command = [sys.executable, "-m", "jupyter", "lab", *(f"--{name}={value}" for name, value in settings.items())]
    os.chdir(plan.NOTEBOOKS)
    os.execve(sys.executable, [*command, *more], {**quiet, **os.environ, **first})
