"""What ./run_all.sh can be told: its commands and options."""

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
        epilog="Exit codes: 0 done, 1 a run failed, 2 bad configuration, 3 something is missing, 4 --max-hours left something, "
        "130 interrupted, 141 nobody read the output to its end (| head).",
    )
    top.add_argument(
        "command",
        nargs="?",
        choices=COMMANDS,
        help="full: the paper's scale; trial: does it run; plan: what would run and why; check: may it run; "
        "compose: write the run YAMLs of a design; status; "
        "report: rebuild the pages; sync: bring W&B up to date with the records; pull: judge the studies from W&B; "
        "judge: have saved answers graded; lab: JupyterLab; test: the tests",
    )
    top.add_argument("--scale", choices=("laptop", "paper"), help="default: laptop, but paper for `full`")
    top.add_argument("--mode", choices=("full", "trial"), help="for plan, status and report (default full)")
    top.add_argument("--study", action="append", help="only this study (may be repeated)")
    top.add_argument("--run", metavar="GLOB", action="append", help="only runs whose run_id matches (may be repeated)")
    top.add_argument("--params", metavar="DIR", help="run YAMLs from this folder instead of params/")
    top.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="sets", help="change a setting of every run"
    )
    top.add_argument("--grid", choices=("all",), help="all: every cell with every seed")
    top.add_argument(
        "--jobs", type=int, metavar="N", help="members trained at the same time (default: one per GPU, else per core)"
    )
    top.add_argument(
        "--cluster", nargs="?", const="auto", metavar="ADDRESS", help="train members on the nodes of a Ray cluster"
    )
    top.add_argument("--entity", help="for sync and pull: the W&B entity (default: the run's own, or the account's)")
    top.add_argument("--project", help="for sync and pull: the W&B project (default: the run's own)")
    top.add_argument("--force", action="store_true", help="do again what is done; old records are kept in attempts/")
    top.add_argument(
        "--max-hours", type=positive, metavar="H", help="start nothing that is predicted to end later than this"
    )
    top.add_argument(
        "--price",
        type=positive,
        metavar="P",
        help="of a GPU (or else a core) an hour: `plan` gives the cost; for judge: of a million tokens",
    )
    grading = top.add_argument_group("for judge")
    grading.add_argument("--model", help="the judge at its endpoint, OPENAI_BASE_URL (default: params/judge.yaml)")
    grading.add_argument("--price-in", type=positive, metavar="P", help="of a million prompt tokens")
    grading.add_argument("--price-out", type=positive, metavar="P", help="of a million reply tokens")
    grading.add_argument(
        "--data", metavar="DIR", help="MT-Bench's files, where not those the members were trained with"
    )
    grading.add_argument("--workers", type=count, default=8, metavar="N", help="calls at a time (default 8)")
    grading.add_argument("--dry-run", action="store_true", help="say what it would take, and send nothing")
    grading.add_argument("--no-analysis", action="store_true", help="grade, and leave the analysis to the next `full`")
    top.add_argument("--json", action="store_true", help="`check` as one JSON object")
    top.add_argument("--static", action="store_true", help="`check` without its trial")
    top.add_argument("--fail-fast", action="store_true", help="start nothing more after the first failure")
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
