"""What is still to be run will take: time, memory, disk and device-hours, from what this machine has measured.

A member's figures come from the nearest record there is: its own run's members, else those of its study, else its
YAML's own figure corrected by how this machine compared with the YAMLs of other studies. Where there is nothing to go
by, a figure is None and is printed as `?`; none is made up.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from lib import config, record
from lib.run import resources

TRIAL_SECONDS = 3.0  # a member of two batches, or making what a trial's members share
KEPT = 50  # executions in the history of predictions


@dataclass(frozen=True)
class Forecast:
    """Of a list of steps. `wall_seconds` with the slots at hand, and `at_least` where some of their members train for
    as many steps as their data turns out to have; `device_hours`: of a GPU where members train on one, of a
    core else; `memory_bytes`: the pool and as many members as run at a time; `disk_bytes`: what they will write."""

    wall_seconds: float
    device_hours: float
    memory_bytes: int | None
    device_memory_bytes: int | None
    disk_bytes: int | None
    at_least: bool = False

    def cost(self, price_per_hour: float | None) -> float | None:
        """In the currency of `price_per_hour`, the price of one GPU (without GPUs: of one core) for an hour."""
        return None if price_per_hour is None else self.device_hours * price_per_hour


def _records(run) -> tuple[list[tuple[Path, dict]], float]:
    """(the nearest members' (folder, resources), what to multiply the YAML's seconds by where there are none)."""
    for pattern in (f"{run.run_id}/members/*", "*/members/*"):
        found = [
            (path.parent, row)
            for path in Path(run.results_dir).glob(f"{pattern}/{resources.NAME}")
            if (row := record.read_json(path))
        ]
        if found:
            return [each for each in found if not each[1]["resumed"]] or found, 1.0
    return [], machine_factor(run)


def machine_factor(run) -> float:
    """This machine's seconds per second that the YAMLs expect: the median over the members of all studies at this
    scale."""
    root = Path(run.results_dir).parent.parent / f"{run.scale}-full"
    ratios = [
        row["seconds"] / row["expected_seconds"]
        for path in root.glob(f"*/*/members/*/{resources.NAME}")
        if (row := record.read_json(path)) and row["expected_seconds"] and not row["resumed"]
    ]
    return statistics.median(ratios) if ratios else 1.0


def expected_seconds(run) -> float:
    """What the run's YAML says of one member on one slot."""
    return config.steps(run) * run.compute.seconds_per_step


def member_seconds(run) -> float | None:
    """Expected seconds of one member on one slot; None where nothing tells: neither a record nor its YAML (no
    `seconds_per_step`, or epochs over data that was not read yet)."""
    if run.mode == "trial":
        return TRIAL_SECONDS
    found, factor = _records(run)
    return statistics.median(r["seconds"] for _, r in found) if found else expected_seconds(run) * factor or None


def prepare_seconds(run) -> float:
    """Expected seconds of making what all members share."""
    return TRIAL_SECONDS if run.mode == "trial" else run.compute.prepare_seconds * machine_factor(run)


def member_memory(run) -> tuple[int | None, int | None, int | None]:
    """(bytes that the pool holds, bytes that one member adds, bytes on its device), the largest seen; None without
    records."""
    found = [r for _, r in _records(run)[0]]
    if not found:
        return None, None, None
    device = [r["device_memory_bytes"] for r in found if r["device_memory_bytes"] is not None]
    return (
        max(r["base_memory_bytes"] for r in found),
        max(r["memory_bytes"] for r in found),
        max(device, default=None),
    )


def member_disk(run) -> int | None:
    """Bytes that one member's record takes; None without records."""
    found = _records(run)[0][:8]  # they are alike: reading all of a large study's folders would take seconds
    return int(statistics.median(resources.disk_bytes(folder) for folder, _ in found)) if found else None


def forecast(planned: list, slots: int) -> Forecast:
    """Of plan.Steps. Training and searches share the slots; preparation and analysis do not."""
    training = [s for s in planned if s.kind != "analysis" and s.reason]
    shared, alone = sum(s.seconds for s in training), sum(s.seconds for s in planned if s.kind == "analysis")
    wide = sum(s.seconds * min(s.run.compute.devices, slots) for s in training)  # a sharded member takes several slots
    wall = wide / max(1, slots) + sum(s.prepare for s in training) + alone
    devices = max((s.run.compute.gpus for s in training), default=0)
    at_once = min(slots, sum(s.members for s in training))
    held = [member_memory(s.run) for s in training if s.members]
    disk = [(s.members, member_disk(s.run)) for s in training if s.members]
    known = [(base, own) for base, own, _ in held if base is not None]
    return Forecast(
        wall_seconds=wall,
        device_hours=shared / 3600 * max(1, devices),
        memory_bytes=max(base + at_once * own for base, own in known) if known and len(known) == len(held) else None,
        device_memory_bytes=max((d for *_, d in held if d is not None), default=None),
        disk_bytes=sum(n * each for n, each in disk) if all(each is not None for _, each in disk) else None,
        at_least=any(s.members and s.unknown for s in training),
    )


def remember(root: Path, predicted: Forecast, actual_seconds: float, titles: list[str], slots: int) -> None:
    """Add one execution to <root>/forecasts.jsonl: what was predicted beside what it took. Whole executions only."""
    path = root / "forecasts.jsonl"
    rows = [
        *record.read_jsonl(path),
        {
            "ended": time.time(),
            "slots": slots,
            "notebooks": len(titles),
            "studies": sorted({title.partition("/")[0] for title in titles}),
            "predicted_seconds": round(predicted.wall_seconds, 1),
            "actual_seconds": round(actual_seconds, 1),
            "predicted_memory_bytes": predicted.memory_bytes,
            "predicted_disk_bytes": predicted.disk_bytes,
        },
    ]
    record.write_jsonl(path, rows[-KEPT:])
