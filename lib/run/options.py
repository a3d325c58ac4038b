"""The commands and options of ./run_all.sh."""

import argparse
import fnmatch
import hashlib
import os
from pathlib import Path

COMMANDS = ("full", "trial", "plan", "check", "compose", "status", "report", "sync", "pull", "judge", "lab", "test")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="./run_all.sh",
        description="Run the studies; without a command: all of them in full at laptop scale.",
        epilog="Exit codes: 0 done, 1 a run failed, 2 bad configuration, 3 something is missing, 4 --max-hours left "
        "something, 130 interrupted, 141 nobody read the output to its end (| head).",
    )
    add = top.add_argument
    add(
        "command",
        nargs="?",
        choices=COMMANDS,
        help="full: the paper's scale; trial: does it run; plan: what would run and why; check: may it run; "
        "compose: write the run YAMLs of a design; status; report: rebuild the pages; sync: bring W&B up to date with "
        "the records; pull: judge the studies from W&B; judge: have saved answers graded; lab: JupyterLab; test",
    )
    add("--scale", choices=("laptop", "paper"), help="default: laptop, but paper for `full`")
    add("--mode", choices=("full", "trial"), help="for plan, status and report (default full)")
    add("--study", action="append", help="only this study (may be repeated)")
    add("--run", metavar="GLOB", action="append", help="only runs whose run_id matches (may be repeated)")
    add("--params", metavar="DIR", help="run YAMLs from this folder instead of params/")
    add("--set", metavar="KEY=VALUE", action="append", default=[], dest="sets", help="change a setting of every run")
    add("--grid", choices=("all",), help="all: every cell with every seed")
    add(
        "--jobs", type=count, metavar="N", help="members trained at the same time (default: one per GPU, else per core)"
    )
    add("--cluster", nargs="?", const="auto", metavar="ADDRESS", help="train members on the nodes of a Ray cluster")
    add("--entity", help="for sync and pull: the W&B entity (default: the run's own, or the account's)")
    add("--project", help="for sync and pull: the W&B project (default: the run's own)")
    add("--force", action="store_true", help="do again what is done; old records are kept in attempts/")
    add("--max-hours", type=positive, metavar="H", help="start nothing that is predicted to end later than this")
    add(
        "--price",
        type=positive,
        metavar="P",
        help="of a GPU (or core) an hour, for plan; of a million tokens, for judge",
    )
    add("--json", action="store_true", help="`check` as one JSON object")
    add("--static", action="store_true", help="`check` without its trial")
    add("--fail-fast", action="store_true", help="start nothing more after the first failure")
    add = top.add_argument_group("for judge").add_argument
    add("--model", help="the judge at its endpoint, OPENAI_BASE_URL (default: params/judge.yaml)")
    add("--price-in", type=positive, metavar="P", help="of a million prompt tokens")
    add("--price-out", type=positive, metavar="P", help="of a million reply tokens")
    add("--data", metavar="DIR", help="MT-Bench's files, where not those the members were trained with")
    add("--workers", type=count, default=8, metavar="N", help="calls at a time (default 8)")
    add("--dry-run", action="store_true", help="say what it would take, and send nothing")
    add("--no-analysis", action="store_true", help="grade, and leave the analysis to the next `full`")
    return top


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a number above 0")
    return value


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number above 0")
    return int(text)


def wants(options: argparse.Namespace, run_id: str) -> bool:
    """Whether --run names this run: any of its patterns, or none given."""
    return any(fnmatch.fnmatch(run_id, pattern) for pattern in options.run or ["*"])


def short(value: str) -> str:
    """A value in a folder's name: of a path its last part, and what tells it from others of that name."""
    if "/" not in value:
        return value[:60]
    return f"{Path(value).name[:40]}-{hashlib.sha256(os.path.abspath(value).encode()).hexdigest()[:6]}"
