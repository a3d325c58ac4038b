"""`./run_all.sh compose design.yaml`: a study's run YAMLs and claims.yaml, written from one design.

What params/<study>/design.yaml holds:

    study: td_dpo
    methods: {<name>: <level>, ...}
    scales:
      laptop | small | paper:
        name: <role>-<dataset>_<method>                   how runs are named; a comparative role with its method's number
        factors: {dataset: {<name>: <level>, ...}, ...}   what else they differ in, if anything
        base: the sections of a complete run YAML
        notes: {<dotted key>: <text>}                     comments on keys, in every run YAML that has the base's value
    claims: what claims.yaml holds, except `study` and `names`; its `about` and `notes` become comments

A run is a method and one level of each factor, and its YAML the base of the scale with the changes of these levels:
what each has under `set`, in the order of the factors; then what each has under `when: {<scale or level>: {set, drop}}`
for the run's own scale and levels; at last every `drop`. Keys are dotted, and a value replaces the one that was there.
A level that is `like` another of its factor takes over all of it but `label` and `about`, and its own changes come
after. `only` names scales and levels, one of which a run must have. `label` is a method's name in claims and verdicts,
`about` a comment at the head of the run YAMLs. `role`, and `name` in place of the scale's, are the last that a level of
the run gives.
"""

import argparse
import copy
import difflib
import itertools
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from lib import config, record
from lib.config import SCALES, Finding, RunId, Section, did_you_mean, fault
from lib.errors import StudyError
from lib.run.check import Loaded, claims_findings, display_path, finding_from, load_folder, runs_of

DIGESTS = ".written.json"  # beside a design: of the texts that it wrote, which it may replace without being asked
WRITTEN_BY = "# Written by ./run_all.sh compose from {}, which explains the keys: change it there."
SHORT = 100  # characters of a list or mapping that is written on one line


# ---- what a design may hold


RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9<][A-Za-z0-9<>._+-]*$")]  # becomes a file's name: no separator


class Change(Section):
    """What is different, by dotted keys."""

    set: dict[str, Any] = {}
    drop: tuple[str, ...] = ()


class Level(Change):
    """A method, or one of the models, data sets, ... that runs differ in."""

    role: Literal["proposed", "comparative", "ablation", "control"] | None = None
    label: str | None = None
    about: str = ""
    name: RunName | None = None
    like: str | None = None
    only: tuple[str, ...] = ()
    when: dict[str, Change] = {}


Levels = dict[RunId, Level]


class Scale(Section):
    name: RunName
    factors: dict[str, Levels] = {}
    base: dict[str, Any]
    notes: dict[str, str] = {}


class Design(Section):
    study: str
    methods: Levels
    scales: dict[Literal[SCALES], Scale]  # pyright: ignore[reportInvalidTypeForm]
    claims: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_names(self):
        """Every scale and level that a level names exists."""
        factors = [self.methods, *(levels for scale in self.scales.values() for levels in scale.factors.values())]
        known = [*SCALES, *itertools.chain(*factors)]
        for factor in factors:
            for name, level in factor.items():
                lineage(factor, name)
                for other in {*level.only, *level.when}.difference(known):
                    fix = did_you_mean(other, known, "")
                    raise fault(repr(other), "a scale or a level", fix, f"{name}: only, when")
        return self


def lineage(levels: Levels, name: str) -> list[Level]:
    """A level, after those that it is like."""
    names = [name]
    while like := levels[names[-1]].like:
        others = [other for other in levels if other not in names]
        if like not in others:
            raise fault(repr(like), f"one of {', '.join(others)}", did_you_mean(like, others, ""), f"{name}.like")
        names.append(like)
    return [levels[name] for name in reversed(names)]


# ---- from a design to the texts of its files


def compose(path: Path) -> tuple[str, dict[Path, str]]:
    """The study of a design, and {file: text} of what it writes into its folder."""
    design, files = config.validate(Design, path), {}
    config.study_module(design.study)  # refuses an unknown study
    for scale, part in design.scales.items():
        factors = {"method": design.methods, **part.factors}
        rivals: dict[str, int] = {}  # the comparative methods of this scale, numbered
        for names in itertools.product(*factors.values()):
            lineages = [lineage(levels, name) for levels, name in zip(factors.values(), names, strict=True)]
            if not all({scale, *names} & {*(_last(levels, "only") or names)} for levels in lineages):
                continue
            levels = list(itertools.chain(*lineages))
            run_id, role = _last(levels, "name") or part.name, _last(levels, "role")
            named = f"comparative-{rivals.setdefault(names[0], len(rivals) + 1)}" if role == "comparative" else role
            for factor, name in zip(["role", *factors], [named or "", *names], strict=True):
                run_id = run_id.replace(f"<{factor}>", name)
            file = path.parent / scale / f"{run_id}.yaml"
            if file in files:
                found, fix = f"two runs named {run_id}", f"name: {'_'.join(f'<{factor}>' for factor in factors)}"
                raise StudyError(f"{path}: scales.{scale}", found, "a name for each run", fix)
            run = {"run_id": run_id, "method": names[0], "role": role} | copy.deepcopy(part.base)
            specific = [change for level in levels for name, change in level.when.items() if name in (scale, *names)]
            _apply(levels + specific, run, f"{path}: {run_id}")
            notes = {key: part.notes[key] for key in part.notes if config.get(run, key) == config.get(part.base, key)}
            files[file] = _text(run, notes, [levels[-1].about for levels in lineages], "../design.yaml")
    if design.claims:
        names = {name: level.label for name, level in design.methods.items() if level.label}
        content = {"study": design.study, "names": names, **design.claims}
        about, notes = [content.pop("about", "")], content.pop("notes", {})
        files[path.parent / "claims.yaml"] = _text(content, notes, about, "design.yaml")
    return design.study, files


def _last(levels: list[Level], field: str) -> Any:
    """The last value of a field that one of these levels gives."""
    return next((value for level in reversed(levels) if (value := getattr(level, field))), None)


def _apply(changes: list[Change], run: dict, where: str) -> None:
    """Every `set` in turn, then every `drop`. A wrong key that is set is refused when the run is validated."""
    for key, value in [pair for change in changes for pair in change.set.items()]:
        config.put(run, key, copy.deepcopy(value))
    for key in {key: None for change in changes for key in change.drop}:
        section, _, name = key.rpartition(".")
        home = config.get(run, section) if section else run
        if name not in (home or {}):
            raise StudyError(where, f"drop: {key}", "a key that is there", did_you_mean(name, list(home or {})))
        del home[name]


def _text(content: dict, notes: Mapping[str, str], about: list[str], design: str) -> str:
    head = "".join(f"# {line}\n" for text in about for line in text.strip().splitlines())
    return f"{head}{WRITTEN_BY.format(design)}\n{_yaml(content, notes)}"


def _yaml(content: dict, notes: Mapping[str, str], above: str = "") -> str:
    """Sections in blocks, with blank lines between them; what is short on one line; notes behind their keys."""
    text = ""
    for name, value in content.items():
        key, line, block = f"{above}{name}", _dump(value), ""
        if isinstance(value, dict) and value and (not above or len(line) > SHORT):
            line, block = "", _yaml(value, notes, f"{key}.")
        elif isinstance(value, list) and len(line) > SHORT:
            items = [textwrap.indent(_dump(item, flow=None), "  ") for item in value]
            line, block = "", "\n".join(f"- {item[2:]}\n" for item in items)
        start = "\n" if block and not above else ""
        note = f"   # {notes[key]}" if key in notes else ""
        text += f"{start}{_dump(name)}: {line}".rstrip() + f"{note}\n{textwrap.indent(block, '  ')}"
    return text


def _dump(value: Any, flow: bool | None = True) -> str:
    text = yaml.safe_dump(value, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").removesuffix("\n")


# ---- the command


def main(argv: list[str]) -> int:
    """Nothing is written before every design's files are known to be valid, and to be new or as they were written."""
    top = argparse.ArgumentParser(prog="./run_all.sh compose", description=__doc__.split("\n\n")[0])
    top.add_argument("design", nargs="*", type=Path, help="a design.yaml (default: those of all studies in params/)")
    top.add_argument("--force", action="store_true", help="overwrite files that differ")
    top.add_argument("--dry-run", action="store_true", help="write nothing; show the lines that would change")
    options, changed, differing, stale, digests = top.parse_args(argv), {}, [], [], {}
    for path in map(Path.absolute, options.design or sorted((config.ROOT / "params").glob("*/design.yaml"))):
        study, files = compose(path)
        _validate(study, path, files)
        changed |= {file: text for file, text in files.items() if _read(file) != text}
        own = record.read_json(path.with_name(DIGESTS), [])
        differing += [f for f in files if f in changed and f.exists() and record.digest(_read(f)) not in own]
        others = [f for f in path.parent.glob("*/*.yaml") if f not in files]  # a run that was renamed or dropped
        stale += [f for f in others if record.digest(_read(f)) in own]
        digests[path.with_name(DIGESTS)] = sorted(map(record.digest, files.values()))
    if differing and not (options.force or options.dry_run):
        found = f"files that somebody changed: {', '.join(map(display_path, differing))}"
        command = " ".join(["./run_all.sh compose", *map(str, options.design)])
        fix = f"{command} --dry-run (shows how), {command} --force (overwrites), or change the design"
        raise StudyError("compose", found, "files as they were written, or new", fix)
    for file, text in changed.items():
        if options.dry_run:
            lines = _read(file).splitlines(), text.splitlines()
            print("\n".join(difflib.unified_diff(*lines, display_path(file), "", lineterm="")))
        else:
            record.write_text(file, text)
            print(f"written: {display_path(file)}")
    for file in stale:
        print(f"{'to remove' if options.dry_run else 'removed'}: {display_path(file)}")
        if not options.dry_run:
            file.unlink()
    for file, own in () if options.dry_run else digests.items():
        record.write_json(file, own)
    print(f"{len(changed)} files {'to change (--dry-run)' if options.dry_run else 'written'}")
    return 0


def _read(file: Path) -> str:
    return file.read_text("utf-8", errors="replace") if file.exists() else ""


def _validate(study: str, path: Path, files: Mapping[Path, str]) -> None:
    """Refuse what `plan` or `check` would refuse: the files are loaded from another folder."""
    wrong: list[Finding] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / study
        for file, text in files.items():
            record.write_text(folder / file.relative_to(path.parent), text)
        for scale in (scale for scale in SCALES if (folder / scale).exists()):
            loaded = load_folder(folder / scale, scale, "full")
            wrong += [finding for _, _, found in loaded for finding in found]
            if (folder / "claims.yaml").exists():
                wrong += claims_findings(study, runs_of(loaded), scale, folder / "claims.yaml")
    if lines := "".join(f"\n  {finding}" for finding in dict.fromkeys(wrong) if finding.level == "error"):
        found = f"faults in what it writes:{lines.replace(str(folder), display_path(path.parent))}"
        raise StudyError(display_path(path), found, "run YAMLs and claims without an error of ./run_all.sh check")


def findings(loaded: list[Loaded]) -> Iterator[Finding]:
    """A warning for each file that is not what the design in its folder, or above its scale's folder, writes: the files
    are what runs."""
    for folder in dict.fromkeys(p.parent.parent if p.parent.name in SCALES else p.parent for p, _, _ in loaded):
        path = folder / "design.yaml"
        try:
            files = compose(path)[1] if path.exists() else {}
        except StudyError as error:
            yield finding_from(error, display_path(path))
            continue
        for file in (file for file, text in files.items() if _read(file) != text):
            what = "differs from what its design writes" if file.exists() else "is missing, and its design writes it"
            fix = f"./run_all.sh compose {display_path(path)} --dry-run (shows how), or change the design"
            yield Finding("warning", "", what, fix, display_path(file))
