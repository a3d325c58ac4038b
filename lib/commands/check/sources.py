"""The code that a run reaches: it parses, holds no placeholder, and calls its own helpers and its run's keys as they
are.

Read as syntax trees, nothing is imported: a fault that an import would hide (a call in a branch that a trial does not
take) shows all the same. What cannot be resolved (a call through a variable, `*arguments`) is left to the dynamic part.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from lib.commands.check.finding import Finding, named
from lib.config import ROOT, Section, section_type

UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b")
TRANSPARENT = {
    "contextmanager",
    "cache",
    "lru_cache",
    "no_grad",
    "wraps",
    "staticmethod",
}  # decorators that keep a signature
Signatures = dict[
    str, dict[str, ast.arguments]
]  # module -> function -> its parameters (a class: those of its __init__)


def read(path: Path) -> tuple[ast.Module | None, str, list[Finding]]:
    """(tree, text, findings) of a Python file that must be there."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        place = f"line {error.lineno}" if isinstance(error, SyntaxError) else ""
        return (
            None,
            "",
            [Finding("error", named(path), place, f"does not parse: {error.args[0]}", "git diff shows what changed")],
        )
    if not tree.body and path.name != "__init__.py":
        return None, text, [Finding("error", named(path), "", "empty", "git checkout -- it, or write it")]
    return tree, text, []


def module_files(modules: list[str]) -> dict[str, Path]:
    return {
        name: path
        for name in modules
        for path in (ROOT.joinpath(*name.split(".")).with_suffix(".py"), ROOT.joinpath(*name.split("."), "__init__.py"))
        if path.exists()
    }


def findings(modules: dict[str, Path], run_types: dict[str, type]) -> tuple[list[Finding], Signatures]:
    """Of the modules `{name: file}`, and the functions they have; `run_types`: {study: its Run}."""
    found: list[Finding] = []
    trees: dict[str, ast.Module] = {}
    for name, path in modules.items():
        tree, text, wrong = read(path)
        found += wrong
        if tree is not None:
            trees[name] = tree
            found += placeholders(tree, text, named(path))
    known = signatures(trees)
    for name, tree in trees.items():
        study = name.split(".")[1] if name.count(".") > 1 else ""
        found += wrong_calls(tree, named(modules[name]), name, known)
        if study in run_types:
            found += wrong_keys(tree, named(modules[name]), run_types[study])
    return found, known


# ---- placeholders


def placeholders(tree: ast.AST, text: str, file: str) -> Iterator[Finding]:
    """TODO comments, functions of nothing but `pass` or `...`, NotImplementedError."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and UNFINISHED.search(token.string):
            yield Finding(
                "error",
                file,
                f"line {token.start[0]}",
                f"unfinished: {token.string.strip()}",
                "finish it, or open an issue",
            )
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _is_empty(node.body):
            yield Finding(
                "error",
                file,
                f"line {node.lineno}",
                f"{node.name}() has no body",
                "write it, or say in a docstring why there is nothing to do",
            )
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node):
            yield Finding(
                "error",
                file,
                f"line {node.lineno}",
                "raises NotImplementedError",
                "write it, or refuse the setting that leads here in the study's config.check",
            )


def _is_empty(body: list[ast.stmt]) -> bool:
    """Nothing but `pass` and `...`, behind a docstring or not. A docstring alone says that nothing is to be done."""
    rest = [
        s
        for s in body
        if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) and isinstance(s.value.value, str))
    ]
    return bool(rest) and all(
        isinstance(s, ast.Pass)
        or isinstance(s, ast.Expr)
        and isinstance(s.value, ast.Constant)
        and s.value.value is ...
        for s in rest
    )


# ---- calls


def signatures(trees: dict[str, ast.Module]) -> Signatures:
    known: Signatures = {}
    for module, tree in trees.items():
        mine = known.setdefault(module, {})
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and all(_decorator(d) in TRANSPARENT for d in node.decorator_list):
                mine[node.name] = node.args
            if isinstance(node, ast.ClassDef) and not node.decorator_list:
                made = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
                if made is not None:
                    mine[node.name] = ast.arguments(
                        **{**{f: getattr(made.args, f) for f in made.args._fields}, "args": made.args.args[1:]}
                    )
    return known


def _decorator(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def wrong_calls(
    tree: ast.AST, file: str, module: str, known: Signatures, offset: int = 0, place: str = ""
) -> Iterator[Finding]:
    """Calls of functions of `lib` with arguments that they do not take, or without one that they need."""
    names = _imported(tree, known)
    for call, bound in _calls(tree):
        target = call.func
        if isinstance(target, ast.Name) and target.id not in bound:
            parameters = known.get(module, {}).get(target.id) or names.get(target.id)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id not in bound:
            parameters = (
                known.get(names.get(target.value.id, ""), {}).get(target.attr)
                if isinstance(names.get(target.value.id), str)
                else None
            )
        else:
            continue
        wrong = misfit(call, parameters) if isinstance(parameters, ast.arguments) else ""
        if wrong:
            yield Finding(
                "error",
                file,
                place or f"line {call.lineno + offset}",
                f"{ast.unparse(target)}() {wrong}",
                f"{ast.unparse(target)}({ast.unparse(parameters)})",
            )


def _imported(tree: ast.AST, known: Signatures) -> dict[str, str | ast.arguments]:
    """{name: the module of `lib` that it is, or the parameters of the function that it is}."""
    names: dict[str, str | ast.arguments] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found = whole if whole in known else known.get(node.module, {}).get(alias.name)
                if found is not None:
                    names[alias.asname or alias.name] = found
    return names


def _calls(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[tuple[ast.Call, frozenset[str]]]:
    """Every call with the names that its enclosing functions bind themselves (those are not what was imported)."""
    for child in ast.iter_child_nodes(node):
        inner = bound
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = (
                bound
                | {a.arg for a in ast.walk(child.args) if isinstance(a, ast.arg)}
                | {n.id for n in ast.walk(child) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            )
        if isinstance(child, ast.Call):
            yield child, inner
        yield from _calls(child, inner)


def misfit(call: ast.Call, parameters: ast.arguments) -> str:
    """What is wrong with the arguments of `call`; empty where they fit, or where it cannot be told."""
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        return ""
    positional = [a.arg for a in (*parameters.posonlyargs, *parameters.args)]
    only = [a.arg for a in parameters.kwonlyargs]
    if len(call.args) > len(positional) and parameters.vararg is None:
        return f"takes {len(positional)} positional arguments, found {len(call.args)}"
    given = set(positional[: len(call.args)]) | {k.arg for k in call.keywords}
    strange = [k.arg for k in call.keywords if k.arg not in (*positional, *only)]
    if strange and parameters.kwarg is None:
        return f"has no argument {strange[0]!r}"
    needed = positional[: len(positional) - len(parameters.defaults)] + [
        a for a, default in zip(only, parameters.kw_defaults, strict=True) if default is None
    ]
    lacking = [name for name in needed if name not in given]
    return f"is called without {lacking[0]!r}" if lacking else ""


# ---- keys of the run


def wrong_keys(tree: ast.AST, file: str, run_type: type, place: str = "") -> Iterator[Finding]:
    """`run.<section>.<key>` that the study's YAML does not have: what would be an AttributeError hours later."""
    for node in ast.walk(tree):
        path = _chain(node) if isinstance(node, ast.Attribute) else None
        if not path:
            continue
        kind, walked = run_type, []
        for name in path:
            walked.append(name)
            if name in kind.model_fields:
                kind = section_type(kind.model_fields[name].annotation)
                if kind is None or not issubclass(kind, Section):
                    break
            elif not hasattr(kind, name):
                near = ", ".join(kind.model_fields)
                yield Finding(
                    "error",
                    file,
                    place or f"line {node.lineno}",
                    f"reads run.{'.'.join(walked)}, which no YAML has",
                    f"one of: {near}",
                )
                break
            else:
                break


def _chain(node: ast.expr) -> list[str]:
    """The attributes behind the last thing named `run`: member.run.loss.beta -> [loss, beta]."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        if node.attr == "run":
            return names[::-1]
        names.append(node.attr)
        node = node.value
    return names[::-1] if isinstance(node, ast.Name) and node.id == "run" else []
