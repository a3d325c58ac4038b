"""`./run_all.sh compose design.yaml`: a design's run YAMLs and claims.yaml, validated as `plan` and `check` do, then
written: all of them, or none. A file that differs from what its design writes is kept without --force.

What params/<study>/design.yaml holds:

    study: td_dpo
    methods: {<name>: <level>, ...}        in the order of their numbers: comparative-1, comparative-2, ...
    scales:
      laptop | paper:
        name: <role>-<model>-<dataset>     a run's name (also <method>, <variant>); this is the default
        models: {<name>: <level>}, datasets: {<name>: <level>}, variants: {<name>: <level>}
        base: the sections of a complete run YAML, with their comments
    claims: what claims.yaml holds, without `study` and `names`; a claim with `each: {<level>: <id>, ...}` once for each
        of these levels, with <dataset> and <dataset.label> (or another kind) filled in

A run is one method x model x dataset (x variant). A level sets what it makes different: `set` (keys that the base has),
`add` (keys that it has not), `drop`, each by dotted keys; `when: {<other level or scale>: {set, add, drop}}` where both
come together. `like` takes over another level of its kind, save what it writes itself, `only` names the levels and
scales it is for. `label` is its name in claims and verdicts, `about` the comment at the head of its runs; of `role` and
`name` (instead of the scale's) a run has the last that its method, model, data set and variant say.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import io
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML, CommentedMap, CommentedSeq
from ruamel.yaml.emitter import Emitter
from ruamel.yaml.error import CommentMark
from ruamel.yaml.tokens import CommentToken

from lib import config, record
from lib.config import CONTEXT, Finding, RunId, Section, did_you_mean, parse_yaml, raise_faults, section_type
from lib.errors import StudyError
from lib.run import check
from lib.run.check import Loaded, named, of_error

KINDS = ("method", "model", "dataset", "variant")
SCALES = ("laptop", "paper")
WRITTEN_BY = "# Written by ./run_all.sh compose from {}: change it there."
SHOWN = 6  # differing keys of a file that are named


# ---- what a design may hold


class Change(Section):
    """What is different, by dotted keys."""

    set: dict[str, Any] = {}
    add: dict[str, Any] = {}
    drop: tuple[str, ...] = ()


class Level(Change):
    """A method, model, data set or variant."""

    role: Literal["proposed", "comparative", "ablation", "control"] | None = None
    label: str | None = None
    about: str = ""
    name: str | None = None
    like: str | None = None
    only: tuple[str, ...] = ()
    when: dict[str, Change] = {}


Levels = dict[RunId, Annotated[Level, BeforeValidator(lambda given: {} if given is None else given)]]


class Scale(Section):
    name: str | None = None
    models: Annotated[Levels, Field(min_length=1)]
    datasets: Annotated[Levels, Field(min_length=1)]
    variants: Levels = {}
    base: Annotated[dict[str, Any], Field(min_length=1)]


class Design(Section):
    study: str
    methods: Annotated[Levels, Field(min_length=1)]
    scales: Annotated[dict[Literal["laptop", "paper"], Scale], Field(min_length=1)]
    claims: dict[str, Any] | None = None

    def levels(self, scale: str) -> dict[str, Levels]:
        """{method, model, dataset, variant: {name: level}} of a scale; a scale without variants has none."""
        own = self.scales[scale]
        kinds = {"method": self.methods, "model": own.models, "dataset": own.datasets, "variant": own.variants}
        return {kind: levels for kind, levels in kinds.items() if levels}


class Edit(NamedTuple):
    """One key that a level sets, adds or drops; `source` is the mapping in the design's text that has it."""

    verb: Literal["set", "add", "drop"]
    key: str
    where: str
    source: CommentedMap | None = None


def load(path: Path) -> tuple[Design, CommentedMap]:
    """A design, and its text as a tree with comments. StudyError with file, key, what was found and expected."""
    try:
        design = Design.model_validate(config.load_yaml(path))
    except ValidationError as error:
        raise_faults(error, str(path), Design)
    config.study_module(design.study)
    tree = _yaml().load(path.read_text("utf-8-sig"))
    _comments_before_keys(tree)
    _check_names(path, design)
    return design, tree


def _check_names(path: Path, design: Design) -> None:
    """A name means one thing; every name in `like`, `only` and `when` is one of them; every method has a role."""
    kind_of = dict.fromkeys(SCALES, "scale")
    groups = [(kind, levels) for scale in design.scales for kind, levels in design.levels(scale).items()]
    for kind, levels in groups:
        for name in levels:
            if kind_of.setdefault(name, kind) != kind:
                raise StudyError(
                    f"{path}: {name}", f"a {kind} and a {kind_of[name]}", "two names", "rename one of them"
                )
    for kind, levels in groups:
        others = [name for name in kind_of if kind_of[name] != kind]
        for name, level in levels.items():
            for key, given, known in (
                ("like", [level.like] if level.like is not None else [], [n for n in levels if n != name]),
                ("only", level.only, others),
                ("when", level.when, others),
            ):
                for other in set(given) - set(known):
                    raise StudyError(
                        f"{path}: {kind}s.{name}.{key}",
                        repr(other),
                        f"one of {', '.join(known) or 'none'}",
                        did_you_mean(other, known),
                    )
            chain = _like(levels, name, f"{path}: {kind}s.{name}.like")
            if kind == "method" and not any(levels[one].role for one in chain):
                raise StudyError(
                    f"{path}: methods.{name}.role", "missing", "proposed, comparative, ...", "role: comparative"
                )


def _like(levels: Levels, name: str, where: str = "") -> list[str]:
    """The level, the one that it is like, the one that this is like, and so on."""
    chain = [name]
    while (name := levels[name].like) is not None:
        if name in chain:
            raise StudyError(where, f"in a circle: {' -> '.join([*chain, name])}", "a level that ends it", "")
        chain.append(name)
    return chain


# ---- the design's text as a tree


class _Emitter(Emitter):
    """Comments three spaces behind what they are about, whatever their column in the design was."""

    def write_comment(self, comment: Any, pre: bool = False) -> None:
        if not pre:
            comment.start_mark.column = self.column + 3
        super().write_comment(comment, pre)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.Emitter, yaml.preserve_quotes, yaml.width = _Emitter, True, 10**6
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def _comments_before_keys(node: CommentedMap | CommentedSeq, pending: str = "") -> str:
    """ruamel.yaml hangs comment and blank lines on the value before them: here they are moved to the key that follows,
    with which they are then copied, dropped or replaced. Returns what stands behind the last key."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        behind = 2 if isinstance(node, dict) else 0
        comments = node.ca.items.setdefault(key, [None] * 4)
        pending += "".join(token.value for token in comments[1] or ())
        comments[1] = [
            CommentToken(f"{line.strip()}\n", CommentMark(node.lc.col if line.strip() else 0), None)
            for line in pending.splitlines()
        ] or None
        nested = isinstance(value, CommentedMap | CommentedSeq)
        token = comments[behind] or (value.ca.comment[0] if nested and value.ca.comment else None)
        first, _, pending = token.value.partition("\n") if token else ("", "", "")
        comments[behind] = CommentToken(f"{first}\n", CommentMark(0), None) if first else None
        if nested:
            value.ca.comment = None  # the same comment once more
            pending = pending if value.fa.flow_style() else _comments_before_keys(value, pending)
            pending += "".join(token.value for token in value.ca.end)
            value.ca.end = []
    return pending


def _text(node: CommentedMap, depth: int) -> str:
    """A mapping that stands `depth` levels deep in the design, as a document of its own."""
    for _ in range(depth):
        node = CommentedMap({"_": node})
    stream = io.StringIO()
    _yaml().dump(node, stream)
    return "".join(line[2 * depth :] or "\n" for line in stream.getvalue().splitlines(keepends=True)[depth:])


def _reach(tree: Mapping, dotted: str) -> tuple[Any, str]:
    """(the mapping that a dotted key stands in or belongs to, its name there). Keys may hold dots themselves."""
    for key, value in tree.items():
        if dotted.startswith(f"{key}.") and isinstance(value, dict):
            return _reach(value, dotted[len(key) + 1 :])
    return tree, dotted


def _put(tree: CommentedMap, edit: Edit, run_type: type[BaseModel]) -> None:
    """The edit's value for a key. A value without a comment keeps that of the one it replaces; an empty one (#) takes it
    away. A key that is not there goes before the first that its section's type has behind it."""
    home, key = _reach(tree, edit.key)
    value = copy.deepcopy(edit.source[edit.key])
    given = copy.deepcopy(edit.source.ca.items.get(edit.key)) or [None] * 4
    old = home.ca.items.get(key) or [None] * 4
    if key in home:
        home[key] = value
    else:
        order = _order(run_type, edit.key[: -len(key) - 1])
        later = order[order.index(key) + 1 :] if key in order else []
        home.insert(next((i for i, other in enumerate(home) if other in later), len(home)), key, value)
    if home.fa.flow_style():  # no room for comments
        return
    behind = given[2] or (None if _is_block(value) else old[2])
    above = [token for token in given[1] or () if token.value.strip()]
    blank = [token for token in old[1] or () if not token.value.strip()]
    kept = None if behind is None or behind.value.strip() == "#" else behind
    home.ca.items[key] = [None, (blank + above if above else old[1]), kept, None]


def _is_block(value: Any) -> bool:
    return isinstance(value, CommentedMap | CommentedSeq) and not value.fa.flow_style()


def _order(kind: type[BaseModel] | None, dotted: str) -> list[str]:
    """The keys of a section, in the order of its type."""
    for part in filter(None, dotted.split(".")):
        field = kind.model_fields.get(part) if kind else None
        kind = section_type(field.annotation) if field else None
    return list(kind.model_fields) if kind else []


# ---- from a design to the texts of its files


class Run(NamedTuple):
    """One combination: a scale and one level of each kind."""

    scale: str
    names: dict[str, str]
    levels: dict[str, Levels]

    def last(self, field: str) -> str | None:
        """`role`, `name`: what the last of method, model, data set and variant says."""
        given = [self.inherited(kind, field) for kind in self.names]
        return next((value for value in reversed(given) if value), None)

    def inherited(self, kind: str, field: str) -> Any:
        """A field of a level, or of the one that it is like."""
        chain = (self.levels[kind][name] for name in _like(self.levels[kind], self.names[kind]))
        return next((getattr(level, field) for level in chain if field in level.model_fields_set), None)

    def __str__(self) -> str:
        return " x ".join(self.names.values())


def composed(path: Path) -> dict[str, str]:
    """{laptop/<run_id>.yaml, paper/<run_id>.yaml, claims.yaml: text} of a design."""
    design, tree = load(Path(path).absolute())
    numbers, files, owner = _role_numbers(design), {}, {}
    for run in _runs(design):
        where = f"{path}: scales.{run.scale}.name"
        name = _run_id(design, run, numbers, where)
        file = f"{run.scale}/{name}.yaml"
        if (first := owner.setdefault(file.lower(), run)) is not run:  # some disks do not tell A from a
            raise StudyError(
                where,
                f"{name} is the name of {first} and of {run}",
                "a name of its own for each run",
                "<role>-<model>-<dataset>-<variant> tells all apart",
            )
        files[file] = _run_text(path, design, tree, run, name)
    if not files:
        raise StudyError(f"{path}: only", "rules out every run", "a method for some scale", "remove an `only`")
    return files if design.claims is None else files | {"claims.yaml": _claims_text(path, design, tree)}


def _runs(design: Design) -> Iterator[Run]:
    """The combinations that no `only` rules out, scale by scale, in the order of the methods."""
    for scale in design.scales:
        levels = design.levels(scale)
        for names in itertools.product(*levels.values()):
            run = Run(scale, dict(zip(levels, names, strict=True)), levels)
            if all(_allows(kind, run.inherited(kind, "only") or (), design, run) for kind in levels):
                yield run


def _allows(own: str, only: tuple[str, ...], design: Design, run: Run) -> bool:
    """Whether an `only` leaves this run: its scale is one that is named or that has a model, data set or variant named,
    and of each kind of which some are named here, the chosen one is."""
    named = {
        scale: {kind: set(only) & set(levels) for kind, levels in design.levels(scale).items() if kind != own}
        for scale in design.scales
    }
    scales = set(SCALES) & set(only)
    scales |= {scale for scale, kinds in named.items() if any(kinds[kind] for kind in kinds if kind != "method")}
    return (not scales or run.scale in scales) and all(
        not names or run.names[kind] in names for kind, names in named[run.scale].items()
    )


def _role_numbers(design: Design) -> dict[str, str]:
    """{method: proposed, comparative-1, comparative-2, ...} in the design's order; a number where a role has several,
    and for `comparative` always, as published."""
    roles = {
        name: next(r for one in _like(design.methods, name) if (r := design.methods[one].role))
        for name in design.methods
    }
    numbers: dict[str, str] = {}
    for name, role in roles.items():
        mine = [other for other in roles if roles[other] == role]
        numbers[name] = role if role == "proposed" and len(mine) == 1 else f"{role}-{mine.index(name) + 1}"
    return numbers


def _run_id(design: Design, run: Run, numbers: dict[str, str], where: str) -> str:
    pattern = (
        run.last("name")
        or design.scales[run.scale].name
        or "-".join(f"<{k}>" for k in ("role", *run.names) if k != "method")
    )
    known = {**run.names, "role": numbers[run.names["method"]]}
    for part in re.findall(r"<(\w+)>", pattern):
        if part not in known:
            raise StudyError(where, f"<{part}>", f"<{'>, <'.join(known)}>", did_you_mean(part, list(known)))
    name = re.sub(r"<(\w+)>", lambda match: known[match[1]], pattern)
    try:
        return TypeAdapter(RunId).validate_python(name)
    except ValidationError:  # a path, say
        raise StudyError(
            where, f"{name!r} as a run_id", "a file name of letters, digits and . _ + -", "change the name"
        ) from None


def _run_text(path: Path, design: Design, tree: CommentedMap, run: Run, name: str) -> str:
    """The run YAML of a combination."""
    base = copy.deepcopy(tree["scales"][run.scale]["base"])
    for key in ("run_id", "method", "role", *CONTEXT):
        if key in base:
            where = f"{path}: scales.{run.scale}.base.{key}"
            raise StudyError(where, "written for each run by compose", "no such key", "remove it")
    for edit in _edits(path, tree, run):
        home, key = _reach(base, edit.key)
        if (key in home) is (edit.verb == "add"):
            wrong = "has this key" if key in home else "has no such key"
            fix = "write it under set:" if key in home else did_you_mean(edit.key, list(_flat(base)))
            found = f"{edit.key}: the base of {run.scale} {wrong} ({run})"
            expected = "a key that it has not" if key in home else "a key that it has"
            raise StudyError(edit.where, found, expected, fix)
        if edit.verb == "drop":
            del home[key]
        else:
            _put(base, edit, config.study_module(design.study).Run)
    about = "\n".join(run.levels[kind][run.names[kind]].about.strip() for kind in run.names)
    lines = [f"# {line}".rstrip() for line in filter(None, about.splitlines())]
    head = {"run_id": name, "method": run.names["method"], "role": run.last("role")}
    lines += [WRITTEN_BY.format("../design.yaml")]
    lines += [f"{key}: {text if parse_yaml(text, key) == text else json.dumps(text)}" for key, text in head.items()]
    return "\n".join(lines) + "\n\n" + _text(base, 3).lstrip("\n")


def _edits(path: Path, tree: CommentedMap, run: Run) -> list[Edit]:
    """What this run takes, wider keys first and drops last. What stands under `when` wins over what is always so; where
    two others set one key neither wins, and that is refused; what one drops the settings of others do not bring
    back."""
    always: dict[str, Edit] = {}
    special: dict[str, Edit] = {}
    gone: dict[str, Edit] = {}
    for kind, name in run.names.items():
        for other, edit in _level_edits(path, tree, run, kind, name):
            kept = gone if edit.verb == "drop" else special if other else always
            first = kept.setdefault(edit.key, edit)
            if first is not edit and edit.verb != "drop":
                raise StudyError(
                    edit.where,
                    f"{edit.key} of {run} is set by {first.where.rpartition(': ')[2]} too",
                    "one of them",
                    "say under when: which value counts where they meet",
                )
    added = {key for key, edit in always.items() if edit.verb == "add"}
    changed = always | {key: e._replace(verb="add") if key in added else e for key, e in special.items()}
    kept = [edit for key, edit in changed.items() if not any(f"{key}.".startswith(f"{other}.") for other in gone)]
    return sorted(kept, key=lambda edit: edit.key.count(".")) + [e for key, e in gone.items() if key not in added]


def _level_edits(path: Path, tree: CommentedMap, run: Run, kind: str, name: str) -> list[tuple[str, Edit]]:
    """(the level or scale that it needs, '' for always; the edit) of a level, with those that it takes over by `like`:
    a key that it changes for always, the other changes nowhere any more."""
    text = tree["methods"] if kind == "method" else tree["scales"][run.scale][f"{kind}s"]
    place = f"{path}: methods" if kind == "method" else f"{path}: scales.{run.scale}.{kind}s"
    found: list[tuple[str, Edit]] = []
    for one in _like(run.levels[kind], name):
        level, own = run.levels[kind][one], text[one] or {}
        parts = [("", level, own, f"{place}.{one}")]
        parts += [(o, change, own["when"][o], f"{place}.{one}.when.{o}") for o, change in level.when.items()]
        mine = []
        for other, change, source, where in parts:
            if other not in ("", run.scale, *run.names.values()):
                continue
            for verb in ("set", "add"):
                given = getattr(change, verb)
                mine += [(other, Edit(verb, key, f"{where}.{verb}.{key}", source[verb])) for key in given]
            mine += [(other, Edit("drop", key, f"{where}.drop")) for key in change.drop]
        for (a, drop), (b, edit) in itertools.product(mine, mine):
            if drop is not edit and drop.verb == "drop" and a in ("", b) and f"{edit.key}.".startswith(f"{drop.key}."):
                raise StudyError(
                    edit.where,
                    f"dropped by {drop.where.rpartition(': ')[2]}",
                    "a key that is there",
                    "remove one of them, or drop it under `when:` only",
                )
        taken = {(other, edit.key) for other, edit in found}
        always = tuple(f"{edit.key}." for other, edit in found if not other)
        kept = [(o, e) for o, e in mine if (o, e.key) not in taken and not f"{e.key}.".startswith(always)]
        found = kept + found
    return found


def _claims_text(path: Path, design: Design, tree: CommentedMap) -> str:
    """claims.yaml: the design's own lines, the methods' labels as `names`, and the claims with `each` spelled out."""
    for key in ("study", "names"):
        if key in design.claims:
            fix = "label: of a method is its name"
            raise StudyError(f"{path}: claims.{key}", "written by compose", "no such key", fix)
    body = copy.deepcopy(tree["claims"])
    about = str(body.pop("about", "")).splitlines()
    names = {name: label for name, level in design.methods.items() if (label := level.label)}
    if isinstance(body.get("claims"), CommentedSeq) and all(isinstance(claim, dict) for claim in body["claims"]):
        body["claims"] = _spelled_out(path, design, body["claims"])
    head = CommentedMap({"study": design.study, **({"names": CommentedMap(names)} if names else {})})
    if names:
        head["names"].fa.set_flow_style()
    lines = [*(f"# {line}".rstrip() for line in about), WRITTEN_BY.format("design.yaml")]
    return "\n".join(lines) + "\n" + _text(head, 0) + _text(body, 1).lstrip("\n")


def _spelled_out(path: Path, design: Design, claims: CommentedSeq) -> CommentedSeq:
    """A claim with `each` once for each of its levels; in the order of their ids where there is one."""
    known = {
        name: (kind, level.label)
        for scale in design.scales
        for kind, levels in design.levels(scale).items()
        for name, level in levels.items()
    }
    found: list[tuple[CommentedMap, list]] = []
    for i, claim in enumerate(claims):
        each, comments = claim.pop("each", None), claims.ca.items.get(i)
        if each is None:
            found.append((claim, comments))
            continue
        where = f"{path}: claims.each"
        if not isinstance(each, dict) or "id" in claim:
            raise StudyError(where, "no mapping, or an id beside it", "each: {<level>: <the claim's id>}")
        for name, claim_id in each.items():
            if name not in known:
                near = did_you_mean(name, list(known))
                raise StudyError(where, repr(name), "a method, model, data set or variant", near)
            one = _filled(copy.deepcopy(claim), name, *known[name], where)
            one.insert(0, "id", claim_id)
            found.append((one, copy.deepcopy(comments)))
    if len(found) > len(claims):
        found.sort(key=lambda pair: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", str(pair[0].get("id")))])
    out = CommentedSeq(claim for claim, _ in found)
    out.ca.items.update({i: comments for i, (_, comments) in enumerate(found) if comments})
    return out


def _filled(value: Any, name: str, kind: str, label: str | None, where: str) -> Any:
    """`value` with <kind> and <kind.label> filled in, at any depth."""

    def fill(match: re.Match) -> str:
        if match[1] not in KINDS:
            return match[0]
        if match[1] != kind or (match[2] and not label):
            missing, fix = ("", "") if label else (f", and {name} has no label", f"label: of {name}")
            raise StudyError(where, match[0] + missing, f"<{kind}> or <{kind}.label>", fix)
        return label if match[2] else name

    if isinstance(value, str):
        return type(value)(re.sub(r"<(\w+)(\.label)?>", fill, value))
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        value[key] = _filled(inner, name, kind, label, where)
    return value


# ---- the command


def main(argv: list[str]) -> int:
    """Nothing is written before every design's files are known to be valid, and to be new or as they are."""
    top = argparse.ArgumentParser(prog="./run_all.sh compose", description=__doc__.split("\n\n")[0])
    top.add_argument("design", nargs="*", type=Path, help="a design.yaml (default: those of all studies in params/)")
    where = "write into DIR/laptop, DIR/paper and DIR/claims.yaml (default: beside the design); --params DIR runs them"
    top.add_argument("--out", type=Path, metavar="DIR", help=where)
    top.add_argument("--force", action="store_true", help="overwrite files that differ")
    top.add_argument("--dry-run", action="store_true", help="write nothing; show the lines that would change")
    options = top.parse_args(argv)
    paths = options.design or sorted((config.ROOT / "params").glob("*/design.yaml"))
    if options.out and len(paths) > 1:
        raise StudyError("--out", f"{len(paths)} designs", "one: their runs would share a folder", "name the design")
    to_write: dict[Path, str] = {}
    lines: list[str] = []
    for path in paths:
        changed, said = _changes(path.absolute(), (options.out or path.parent).absolute(), options)
        to_write |= changed
        lines += said
    if options.dry_run:
        lines.append("nothing was written (--dry-run)")
    else:
        write(to_write)
        lines.append(
            f"written: {len(to_write)}" if to_write else "nothing to do: every file is as its design writes it"
        )
    print("\n".join(lines))
    return 0


def _changes(path: Path, out: Path, options: argparse.Namespace) -> tuple[dict[Path, str], list[str]]:
    """({file: text} that this design would write and that is not there like that, what to say of it). Refused: a design
    with a fault, and without --force one that would overwrite what differs."""
    study = load(path)[0].study
    files = {out / name: text for name, text in composed(path).items()}
    _validate(study, path, out, files)
    changed = {file: text for file, text in files.items() if _old(file) != text}
    differing = {file: text for file, text in changed.items() if file.exists()}
    if differing and not options.force and not options.dry_run:
        told = "".join(f"\n  {named(file)}: {difference(_old(file), text)}" for file, text in differing.items())
        raise StudyError(
            named(path),
            f"files that differ from what it writes: {len(differing)} (file -> design){told}",
            "new files, or files as they are",
            "--force, to overwrite; --dry-run, to see the lines; or bring into the design what was changed by hand",
        )
    lines = [
        f"{named(path)}: {len(files)} files; {len(changed) - len(differing)} new, {len(differing)} "
        f"{'differ' if options.dry_run else 'overwritten'}, {len(files) - len(changed)} as they are"
    ]
    for file, text in changed.items():
        lines.append(f"  {'differs' if file in differing else 'new'}: {named(file)}")
        if options.dry_run:
            old, new = _old(file).splitlines(), text.splitlines()
            lines += difflib.unified_diff(old, new, named(file), "composed", lineterm="")
    lines += [f"  not in this design, left alone: {named(file)}" for file in _strangers(out, files)]
    read = config.ROOT / "params" / study / "claims.yaml"
    if out / "claims.yaml" in files and out / "claims.yaml" != read:
        lines.append(f"  {named(out / 'claims.yaml')} is not what an analysis reads: that is {named(read)}")
    return changed, lines


def _validate(study: str, path: Path, out: Path, files: Mapping[Path, str]) -> None:
    """Refuse what `plan` or `check` would refuse, before anything is written: the files are loaded from another
    folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / study
        for file, text in files.items():
            record.write_text(folder / file.relative_to(out), text)
        wrong = []
        for scale in SCALES:
            if (folder / scale).is_dir():
                found = check.load_folder(folder / scale, scale, "full")
                wrong += check.yaml_findings(found)
                if (folder / "claims.yaml").exists():
                    read = [run for _, run, _ in found if not isinstance(run, StudyError)]
                    wrong += check.claims_findings(study, read, scale, folder / "claims.yaml")
        wrong = [finding for finding in dict.fromkeys(wrong) if finding.level == "error"]
    if wrong:
        told = "".join(f"\n  {finding.file}: {finding.key}: {finding.what}" for finding in wrong)
        raise StudyError(
            named(path),
            f"in what it writes, faults: {len(wrong)}{told.replace(str(folder), named(out))}",
            "run YAMLs and claims that ./run_all.sh check takes",
            wrong[0].fix,
        )


def findings(loaded: list[Loaded]) -> Iterator[Finding]:
    """Whether run YAMLs and claims.yaml are what the design beside them, or above their folder for a scale, writes. A
    difference is a warning: the files are what runs."""
    for folder in dict.fromkeys(p.parent.parent if p.parent.name in SCALES else p.parent for p, _, _ in loaded):
        design = folder / "design.yaml"
        if not design.exists():
            continue
        try:
            files = {folder / name: text for name, text in composed(design).items()}
        except StudyError as error:
            yield of_error(error, named(design))
            continue
        again = f"./run_all.sh compose {named(design)}"
        for file, text in files.items():
            if not file.exists():
                yield Finding("warning", "", "its design writes it, and it is not there", again, named(file))
            elif _old(file) != text:
                key, _, change = difference(_old(file), text).partition(": ")
                what = f"differs from its design{change and f' ({change})'}"
                fix = f"{again} --force, or change the design to what the file says"
                yield Finding("warning", key, what, fix, named(file))
        for file in _strangers(folder, files):
            fix = "write it into the design, or keep it in a folder of its own, for --params"
            yield Finding("warning", "", "not in the design beside it", fix, named(file))


def _strangers(out: Path, files: Mapping[Path, str]) -> list[Path]:
    """Run YAMLs that lie where this design writes, and that it does not write."""
    return [file for scale in SCALES for file in sorted((out / scale).glob("*.y*ml")) if file not in files]


def difference(old: str, new: str) -> str:
    """What is different, by keys where it is in the values, else by the first line."""
    try:
        before, after = _flat(parse_yaml(old, "")), _flat(parse_yaml(new, ""))
    except StudyError as error:
        return f"cannot be read ({error.found})"
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key, _flat) != after.get(key, _flat)]
    if not keys:
        pairs = enumerate(zip([*old.splitlines(), ""], [*new.splitlines(), ""], strict=False), 1)
        return f"comments or layout, from line {next((i for i, (a, b) in pairs if a != b), 1)}"
    told = [
        f"{key}: {json.dumps(before[key]) if key in before else '(not there)'} -> "
        f"{json.dumps(after[key]) if key in after else '(not there)'}"
        for key in keys[:SHOWN]
    ]
    return "; ".join(told) + (f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def _flat(value: Any, prefix: str = "") -> dict:
    """{dotted key: value}; a list of claims by their ids."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "id" in item for item in value):
        value = {item["id"]: item for item in value}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}.{name}" if prefix else name).items()
    }


def write(files: Mapping[Path, str]) -> None:
    """All of them or, where one cannot be written, none: what was there is put back."""
    before: dict[Path, bytes | None] = {}
    made = [folder for folder in dict.fromkeys(f.parent for f in files) if not folder.exists()]
    try:
        for file, text in files.items():
            old = file.read_bytes() if file.exists() else None
            record.write_text(file, text)
            before[file] = old
    except BaseException:
        for file, old in before.items():
            with contextlib.suppress(OSError):
                file.unlink() if old is None else record.write_bytes(file, old)
        for folder in made:
            with contextlib.suppress(OSError):  # not made, or somebody put something into it
                folder.rmdir()
        raise


def _old(file: Path) -> str:
    return file.read_text("utf-8", errors="replace") if file.exists() else ""
