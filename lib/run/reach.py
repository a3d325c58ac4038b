"""What code of `lib` a study's functions can execute: followed from definition to definition by name.

A check or a figure in the same module does not count, the texts of exceptions do not, annotations do not. Of a table
that the study declares in BY_NAME ({table: key of the run YAML that picks the entry}) only the entry counts that the
run picks, as long as it is only used as `TABLE[...]` and `in TABLE`. Whatever is not certain counts as a whole module.
"""

import ast
import functools
import hashlib
import importlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
ABSENT = ast.Constant(None)
Place = tuple[str, str, str]  # module, name in it ("" for all of it), "item" where it is used as a table


@functools.cache  # until a file changes: `_stamp`
def module_file(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


def imports(tree: ast.AST) -> dict[str, set[tuple[str, str]]]:
    """{local name: {(module, name in it)}} of all imports from `lib` in a tree; the name is "" for a module itself."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lib":
                    found.setdefault(alias.asname or "lib", set()).add((alias.name, ""))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                target = (inner, "") if module_file(inner) else (node.module, alias.name)
                found.setdefault(alias.asname or alias.name, set()).add(target)
    return found


class _WithoutTexts(ast.NodeTransformer):
    """Takes away what changes no number: docstrings, and the texts of exceptions."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        first = node.body[0] if isinstance(node, DOCUMENTED) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:]  # pyright: ignore[reportAttributeAccessIssue]
        return super().generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                part.value = ""
        return node


class Source:
    """A module taken apart: its imports from `lib`, its top-level definitions, and what else its import executes."""

    def __init__(self, text: str):
        tree = _WithoutTexts().visit(ast.parse(text))
        self.imports, self.definitions, self.effects = imports(tree), {}, []
        self.known = {}  # {nodes: (hash, names)}: asked for every member
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


@functools.cache
def source_of(module: str) -> Source | None:
    path = module_file(module)
    return None if path is None else Source(path.read_text(encoding="utf-8"))


def _stamp() -> tuple:
    """What tells one state of `lib` from another; what was read of an earlier one is forgotten."""
    folders = [ROOT / "lib", *(entry for entry in os.scandir(ROOT / "lib") if entry.is_dir())]
    files = (entry for folder in folders for entry in os.scandir(folder) if entry.name.endswith(".py"))
    stamp = (str(ROOT), *((entry.path, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in files))
    if _stamps[-1:] != [stamp]:
        _stamps[:] = [stamp]
        for known in (module_file, source_of, _is_section):
            known.cache_clear()
    return stamp


_stamps: list[tuple] = []


def _hash(nodes: list[ast.AST]) -> str:
    return hashlib.sha256("".join(map(ast.dump, nodes)).encode()).hexdigest()[:8]


def modules(*names: str) -> dict[str, str]:
    """{module: hash of its code} for these and every module of `lib` that they import, directly or not."""
    _stamp()
    found, queue = {}, list(names)
    while queue:
        name = queue.pop()
        if name not in found and (source := source_of(name)):
            definitions = [node for nodes in source.definitions.values() for node in nodes]
            found[name] = _hash(definitions + source.effects)
            queue += {module for targets in source.imports.values() for module, _ in targets}
    return dict(sorted(found.items()))


def imported_by(code: str) -> dict[str, str]:
    """`modules` of what a piece of code imports."""
    return modules(*{module for targets in imports(ast.parse(code)).values() for module, _ in targets})


class _Names(ast.NodeVisitor):
    """The places that a piece of code names. A module that is used as a value, or named in a string, counts as a
    whole."""

    def __init__(self, module: str, study: list[str]):
        """`study`: modules known by name at run time (study_module), whose attributes count by their name alone."""
        self.module, self.source, self.study = module, source_of(module), study
        self.found: set[Place] = set()

    def visit_Name(self, node: ast.Name, how: str = "") -> None:
        if node.id in self.source.definitions:
            self.found.add((self.module, node.id, how))
        self.found |= {(*target, how) for target in self.source.imports.get(node.id, ())}

    def visit_Attribute(self, node: ast.Attribute, how: str = "") -> None:
        local = node.value.id if isinstance(node.value, ast.Name) else ""
        named = {module for module, name in self.source.imports.get(local, ()) if not name}
        self.found |= {(module, node.attr, how) for module in named}
        self.found |= {(module, node.attr, how) for module in self.study if node.attr in source_of(module).definitions}
        if not named:
            self.visit(node.value)

    def visit_table(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name):
            self.visit_Name(node, "item")
        elif isinstance(node, ast.Attribute):
            self.visit_Attribute(node, "item")
        else:
            self.visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit_table(node.value)
        self.visit(node.slice)

    def visit_Compare(self, node: ast.Compare) -> None:
        self.visit(node.left)
        for operator, value in zip(node.ops, node.comparators, strict=True):
            if isinstance(operator, ast.In | ast.NotIn):
                self.visit_table(value)
            else:
                self.visit(value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Only which exception: what its text is made of changes no number."""
        if node.exc is not None:
            self.visit(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)

    def visit_Constant(self, node: ast.Constant) -> None:
        name = node.value.split(":")[0] if isinstance(node.value, str) else ""
        if name.startswith("lib.") and module_file(name):
            self.found.add((name, "", ""))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)


def _looked_at(module: str, nodes: list[ast.AST], study: list[str]) -> tuple[str, set[Place]]:
    """(hash, the places named) of a piece of a module's code."""
    known, which = source_of(module).known, tuple(map(id, nodes))
    if which not in known:
        asks = any(isinstance(n, ast.Name) and n.id == "study_module" for node in nodes for n in ast.walk(node))
        visitor = _Names(module, study if asks else [])
        for node in nodes:
            visitor.visit(node)
        known[which] = _hash(nodes), visitor.found
    return known[which]


def _classes(module: str, nodes: list[ast.AST]) -> set[tuple[str, str]]:
    """(module, name) of everything that bases and annotations name."""
    imported, found = source_of(module).imports, set()
    for node in (part for each in nodes for part in ast.walk(each)):
        if isinstance(node, ast.Name):
            found |= imported.get(node.id) or {(module, node.id)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {(home, node.attr) for home, name in imported.get(node.value.id, ()) if not name}
    return found


@functools.cache
def _is_section(module: str, name: str) -> bool:
    """Whether a class holds values of a run YAML (a pydantic model)."""
    definitions = source_of(module).definitions.get(name, ()) if source_of(module) else ()
    bases = [base for node in definitions if isinstance(node, ast.ClassDef) for base in node.bases]
    places = _classes(module, bases) - {(module, name)}
    return any(place[1] == "BaseModel" or _is_section(*place) for place in places)


def _section(module: str, node: ast.ClassDef) -> tuple[list[ast.AST], set[Place]]:
    """Of a section: its methods, but for those that check (its values are in the key), and the sections it holds or
    comes from."""
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    kept = [n for n in methods if not any("validator" in ast.dump(d) for d in n.decorator_list)]
    fields = [n.annotation for n in node.body if isinstance(n, ast.AnnAssign)]
    return kept, {(*place, "") for place in _classes(module, [*node.bases, *fields]) if _is_section(*place)}


def _entry(node: ast.AST, key) -> ast.AST | None:
    """What a table (a dictionary, or a tuple or set of names, written out) says of this key; None where that is not
    certain."""
    table = getattr(node, "value", None)
    names = table.keys if isinstance(table, ast.Dict) else getattr(table, "elts", None)
    if key is None or names is None or not all(isinstance(name, ast.Constant) for name in names):
        return None
    index = next((i for i, name in enumerate(names) if name.value == key), None)  # pyright: ignore[reportAttributeAccessIssue]
    if index is None:
        return ABSENT
    return table.values[index] if isinstance(table, ast.Dict) else names[index]


def homes(study: str) -> list[str]:
    """The modules in which a study's own `prepare`, `train` and `Run` may stand."""
    return [m for part in ("study", "config", "member", "inputs") if source_of(m := f"lib.{study}.{part}")]


def reach(study: str, *functions: str, values: dict | None = None, more: tuple = ()) -> dict[str, dict[str, str]]:
    """{module: {definition: hash}} of all that these functions of a study can execute, given `values` ({dotted key:
    value}) of a run; `more`: modules that count besides. Nothing of `lib.run` counts but what is named there."""
    stamp, values = _stamp(), values or {}
    tables = getattr(importlib.import_module(homes(study)[0]), "BY_NAME", {})
    return _reach(study, functions, tuple((table, values.get(key)) for table, key in tables.items()), more, stamp)


@functools.lru_cache(maxsize=256)
def _reach(study: str, functions: tuple, entries: tuple, more: tuple, stamp: tuple) -> dict[str, dict[str, str]]:
    own, picked = homes(study), dict(entries)
    todo = [(m, name, "") for name in (*functions, "Run") for m in own if name in source_of(m).definitions]
    todo += [(*place, "") for m in own for place in source_of(m).imports.get("Run", ())]
    todo += [(module, "", "") for module in more]
    seen, found = set(), {}
    while todo:
        place = module, name, how = todo.pop()
        source = source_of(module)
        if place in seen or source is None or (module.startswith("lib.run") and module not in more):
            continue
        seen.add(place)
        if module not in found:
            code, named = _looked_at(module, source.effects, own)
            found[module] = {"(import)": code} if source.effects else {}
            todo += named
        if not name:
            todo += [(module, each, "") for each in source.definitions]
        elif name not in source.definitions:
            todo += [(*target, how) for target in source.imports.get(name, ())] or [(module, "", "")]
        for node in source.definitions.get(name, ()):
            parts, label = [node], name
            if isinstance(node, ast.ClassDef) and _is_section(module, name):
                parts, further = _section(module, node)
                todo += further
            elif how and name in picked and (entry := _entry(node, picked[name])):
                parts, label = [entry], f"{name}[{picked[name]}]"
            code, named = _looked_at(module, parts, own)
            todo += named
            if parts:
                found[module][label] = code
    return {module: dict(sorted(names.items())) for module, names in sorted(found.items()) if names}


def changed(old: dict, new: dict) -> list[str]:
    """What differs between two of `reach`, as `lib/x.py f`."""
    return [
        f"{module.replace('.', '/')}.py {name}"
        for module in sorted({*old, *new})
        for name in sorted({*old.get(module, {}), *new.get(module, {})})
        if old.get(module, {}).get(name) != new.get(module, {}).get(name)
    ]
