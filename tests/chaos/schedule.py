"""Which faults strike where: drawn from an undisturbed run's events by a seed."""

import random
import re

KINDS = {  # how many of a hundred
    "member killed": 10,
    "kernel killed": 10,
    "runner killed": 14,
    "fork server killed": 10,
    "killed inside a checkpoint save": 12,
    "killed inside a JSON write": 12,
    "killed at the notebook's rename": 6,
    "clocks stopped or jumping": 4,
    "disk full (a real one)": 4,
    "disk full (one write fails, or all)": 4,
    "outputs read-only": 6,
    "two runners at once": 4,
    "laptop asleep": 4,
}


def candidates(events: list[dict]) -> dict[str, list[dict]]:
    """The events that each kind of fault may strike at."""
    outputs = [e for e in events if e["path"].startswith("outputs/laptop-full/td_dpo/")]
    steps = [
        e for e in outputs if e["role"] == "member" and e["event"] == "open" and e["path"].endswith("history.jsonl")
    ]
    kernel = [e for e in outputs if e["role"] == "kernel" and "progress.json" not in e["path"]]
    json_writes = [
        e
        for e in events
        if e["event"] in ("open", "os.chmod", "os.rename")
        and "progress.json" not in e["path"]
        and re.search(r"\.jsonl?(~tmp)?$", e["path"])
        and (e["event"] == "os.rename" or e["path"].endswith("~tmp"))
    ]
    return {
        "member killed": [e for e in events if e["role"] == "member" and "checkpoint-" not in e["path"]],
        "kernel killed": kernel,
        "runner killed": [*steps, *kernel, *(e for e in outputs if e["role"] == "runner")],
        "fork server killed": [*steps, *kernel],
        "killed inside a checkpoint save": [e for e in outputs if "/checkpoint-" in e["path"]],
        "killed inside a JSON write": json_writes,
        "killed at the notebook's rename": notebook_renames(outputs),
        "clocks stopped or jumping": steps[:1],
        "disk full (a real one)": [*steps, *kernel],
        "disk full (one write fails, or all)": [e for e in outputs if "progress.json" not in e["path"]],
        "outputs read-only": [*steps, *kernel],
        "two runners at once": [*steps, *kernel],
        "laptop asleep": [*steps, *kernel],
    }


def notebook_renames(outputs: list[dict]) -> list[dict]:
    """Right before the rename that makes a notebook the record, and at the runner's next three acts after it."""
    found, left = [], 0
    for event in [e for e in outputs if e["role"] == "runner"]:
        if event["event"] == "os.rename" and re.search(r"/(run|analysis)\.ipynb$", event["path"]):
            left = 4
        if left:
            found.append(event)
            left -= 1
    return found


def fault(kind: str, event: dict, rng: random.Random, number: int) -> dict:
    """One fault of a kind at an event: what the hook is reported, and what the controller does beside it."""
    do = "kill"
    if kind == "kernel killed":
        do = "kill" if event["role"] == "kernel" else "kill:kernel"
    elif kind == "runner killed":
        do = "kill:runner"
    elif kind == "fork server killed":
        do = "kill:server"
    elif kind == "disk full (one write fails, or all)":
        do = rng.choice(["errno:28", "errno:28:stay"])
    elif kind == "outputs read-only":
        do = rng.choice(["errno:30:stay", "errno:30:stay", "mounted"])
    elif kind in ("disk full (a real one)", "two runners at once", "laptop asleep"):
        do = "tell"
    elif kind == "clocks stopped or jumping":
        do = rng.choice(["standing", "back", "forward"])
    return {**event, "id": f"f{number}", "kind": kind, "do": do}


def draw(events: list[dict], count: int, seed: int) -> list[dict]:
    """`count` faults: each kind in its share, in an order and at places that depend on the seed alone."""
    rng = random.Random(seed)
    known = {
        kind: sorted(found, key=lambda e: (e["path"], e["event"], e["n"])) for kind, found in candidates(events).items()
    }
    kinds = [kind for kind, share in KINDS.items() for _ in range(share)]
    rng.shuffle(kinds)
    kinds = (kinds * (1 + count // len(kinds)))[:count]
    return [fault(kind, rng.choice(known[kind]), rng, number) for number, kind in enumerate(kinds)]
