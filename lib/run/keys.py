"""Whether something has to be done again: a member's key is made of everything that can change its numbers.

Kept in parts (configuration, code, data, versions, device), so that `plan` can say which part changed.
"""

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

from lib.config import part
from lib.record import digest
from lib.run.preflight import visible_gpus

ROOT = Path(__file__).resolve().parents[2]
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


def _module_file(name: str) -> str | None:
    base = os.path.join(ROOT, *name.split("."))
    return next((path for path in (f"{base}.py", f"{base}/__init__.py") if os.path.exists(path)), None)


def _imports(tree: ast.AST) -> set[str]:
    """The `lib` modules that a syntax tree imports (and names of theirs that are no modules)."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "lib"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def _parsed(path: str, stamp: tuple) -> tuple[str, tuple[str, ...]]:
    """(hash of the code without docstrings and comments, the `lib` modules it imports)."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    imports = filter(
        _module_file, _imports(tree)
    )  # here, once, because most names are functions: `plan` asks for every member
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], tuple(sorted(imports))


def closure(*modules: str) -> dict[str, str]:
    """{module: hash of its code} for `modules` and every `lib` module they import, directly or not."""
    found, queue = {}, list(modules)
    while queue:
        name = queue.pop()
        path = _module_file(name)
        if path is None or name in found:
            continue
        stat = os.stat(path)
        found[name], imports = _parsed(path, (stat.st_mtime_ns, stat.st_size))
        queue += imports
    return dict(sorted(found.items()))


def imported_by(code: str) -> dict[str, str]:
    """`closure` of what a piece of code imports."""
    return closure(*_imports(ast.parse(code)))


def notebook_code(path: Path, *, imports: bool = False) -> str:
    """Hash of a notebook's code cells: editing its text does not re-execute it, editing its code does. `imports`: with
    everything of `lib` that they import (an analysis is no more than what its functions make of the records)."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return digest([code, closure(*set().union(*(_imports(ast.parse(c)) for c in code))) if imports else None])


@functools.cache
def _content(path: Path, stamp: tuple) -> str:
    sha = hashlib.sha256()
    for file in sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()):
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
    return _content(path, tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@functools.cache
def device_kind(gpus: int = 1) -> str:
    """What a member that asks for so many GPUs trains on: 'cpu' with its architecture (0, or no GPU to use), else the
    name of the GPUs that may be used, of each kind that they are of. Asked of NVML: importing torch would cost seconds.
    On a cluster the kinds of its GPUs."""
    if gpus and os.environ.get("STUDY_DEVICES"):
        return os.environ["STUDY_DEVICES"]
    try:
        names = [gpu.name for gpu in visible_gpus(os.environ)] if gpus else []
    except Exception:  # no driver, no library, no permission: whatever NVML says, there is no GPU to use
        names = []
    return ",".join(sorted(set(names))) or f"cpu-{platform.machine()}"


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def member_key(config: dict, seed: int, module: str, mode: str, files: dict[str, str] | None = None) -> dict:
    """The key of one member, in parts. `config`: the run's sections with its cell applied, as plain data; `module`:
    where its training lives; `files`: what other local files it names hold."""
    numbers = {k: v for k, v in config.items() if k not in NOT_NUMBERS}
    numbers["threads"] = config.get("compute", {}).get("threads")  # the order of float sums depends on it
    if config.get("compute", {}).get("strategy") == "fsdp":
        numbers["sharded"] = True
    model, dataset, unheard = config["model"], config["dataset"], silent(module)
    parts = {
        "config": {**{k: v for k, v in _flat(numbers).items() if k not in unheard}, "seed": seed, "mode": mode},
        "code": digest(closure(module)),
        "data": source(dataset["name"], dataset.get("revision")),
        "model": source(model["name"], model.get("revision")),
        "versions": versions(),
        "device": device_kind(config.get("compute", {}).get("gpus", 0)),
        **({"files": files} if files else {}),
    }
    return {**parts, "all": digest(parts)}


def silent(module: str) -> tuple[str, ...]:
    """The dotted keys of which the study of this training function says that no number depends on them
    (NOT_NUMBERS)."""
    return getattr(importlib.import_module(part(module.split(".")[1], "config")), "NOT_NUMBERS", ())


def _flat(value: dict, prefix: str = "") -> dict:
    flat = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


def difference(old: dict | None, new: dict) -> str:
    """Why a record made under `old` does not stand for `new`; the empty string where it does."""
    if not old:
        return "no record"
    if old.get("all") == new["all"]:
        return ""
    reasons = []
    before, after = old.get("config", {}), new["config"]
    changed = [k for k in sorted({*before, *after}) if before.get(k) != after.get(k)]
    reasons += [f"{k} {before.get(k)} -> {after.get(k)}" for k in changed[:2]] + (["…"] if len(changed) > 2 else [])
    reasons += [
        f"{part} changed" for part in ("code", "data", "model", "device", "files") if old.get(part) != new.get(part)
    ]
    if old.get("versions") != new["versions"]:
        reasons += [
            f"{k} {old.get('versions', {}).get(k)} -> {v}"
            for k, v in new["versions"].items()
            if old.get("versions", {}).get(k) != v
        ]
    return ", ".join(reasons)
