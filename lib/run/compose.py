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

from pydantic import BeforeValidator, Field
from ruamel.yaml import YAML, CommentedMap, CommentedSeq
from ruamel.yaml.emitter import Emitter
from ruamel.yaml.error import CommentMark
from ruamel.yaml.tokens import CommentToken

from lib import config, record
from lib.config import Finding, RunId, Section, did_you_mean, parse_yaml
from lib.errors import StudyError
from lib.run import check
from lib.run.check import Loaded, display_path, finding_from

KINDS = ("method", "model", "dataset", "variant")
SCALES = ("laptop", "paper")
WRITTEN_BY = "# Written by ./run_all.sh compose from {}: change it there."
SHOWN = 6  # differing lines of a file that are shown


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


class Top(Section):
    study: str
    methods: Annotated[Levels, Field(min_length=1)]
    scales: Annotated[dict[Literal["laptop", "paper"], Scale], Field(min_length=1)]
    claims: dict[str, Any] | None = None


class Edit(NamedTuple):
    """One key that a level sets, adds or drops. `other`: the level or scale that it needs, "" for always; `source`: the
    mapping in the design's text that has the value and its comments."""

    verb: Literal["set", "add", "drop"]
    other: str
    key: str
    where: str
    source: CommentedMap | None = None


class Factor(NamedTuple):
    """A level and its edits, with what it takes over by `like`."""

    level: Level
    edits: list[Edit]


class Design(NamedTuple):
    """`tree` is the text with its comments; `factors` {scale: {method, model, dataset, variant: {name: factor}}}."""

    path: Path
    top: Top
    tree: CommentedMap
    factors: dict[str, dict[str, dict[str, Factor]]]


def load(path: str | Path) -> Design:
    """The design in a file. StudyError with file, key, what was found and what was expected for what is wrong."""
    path = Path(path).absolute()
    top = config.validate(Top, path)
    config.study_module(top.study)
    tree, factors = _yaml().load(path.read_text("utf-8-sig")), {}
    _comments_before_keys(tree)
    for name, scale in top.scales.items():
        place = f"{path}: scales.{name}"
        factors[name] = {"method": _factors(top.methods, tree["methods"], f"{path}: methods")}
        for kind in KINDS[1:]:  # a scale without variants has none
            if levels := getattr(scale, f"{kind}s"):
                factors[name][kind] = _factors(levels, tree["scales"][name][f"{kind}s"], f"{place}.{kind}s")
    design = Design(path, top, tree, factors)
    _check_names(design)
    return design


def _factors(levels: Levels, tree: CommentedMap, where: str) -> dict[str, Factor]:
    """The levels of a kind, `like` followed: what a level changes for always, the one that it is like changes nowhere
    any more."""

    def follow(name: str, chain: tuple[str, ...]) -> Factor:
        level, edits = levels[name], _edits_of(levels[name], tree[name], f"{where}.{name}")
        if level.like is None:
            return Factor(level, edits)
        if level.like not in levels or level.like in chain:
            others = [other for other in levels if other not in chain]
            found, expected = repr(level.like), f"one of {', '.join(others) or 'none'}"
            raise StudyError(f"{where}.{name}.like", found, expected, did_you_mean(level.like, others, ""))
        old = follow(level.like, (*chain, level.like))
        inherited = {f: getattr(old.level, f) for f in ("role", "only", "name") if f not in level.model_fields_set}
        mine = {(edit.other, edit.key) for edit in edits}
        always = tuple(f"{edit.key}." for edit in edits if not edit.other)
        kept = [e for e in old.edits if (e.other, e.key) not in mine and not f"{e.key}.".startswith(always)]
        return Factor(level.model_copy(update=inherited), kept + edits)

    return {name: follow(name, (name,)) for name in levels}


def _edits_of(level: Level, tree: CommentedMap, where: str) -> list[Edit]:
    edits = []
    for other, change in {"": level, **level.when}.items():
        source, place = (tree["when"][other], f"{where}.when.{other}") if other else (tree, where)
        for verb in ("set", "add"):
            keys = getattr(change, verb)
            edits += [Edit(verb, other, key, f"{place}.{verb}.{key}", source[verb]) for key in keys]
        edits += [Edit("drop", other, key, f"{place}.drop") for key in change.drop]
    return edits


def _check_names(design: Design) -> None:
    """A name means one thing; every name in `only` and `when` is one of them; every method has a role."""
    kind_of, levels = dict.fromkeys(SCALES, "scale"), _levels(design)
    for kind, name, _ in levels:
        if (other := kind_of.setdefault(name, kind)) != kind:
            raise StudyError(f"{design.path}: {name}", f"a {kind} and a {other}", "two names", "rename one of them")
    for kind, name, level in levels:
        others = [other for other in kind_of if kind_of[other] != kind]
        for key in ("only", "when"):
            for other in set(getattr(level, key)) - set(others):
                expected, fix = "a scale or a level of another kind", did_you_mean(other, others, "")
                raise StudyError(f"{design.path}: {name}.{key}", repr(other), expected, fix)


def _levels(design: Design) -> list[tuple[str, str, Level]]:
    """(kind, name, level) of everything that runs are combined of."""
    kinds = [pair for scale in design.factors.values() for pair in scale.items()]
    return [(kind, name, factor.level) for kind, factors in kinds for name, factor in factors.items()]


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


def _put(tree: CommentedMap, edit: Edit) -> None:
    """The edit's value for a key. A value without a comment keeps that of the one it replaces; an empty one (#) takes it
    away."""
    home, key = _reach(tree, edit.key)
    given, old = (copy.deepcopy(m.ca.items.get(k)) or [None] * 4 for m, k in ((edit.source, edit.key), (home, key)))
    home[key] = value = copy.deepcopy(edit.source[edit.key])
    if home.fa.flow_style():  # no room for comments
        return
    block = isinstance(value, CommentedMap | CommentedSeq) and not value.fa.flow_style()
    behind = given[2] or (None if block else old[2])
    above = [token for token in given[1] or () if token.value.strip()]
    blank = [token for token in old[1] or () if not token.value.strip()]
    kept = behind if behind and behind.value.strip() != "#" else None
    home.ca.items[key] = [None, blank + above if above else old[1], kept, None]


# ---- from a design to the texts of its files


class Run(NamedTuple):
    """One combination: a scale and one level of each kind, by name."""

    scale: str
    names: dict[str, str]
    factors: list[Factor]

    def last(self, field: str) -> str | None:
        """`role`, `name`: what the last of method, model, data set and variant says."""
        return next((value for f in reversed(self.factors) if (value := getattr(f.level, field)) is not None), None)

    def __str__(self) -> str:
        return " x ".join(self.names.values())


def render(path: str | Path) -> dict[str, str]:
    """{laptop/<run_id>.yaml, paper/<run_id>.yaml, claims.yaml: text} of a design."""
    design = load(path)
    numbers, files, owner = _role_numbers(design), {}, {}
    for run in _runs(design):
        name = _run_id(design, run, numbers)
        file = f"{run.scale}/{name}.yaml"
        if (first := owner.setdefault(file.lower(), run)) is not run:  # some disks do not tell A from a
            where, found = f"{design.path}: scales.{run.scale}.name", f"{name} is the name of {first} and of {run}"
            raise StudyError(where, found, "a name for each run", "<role>-<model>-<dataset>-<variant> tells all apart")
        files[file] = _run_text(design, run, name)
    if not files:
        raise StudyError(f"{design.path}: only", "rules out every run", "some run", "remove an `only`")
    return files if design.top.claims is None else files | {"claims.yaml": _claims_text(design)}


def _runs(design: Design) -> Iterator[Run]:
    """The combinations that no `only` rules out, scale by scale, in the order of the methods."""
    for scale, kinds in design.factors.items():
        for names in itertools.product(*kinds.values()):
            run = Run(scale, dict(zip(kinds, names, strict=True)), list(map(dict.get, kinds.values(), names)))
            if all(_allows(kind, f.level.only, design, run) for kind, f in zip(kinds, run.factors, strict=True)):
                yield run


def _allows(own: str, only: tuple[str, ...], design: Design, run: Run) -> bool:
    """Whether an `only` leaves this run: its scale is one that is named or that has a model, data set or variant named,
    and of each kind of which some are named here, the chosen one is."""
    named = {
        scale: {kind: set(only) & set(factors) for kind, factors in kinds.items() if kind != own}
        for scale, kinds in design.factors.items()
    }
    scales = set(SCALES) & set(only)
    scales |= {scale for scale, kinds in named.items() if any(kinds[kind] for kind in kinds if kind != "method")}
    chosen = all(not names or run.names[kind] in names for kind, names in named[run.scale].items())
    return chosen and (not scales or run.scale in scales)


def _role_numbers(design: Design) -> dict[str, str]:
    """{method: proposed, comparative-1, comparative-2, ...} in the design's order; a number where a role has several,
    and for `comparative` always, as published."""
    methods = next(iter(design.factors.values()))["method"]
    roles = {name: factor.level.role for name, factor in methods.items()}
    alike = {role: [name for name in roles if roles[name] == role] for role in roles.values()}
    return {
        name: role if role == "proposed" and len(alike[role]) == 1 else f"{role}-{alike[role].index(name) + 1}"
        for name, role in roles.items()
    }


def _run_id(design: Design, run: Run, numbers: dict[str, str]) -> str:
    default = "-".join(f"<{part}>" for part in ("role", *run.names) if part != "method")
    known = {**run.names, "role": numbers[run.names["method"]]}
    where = f"{design.path}: scales.{run.scale}.name"

    def fill(match: re.Match) -> str:
        if match[1] not in known:
            raise StudyError(where, match[0], f"<{'>, <'.join(known)}>", did_you_mean(match[1], list(known), ""))
        return known[match[1]]

    name = re.sub(r"<(\w+)>", fill, run.last("name") or design.top.scales[run.scale].name or default)
    if Path(name).name != name:  # a path; what else is wrong with a name is found when its run is validated
        raise StudyError(where, f"{name!r} as a run_id", "a file name of letters, digits and . _ + -")
    return name


def _run_text(design: Design, run: Run, name: str) -> str:
    """The run YAML of a combination."""
    base = copy.deepcopy(design.tree["scales"][run.scale]["base"])
    for edit in _edits(run):
        home, key = _reach(base, edit.key)
        if (key in home) is (edit.verb == "add"):
            known = config.keys(config.study_module(design.top.study).Run)
            has, fix = ("has this key", "write it under set:") if key in home else ("has no such key", "")
            found = f"{edit.key}: the base of {run.scale} {has} ({run})"
            raise StudyError(edit.where, found, f"a key to {edit.verb}", fix or did_you_mean(edit.key, known))
        if edit.verb == "drop":
            del home[key]
        else:
            _put(base, edit)
    about = [f"# {line}".rstrip() for factor in run.factors for line in factor.level.about.strip().splitlines()]
    head = {"run_id": name, "method": run.names["method"], "role": run.last("role") or ""}
    head = [f"{key}: {text if parse_yaml(text, key) == text else json.dumps(text)}" for key, text in head.items()]
    return "\n".join([*about, WRITTEN_BY.format("../design.yaml"), *head, "", _text(base, 3).lstrip("\n")])


def _edits(run: Run) -> list[Edit]:
    """What this run takes, wider keys first and drops last. What stands under `when` wins over what is always so; where
    two others set one key neither wins, and that is refused; what one drops the settings of others do not bring
    back."""
    always, special, gone = {}, {}, {}
    for edit in (edit for factor in run.factors for edit in factor.edits):
        if edit.other in ("", run.scale, *run.names.values()):
            kept = gone if edit.verb == "drop" else special if edit.other else always
            if (first := kept.setdefault(edit.key, edit)) is not edit and edit.verb != "drop":
                found = f"{edit.key} of {run} is set by {first.where.rpartition(': ')[2]} too"
                raise StudyError(edit.where, found, "one of them", "say under when: which counts where they meet")
    added = {key for key, edit in always.items() if edit.verb == "add"}  # a key that was added is there to be set
    changed = always | {key: edit._replace(verb="add") if key in added else edit for key, edit in special.items()}
    kept = [edit for key, edit in changed.items() if not any(f"{key}.".startswith(f"{other}.") for other in gone)]
    return sorted(kept, key=lambda edit: edit.key.count(".")) + [e for key, e in gone.items() if key not in added]


def _claims_text(design: Design) -> str:
    """claims.yaml: the design's own lines, the methods' labels as `names`, and the claims with `each` spelled out."""
    body = copy.deepcopy(design.tree["claims"])
    lines = [f"# {line}".rstrip() for line in str(body.pop("about", "")).splitlines()]
    if isinstance(body.get("claims"), CommentedSeq) and all(isinstance(claim, dict) for claim in body["claims"]):
        body["claims"] = _expand(design, body["claims"])
    head = CommentedMap(study=design.top.study)
    if names := {name: level.label for name, level in design.top.methods.items() if level.label}:
        head["names"] = CommentedMap(names)
        head["names"].fa.set_flow_style()
    return "\n".join([*lines, WRITTEN_BY.format("design.yaml"), _text(head, 0) + _text(body, 1).lstrip("\n")])


def _expand(design: Design, claims: CommentedSeq) -> CommentedSeq:
    """A claim with `each` once for each of its levels; in the order of their ids where there is one."""
    where = f"{design.path}: claims.each"
    known = {name: (kind, level.label) for kind, name, level in _levels(design)}
    expanded: list[tuple[CommentedMap, list]] = []
    for i, claim in enumerate(claims):
        each = claim.pop("each", None)
        if each is not None and (not isinstance(each, dict) or "id" in claim):
            raise StudyError(where, "no mapping, or an id beside it", "each: {<level>: <the claim's id>}")
        for name, claim_id in (each or {"": ""}).items():
            one = copy.deepcopy(claim)
            if name:
                if name not in known:
                    expected, fix = "a method, model, data set or variant", did_you_mean(name, list(known), "")
                    raise StudyError(where, repr(name), expected, fix)
                kind, label = known[name]
                _fill(one, {f"<{kind}>": name, f"<{kind}.label>": label}, where)
                one.insert(0, "id", claim_id)
            expanded.append((one, copy.deepcopy(claims.ca.items.get(i))))
    if len(expanded) > len(claims):
        expanded.sort(
            key=lambda pair: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", str(pair[0].get("id")))]
        )
    out = CommentedSeq(claim for claim, _ in expanded)
    out.ca.items.update({i: comments for i, (_, comments) in enumerate(expanded) if comments})
    return out


def _fill(part: CommentedMap | CommentedSeq, known: Mapping[str, str | None], where: str) -> None:
    """Fill the marks <kind> and <kind.label> into the strings of `part`, at any depth."""

    def fill(match: re.Match) -> str:
        if match[1] not in KINDS:
            return match[0]
        if (text := known.get(match[0])) is None:
            fix = "" if match[0] not in known else "label: of the level"
            raise StudyError(where, match[0], " or ".join(mark for mark in known if known[mark]), fix)
        return text

    for key, value in list(part.items() if isinstance(part, dict) else enumerate(part)):
        if isinstance(value, str):
            part[key] = type(value)(re.sub(r"<(\w+)(\.label)?>", fill, value))
        elif isinstance(value, dict | list):
            _fill(value, known, where)


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
    for path in map(Path.absolute, paths):
        out = (options.out or path.parent).absolute()
        files, new, differing = _compare(path, out)
        _validate(path, out, files)
        if differing and not (options.force or options.dry_run):
            shown = "".join(f"\n  {display_path(f)}: {' | '.join(_lines(f, text))}" for f, text in differing.items())
            found = f"files that differ from what it writes: {len(differing)} (- file, + design){shown}"
            fix = "--force, to overwrite; --dry-run, to see the lines; or change the design to what the files say"
            raise StudyError(display_path(path), found, "new files, or files as they are", fix)
        same = len(files) - len(new) - len(differing)
        print(f"{display_path(path)}: {len(files)} files; {len(new)} new, {len(differing)} differ, {same} as they are")
        for file, text in (new | differing).items():
            print(f"  {'differs' if file in differing else 'new'}: {display_path(file)}")
            if options.dry_run:
                print("\n".join(_diff(file, text)))
        for file in _other_files(out, files):
            print(f"  not in this design, left alone: {display_path(file)}")
        to_write |= new | differing
    if options.dry_run:
        print("nothing was written (--dry-run)")
    else:
        write(to_write)
        print(f"written: {len(to_write)}" if to_write else "nothing to do: every file is as its design writes it")
    return 0


def _compare(path: Path, out: Path) -> tuple[dict[Path, str], dict[Path, str], dict[Path, str]]:
    """{file: text} of what a design writes: all, those that are not there, those that are there and differ."""
    files = {out / name: text for name, text in render(path).items()}
    new = {file: text for file, text in files.items() if not file.exists()}
    return files, new, {file: text for file, text in files.items() if file not in new and _read(file) != text}


def _validate(path: Path, out: Path, files: Mapping[Path, str]) -> None:
    """Refuse what `plan` or `check` would refuse, before anything is written: the files are loaded from another
    folder."""
    study, wrong = load(path).top.study, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / study
        for file, text in files.items():
            record.write_text(folder / file.relative_to(out), text)
        for scale in SCALES:
            loaded = check.load_folder(folder / scale, scale, "full") if (folder / scale).is_dir() else []
            wrong += check.yaml_findings(loaded)
            if loaded and (folder / "claims.yaml").exists():
                runs = [run for _, run, _ in loaded if not isinstance(run, StudyError)]
                wrong += check.claims_findings(study, runs, scale, folder / "claims.yaml")
    wrong = [finding for finding in dict.fromkeys(wrong) if finding.level == "error"]
    if wrong:
        lines = "".join(f"\n  {finding.file}: {finding.key}: {finding.what}" for finding in wrong)
        found = f"in what it writes, faults: {len(wrong)}{lines.replace(str(folder), display_path(out))}"
        raise StudyError(display_path(path), found, "run YAMLs and claims that ./run_all.sh check takes", wrong[0].fix)


def findings(loaded: list[Loaded]) -> Iterator[Finding]:
    """Whether run YAMLs and claims.yaml are what the design beside them, or above their folder for a scale, writes. A
    difference is a warning: the files are what runs."""
    for folder in dict.fromkeys(p.parent.parent if p.parent.name in SCALES else p.parent for p, _, _ in loaded):
        design = folder / "design.yaml"
        if not design.exists():
            continue
        try:
            files, new, differing = _compare(design, folder)
        except StudyError as error:
            yield finding_from(error, display_path(design))
            continue
        again = f"./run_all.sh compose {display_path(design)}"
        for file in new:
            yield Finding("warning", "", "its design writes it, and it is not there", again, display_path(file))
        for file, text in differing.items():
            what = f"differs from its design (- file, + design): {' | '.join(_lines(file, text))}"
            fix = f"{again} --force, or change the design to what the file says"
            yield Finding("warning", "", what, fix, display_path(file))
        for file in _other_files(folder, files):
            fix = "write it into the design, or keep it in a folder of its own, for --params"
            yield Finding("warning", "", "not in the design beside it", fix, display_path(file))


def _other_files(out: Path, files: Mapping[Path, str]) -> list[Path]:
    """Run YAMLs that lie where this design writes, and that it does not write."""
    return [file for scale in SCALES for file in sorted((out / scale).glob("*.y*ml")) if file not in files]


def _read(file: Path) -> str:
    return file.read_text("utf-8", errors="replace") if file.exists() else ""


def _diff(file: Path, text: str, around: int = 3) -> list[str]:
    old, new, name = _read(file).splitlines(), text.splitlines(), display_path(file)
    return list(difflib.unified_diff(old, new, name, "composed", n=around, lineterm=""))


def _lines(file: Path, text: str) -> list[str]:
    """The first lines that are different, `- ` in the file and `+ ` in the design."""
    changed = [line for line in _diff(file, text, 0)[2:] if not line.startswith("@@")]
    return [f"{line[0]} {line[1:].strip()}" for line in changed[:SHOWN]] + ["..."] * (len(changed) > SHOWN)


def write(files: Mapping[Path, str]) -> None:
    """All of them or, where one cannot be written, none: what was there is put back."""
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    made = [folder for folder in dict.fromkeys(f.parent for f in files) if not folder.exists()]
    try:
        for file, text in files.items():
            record.write_text(file, text)
    except BaseException:
        for file, old in before.items():
            with contextlib.suppress(OSError):
                file.unlink() if old is None else record.write_bytes(file, old)
        for folder in made:
            with contextlib.suppress(OSError):  # not made, or somebody put something into it
                folder.rmdir()
        raise
