"""Whether something has to be done again: a member's key is made of everything that can change its numbers.

Kept in parts (configuration, code, data, versions, device), so that `plan` can say which part changed. The code is what
of `lib` its study's functions can execute, followed from definition to definition by name. A check or a figure in the
same module does not count; neither do docstrings, the texts of exceptions, and annotations. Of a table that the study
declares in BY_NAME ({table: key of the run YAML that picks the entry}) only the entry counts that the run picks, as long
as it is only used as `TABLE[...]` and `in TABLE`. Whatever is not certain counts as a whole module.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from lib import config, hub, record
from lib.config import ROOT
from lib.errors import StudyError
from lib.run.preflight import visible_gpus

ABSENT = ast.Constant(None)
Place = tuple[str, str, bool]  # module, name in it ("" for all of it), whether it is only used as a table
PACKAGES = """torch transformers trl peft bitsandbytes tokenizers accelerate numpy datasets safetensors scikit-learn"""
# Keys of a run YAML that name, place or mirror a run, or say how its members are chosen: none changes a member's
# numbers.
NOT_NUMBERS = ("run_id", "role", "grid", "seed_list", "pilot_seeds", "optuna", "wandb", "compute", "idea")


# ---- the code of `lib`


class Bare(ast.NodeTransformer):
    """Takes away what changes no number: docstrings, what an exception says, and what functions are annotated with."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg)


class Source:
    """A module taken apart: its imports from `lib`, its top-level definitions, and what else its import executes."""

    def __init__(self, text: str, modules: Iterable[str]):
        tree = Bare().visit(ast.parse(text))
        self.imports, self.definitions, self.effects = imports(tree, modules), {}, []
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.definitions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            self.definitions.setdefault(name.id, []).append(node)
            elif not isinstance(node, ast.Import | ast.ImportFrom):
                self.effects.append(node)

    @functools.cached_property
    def hash(self) -> str:
        """Of all of the module's code; asked for every analysis that imports it."""
        return hash_of([node for nodes in self.definitions.values() for node in nodes] + self.effects)


def imports(tree: ast.AST, modules: Iterable[str]) -> dict[str, set[Place]]:
    """{local name: places} of all imports from `lib` in a tree, those in functions too."""
    places = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                places.setdefault(alias.asname or "lib", set()).add((alias.name, "", False))
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                place = (inner, "", False) if inner in modules else (node.module, alias.name, False)
                places.setdefault(alias.asname or alias.name, set()).add(place)
    return {name: mine for name, found in places.items() if (mine := {p for p in found if p[0].split(".")[0] == "lib"})}


class Lib:
    """The modules of `lib` as their files are at this moment."""

    def __init__(self, files: Iterable[tuple[str, int, int]]):
        parts = {file: file.relative_to(ROOT).with_suffix("").parts for file in (Path(path) for path, _, _ in files)}
        self.files = {".".join(names).removesuffix(".__init__"): file for file, names in parts.items()}
        self.source, self.look = functools.cache(self.source), functools.cache(self.look)  # asked for every member
        self.is_section = functools.cache(self.is_section)

    def source(self, module: str) -> Source:
        return Source(self.files[module].read_text(encoding="utf-8"), self.files)

    def look(self, module: str, nodes: tuple[ast.AST, ...], study: str) -> tuple[str, set[Place]]:
        """(hash, the places named) of a piece of a module's code."""
        return hash_of(nodes), self.named(module, nodes, study)

    def named(self, module: str, nodes: Iterable[ast.AST], study: str = "") -> set[Place]:
        """The places that code names. A module that is used as a value, or named in a string, counts as a whole; where
        `study_module` is called, every attribute may be one of the module `study`."""
        source, parts = self.source(module), [part for node in nodes for part in ast.walk(node)]
        pairs = [pair for p in parts if isinstance(p, ast.Compare) for pair in zip(p.ops, p.comparators, strict=True)]
        tables = {id(value) for operator, value in pairs if isinstance(operator, ast.In | ast.NotIn)}
        tables |= {id(part.value) for part in parts if isinstance(part, ast.Subscript)}
        asks = any(isinstance(part, ast.Name) and part.id == "study_module" for part in parts)
        of_study = self.source(study).definitions if asks else ()
        places, passed = set(), set()  # `passed`: parts of what has been looked at; ast.walk goes from whole to part
        for part in parts:
            is_table, known = id(part) in tables, set()
            if id(part) in passed:
                continue
            if isinstance(part, ast.AnnAssign):
                passed |= set(map(id, ast.walk(part.annotation)))
            elif isinstance(part, ast.Name):
                known = source.imports.get(part.id, set())
                known = known | {(module, part.id, False)} if part.id in source.definitions else known
            elif isinstance(part, ast.Attribute):
                whole = source.imports.get(part.value.id, ()) if isinstance(part.value, ast.Name) else ()
                known = {(other, part.attr, False) for other, name, _ in whole if not name}
                passed |= {id(part.value)} if known else set()
                known = known | {(study, part.attr, False)} if part.attr in of_study else known
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                known = {(name, "", False) for name in [part.value.split(":")[0]] if name in self.files}
            places |= {(other, name, is_table) for other, name, _ in known}
        return places

    def is_section(self, module: str, name: str) -> bool:
        """Whether a class holds values of a run YAML (a pydantic model)."""
        nodes = self.source(module).definitions.get(name, ()) if module in self.files else ()
        bases = [base for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases]
        places = self.named(module, bases) - {(module, name, False)}
        return "'BaseModel'" in "".join(map(ast.dump, bases)) or any(self.is_section(*place[:2]) for place in places)

    def section(self, module: str, node: ast.ClassDef) -> tuple[list[ast.AST], list[Place]]:
        """Of a section: its methods, but for those that check (its values are in the key), and the sections it holds or
        comes from."""
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        kept = [n for n in methods if not any("validator" in ast.dump(d) for d in n.decorator_list)]
        places = self.named(module, [*node.bases, *(n.annotation for n in node.body if isinstance(n, ast.AnnAssign))])
        return kept, [(other, name, False) for other, name, _ in places if self.is_section(other, name)]


def current() -> Lib:
    folders = [ROOT / "lib", *(entry for entry in os.scandir(ROOT / "lib") if entry.is_dir())]
    files = [(e.path, e.stat()) for folder in folders for e in os.scandir(folder) if e.name.endswith(".py")]
    return _read(tuple(sorted((path, stat.st_mtime_ns, stat.st_size) for path, stat in files)))


_read = functools.lru_cache(maxsize=1)(Lib)  # until a file changes


def hash_of(nodes: Iterable[ast.AST]) -> str:
    return hashlib.sha256("".join(map(ast.dump, nodes)).encode()).hexdigest()[:8]


def modules(*names: str) -> dict[str, str]:
    """{module: hash of its code} for these and every module of `lib` that they import, directly or not."""
    lib, hashes, todo = current(), {}, list(names)
    while todo:
        name = todo.pop()
        if name not in hashes and name in lib.files:
            source = lib.source(name)
            hashes[name] = source.hash
            todo += [module for places in source.imports.values() for module, _, _ in places]
    return dict(sorted(hashes.items()))


def entry(node: ast.AST, key) -> ast.AST | None:
    """What a table (a dictionary, or a tuple or set of names, written out) says of this key; None where that is not
    certain."""
    table = getattr(node, "value", None)
    names = table.keys if isinstance(table, ast.Dict) else getattr(table, "elts", [])
    values = table.values if isinstance(table, ast.Dict) else names
    written = {n.value: value for n, value in zip(names, values, strict=True) if isinstance(n, ast.Constant)}
    return written.get(key, ABSENT) if written and len(written) == len(names) and key is not None else None


def reach(study: str, *functions: str, values: dict | None = None, more: tuple = ()) -> dict[str, dict[str, str]]:
    """{module: {definition: hash}} of all that these functions of a study can execute, given `values` ({dotted key:
    value}) of a run; `more`: modules that count besides. Nothing of `lib.run` counts but what is named there."""
    tables = config.study_module(study).BY_NAME.items()
    entries = tuple((table, (values or {}).get(key)) for table, key in tables)
    return _reach(current(), f"lib.{study}.study", functions, entries, more)


@functools.lru_cache(maxsize=256)
def _reach(lib: Lib, study: str, functions: tuple, entries: tuple, more: tuple) -> dict[str, dict[str, str]]:
    picked, seen, found = dict(entries), set(), {}
    todo = [(study, name, False) for name in (*functions, "Run")] + [(module, "", False) for module in more]
    while todo:
        place = module, name, is_table = todo.pop()
        if place in seen or module not in lib.files or (module.startswith("lib.run") and module not in more):
            continue
        seen.add(place)
        source = lib.source(module)
        label, parts = name, source.definitions.get(name, [])
        if not name:
            todo += [(module, each, False) for each in source.definitions]
        elif not parts:
            places = source.imports.get(name) or {(module, "", False)}
            todo += [(other, inner, is_table) for other, inner, _ in places]
        elif len(parts) == 1 and isinstance(parts[0], ast.ClassDef) and lib.is_section(module, name):
            parts, held = lib.section(module, parts[0])
            todo += held
        elif len(parts) == 1 and is_table and name in picked and (only := entry(parts[0], picked[name])):
            label, parts = f"{name}[{picked[name]}]", [only]
        pieces = {label: parts} if module in found else {"(import)": source.effects, label: parts}
        found.setdefault(module, {})
        for label, nodes in pieces.items():
            if nodes:
                found[module][label], places = lib.look(module, tuple(nodes), study)
                todo += places
    return {module: dict(sorted(names.items())) for module, names in sorted(found.items()) if names}


def changed(old: dict, new: dict) -> list[str]:
    """What differs between two of `reach`, as `lib/x.py f`."""
    before, after = ({(m, n, h) for m, names in each.items() for n, h in names.items()} for each in (old, new))
    places = sorted({(module, name) for module, name, _ in before ^ after})
    return [f"{module.replace('.', '/')}.py {name}" for module, name in places]


# ---- data, models, packages, the device


def notebook_code(path: Path, *, with_imports: bool = False) -> str:
    """Hash of a notebook's code cells: editing its text does not re-execute it, editing its code does. `with_imports`:
    with everything of `lib` that they import (an analysis is no more than what its functions make of the records)."""
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, LookupError) as error:
        found = f"no notebook: {type(error).__name__}: {error}"
        raise StudyError(str(path), found, "the JSON of one", f"git checkout -- {path}") from None
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    imported = [imports(ast.parse(c), current().files).values() for c in code] if with_imports else []
    own = [modules(*{module for places in each for module, _, _ in places}) for each in imported]
    return record.digest([code, own if with_imports else None])


@functools.cache
def _content(path: Path, stamp: tuple) -> str:
    """Of the files of `stamp`: [(file, time, size)]."""
    return record.digest([[str(file.relative_to(path.parent)), record.sha256(file)] for file, _, _ in stamp])


def source(name: str, revision: str | None) -> str:
    """Fingerprint of a data set or model by its name: content of a local path or of a fetched model, name and revision
    of a hub id."""
    path = hub.fetched(name) or Path(name)
    if not path.is_absolute() or not path.exists():  # the configuration keeps local paths absolute
        return f"{name}@{revision or 'unpinned'}"
    visible = (p for p in path.rglob("[!.]*") if p.is_file())  # a .DS_Store is nobody's data
    files = [path] if path.is_file() else sorted(visible)
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
    installed = {package: importlib.metadata.version(package) for package in PACKAGES.split()}
    return {"python": platform.python_version(), **installed}


def sources(run) -> dict:
    """Fingerprints of what a run reads: its data, its model, and the other local files that it names."""
    values, named = config.dump(run), config.study_module(run.study).PATHS
    paths = {key: config.get(values, key) for key in sorted({*named} - {"model.name", "dataset.name"})}
    data, model = (source(section.name, section.revision) for section in (run.dataset, run.model))
    files = {key: source(path, None) for key, path in paths.items() if config.is_local(path)}
    return {"data": data, "model": model, "files": files}


# ---- keys


def member_code(member) -> dict[str, dict[str, str]]:
    """What code of `lib` a member executes: {module: {definition: hash}}. Kept with its record, so that `plan` can name
    what changed."""
    more = ("lib.run.sharding",) if member.run.compute.strategy == "fsdp" else ()
    entries = ("prepare", "train", *(["adopt"] if member.run.idea else []))
    return reach(member.run.study, *entries, values=flat(config.dump(member.run)), more=more)


def member_key(member) -> dict:
    """What a member's numbers depend on, in parts, with a digest of `all`."""
    run, numbers = member.run, {k: v for k, v in config.dump(member.run).items() if k not in NOT_NUMBERS}
    numbers["threads"] = run.compute.threads  # the order of float sums depends on it
    numbers |= {"sharded": True} if run.compute.strategy == "fsdp" else {}
    unused = config.study_module(run.study).NOT_NUMBERS  # no number depends on these, says the study
    settings = {k: v for k, v in flat(numbers).items() if k not in unused} | {"seed": member.seed, "mode": run.mode}
    made_by = {"code": record.digest(member_code(member)), "versions": versions()}
    idea = {"idea": source(run.idea, None)} if run.idea else {}
    parts = {"config": settings, **made_by, **sources(run), **idea, "device": device_kind(run.compute.gpus)}
    return {**parts, "all": record.digest(parts)}


def measurement_key(run, function: str) -> str:
    """A digest of all that a measurement of the study's depends on, but the machine."""
    numbers = {k: v for k, v in config.dump(run).items() if k not in NOT_NUMBERS}
    code = reach(run.study, function, values=flat(numbers))
    return record.digest([numbers, run.mode, code, versions(), sources(run)])


def inputs_key(run, function: str = "prepare") -> str:
    """A digest of all that what a run's members share is made of, or that the study's `function` makes of the same."""
    values, own = config.dump(run), config.study_module(run.study).MEMBER_KEYS
    sections = {s: {k: v for k, v in values[s].items() if f"{s}.{k}" not in own} for s in ("model", "dataset")}
    place = {"scale": run.scale, "mode": run.mode, "threads": run.compute.threads}
    if run.dataset.name in hub.SAMPLED:
        place["max_new_tokens"] = run.evaluation.max_new_tokens  # of the answers that pairs are made of
    code = reach(run.study, function, values=flat(sections))
    return record.digest([sections, place, code, versions(), device_kind(run.compute.gpus), sources(run)])


def flat(values: dict, prefix: str = "") -> dict:
    """{dotted key: value} of nested dictionaries."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def difference(old: dict, new: dict, ran: dict | None = None, runs: dict | None = None) -> str:
    """Why a record made under `old` does not stand for `new`; the empty string where it does. What its member `ran` and
    what it `runs` now, of `member_code`, name the functions that differ."""
    if old.get("all") == new["all"]:
        return ""
    before, after = old.get("config", {}), new["config"]
    other = [k for k in sorted({*before, *after}) if before.get(k) != after.get(k)]
    reasons = [f"{k} {before.get(k)} -> {after.get(k)}" for k in other[:2]] + ["…"] * (len(other) > 2)
    if old.get("code") != new["code"]:
        named = changed(ran, runs) if ran else []
        more = f" and {len(named) - 2} more" if len(named) > 2 else ""
        reasons.append("code changed" + f": {', '.join(named[:2])}{more}" * bool(named))
    parts = ("data", "model", "device", "files", "idea")
    reasons += [f"{part} changed" for part in parts if old.get(part) != new.get(part)]
    then = old.get("versions", {})
    return ", ".join(reasons + [f"{k} {then.get(k)} -> {v}" for k, v in new["versions"].items() if then.get(k) != v])
