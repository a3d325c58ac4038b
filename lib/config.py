"""A run YAML as one typed, frozen object; its members; its trial form.

A run YAML is complete: nothing is merged into it except params/wandb.yaml (entity and project) where it has no `wandb`.
What is validated is always what a member would train: the values of a grid cell are put into the plain dictionary, then
the whole is validated. A value that only the cells supply (`${opt.name}`) holds the first cell's in a run itself, and
`Run.searched` says which keys those are.

A study is a folder of lib/ with a study.py, which gives Run (the typed sections), METRICS (name -> "maximize" or
"minimize"; the reported one first), prepare(run, folder) and train(member, folder, shared) -> metrics. What else it may
give is in DEFAULTS, with what holds where it does not; and, of its metrics: CLAIM_METRICS (columns that its analysis
gives to claims.evaluate; METRICS), primary_metric(run) and published_name(run) of it. A study whose members may be
sharded gives `fit`. What published files write elsewhere is read by validators of the sections.
"""

import copy
import difflib
import functools
import importlib
import itertools
import math
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, JsonValue, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from lib.errors import StudyError

ROOT = Path(__file__).resolve().parents[1]
SCALES = ("laptop", "small", "paper")
TUNABLE = ("model", "dataset", "training", "loss", "evaluation")  # sections that grid cells and searches may set
CONTEXT = ("study", "scale", "mode", "results_dir", "source", "overrides", "searched")  # not written in a run's YAML
MARKER = re.compile(r"\$\{opt\.([A-Za-z_][\w.]*)\}")
# YAML 1.1 reads 1e-5 (no dot) as a string.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
FILE_SUFFIXES = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".pt", ".safetensors"}
MAX_LENGTH = 1_000_000  # of a YAML file
MAX_ALIASES = 20  # nested, a few dozen stand for billions of values
YAML_FIXES = {  # what the parser says: what to do
    "mapping values are not allowed": "quote a text that holds a colon, as in about: 'DPO: the baseline'",
    "expected ':'": "write a space after the colon, as in beta: 0.1",
    "\\t": "indent with spaces, not with tabs",
    "constructor": "plain values: no !!python is read, nor another tag",
}
BEST = "best"  # in the place of a cell: the one that pilots choose
TUNED = "tuned"  # the name of the cell that a search finds
ASSIGNED = re.compile(r"^([A-Za-z]\w*)\s*(?::[^=\n]*)?=(?!=)", re.MULTILINE)  # in the source of a cell
PLAIN = (str, int, float, list, tuple, dict, set, bytes, type(None))


# ---- types of values


class Finding(NamedTuple):
    """Something about a run that a person should know before it starts. An error keeps the run from starting.

    `key`: of the YAML, or the place in another `file`: a notebook's cell, a line; empty for the whole of it.
    """

    level: Literal["error", "warning"]
    key: str
    what: str
    fix: str = ""
    file: str = ""

    def __str__(self) -> str:
        text = ": ".join(filter(None, (self.level, self.file, self.key, self.what)))
        return f"{text} — {self.fix}" if self.fix else text


def fault(found: str, expected: str, fix: str = "", key: str = "") -> PydanticCustomError:
    """A validation error that carries its own wording; `key` is relative to the section that raises it."""
    return PydanticCustomError("study", "{expected}", {"found": found, "expected": expected, "fix": fix, "key": key})


def plain(value: Any) -> Any:
    """A value of a search space, a grid or a claim, with a numeric string turned into its number."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = int(value) if re.fullmatch(r"[-+]?\d{1,19}", value) else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise fault(str(value), "a finite number")
    return value


def not_bool(value: Any) -> Any:
    """For a field of numbers: pydantic would take true as 1."""
    if isinstance(value, bool):
        raise fault(str(value).lower(), "a number")
    return value


def renamed(names: Mapping[Any, str]) -> BeforeValidator:
    """For a field whose published values have other names here."""
    return BeforeValidator(lambda value: names.get(value, value) if isinstance(value, str | None) else value)


def distinct(seeds: list) -> list:
    if len(set(seeds)) < len(seeds):
        raise fault(str(seeds), "seeds that differ", "remove the repeated one")
    return seeds


Value = Annotated[JsonValue, BeforeValidator(plain)]
Number = Annotated[float, BeforeValidator(not_bool)]
Whole = Annotated[int, BeforeValidator(not_bool), Field(ge=0)]
Count = Annotated[int, BeforeValidator(not_bool), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(not_bool), Field(ge=0, lt=2**32)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(distinct)]
Positive = Annotated[float, BeforeValidator(not_bool), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(not_bool), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(not_bool), Field(ge=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]  # pydantic would take 1, "on", "y"
Name = Annotated[str, Field(min_length=1)]
RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$")]  # a folder name: no separator, no ..


# ---- sections of a run YAML. A field with `exclude` is one that published files have: read and checked, not kept.


class Section(BaseModel):
    model_config = {"frozen": True, "extra": "forbid", "populate_by_name": True, "allow_inf_nan": False}


class Distribution(Section):
    """One entry of a search space."""

    type: Literal["categorical", "loguniform", "uniform", "int"]
    choices: list[Value] | None = None
    low: Number | None = None
    high: Number | None = None
    step: Positive | None = None

    @model_validator(mode="after")
    def _complete(self):
        numbers = (self.low, self.high, self.step)
        found = f"choices {self.choices}, low {self.low}, high {self.high}, step {self.step}"
        if self.type == "categorical":
            if not self.choices or numbers != (None, None, None):
                raise fault(found, "choices alone, at least one", "choices: [...], or another type", "choices")
        elif self.choices is not None or self.low is None or self.high is None or not self.low < self.high:
            raise fault(found, "low and a higher high, no choices", "low: ..., high: ..., or type: categorical", "low")
        elif self.type == "loguniform" and (self.low <= 0 or self.step is not None):
            raise fault(found, "low above 0 and no step", "type: uniform", "low")
        elif self.type == "int" and any(number % 1 for number in numbers if number):
            raise fault(found, "whole numbers", "type: uniform", "low")
        return self


class Optuna(Section):
    n_trials: Whole = 0
    direction: Literal["maximize", "minimize"] = "maximize"
    objective_metric: Name
    seed: Seed = 0
    search_space: dict[str, Distribution] = {}


class Compute(Section):
    gpus: Whole = 0  # that ONE member trains on; 0: the CPU
    gpu_type: str | None = None
    strategy: Literal["none", "fsdp"] = "none"  # fsdp: one member's weights sharded over its GPUs
    processes: Count | None = None  # of one member under fsdp; null: one per GPU (a number shards on the CPU too)
    threads: Count = 1
    min_gpu_memory_gb: Positive | None = None
    # Of one member; with prepare_seconds, what `plan` goes by before it has a record.
    seconds_per_step: NonNegative = 0.0
    prepare_seconds: NonNegative = 0.0
    on_gpu: dict[str, Any] | None = None  # other keys, set along where --set compute.gpus asks for one

    @property
    def devices(self) -> int:
        """Processes that train one member together, each with its part of the weights."""
        return (self.processes or max(1, self.gpus)) if self.strategy == "fsdp" else 1

    @model_validator(mode="after")
    def _read(self):
        if self.processes and self.strategy != "fsdp":
            raise fault("unread", "null, as strategy is none", "processes: null, or strategy: fsdp", "processes")
        return self


class Wandb(Section):
    entity: str | None = None
    project: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None  # null: online at paper scale, else offline


class Block(Section):
    """Grid cells: written out, or the product of lists. `seeds` null: the run's seed_list.

    Of a `pilot` block every cell is trained with the run's pilot_seeds, and the best of them, which is then known
    (lib/run/runs.py), with `seeds`. A `tuned` block has one cell, named so: what the run's search finds, whose trials
    are the pilots."""

    cells: list[Annotated[dict[str, Value], Field(min_length=1)]] | None = None
    product: dict[str, Annotated[list[Value], Field(min_length=1)]] | None = None
    seeds: Seeds | None = None
    pilot: Flag = False
    tuned: Flag = False

    @model_validator(mode="after")
    def _one_kind(self):
        if self.tuned and (self.pilot or self.product or len(self.cells or ()) > 1):
            raise fault("more than seeds", "seeds alone: the search finds the cell", "tuned: true", "tuned")
        if bool(self.cells) == bool(self.product) and not self.tuned:
            raise fault("both" if self.cells else "neither", "either cells or product", "cells: [{beta: 0.05}]")
        return self


class Model(Section):
    """What the `model` section of every study has."""

    name: Name
    revision: str | None = None
    torch_dtype: Literal["float32", "bfloat16"] = Field("float32", validation_alias="dtype")  # as published for GRAFF
    trust_remote_code: Flag = False


class Schedule(Section):
    """What `training` has in a study whose runs are so many epochs or steps long."""

    epochs: Positive | None = None
    max_steps: Count | None = None
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    optimizer: Literal["adamw"] = "adamw"
    warmup_ratio: Fraction = 0.0
    warmup_steps: Whole | None = None
    max_grad_norm: Positive = 1.0
    bf16: Flag = False
    eval_steps: Count | None = None  # null: at the end only

    def warmup(self, total_steps: int) -> int:
        """Warm-up steps; the ratio (0.1 where none is given) where the configured steps exceed the run's."""
        if self.warmup_steps is not None and self.warmup_steps < total_steps:
            return self.warmup_steps
        return math.ceil((self.warmup_ratio or (0.1 if self.warmup_steps else 0.0)) * total_steps)

    @model_validator(mode="after")
    def _length_and_warmup(self):
        if self.epochs is None and self.max_steps is None:
            raise fault("neither epochs nor max_steps", "one of them", "epochs: 3", "epochs")
        if self.warmup_ratio and self.warmup_steps:
            raise fault("warmup_ratio and warmup_steps", "one of them", "remove warmup_steps", "warmup_steps")
        if getattr(self, "evaluation_strategy", None) == "steps" and self.eval_steps is None:
            raise fault("missing", "an interval, as its strategy is steps", "eval_steps: 15", "eval_steps")
        return self


class Data(Section):
    """What the `dataset` section of every study has. KNOWN: the columns of a row that the study reads."""

    KNOWN: ClassVar[tuple[str, ...]] = ()
    name: Name
    revision: str | None = None
    # {column as the study knows it: as the file has it}; of a column that is to be left out: null
    columns: dict[Name, Name | None] = {}
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    split_seed: Seed | None = None  # null: the member's own; of what is chosen on, while what judges stays as it is
    limit: Count | None = None  # rows of each split

    @model_validator(mode="after")
    def _known_columns(self):
        for name in sorted(name for name, theirs in self.columns.items() if theirs and name not in self.KNOWN):
            fix = did_you_mean(name, self.KNOWN, f"{name}: null leaves a column out")
            raise fault(f"{name}: {self.columns[name]}", f"one of {', '.join(self.KNOWN)}", fix, f"columns.{name}")
        return self


class Run(Section):
    """What every study's run has. A study's Run gives the sections their types and adds its own rules."""

    run_id: RunId
    method: Name
    role: Literal["proposed", "comparative", "ablation", "control"]
    model: Any = None  # these sections are the study's
    dataset: Any = None
    training: Any = None
    loss: Any = None
    compute: Compute = Compute()
    evaluation: Any = None
    optuna: Optuna
    seed_list: Seeds
    pilot_seeds: Seeds | None = None  # what a cell is chosen with, and never judged
    grid: list[Block] | None = None
    wandb: Wandb | None = None
    # Of `try`: a file whose function takes the place of the method's own. Not written where there is none.
    idea: Name | None = Field(None, exclude_if=lambda path: path is None)
    study: str
    scale: Literal[SCALES]  # pyright: ignore[reportInvalidTypeForm]
    mode: Literal["trial", "full"]
    results_dir: Path
    source: Path | None = None
    overrides: dict[str, str] = {}  # what --set gave, as written; already in the values
    searched: dict[str, str] = {}  # {dotted key: name in the search space} of values written as ${opt.name}

    @property
    def has_tuned(self) -> bool:
        """Whether a cell of the grid is what the search finds."""
        return any(block.tuned for block in self.grid or ())

    @classmethod
    def usual(cls, raw: dict) -> tuple[Any, str]:
        """(method, role) of a YAML that does not write them."""
        return None, "comparative"

    @model_validator(mode="before")
    @classmethod
    def _method_and_role(cls, raw: dict):
        """Published files write the role under `method`, as `proposed` or `comparative-1`."""
        written, (method, role) = raw.get("method"), cls.usual(raw)
        first = written.split("-")[0] if isinstance(written, str) else None
        if first in typing.get_args(Run.model_fields["role"].annotation):
            written, role = None, first
        method = method if written is None else written
        return {"role": role, **raw} | ({} if method is None else {"method": method})

    @model_validator(mode="after")
    def _pilots_are_not_judged(self):
        blocks, pilots = self.grid or (), {*(self.pilot_seeds or ())}
        if not pilots and any(block.pilot for block in blocks):
            raise fault("missing", "seeds for the grid's pilots", "pilot_seeds: [40, 41]", "pilot_seeds")
        if both := sorted(pilots & {*self.seed_list, *(seed for block in blocks for seed in block.seeds or ())}):
            raise fault(str(both), "no seed that is judged, in seed_list or in the grid", "other seeds", "pilot_seeds")
        return self


@functools.cache  # asked for every key of every grid cell
def keys(section: type[BaseModel], prefix: str = "") -> tuple[str, ...]:
    """Every dotted key of a run's YAML, sections included; * is a place in a list or mapping of sections."""
    names = []
    for name, field in section.model_fields.items():
        if field.exclude or (not prefix and name in CONTEXT):
            continue
        inner, place = section_type(field.annotation)
        names += [prefix + name, *(keys(inner, f"{prefix}{name}.{place}") if inner else ())]
    return tuple(names)


def section_type(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """(the section that a field holds, its place in the field): (Peft, "") of `Peft | None`, (Block, "*.") of
    `list[Block]`, and (None, "") of a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    place = "" if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType) else "*."
    parts = (section_type(part) for part in typing.get_args(annotation))
    return next(((inner, place + more) for inner, more in parts if inner), (None, ""))


# ---- faults in words


def did_you_mean(key: str, known: Iterable[str], otherwise: str = "remove it") -> str:
    """A sentence naming the known key whose last part is nearest, rather one of the same section."""
    (section, _, leaf), places = key.rpartition("."), [name.rpartition(".") for name in known]
    near = difflib.get_close_matches(leaf, {name for _, _, name in places}, cutoff=0.65)
    likely = [(section if fnmatch(section, home) else home, dot, name) for home, dot, name in places if name in near]
    best = min(likely, key=lambda place: (place[0] != section, near.index(place[2])), default=None)
    return f"did you mean {''.join(best)}?" if best else otherwise


def _not_supplied(name: str, key: str) -> tuple[str, str, str]:
    fix = f"grid: [{{cells: [{{{key}: ...}}]}}], or run the sweep and train its best.yaml"
    return f"${{opt.{name}}}, which nothing supplies", "a value, a grid over it, or choices in optuna.search_space", fix


def validated(section: type[BaseModel], raw: dict, where: str) -> Any:
    """Plain data as that section; all its faults in one StudyError: file, key, found, expected, fix for each. The value
    of an unknown key is never shown: it may be secret."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        # Unknown keys first: a slip of the pen is why another key is missing.
        errors = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    faults, by_name = [], getattr(sys.modules[section.__module__], "BY_NAME", {})
    for item in errors:
        kind, value, context = item["type"], item["input"], item.get("ctx", {})
        key = ".".join(filter(None, [*map(str, item["loc"]), context.get("key")])) or "(top level)"
        if kind == "extra_forbidden":
            words = "unknown key", "a key of this section", did_you_mean(key, keys(section))
        elif kind == "missing":
            words = "missing", "this key", f"write {key}: ... (params/ has complete examples)"
        elif kind == "study":
            words = context["found"], context["expected"], context["fix"]
        elif isinstance(value, str) and (marker := MARKER.fullmatch(value)) and item["loc"][0] in TUNABLE:
            words = _not_supplied(marker[1], key)
        else:
            fixes = [did_you_mean(str(value), re.findall("'([^']*)'", context.get("expected", "")), "")]
            fixes += [f"CONTRIBUTING.md says how to add one to {name}" for name in by_name if by_name[name] == key]
            words = reprlib.repr(value), item["msg"].removeprefix("Input should be "), " ".join(filter(None, fixes))
        faults.append((key, *words))
    if len(faults) == 1:
        raise StudyError(f"{where}: {key}", *words)
    lines = [f"\n  {key}: {found}; expected {'; '.join(filter(None, rest))}" for key, found, *rest in faults]
    raise StudyError(where, f"{len(faults)} faults{''.join(lines)}", "values as in params/", "correct each")


# ---- reading a YAML file that somebody else wrote


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would keep the last."""

    def construct_mapping(self, node, deep=False):
        names = [str(key.value) for key, _ in node.value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.MarkedYAMLError(problem=f"written twice: {', '.join(twice)}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document as plain Python data; StudyError with line and column where it is not one, writes a key twice,
    or has more aliases than anybody writes."""
    try:
        events = yaml.parse(text) if text.count("*") > MAX_ALIASES else ()
        if len(text) > MAX_LENGTH or sum(isinstance(event, yaml.AliasEvent) for event in events) > MAX_ALIASES:
            raise ValueError(f"more than {MAX_LENGTH:,} characters or {MAX_ALIASES} aliases; data goes elsewhere")
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: too many digits, an impossible date
        mark, found = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        fix = next((fix for words, fix in YAML_FIXES.items() if words in found), "correct it")
        raise StudyError(place, found, "plain YAML, not nested too deeply", fix) from None


def load_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. Refused: unreadable, not UTF-8, not a mapping, and what `parse_yaml` refuses."""
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        found = f"is not UTF-8: {error}" if isinstance(error, ValueError) else error.strerror
        raise StudyError(str(path), found, "a readable file in UTF-8", "check the path; iconv converts text") from None
    if not isinstance(content, dict):
        found, fix = "empty" if content is None else f"a {type(content).__name__}", "copy a YAML of params/ and edit it"
        raise StudyError(str(path), found, "a mapping of run_id, method, model, ...", fix)
    return content


def validate(section: type[Section], path: str | Path) -> Any:
    """A YAML file as a section of that type."""
    return validated(section, load_yaml(path), str(path))


# ---- studies, and their keys by name


def _implied(run: Run, values: Mapping[str, Any]) -> dict[str, Any]:
    """Where --set names real data in place of generated data or asks for a GPU: what the run's `dataset.real` and
    `compute.on_gpu`, if any, say of it."""
    is_given = values.get("dataset.name", "generated") not in ("generated", run.dataset.name)
    on_gpu = values.get("compute.gpus") and run.compute.on_gpu
    return {**(is_given and getattr(run.dataset, "real", None) or {}), **(on_gpu or {})}


DEFAULTS: dict[str, Any] = {  # of what a study's module may define
    "ALIASES": {},  # short name -> dotted key, in the order of a cell's name
    "DIVERGED": {},  # metric -> what a diverged member counts as
    "UNREAD": (),  # keys that no code names, metrics that a trial need not log
    "OWN_KEYS": (),  # by any of which a YAML outside params/<study>/ is known to be its
    "MEMBER_KEYS": (),  # what members of one preparation may differ in
    "SEED_KEYS": (),  # seeds of what is prepared: a member's own where its YAML leaves them out
    "NOT_NUMBERS": (),  # keys that no number depends on
    "PATHS": ("model.name", "dataset.name"),  # keys that may name a local file
    "MADE_BY": {},  # such a key -> the command that makes its file
    "BY_NAME": {},  # table -> the key that picks the one entry of it that a member uses
    "GROUP": ("model.name", "dataset.name"),  # keys: runs that differ in them are not held against each other
    "LEADS": "",  # part of the name of the group that speaks for the study; the first that has it
    "GRADED_BY": {},  # metric -> the command that makes it where training does not
    "steps": lambda run: None,  # optimizer steps of one member; None where that shows only when it runs
    "trial_changes": lambda run: {},  # {dotted key: value} that leave at most 2 batches of every phase
    "search_changes": lambda run: {},  # the same of what a trial of the search or a pilot leaves out
    "unread": lambda run: {},  # {key: why} of what this run does not read, so that --set of it is refused
    # (4,) tensors that what BY_NAME picks makes of four small ones, for `check`
    "dry_call": lambda run: (),
    "implied": _implied,  # what --set brings along where it does not say otherwise
    "check": lambda run: (),  # Findings about one member's run
    "needs": lambda run: (),  # Findings: what only it needs on the machine before a full run
}


def studies() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "lib").glob("*/study.py"))


@functools.cache  # asked for every member: the folder would be listed each time
def study_module(study: str) -> types.ModuleType:
    """lib/<study>/study.py, with the DEFAULTS of what it does not define."""
    if study not in studies():
        near = did_you_mean(str(study), studies(), "")
        raise StudyError("study", repr(study), "one of " + ", ".join(studies()), near)
    module = importlib.import_module(f"lib.{study}.study")
    own = {"CLAIM_METRICS": tuple(module.METRICS), "primary_metric": lambda run: next(iter(module.METRICS))}
    own |= {"published_name": lambda run: module.primary_metric(run)}
    for name, value in {**DEFAULTS, **own}.items():
        vars(module).setdefault(name, value)
    return module


def recognize(raw: dict, where: str) -> str:
    """The study a YAML belongs to, by its sections (published files carry no study name)."""
    names = [study for study in studies() if any(get(raw, key) is not None for key in study_module(study).OWN_KEYS)]
    if len(names) != 1:
        found, fix = f"belongs to {' and '.join(names) or 'no study'}", "put it under params/<study>/<scale>/"
        raise StudyError(where, found, "the sections of one study: " + ", ".join(studies()), fix)
    return names[0]


def resolve(study: str, key: str, where: str = "key") -> str:
    """The dotted configuration key of a short name or a dotted name."""
    module = study_module(study)
    known, dotted = keys(module.Run), module.ALIASES.get(key, key)
    if dotted in known or dotted.startswith(("optuna.search_space.", "dataset.columns.")):
        return dotted
    expected = f"a dotted key of {study}'s YAML or one of " + ", ".join(sorted(module.ALIASES))
    raise StudyError(f"{where} {key}", "no such key", expected, did_you_mean(key, [*known, *module.ALIASES], ""))


# ---- findings that several studies have


def check_batch(training: Any, per_step: int) -> Iterator[Finding]:
    """The global batch is a multiple of what all devices take at a time; a stated accumulation agrees with it."""
    size, stated, key = training.global_batch_size, training.gradient_accumulation_steps, "training.global_batch_size"
    if size % per_step:
        fix = f"global_batch_size: {max(1, round(size / per_step)) * per_step}"
        yield Finding("error", key, f"{size} is not a multiple of {per_step}, the rows of one pass", fix)
    elif stated and stated * per_step != size:
        what = f"{per_step} x {stated} is {per_step * stated}, not the global batch of {size}, which decides"
        yield Finding("warning", "training.gradient_accumulation_steps", what, "remove the key, it is derived")


def check_schedule(training: Any, total: int | None, every: int | Literal[False] | None) -> Iterator[Finding]:
    """In `total` steps an evaluation `every` so many steps happens, and the warm-up leaves most of them."""
    warmup = training.warmup_steps or math.ceil(training.warmup_ratio * (total or 0))
    if total and every and every > total:
        what = f"every {every} steps never happens in a run of {total}"
        yield Finding("warning", "training.eval_steps", what, f"eval_steps: {max(1, total // 10)}")
    if total and warmup > total / 2:
        what = f"a warm-up of {warmup} covers most of a run of {total} steps"
        what += f": it does not fit, and {training.warmup(total)} are taken" if warmup >= total else ""
        yield Finding("warning", "training.warmup_steps", what, "warmup_ratio: 0.1 instead of warmup_steps")


# ---- plain data -> run -> plain data


def is_local(name: str | None) -> bool:
    return bool(name) and name.startswith("/")


def _absolute(value: str) -> str:
    """Paths are kept absolute, so that a notebook's working directory does not matter; hub ids stay as they are."""
    path = Path(os.path.expanduser(value))
    places = (Path.cwd() / path, ROOT / path)
    written_as_path = value.startswith(("/", "./", "../", "~")) or FILE_SUFFIXES & {*path.suffixes[-2:]}
    is_here = any(os.path.exists(place) or ("/" in value and os.path.isdir(place.parent)) for place in places)
    if value in ("", "made", "generated", "verifiable") or value.startswith("${") or not (written_as_path or is_here):
        return value
    return os.path.realpath(next((place for place in places if os.path.exists(place)), path))


def get(raw: Any, dotted: str) -> Any:
    """The value at a dotted key of plain data, None where there is none."""
    for part in dotted.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def put(raw: dict, dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        if not isinstance(raw.get(part), dict):
            raw[part] = {}
        raw = raw[part]
    raw[last] = value


def build(study: str, raw: Mapping[str, Any], where: str, /, **context: Any) -> Run:
    """Plain data, in our names or the published ones, as the study's typed run; `raw` is changed. `context`: fields of
    CONTEXT."""
    module, raw = study_module(study), dict(raw)
    marks = ((key, MARKER.fullmatch(str(get(raw, key)))) for key in keys(module.Run) if key.split(".")[0] in TUNABLE)
    searched = {key: mark[1] for key, mark in marks if mark}
    for key, value in _first_values(raw, module.ALIASES).items():
        if key in searched:
            put(raw, key, value)
    for key in module.PATHS:
        if isinstance(path := get(raw, key), str):
            put(raw, key, _absolute(path))
    folder = context.get("results_dir") or default_results(study, context["scale"], context["mode"])
    context |= {"study": study, "searched": searched, "results_dir": ROOT / Path(folder).expanduser()}
    return validated(module.Run, {**raw, **context}, where)


def _first_values(raw: dict, aliases: Mapping[str, str]) -> dict[str, Any]:
    """{dotted key: value} of the first cell, and of the marked keys that it leaves to the search: the first choice, or
    the low end. Of data that is not validated yet: what is malformed in it is left to the validation."""
    try:
        block, space = (raw.get("grid") or [{}])[0], get(raw, "optuna.search_space") or {}
        values = {key: (entry.get("choices") or [entry.get("low")])[0] for key, entry in space.items()}
        marked = {key: value for key, value in values.items() if str(get(raw, aliases.get(key, key))).startswith("${")}
        product = {key: options[0] for key, options in (block.get("product") or {}).items()}
        cell = marked | product | (block.get("cells") or [{}])[0]
    except (AttributeError, LookupError, TypeError, ValueError):
        return {}
    return {aliases.get(key, key): value for key, value in cell.items()}


def dump(run: Run) -> dict:
    """The complete YAML of a run as plain types, without the context fields."""
    raw = run.model_dump(mode="json", exclude=set(CONTEXT), warnings=False)
    for key, name in run.searched.items():
        put(raw, key, f"${{opt.{name}}}")
    return raw


def apply(run: Run, values: Mapping[str, Any], where: str = "") -> Run:
    """The run with other values, validated again. Keys are dotted or the study's short names."""
    raw, where = dump(run), where or run.run_id
    for key, value in values.items():
        put(raw, resolve(run.study, key, where), value)
    return build(run.study, raw, where, **{key: getattr(run, key) for key in CONTEXT})


def default_results(study: str, scale: str, mode: str) -> Path:
    return outputs() / f"{scale}-{mode}" / study


def outputs() -> Path:
    """Where results go: outputs/, or STUDY_OUTPUTS."""
    return Path(os.environ.get("STUDY_OUTPUTS") or ROOT / "outputs").absolute()


def _with_wandb(raw: dict) -> dict:
    """With params/wandb.yaml where the run itself says nothing of W&B."""
    path = ROOT / "params" / "wandb.yaml"
    is_said = raw.get("wandb") is not None or not path.exists()
    return raw if is_said else {**raw, "wandb": validate(Wandb, path).model_dump()}


Overrides = Mapping[str, str] | None


def load_run(
    path: str | Path, *, study: str = "", scale: str, mode: str, overrides: Overrides = None, results_dir: Any = None
) -> Run:
    """The run in a YAML file, `--set` overrides applied; in trial mode already in its trial form."""
    path = Path(path).absolute()
    raw = load_yaml(path)
    for key in raw.keys() & set(CONTEXT):
        raise StudyError(f"{path}: {key}", "not a key of a YAML", "an option, as --scale", "remove it")
    folder = path.parent.parent.name
    study = study or (folder if folder in studies() else recognize(raw, str(path)))
    run = build(study, _with_wandb(raw), str(path), scale=scale, mode=mode, results_dir=results_dir, source=path)
    run = _override(run, overrides, str(path)) if overrides else run
    return trial(run) if mode == "trial" else run


def _override(run: Run, overrides: Mapping[str, str], where: str) -> Run:
    """With the values of --set, and what the study says that they bring along."""
    if "run_id" in overrides:
        raise StudyError("--set run_id", "names the records", "another key", "copy the YAML under another run_id")
    values = {resolve(run.study, key, "--set"): parse_yaml(text, f"--set {key}") for key, text in overrides.items()}
    where += " with" + "".join(f" --set {key}={text}" for key, text in overrides.items())
    run = apply(run, study_module(run.study).implied(run, values) | values, where=where)
    only = _alone(run, values)
    if both := [key for key in only if any(f"{name}.".startswith(f"{key}.") for name in values)]:
        found, expected = f"{both[0]} supplies what another --set does", "each setting once"
        raise StudyError(where, found, expected, "leave one of the two out")
    return (apply(run, only, where=where) if only else run).model_copy(update={"overrides": dict(overrides)})


def _alone(run: Run, values: Mapping[str, Any]) -> dict[str, Any]:
    """What has to change for these values of --set to be the only ones in the run's members: cells of the grid, their
    blocks' seeds, the space of the search."""
    raw, changed = dump(run), {}
    fixed = tuple(f"{key}." for key in values if key.split(".")[0] in TUNABLE and key not in run.searched)

    def is_set(name: str) -> bool:
        return f"{resolve(run.study, name)}.".startswith(fixed)

    blocks, space = copy.deepcopy(raw["grid"] or []), raw["optuna"]["search_space"]
    for block in blocks:
        block["seeds"] = None if "seed_list" in values else block["seeds"]
        for cell in block["cells"] or ():
            cell |= {name: get(raw, resolve(run.study, name)) for name in filter(is_set, cell)}
        for name in filter(is_set, block["product"] or ()):
            block["product"][name] = [get(raw, resolve(run.study, name))]
    if blocks != (raw["grid"] or []):
        changed["grid"] = blocks
    if any(map(is_set, space)):
        changed["optuna.search_space"] = {name: entry for name, entry in space.items() if not is_set(name)}
        if not changed["optuna.search_space"] and "optuna.n_trials" not in values:
            changed["optuna.n_trials"] = 0
    return changed


def restore(values: Mapping[str, Any], *, study: str, scale: str, mode: str, results_dir: Any = None) -> Run:
    """The run that `dump` wrote out, as it is: nothing is shrunk or filled in. `values` may be changed."""
    return build(study, values, str(values.get("run_id", "run")), scale=scale, mode=mode, results_dir=results_dir)


def parameters(run: Run) -> dict:
    """One papermill variable per top-level key, and where the run stands."""
    return {**dump(run), "study": run.study, "scale": run.scale, "mode": run.mode, "results_dir": str(run.results_dir)}


def from_notebook(namespace: Mapping[str, Any]) -> Run:
    """The run described by a notebook's parameters: `from_notebook(globals())` in the cell after them.

    Unknown parameters are refused. In JupyterLab, where this cell may run again after later ones, only names that the
    parameters cells assigned are looked at; under the runner (which passes a nonce) every name of plain data is.
    """
    where, cells = "notebook parameters", () if namespace.get("nonce") else namespace.get("In", ())
    assigned = [names for cell in cells if "run_id" in (names := ASSIGNED.findall(cell))]
    written = (set(itertools.chain(*assigned)) or namespace.keys()) - {"In", "Out", "nonce"}
    given = {key: namespace[key] for key in written if isinstance(namespace[key], PLAIN) and not key.startswith("_")}
    study = given.pop("study", None) or recognize(given, where)
    module, context = study_module(study), {"mode": "full", "scale": "laptop", "results_dir": None}
    known = [*context, *(key for key in module.Run.model_fields if key not in CONTEXT)]
    for key in sorted(given.keys() - set(known)):
        near = did_you_mean(module.ALIASES.get(key, key), [*known, *keys(module.Run)])
        raise StudyError(f"{where}: {key}", "unknown parameter", "one of " + ", ".join(known), near)
    context |= {key: given.pop(key) for key in context.keys() & given.keys()}
    run = build(study, _with_wandb(copy.deepcopy(given)), where, **context)
    return trial(run) if run.mode == "trial" else run


# ---- members: the grid's cells times its seeds; and a run's trial form, which has one


class Member(NamedTuple):
    """One training: a cell of the run's grid with one seed. `run` has the cell's values in place."""

    run: Run
    cell: dict[str, Any]
    cell_name: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.cell_name}-s{self.seed}"

    @property
    def pilot(self) -> bool:
        return self.seed in (self.run.pilot_seeds or ())


def _format(value: Any) -> str:
    """%g where that is the value exactly, so that two cells never share a name; safe in a file name."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return re.sub(r"[^A-Za-z0-9._+]+", "_", str(value)).strip("_.") or "none"


def cell_name(study: str, cell: Mapping[str, Any]) -> str:
    """The same whatever order the cell is written in: short names in the order of the study's ALIASES."""
    aliases = study_module(study).ALIASES
    short = {dotted: alias for alias, dotted in reversed(aliases.items())}
    ranked = sorted(cell, key=[*aliases.values(), *sorted(cell)].index)
    return "-".join(short.get(key, key.rpartition(".")[2]) + _format(cell[key]) for key in ranked) or "default"


def _product(lists: Mapping[str, list]) -> list[dict]:
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _blocks(run: Run) -> list[Block]:
    """The grid; without one, the choices of the searched keys."""
    if run.grid:
        return run.grid
    space = {resolve(run.study, key): entry.choices for key, entry in run.optuna.search_space.items()}
    return [Block.model_construct(cells=_product({key: space[key] for key in run.searched if space.get(key)}))]


def tune(run: Run, cell: Mapping[str, Any] | None = None) -> Run:
    """The run with `cell` in its tuned block, where its grid has one; without a cell, with the run's own values of what
    its search looks for."""
    if not run.has_tuned:
        return run
    raw, keys_of = run.model_dump(mode="json"), [resolve(run.study, name) for name in run.optuna.search_space]
    tuned = {"cells": [dict(cell or {key: get(raw, key) for key in keys_of})]}
    grid = [block.model_copy(update=tuned) if block.tuned else block for block in run.grid or ()]
    return run.model_copy(update={"grid": grid})


def cell_members(run: Run, cell: dict[str, Any], seeds: Iterable[int], name: str = "") -> list[Member]:
    """A run's members of any one cell, on its grid or not (a trial of the search); its `name`: after its values."""
    where = run.source or run.run_id
    for key in cell:
        if key.split(".")[0] not in TUNABLE:
            raise StudyError(f"{where}: grid: {key}", "not a key that differs between members", ", ".join(TUNABLE))
    name = name or cell_name(run.study, cell)
    trained = apply(run, cell, where=f"{where}: grid cell {name}") if cell else run
    for key, marked in trained.searched.items():
        raise StudyError(f"{where}: cell {name}: {key}", *_not_supplied(marked, key))
    return [Member(seeded(trained, seed), cell, name, seed) for seed in seeds]


def seeded(run: Run, seed: int) -> Run:
    """A seed is a complete repetition: the run with its own `seed` where it leaves out one of the study's SEED_KEYS; a
    pilot's without what a search leaves out."""
    raw, study = dump(run), study_module(run.study)
    left = [key for key in study.SEED_KEYS if get(raw, key.rpartition(".")[0]) and get(raw, key) is None]
    changes = dict.fromkeys(left, seed) | (study.search_changes(run) if seed in (run.pilot_seeds or ()) else {})
    return apply(run, changes) if changes else run


def cells(run: Run) -> dict[str, tuple[dict[str, Any], list[int]]]:
    """{name: (cell, its seeds)}: the union of the grid's blocks in the order written, each cell with its blocks' seeds."""
    where, found = run.source or run.run_id, {}
    for block in _blocks(run):
        own = run.pilot_seeds if block.pilot else block.seeds or run.seed_list
        for values in block.cells or (_product(block.product) if block.product else []):
            cell = {resolve(run.study, key, f"{where}: grid:"): value for key, value in values.items()}
            name = TUNED if block.tuned else cell_name(run.study, cell)
            first, seeds = found.setdefault(name, (cell, []))
            if first != cell:
                raise StudyError(f"{run.run_id}: grid", f"two cells named {name}", "one", f"drop {cell}")
            seeds += [seed for seed in own if seed not in seeds]
    return found


def members(run: Run) -> list[Member]:
    return [each for name, (cell, seeds) in cells(run).items() for each in cell_members(run, cell, seeds, name)]


def with_seeds(run: Run, seeds: Mapping[str, list[int]]) -> Run:
    """The run with these of its cells alone, {name: its seeds}; under BEST those of the cells that its pilots choose,
    under TUNED that of the cell that its search finds."""
    if not run.grid:  # one cell without values, or the choices of the search, which all have the same seeds
        return apply(run, {"seed_list": list(dict.fromkeys(itertools.chain(*seeds.values())))})
    chosen = [block for block in run.grid if block.pilot or block.tuned]
    chosen = [b.model_copy(update={"seeds": seeds.get(TUNED if b.tuned else BEST)}) for b in chosen]
    blocks: dict[tuple[int, ...], list] = {}
    for name, (cell, own) in cells(run).items():
        if name in {*seeds} - {TUNED} and not {*own} <= {*(run.pilot_seeds or ())}:
            blocks.setdefault(tuple(seeds[name]), []).append(cell)
    judged = [{"cells": of_seeds, "seeds": list(own)} for own, of_seeds in blocks.items()]
    return apply(run, {"grid": [*(block.model_dump() for block in chosen if block.seeds), *judged]})


def first_cell(run: Run) -> dict[str, Any]:
    """The values of the first member's cell (of a continuous search: the low end)."""
    return _first_values(dump(run), study_module(run.study).ALIASES)


def at_most(run: Run, limits: Mapping[str, float]) -> dict[str, Any]:
    """{dotted key: its value, or the limit where that is smaller}, of the keys that have a value: for trial_changes."""
    raw = run.model_dump(mode="json")
    return {key: min(limit, value) for key, limit in limits.items() if (value := get(raw, key)) is not None}


def trial(run: Run) -> Run:
    """Does it run? The same run with 1 epoch, at most 2 batches in every phase, ONE cell, ONE seed, no search, no W&B.

    Applying it again changes nothing. A value that only a continuous search would supply takes its low end.
    """
    first, seed = first_cell(run), ((run.grid and run.grid[0].seeds) or run.seed_list)[0]
    changes = {
        **study_module(run.study).trial_changes(apply(run, first)),
        **{"compute.strategy": "none", "compute.processes": None, "compute.gpus": min(1, run.compute.gpus)},
        **{"optuna.n_trials": 0, "seed_list": [seed], "pilot_seeds": None},
        "grid": [{"cells": [first], "seeds": [seed]}] if first else None,
        "wandb": {**(run.wandb or Wandb()).model_dump(), "mode": "disabled"},
    }
    full = default_results(run.study, run.scale, "full")
    results = default_results(run.study, run.scale, "trial") if run.results_dir == full else run.results_dir
    return apply(run, changes).model_copy(update={"mode": "trial", "results_dir": results})


def steps(run: Run) -> int:
    """Optimizer steps of one member; 0 where the data's size is not known before it is read."""
    return study_module(run.study).steps(run) or 0


def wandb_mode(run: Run) -> str:
    """online, offline or disabled: the YAML's word (a trial's is disabled), else online at paper scale and offline at
    the others."""
    return (run.wandb.mode if run.wandb else None) or ("online" if run.scale == "paper" else "offline")
