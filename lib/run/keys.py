"""Whether something has to be done again: a member's key is made of everything that can change its numbers.

Kept in parts (configuration, code, data, versions, device), so that `plan` can say which part changed.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

from lib import config
from lib.record import digest
from lib.run import reach
from lib.run.preflight import visible_gpus

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "accelerate",
    "numpy",
    "datasets",
    "safetensors",
    "scikit-learn",
    "schedulefree",
    "prodigyopt",
)
# Keys of a run YAML that name, place or mirror a run, or say how its members are chosen: none changes a member's
# numbers.
NOT_NUMBERS = ("run_id", "role", "grid", "seed_list", "optuna", "wandb", "compute")


def notebook_code(path: Path, *, imports: bool = False) -> str:
    """Hash of a notebook's code cells: editing its text does not re-execute it, editing its code does. `imports`: with
    everything of `lib` that they import (an analysis is no more than what its functions make of the records)."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return digest([code, [reach.imported_by(c) for c in code] if imports else None])


@functools.cache
def _content(path: Path, stamp: tuple) -> str:
    """Of the files of `stamp`: [(file, time, size)]."""
    sha = hashlib.sha256()
    for file, _, _ in stamp:
        sha.update(str(file.relative_to(path.parent)).encode())
        with open(file, "rb") as handle:
            while block := handle.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()[:16]


def source(name: str, revision: str | None) -> str:
    """Fingerprint of a data set or model by its name: content of a local path, name and revision of a hub id."""
    path = Path(name)
    if not path.is_absolute() or not path.exists():  # the configuration keeps local paths absolute
        return f"{name}@{revision or 'unpinned'}"
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return _content(path, tuple((f, f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@functools.cache
def device_kind(gpus: int = 1) -> str:
    """What a member that asks for so many GPUs trains on: 'cpu' with its architecture (0, or no GPU to use), else the
    name of the GPUs that may be used, of each kind that they are of. Asked of NVML: importing torch would cost seconds.
    On a cluster the kinds of its GPUs."""
    if gpus and os.environ.get("STUDY_DEVICES"):
        return os.environ["STUDY_DEVICES"]
    names = {gpu.name for gpu in visible_gpus()} if gpus else ()
    return ",".join(sorted(names)) or f"cpu-{platform.machine()}"


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def member_code(study: str, values: dict) -> dict[str, dict[str, str]]:
    """What code a member with these `values` (a run's sections, as plain data) executes: {module: {definition: hash}}."""
    more = ("lib.run.sharding",) if values["compute"]["strategy"] == "fsdp" else ()
    return reach.reach(study, "prepare", "train", values=flat(values), more=more)


def member_key(values: dict, seed: int, study: str, mode: str, files: dict[str, str] | None = None) -> dict:
    """The key of one member, in parts. `values`: the run's sections with its cell applied, as plain data; `files`: what
    other local files it names hold."""
    numbers = {k: v for k, v in values.items() if k not in NOT_NUMBERS}
    model, dataset, compute = values["model"], values["dataset"], values["compute"]
    numbers["threads"] = compute["threads"]  # the order of float sums depends on it
    if compute["strategy"] == "fsdp":
        numbers["sharded"] = True
    unused = config.study_module(study).NOT_NUMBERS  # no number depends on these, says the study
    parts = {
        "config": {**{k: v for k, v in flat(numbers).items() if k not in unused}, "seed": seed, "mode": mode},
        "code": digest(member_code(study, values)),
        "data": source(dataset["name"], dataset.get("revision")),
        "model": source(model["name"], model.get("revision")),
        "versions": versions(),
        "device": device_kind(compute["gpus"]),
        **({"files": files} if files else {}),
    }
    return {**parts, "all": digest(parts)}


def flat(values: dict, prefix: str = "") -> dict:
    """{dotted key: value} of nested dictionaries."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def difference(old: dict | None, new: dict, code: tuple[dict, dict] | None = None) -> str:
    """Why a record made under `old` does not stand for `new`; the empty string where it does. `code`: what its member
    executed and what it would execute, to name the functions that differ."""
    if not old:
        return "no record"
    if old.get("all") == new["all"]:
        return ""
    before, after = old.get("config", {}), new["config"]
    changed = [k for k in sorted({*before, *after}) if before.get(k) != after.get(k)]
    reasons = [f"{k} {before.get(k)} -> {after.get(k)}" for k in changed[:2]] + ["…"] * (len(changed) > 2)
    if old.get("code") != new["code"]:
        named = reach.changed(*code) if code and code[0] else []
        more = f" and {len(named) - 2} more" if len(named) > 2 else ""
        reasons.append("code changed" + f": {', '.join(named[:2])}{more}" * bool(named))
    reasons += [f"{part} changed" for part in ("data", "model", "device", "files") if old.get(part) != new.get(part)]
    then = old.get("versions", {})
    return ", ".join(reasons + [f"{k} {then.get(k)} -> {v}" for k, v in new["versions"].items() if then.get(k) != v])
