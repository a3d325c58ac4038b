"""What the command line prints: the plan, the table of a finished run, the verdicts, the status."""

import os
import shutil
import sys
from pathlib import Path

import psutil

from lib import config, record
from lib.run import forecast, lock, progress


def table(steps: list, finished) -> None:
    print(f"\n{'run':34} {'status':11} {'minutes':>7}  key metric")
    for step in steps:
        state = finished.state[id(step)] or "not started"
        status = record.read_json(step.folder / "status.json") or {}
        metric = status.get("key_metric") or {}
        value = f"{metric['name']} {metric['value']:.3f}" if metric.get("value") is not None else ""
        state = status.get("status", state) if state == "failed" else state
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
            state = f": cannot run ({errors} error{'s' * (errors > 1)})" if errors else ""
            print(f"\n{record.inert(name)}{state}", file=out)
        for finding in sorted(mine, key=lambda f: f.level):
            print("  " + record.inert(str(finding)).replace("\n", "\n  "), file=out)


def planned(steps: list, slots: int, root: Path, price: float | None = None) -> None:
    """The plan, a line per notebook, and what it will take in all. `root`: where it will write."""
    print(f"\n{'run':34} {'members':>8} {'predicted':>10} {'memory':>9} {'disk':>9}  why")
    for step in steps:
        every = len(config.members(step.run)) if step.kind == "train" else 0
        members = f"{step.members}/{every}" if every else str(step.members or "")
        memory = disk = ""
        if step.members:
            own, disk = forecast.member_memory(step.run)[1], forecast.member_disk(step.run)
            memory, disk = size(own), size(None if disk is None else disk * step.members)
        seconds = "?" if step.unknown else progress.duration(step.seconds)
        print(
            f"{step.title:34} {members:>8} {seconds:>10} {memory:>9} {disk:>9}  "
            + (step.reason or "cached: its record stands")
        )
        needs = (
            [n for n in (step.run.model.name, step.run.dataset.name) if config.is_hub_id(n)]
            if step.kind == "train"
            else []
        )
        if needs:
            print(f"{'':34} downloads: {', '.join(needs)}")
    if not steps:
        return
    found, gpus = forecast.forecast(steps, slots), any(s.run is not None and s.run.compute.gpus for s in steps)
    folder = next(path for path in (root, *root.parents) if path.exists())
    device = f" ({size(found.device_memory_bytes)} on the GPU)" if found.device_memory_bytes else ""
    cost = "" if price is None else f", {found.cost(price):.2f} at {price:g} an hour"
    print(
        f"\npredicted with {slots} members at a time: {progress.predicted(found)} of wall-clock, "
        f"{'more than ' if found.at_least else ''}{found.device_hours:.2f} {'GPU' if gpus else 'core'}-hours{cost}\n"
        f"memory {size(found.memory_bytes)}{device} of {size(psutil.virtual_memory().available)} available, "
        f"disk {size(found.disk_bytes)} of {size(shutil.disk_usage(folder).free)} free\n"
        "per run: seconds of all its members on one slot, memory of one member beside the pool's; ? until one was recorded"
    )


def size(count: int | None) -> str:
    """Bytes for people, in powers of 1024; `?` for None."""
    if count is None:
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit == "GiB" else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def status(root: Path, studies: list[str] | None = None) -> int:
    rows = sorted(root.glob("*/*/status.json")) + sorted(root.glob("*/*/sweep/status.json"))
    if not rows:
        print(f"nothing has run in {os.path.relpath(root, os.getcwd())} yet: ./run_all.sh")
        return 0
    alive = lock.running(root)
    for path in rows:
        state = record.read_json(path, {})
        if studies and state.get("study") not in studies:
            continue
        title = f"{state.get('study')}/{state.get('run_id')}" + (" sweep" if state.get("kind") == "sweep" else "")
        told = f"{state.get('minutes') or 0:.2f} min"
        if state.get("status") == "running" and not alive:
            state["status"], told = "interrupted", "its runner is gone; the same command again goes on"
        elif state.get("status") == "running":
            told = progress.line(
                path.parent.parent if state.get("kind") == "sweep" else path.parent, "now"
            ).removeprefix("now: ")
        elif state.get("status") == "interrupted":
            told += "  the same command again goes on"
        elif state.get("error"):
            told += "  " + state["error"]["exception"].splitlines()[0] + f"  again: {state['error']['again']}"
        print(f"{title:34} {state.get('status', '?'):11} {told}")
    return 0
