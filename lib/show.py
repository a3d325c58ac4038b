"""What the command line prints: the plan, the table of a finished run, the verdicts, the status."""

import os
import sys
from pathlib import Path

from lib import config, plan, progress, record


def table(steps: list, finished) -> None:
    print(f"\n{'run':34} {'status':11} {'minutes':>7}  key metric")
    for step in steps:
        state = finished.state[id(step)] or "not started"
        metric = (record.read_json(step.folder / "status.json") or {}).get("key_metric") or {}
        value = f"{metric['name']} {metric['value']:.3f}" if metric.get("value") is not None else ""
        print(f"{step.title:34} {state:11} {finished.minutes.get(id(step), 0):7.2f}  {value}")
    for step in steps:
        error = finished.errors.get(id(step))
        if error:
            print(
                f"\n{step.title} failed"
                + (f" in cell {error['cell']}" if error["cell"] else "")
                + f"\n  {error['exception']}\n  notebook: {error['notebook']}\n  log: {error['log']}\n  again: {error['again']}"
            )


def verdicts(steps: list) -> None:
    for step in steps:
        claims = record.read_json(step.folder / "claims.json") if step.kind == "analysis" else None
        for claim in claims or []:
            interval = claim.get("interval95")
            ends = ["unbounded" if bound is None else f"{bound:+.3f}" for bound in interval or ()]
            told = f"{claim['estimate']:+.3f} [{', '.join(ends)}]" if ends else "-"
            print(f"{step.study} {claim['id']}  {claim['verdict']:13} {told:28} {claim['sentence']}")


def findings(told: dict[str, list], out=sys.stdout) -> None:
    """What keeps each YAML (or all of them, on this machine) from running, and what is odd about it."""
    for name, mine in told.items():
        if mine:
            errors = sum(f.level == "error" for f in mine)
            print(f"\n{name}" + (f": cannot run ({errors} error{'s' * (errors > 1)})" if errors else ""), file=out)
        for finding in sorted(mine, key=lambda f: f.level):
            print("  " + record.inert(str(finding)).replace("\n", "\n  "), file=out)


def planned(steps: list, slots: int) -> None:
    print(f"\n{'run':34} {'members':>8} {'predicted':>10}  why")
    for step in steps:
        every = len(config.members(step.run)) if step.kind == "train" else 0
        members = f"{len(step.stale)}/{every}" if every else ""
        print(
            f"{step.title:34} {members:>8} {progress.duration(step.seconds):>10}  {step.reason or 'cached: its record stands'}"
        )
        needs = [n for n in (step.run.model.name, step.run.dataset.name) if config.is_hub_id(n)] if step.kind == "train" else []
        if needs:
            print(f"{'':34} downloads: {', '.join(needs)}")
    if steps:
        print(
            f"\npredicted wall-clock with {slots} members at a time: {progress.duration(plan.wall_seconds(steps, slots))} "
            "(predicted: seconds of all members on one slot)"
        )


def status(root: Path, studies: list[str] | None = None) -> int:
    rows = sorted(root.glob("*/*/status.json")) + sorted(root.glob("*/*/sweep/status.json"))
    if not rows:
        print(f"nothing has run in {os.path.relpath(root, os.getcwd())} yet: ./run_all.sh")
        return 0
    alive = progress.running(root)
    for path in rows:
        state = record.read_json(path, {})
        if studies and state.get("study") not in studies:
            continue
        title = f"{state.get('study')}/{state.get('run_id')}" + (" sweep" if state.get("kind") == "sweep" else "")
        told = f"{state.get('minutes') or 0:.2f} min"
        if state.get("status") == "running" and not alive:
            state["status"], told = "interrupted", "its runner is gone; the same command again goes on"
        elif state.get("status") == "running":
            told = progress.line(path.parent.parent if state.get("kind") == "sweep" else path.parent, "now").removeprefix(
                "now: "
            )
        elif state.get("error"):
            told += "  " + state["error"]["exception"].splitlines()[0] + f"  again: {state['error']['again']}"
        print(f"{title:34} {state.get('status', '?'):11} {told}")
    return 0
