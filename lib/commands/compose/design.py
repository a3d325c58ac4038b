"""A study's design: what params/<study>/design.yaml may hold.

    study: td_dpo
    methods: {<name>: <level>, ...}        in the order of their numbers: comparative-1, comparative-2, ...
    scales:
      laptop | paper:
        name: <role>-<model>-<dataset>     a run's name (also <method>, <variant>); this is the default:
        proposed-made-generated models: {<name>: <level>}, datasets: {<name>: <level>}, variants: {<name>: <level>}
        base: the sections of a complete run YAML, with their comments
    claims: what claims.yaml holds, without `study` and `names`

A level sets what it makes different: `set` (keys that the base has), `add` (keys that it has not), `drop`, each by
dotted keys;
`when: {<other level or scale>: {set, add, drop}}` where both come together. `like` takes over another level of its
kind, save what it writes itself, `only` names the levels and scales it is for. `label` is its name in claims and
verdicts, `about` the comment at the head of its runs; of `role` and `name` (instead of the scale's) a run has the last
that its method, model, data set and variant say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError

from lib import config
from lib.commands.compose import layout
from lib.config import CONTEXT, RunId, Section, did_you_mean, raise_faults
from lib.errors import StudyError

FACTORS = ("method", "model", "dataset", "variant")
HEAD = ("run_id", "method", "role")  # written for each run


def _empty(value: Any) -> Any:
    return {} if value is None else value


class Change(Section):
    """What is different, by dotted keys; the values are read from the text, with their comments."""

    set: Annotated[dict[str, Any], BeforeValidator(_empty)] = {}
    add: Annotated[dict[str, Any], BeforeValidator(_empty)] = {}
    drop: tuple[str, ...] = ()


class Level(Change):
    """A method, model, data set or variant."""

    role: Literal["proposed", "comparative", "ablation", "control"] | None = None
    label: str | None = None
    about: str | None = None
    name: str | None = None
    like: str | None = None
    only: tuple[str, ...] = ()
    when: dict[str, dict] = {}


Levels = dict[RunId, Annotated[dict[str, Any], BeforeValidator(_empty)]]  # each is typed by `_level`, which names it


class Scale(Section):
    name: str | None = None
    models: Annotated[Levels, Field(min_length=1)]
    datasets: Annotated[Levels, Field(min_length=1)]
    variants: Levels = {}
    base: Annotated[dict[str, Any], Field(min_length=1)]


class Top(Section):
    study: str
    methods: Annotated[Levels, Field(min_length=1)]
    scales: Annotated[dict[Literal["laptop", "paper"], dict[str, Any]], Field(min_length=1)]
    claims: dict[str, Any] | None = None


class Edit(NamedTuple):
    """One key that a level sets, adds or drops. `other`: the level or scale that it needs beside, '' for always."""

    verb: Literal["set", "add", "drop"]
    other: str
    key: str
    where: str
    entry: layout.Entry | None = None
    value: Any = None


@dataclass(frozen=True)
class Factor:
    """A level, with what it took over by `like`."""

    level: Level
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class ScaleDesign:
    name: str
    factors: dict[str, dict[str, Factor]]  # model, dataset, variant; a scale without variants has none
    base: layout.Tree
    values: dict


@dataclass(frozen=True)
class Design:
    path: Path
    study: str
    methods: dict[str, Factor]
    scales: dict[str, ScaleDesign]
    claims: dict | None
    tree: layout.Tree

    def factors(self, scale: str) -> dict[str, dict[str, Factor]]:
        """{method, model, dataset, variant: {name: level}} of a scale."""
        return {"method": self.methods, **self.scales[scale].factors}


def load(path: str | Path) -> Design:
    """The design in a file. StudyError with file, key, what was found and what was expected for the first fault."""
    path = Path(path).absolute()
    raw = config.load_yaml(path)
    where = str(path)
    top = _typed(Top, raw, where)
    config.study_module(top.study)
    tree = layout.read(path.read_text("utf-8-sig"), where)
    methods = _levels(top.methods, tree.get("methods"), f"{where}: methods")
    scales = {}
    for name, given in top.scales.items():
        place = f"{where}: scales.{name}"
        scale, text = _typed(Scale, given, place), tree.get("scales", name)
        factors = {}
        for kind in FACTORS[1:]:
            if levels := getattr(scale, f"{kind}s"):
                factors[kind] = _levels(levels, text.get(f"{kind}s"), f"{place}.{kind}s")
        for key in (*HEAD, *CONTEXT):
            if key in scale.base:
                raise StudyError(f"{place}.base.{key}", "written for each run by compose", "no such key", "remove it")
        for key in scale.base:
            text.get("base").entry(key, f"{place}.base.{key}")
        pattern = scale.name or "-".join(f"<{kind}>" for kind in ("role", *factors))
        scales[name] = ScaleDesign(pattern, factors, text.get("base"), scale.base)
    design = Design(path, top.study, methods, scales, top.claims, tree)
    _names(design)
    return design


def _typed(kind: type[Section], raw: Any, where: str) -> Any:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise_faults(error, where, kind)


def _levels(raw: dict, tree: layout.Tree, where: str) -> dict[str, Factor]:
    """A factor's levels, `like` followed."""
    typed = {name: _typed(Level, given, f"{where}.{name}") for name, given in raw.items()}
    whole: dict[str, Factor] = {}

    def follow(name: str, chain: tuple[str, ...]) -> Factor:
        if name in whole:
            return whole[name]
        level, place = typed[name], f"{where}.{name}"
        own = _own(level, tree.get(name), place)
        if level.like is not None:
            if level.like not in typed or level.like in chain:
                others = [other for other in typed if other not in chain]
                near = did_you_mean(level.like, others)
                raise StudyError(
                    f"{place}.like",
                    repr(level.like),
                    f"one of {', '.join(others) or 'none'}",
                    near if near != "remove it" else "name one that is not like this one",
                )
            own = _over(follow(level.like, (*chain, level.like)), own)
        _lost(own)
        whole[name] = own
        return own

    for name in typed:
        follow(name, (name,))
    return {name: whole[name] for name in typed}


def _own(level: Level, tree: layout.Tree, where: str) -> Factor:
    """The level as it is written."""
    parts = [("", level, tree, where)]
    for other, given in level.when.items():
        place = f"{where}.when.{other}"
        parts.append((other, _typed(Change, given, place), tree.get("when", other), place))
    edits = []
    for other, change, text, place in parts:
        for verb in ("set", "add"):
            for key, value in getattr(change, verb).items():
                spot = f"{place}.{verb}.{key}"
                edits.append(Edit(verb, other, key, spot, text.get(verb).entry(key, spot), value))
        edits += [Edit("drop", other, key, f"{place}.drop") for key in change.drop]
        keys = [edit.key for edit in edits if edit.other == other]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise StudyError(place, f"{twice[0]} under two of set, add and drop", "one of them", "remove the other")
    return Factor(level, tuple(edits))


def _over(old: Factor, new: Factor) -> Factor:
    """`old` with what `new` writes in its place: a key that it changes for always, `old` changes nowhere any more."""
    mine = {(edit.other, edit.key) for edit in new.edits}
    always = tuple(f"{edit.key}." for edit in new.edits if not edit.other)
    given = new.level.model_fields_set
    taken = {name: getattr(old.level, name) for name in ("role", "only", "name") if name not in given}
    kept = (edit for edit in old.edits if (edit.other, edit.key) not in mine and not f"{edit.key}.".startswith(always))
    return Factor(new.level.model_copy(update=taken), (*kept, *new.edits))


def _lost(factor: Factor) -> None:
    """Refused: a key that the level sets for some runs and drops for the same ones, which would lose the setting
    silently."""
    for drop in (edit for edit in factor.edits if edit.verb == "drop"):
        for edit in factor.edits:
            if edit.verb != "drop" and drop.other in ("", edit.other) and f"{edit.key}.".startswith(f"{drop.key}."):
                raise StudyError(
                    edit.where,
                    f"dropped by {drop.where.rpartition(': ')[2]}",
                    "a key that is there",
                    "remove one of them, or drop it under `when:` only",
                )


def _names(design: Design) -> None:
    """A name means one thing; every name in `only` and `when` is one of them; every method has a role."""
    owner = dict.fromkeys(("laptop", "paper"), "a scale")
    kinds = [("a method", design.methods)]
    kinds += [(f"a {kind}", levels) for scale in design.scales.values() for kind, levels in scale.factors.items()]
    for kind, levels in kinds:
        for name in levels:
            if owner.setdefault(name, kind) != kind:
                raise StudyError(
                    f"{design.path}: {name}", f"{kind} and {owner[name]}", "two names", "rename one of them"
                )
    for kind, levels in kinds:
        for name, factor in levels.items():
            for key, places in (("only", factor.level.only), ("when", factor.level.when)):
                for other in places:
                    if other not in owner or owner[other] == kind:
                        near = did_you_mean(other, [n for n in owner if owner[n] != kind])
                        raise StudyError(
                            f"{design.path}: {name}.{key}",
                            repr(other),
                            "a scale or a level of another kind",
                            near if near != "remove it" else "",
                        )
            if kind == "a method" and factor.level.role is None:
                raise StudyError(
                    f"{design.path}: methods.{name}.role",
                    "missing",
                    "proposed, comparative, ablation or control",
                    "role: comparative",
                )
