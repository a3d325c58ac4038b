"""From a design to the texts of its run YAMLs: methods x models x data sets (x variants) of each scale."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel, TypeAdapter, ValidationError

from lib import config
from lib.commands.compose import layout
from lib.commands.compose.design import FACTORS, Design, Edit, Factor
from lib.config import RunId, did_you_mean, parse_yaml, section_type
from lib.errors import StudyError

MARK = re.compile(r"<(\w+)>")
MADE = "Written by ./run_all.sh compose from {}: change it there."


@dataclass(frozen=True)
class Cell:
    """One run: a scale and one level of each factor, by name and as it is in the design."""

    scale: str
    names: dict[str, str]
    levels: dict[str, Factor]

    def last(self, field: str) -> str | None:
        """`role`, `name`: what the last of method, model, data set and variant says."""
        said = [getattr(self.levels[kind].level, field) for kind in FACTORS if kind in self.levels]
        return next((value for value in reversed(said) if value is not None), None)

    def __str__(self) -> str:
        return " x ".join(self.names.values())


def cells(design: Design) -> Iterator[Cell]:
    """The combinations that no `only` rules out, scale by scale, in the order of the methods."""
    for scale in design.scales:
        factors = design.factors(scale)
        for names in itertools.product(*factors.values()):
            chosen = dict(zip(factors, names, strict=True))
            levels = {kind: factors[kind][name] for kind, name in chosen.items()}
            if all(_allows(kind, levels[kind].level.only, design, scale, chosen) for kind in chosen):
                yield Cell(scale, chosen, levels)


def _allows(own: str, only: tuple[str, ...], design: Design, scale: str, chosen: dict[str, str]) -> bool:
    """Whether an `only` leaves this run: its scale is one that is named or that has a model, data set or variant named,
    and of each kind of which some are named here, the chosen one is."""
    named = {
        s: {kind: set(only) & set(levels) for kind, levels in design.factors(s).items() if kind != own}
        for s in design.scales
    }
    scales = {s for s in ("laptop", "paper") if s in only}
    scales |= {s for s, kinds in named.items() if any(names for kind, names in kinds.items() if kind != "method")}
    return (not scales or scale in scales) and all(
        not names or chosen[kind] in names for kind, names in named[scale].items()
    )


def role_numbers(design: Design) -> dict[str, str]:
    """{method: proposed, comparative-1, comparative-2, ...} in the design's order; a number where a role has several,
    and for `comparative` always, as published."""
    numbers: dict[str, str] = {}
    for role in ("proposed", "comparative", "ablation", "control"):
        mine = [name for name, factor in design.methods.items() if factor.level.role == role]
        for i, name in enumerate(mine, 1):
            numbers[name] = role if role == "proposed" and len(mine) == 1 else f"{role}-{i}"
    return numbers


def run_id(design: Design, cell: Cell, numbers: dict[str, str]) -> str:
    pattern = cell.last("name") or design.scales[cell.scale].name
    known = {**cell.names, "role": numbers[cell.names["method"]]}
    for found in MARK.findall(pattern):
        if found not in known:
            near = did_you_mean(found, list(known))
            raise StudyError(
                f"{design.path}: scales.{cell.scale}.name",
                f"<{found}>",
                "<" + ">, <".join(known) + ">",
                near if near != "remove it" else "",
            )
    name = MARK.sub(lambda match: known[match[1]], pattern)
    try:
        return TypeAdapter(RunId).validate_python(name)
    except ValidationError:  # a path, say
        raise StudyError(
            f"{design.path}: scales.{cell.scale}.name",
            f"{name!r} as a run_id",
            "a file name of letters, digits and . _ + -",
            "change the name",
        ) from None


def texts(design: Design) -> dict[str, str]:
    """{laptop/<run_id>.yaml: its text}. StudyError for a key that the base has not, and for two runs of one name."""
    numbers, made, owner = role_numbers(design), {}, {}
    for cell in cells(design):
        name = run_id(design, cell, numbers)
        file = f"{cell.scale}/{name}.yaml"
        if (first := owner.setdefault(file.lower(), cell)) is not cell:  # some disks do not tell A from a
            raise StudyError(
                f"{design.path}: scales.{cell.scale}.name",
                f"{name} is the name of {first} and of {cell}",
                "a name of its own for each run",
                "<role>-<model>-<dataset>-<variant> tells all apart",
            )
        made[file] = text(design, cell, name)
    if not made:
        raise StudyError(f"{design.path}: only", "rules out every run", "a method for some scale", "remove an `only`")
    return made


def text(design: Design, cell: Cell, name: str) -> str:
    """The run YAML of a cell."""
    scale = design.scales[cell.scale]
    tree, values = copy.deepcopy(scale.base), copy.deepcopy(scale.values)
    order = _order(config.study_module(design.study).Run)
    for edit in edits(design, cell):
        there = layout.locate(tree, edit.key)
        if bool(there) is (edit.verb == "add"):
            near = did_you_mean(edit.key, _keys(values))
            found, mend = (
                ("has this key", "write it under set:")
                if there
                else (
                    "has no such key",
                    near if near != "remove it" else "where the study knows it, write it under add:",
                )
            )
            raise StudyError(
                edit.where,
                f"{edit.key}: the base of {cell.scale} {found} ({cell})",
                "a key that it has not" if there else "a key that it has",
                mend,
            )
        home, last = _reach(values, edit.key)
        if edit.verb == "drop":
            layout.drop(tree, edit.key)
            del home[last]
            continue
        if there:
            layout.put(tree, edit.key, edit.entry, edit.where)
        else:
            layout.add(tree, edit.key, edit.entry, order, edit.where)
        home[last] = copy.deepcopy(edit.value)
    head = {"run_id": name, "method": cell.names["method"], "role": cell.last("role")}
    about = [line for level in cell.levels.values() for line in (level.level.about or "").strip().splitlines()]
    lines = [f"# {line}".rstrip() for line in (*about, MADE.format("../design.yaml"))]
    lines += [
        f"{key}: {value if parse_yaml(value, key) == value else json.dumps(value)}" for key, value in head.items()
    ]
    body = layout.write(tree)
    written = "\n".join([*lines, *([] if body[:1] == [""] else [""]), *body]) + "\n"
    if parse_yaml(written, f"{design.path}: {name}") != {**head, **values}:
        raise StudyError(
            f"{design.path}: {name}",
            "a layout that compose cannot carry over",
            "a value on its key's line, or as a block below it",
            "write values of several lines in block form",
        )
    return written


def edits(design: Design, cell: Cell) -> list[Edit]:
    """What this run takes, wider keys first and drops last. What stands under `when` wins over what is always so; where
    two others set one key neither wins, and that is refused; what one drops the settings of others do not bring
    back."""
    always: dict[str, Edit] = {}
    special: dict[str, Edit] = {}
    gone: dict[str, Edit] = {}
    for edit in (edit for factor in cell.levels.values() for edit in factor.edits):
        if edit.other not in ("", cell.scale, *cell.names.values()):
            continue
        kept = gone if edit.verb == "drop" else special if edit.other else always
        first = kept.setdefault(edit.key, edit)
        if first is not edit and edit.verb != "drop":
            raise StudyError(
                edit.where,
                f"{edit.key} of {cell} is set by {first.where.rpartition(': ')[2]} too",
                "one of them",
                "say under when: which value counts where they meet",
            )
    for key, edit in special.items():
        if key in always:  # a key that was added is there to be set
            edit = edit._replace(verb=always[key].verb)
        always[key] = edit
    left = [edit for key, edit in always.items() if not any(f"{key}.".startswith(f"{other}.") for other in gone)]
    there = [edit for key, edit in gone.items() if not (key in always and always[key].verb == "add")]
    return [*sorted(left, key=lambda edit: edit.key.count(".")), *there]


def _reach(values: dict, dotted: str) -> tuple[dict, str]:
    """(the mapping that a dotted key of plain data stands in or belongs to, its name there)."""
    for key, value in values.items():
        if dotted.startswith(key + ".") and isinstance(value, dict):
            return _reach(value, dotted[len(key) + 1 :])
    return values, dotted


def _keys(values: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found += [prefix + key, *(_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else ())]
    return found


def _order(run_type: type[BaseModel]):
    """For layout.add: the keys of a section in the order of its type."""

    def of(prefix: str) -> list[str]:
        kind: type[BaseModel] | None = run_type
        for part in filter(None, prefix.split(".")):
            field = kind.model_fields.get(part) if kind else None
            kind = section_type(field.annotation) if field else None
        return list(kind.model_fields) if kind else []

    return of
