"""The notebooks of a study: sources, not records; one parameters cell, every parameter of it used; code that fits
`lib`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from lib.commands.check import sources
from lib.commands.check.finding import Finding, named

ABSOLUTE = re.compile(r"""["'](/|~|[A-Z]:\\)""")
PASSED = {"study", "scale", "mode", "results_dir", "nonce"}  # what every executed notebook is given
ALL = "from_notebook(globals())"  # reads every parameter that is a section of the run


def read(path: Path) -> tuple[list[dict], list[Finding]]:
    """(cells, findings) of a notebook that must be there."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return cells, ([] if cells else [Finding("error", named(path), "", "no cells", "git checkout -- it")])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [], [Finding("error", named(path), "", f"not a notebook: {error}", "git checkout -- it")]


def findings(path: Path, known: sources.Signatures, run_type: type | None) -> Iterator[Finding]:
    cells, wrong = read(path)
    yield from wrong
    file, trees = named(path), {}
    for number, cell in enumerate(cells, 1):
        if cell["cell_type"] != "code":
            continue
        text, place = "".join(cell["source"]), f"cell {number}"
        if cell.get("outputs") or cell.get("execution_count") is not None:
            yield Finding(
                "error",
                file,
                place,
                "holds outputs: a notebook here is source, its executed copy is the record",
                f".venv/bin/nbstripout --keep-id {file}",
            )
        try:
            trees[number] = ast.parse(text)
        except SyntaxError as error:
            yield Finding(
                "error", file, place, f"does not parse: {error.msg} (line {error.lineno})", "correct the cell"
            )
            continue
        if ABSOLUTE.search(text):
            yield Finding(
                "error", file, place, "holds an absolute path", "take it from a parameter, or from config.ROOT"
            )
        yield from sources.placeholders(trees[number], text, file)
        if run_type is not None:
            yield from sources.wrong_keys(trees[number], file, run_type, place)
    whole = ast.Module(body=[s for tree in trees.values() for s in tree.body], type_ignores=[])
    for number, tree in trees.items():
        imports = [s for s in whole.body if isinstance(s, ast.Import | ast.ImportFrom)]
        yield from sources.wrong_calls(ast.Module([*imports, *tree.body], []), file, "", known, place=f"cell {number}")
    yield from _parameters(file, cells, trees)


def _is_parameters(cell: dict) -> bool:
    return "parameters" in cell.get("metadata", {}).get("tags", ())


def _parameters(file: str, cells: list[dict], trees: dict[int, ast.Module]) -> Iterator[Finding]:
    tagged = [n for n, cell in enumerate(cells, 1) if _is_parameters(cell) and n in trees]
    if len(tagged) != 1:
        yield Finding(
            "error",
            file,
            "",
            f"{len(tagged)} cells tagged `parameters`, expected one",
            "tag the one that papermill is to replace",
        )
        return
    names = [
        t.id for s in trees[tagged[0]].body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)
    ]
    lacking = sorted(PASSED - set(names))
    if lacking:
        yield Finding(
            "error",
            file,
            f"cell {tagged[0]}",
            f"no parameter {lacking[0]}: the runner's value would be ignored",
            f"{lacking[0]} = None",
        )
    others = [tree for number, tree in trees.items() if number != tagged[0]]
    read_names = {
        n.id for tree in others for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }
    takes_all = any(ALL in "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for name in [] if takes_all and "nonce" in read_names else [n for n in names if n not in read_names]:
        if takes_all and name != "nonce":
            continue
        yield Finding(
            "error", file, f"cell {tagged[0]}", f"the parameter {name} is read by no cell", "read it, or remove it"
        )
