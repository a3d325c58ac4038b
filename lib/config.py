"""A run YAML as one typed, frozen object; its members; its trial form.

A run YAML is complete: nothing is merged into it except params/wandb.yaml (entity and project) where it has no `wandb`.
What is validated is always what a member would train: the values of a grid cell are put into the plain dictionary, then
the whole is validated. A value that only the cells supply (`${opt.name}`) holds the first cell's in a run itself, and
`Run.searched` says which keys those are.

A study is a folder of lib/ with a study.py, which gives: Run (the typed sections), ALIASES (short name -> dotted key),
METRICS (name -> direction), PRIMARY_METRIC, SECOND_METRIC (where the primary one is not measured yet),
VALIDATION_METRIC, CLAIM_METRICS (columns that its analysis gives to claims.evaluate), DIVERGED (metric -> what a
diverged run counts as), UNREAD (keys and metrics that a trial may leave alone), MEMBER_KEYS (what members of one
preparation may differ in), PATHS (keys that may name a local file), recognizes(raw), normalize(raw) (what published
files write elsewhere), steps(run), trial_changes(run), check(run), prepare and train; and, where it has them,
BY_NAME (tables of which a member uses the entry that a key names), NOT_NUMBERS (keys that no number depends on), MADE_BY
(file -> the command that makes it), fit, primary_metric(run), search_changes(run) (what a trial of the search leaves
out), needs(run) (what only it needs on the machine before a full run) and implied(run, values) (what --set brings along
where it does not say otherwise).
"""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import functools
import importlib
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from lib.errors import StudyError

ROOT = Path(__file__).resolve().parents[1]
TUNABLE = ("model", "dataset", "training", "loss", "evaluation")  # sections that grid cells and searches may set
CONTEXT = ("study", "scale", "mode", "results_dir", "source", "overrides", "searched")  # not written in a run's YAML
MARKER = re.compile(r"\$\{opt\.([A-Za-z_][\w.]*)\}")
# YAML 1.1 reads 1e-5 (no dot) as a string; so do the shells that --set values come through.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
FILE_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".pt", ".safetensors"}
MAX_BYTES = 1_000_000  # of a YAML file
MAX_ALIASES = 20
NOTEBOOK_OWN = {"In", "Out", "exit", "quit", "get_ipython", "open", "display"}
PLAIN = (str, int, float, list, tuple, dict, set, bytes, type(None))


# ---- types of values


@dataclass(frozen=True)
class Finding:
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
    """A value of a search space, a grid or --set as plain data, numeric strings turned into numbers at any depth."""
    if isinstance(value, str):
        if not NUMBER.fullmatch(value):
            return value
        return int(value) if re.fullmatch(r"[-+]?\d+", value) and len(value) < 20 else plain(float(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise fault(str(value), "a finite number")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    raise fault(type(value).__name__, "a number, a string, true/false, null, or a list or mapping of them")


def not_bool(value: Any) -> Any:
    """For a field of numbers: pydantic would take true as 1."""
    if isinstance(value, bool):
        raise fault(str(value).lower(), "a number")
    return value


Value = Annotated[Any, BeforeValidator(plain)]
Number = Annotated[float, BeforeValidator(not_bool)]
Whole = Annotated[int, BeforeValidator(not_bool), Field(ge=0)]
Count = Annotated[int, BeforeValidator(not_bool), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(not_bool), Field(ge=0, lt=2**32)]
Positive = Annotated[float, BeforeValidator(not_bool), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(not_bool), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(not_bool), Field(ge=0, lt=1)]
Flag = StrictBool  # pydantic would take 1, "on", "y"
Name = Annotated[str, Field(min_length=1)]
RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$")]  # a folder name: no separator, no ..


# ---- sections of a run YAML


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class Distribution(Section):
    """One entry of a search space."""

    type: Literal["categorical", "loguniform", "uniform", "int"]
    choices: list[Value] | None = None
    low: Number | None = None
    high: Number | None = None
    step: Positive | None = None

    @model_validator(mode="after")
    def _complete(self):
        low, high, step = numbers = self.low, self.high, self.step
        text = f"low {low}, high {high}, step {step}"
        if self.type == "categorical":
            if not self.choices:
                raise fault("no choices", "a list of at least one value", "choices: [...]", "choices")
            if numbers != (None, None, None):
                raise fault("low, high or step", "choices alone", "remove them, or use uniform or int", "type")
        elif self.choices is not None:
            raise fault("choices", "low and high", "remove them, or use type: categorical", "choices")
        elif low is None or high is None or not low < high:
            raise fault(text, "low below high", "", "low")
        elif self.type == "loguniform" and (low <= 0 or step is not None):
            raise fault(text, "low above 0 and no step", "", "low")
        elif self.type == "int" and any(x is not None and x != int(x) for x in numbers):
            raise fault(text, "whole numbers", "type: uniform", "low")
        return self


class Optuna(Section):
    n_trials: Whole = 0
    direction: Literal["maximize", "minimize"] = "maximize"
    objective_metric: Name
    seed: Seed = 0
    search_space: dict[str, Distribution] = {}
    storage: str | None = None  # null: a journal file; a data base URL where several machines search together


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

    @property
    def devices(self) -> int:
        """Processes that train one member together, each with its part of the weights."""
        return (self.processes or max(1, self.gpus)) if self.strategy == "fsdp" else 1


class Wandb(Section):
    entity: str | None = None
    project: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None  # null: online at paper scale, offline on the laptop
    report_to: None = None  # written by records of before, when other trackers could be named


class Block(Section):
    """Grid cells: written out, or the product of lists. `seeds` null: the run's seed_list."""

    cells: list[Annotated[dict[str, Value], Field(min_length=1)]] | None = None
    product: dict[str, Annotated[list[Value], Field(min_length=1)]] | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self):
        if bool(self.cells) == bool(self.product):
            fix = "cells: [{beta: 0.05}] or product: {beta: [0.01, 0.05]}"
            raise fault("both" if self.cells else "neither", "either cells or product", fix)
        return self


class Run(Section):
    """What every study's run has. A study's Run gives the sections their types and adds its own rules."""

    run_id: RunId
    method: Name
    role: Literal["proposed", "comparative", "ablation", "control"]
    model: Any  # these sections are the study's
    dataset: Any
    training: Any
    loss: Any
    compute: Compute = Compute()
    evaluation: Any
    optuna: Optuna
    seed_list: Annotated[list[Seed], Field(min_length=1)]
    grid: list[Block] | None = None
    wandb: Wandb | None = None
    study: str
    scale: Literal["laptop", "paper"]
    mode: Literal["trial", "full"]
    results_dir: Path
    source: Path | None = None
    overrides: dict[str, str] = {}  # what --set gave, as written; already in the values
    searched: dict[str, str] = {}  # {dotted key: name in the search space} of values written as ${opt.name}

    @model_validator(mode="after")
    def _distinct(self):
        if len(set(self.seed_list)) < len(self.seed_list):
            raise fault(str(self.seed_list), "seeds that differ", "remove the repeated one", "seed_list")
        return self


@functools.cache  # asked for every key of every grid cell
def keys(run_type: type[BaseModel], prefix: str = "") -> tuple[str, ...]:
    """Every dotted key of a run's YAML, sections included."""
    names = []
    for name, field in run_type.model_fields.items():
        if not prefix and name in CONTEXT:
            continue
        names.append(prefix + name)
        inner = section_type(field.annotation)
        names += keys(inner, f"{prefix}{name}.") if inner else ()
    return tuple(names)


def section_type(annotation: Any, inside: bool = False) -> type[BaseModel] | None:
    """The section that a field holds (`Peft | None` -> Peft), None where it holds a value; `inside`: in a list, too."""
    parts, origin = typing.get_args(annotation), typing.get_origin(annotation)
    if parts and (inside or origin in (Annotated, typing.Union, types.UnionType)):
        return next(filter(None, (section_type(part, inside) for part in parts)), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def split_role(method: Any) -> tuple[str | None, Any]:
    """(role, method): published files write the role under `method`, as `proposed` or `comparative-1`."""
    role = method.split("-")[0] if isinstance(method, str) else None
    return (role, None) if role in ("proposed", "comparative", "ablation", "control") else (None, method)


# ---- faults in words


def did_you_mean(key: str, known: list[str] | tuple[str, ...], otherwise: str = "remove it") -> str:
    """A sentence naming the nearest known key: a slip of the pen in the same section, or the section it belongs to."""
    section, _, leaf = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    if near := difflib.get_close_matches(leaf, siblings, 1, 0.6):
        return f"did you mean {section + '.' if section else ''}{near[0]}?"
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf] or difflib.get_close_matches(key, known, 1, 0.7)
    if not elsewhere:
        leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
        elsewhere = [leaves[name] for name in difflib.get_close_matches(leaf, list(leaves), 1, 0.75)]
    return f"did you mean {elsewhere[0]}?" if elsewhere else otherwise


def _fields_at(model: type[BaseModel], location: tuple) -> list[str]:
    """The keys of the section that an error's location leads to, through lists and mappings too."""
    for part in location:
        if part in model.model_fields:
            model = section_type(model.model_fields[part].annotation, inside=True) or model
    return list(model.model_fields)


def _describe(error: dict, model: type[BaseModel]) -> tuple[str, str, str, str]:
    """(key, found, expected, fix) of one pydantic error. The value of an unknown key is never shown: it may be
    secret."""
    context, found = error.get("ctx", {}), repr(error["input"])
    parts = [str(part) for part in error["loc"]] + ([context["key"]] if context.get("key") else [])
    key = ".".join(parts) or "(top level)"
    if error["type"] == "extra_forbidden":
        siblings = [".".join([*parts[:-1], name]) for name in _fields_at(model, error["loc"][:-1])]
        return key, "unknown key", "a key of this section", did_you_mean(key, (*keys(model), *siblings))
    if error["type"] == "missing":
        return key, "missing", "this key", f"write {key}: ... (params/ has complete examples)"
    if error["type"] == "study":
        return key, context["found"], context["expected"], context["fix"]
    if isinstance(error["input"], str) and MARKER.fullmatch(error["input"]) and parts[0] in TUNABLE:
        return key, *_not_supplied(error["input"], key)
    if error["loc"] == ("run_id",):
        return key, found[:80], "a file name of letters, digits and . _ + -", "rename the run"
    expected = "true or false" if error["type"] == "bool_type" else re.sub(r"^Input should be ", "", error["msg"])
    return key, found if len(found) <= 80 else found[:77] + "...", expected, ""


def _not_supplied(marker: str, key: str) -> tuple[str, str, str]:
    expected = "a value, a grid over it, or categorical choices in optuna.search_space"
    fix = f"grid: [{{cells: [{{{key}: ...}}]}}], or run the sweep and train its best.yaml"
    return f"{marker}, which nothing supplies", expected, fix


def raise_faults(error: ValidationError, where: str, model: type[BaseModel]) -> typing.NoReturn:
    """All faults of a file in one StudyError: file, key, found, expected, fix for each."""
    # Unknown keys first: a slip of the pen is why another key is missing.
    errors = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    faults = [_describe(item, model) for item in errors]
    if len(faults) == 1:
        key, *rest = faults[0]
        raise StudyError(f"{where}: {key}", *rest) from None
    lines = [f"\n  {key}: {found}; expected {'; '.join(filter(None, rest))}" for key, found, *rest in faults]
    found, expected = f"{len(faults)} faults" + "".join(lines), "known keys with values of the right type and range"
    raise StudyError(where, found, expected, "correct each of them; params/ has complete examples") from None


# ---- reading a YAML file that somebody else wrote


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice (YAML keeps the last one silently), keys that are not names, and
    more aliases than anybody writes: nested, a few dozen stand for billions of values."""

    aliases = 0

    def compose_node(self, parent, index):
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MAX_ALIASES:
            problem = f"more than {MAX_ALIASES} aliases; write the values out"
            raise yaml.constructor.ConstructorError(None, None, problem, self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key.value, str) else "(a list or mapping)"
            kind = key.tag.rsplit(":", 1)[-1]
            if kind not in ("merge", "str"):
                problem = f"the key {name!r} is read as {kind}, not as a name; write it in quotes"
            elif kind == "str" and name in seen:
                problem = f"the key {name!r} is written twice"
            else:
                seen.add(name)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document as plain Python data; StudyError with line and column where it is not one."""
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
        json.dumps(content, default=str)  # Circular reference: an alias that contains itself
        return content
    except RecursionError:
        raise StudyError(where, "mappings or lists nested too deeply", "a few levels", "flatten the file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits, an impossible date
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        found = getattr(error, "problem", None) or str(error)
        found = found.replace("Circular reference", "an alias that contains itself")
        fix = "correct the line; tags such as !!python are not read"
        raise StudyError(place, found, "one plain YAML document", fix) from None


def load_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. Refused: > 1 MB, not UTF-8, empty, not a mapping, duplicate keys, alias bombs."""

    def refuse(found: str, expected: str, fix: str) -> typing.NoReturn:
        raise StudyError(str(path), found, expected, fix) from None

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        refuse(error.strerror or str(error), "a readable YAML file", "check the path and its permissions")
    except UnicodeDecodeError as error:
        fix = f"iconv -t UTF-8 {path} > new.yaml, or save it as UTF-8 in the editor"
        refuse(f"byte {error.start} is not UTF-8", "a UTF-8 text file", fix)
    if len(data) > MAX_BYTES:
        fix = "data belongs in files that dataset.name points to"
        refuse(f"more than {MAX_BYTES:,} bytes", "a run YAML of a few kilobytes", fix)
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        found = "an empty file" if content is None else f"a {type(content).__name__} at the top level"
        refuse(found, "a mapping of run_id, method, model, ...", "copy a YAML of params/ and edit it")
    return content


def validate(section: type[S], path: str | Path) -> S:
    """A YAML file as a section of that type."""
    raw = load_yaml(path)
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise_faults(error, str(path), section)


# ---- studies, and their keys by name


def studies() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "lib").glob("*/study.py"))


@functools.cache  # asked for every member: the folder would be listed each time
def study_module(study: str) -> types.ModuleType:
    """What lib/<study>/study.py says of its runs."""
    if study not in studies():
        near = did_you_mean(str(study), studies(), "")
        raise StudyError("study", repr(study), "one of " + ", ".join(studies()), near)
    return importlib.import_module(f"lib.{study}.study")


def recognize(raw: dict, where: str) -> str:
    """The study a YAML belongs to, by its sections (published files carry no study name)."""
    names = [study for study in studies() if study_module(study).recognizes(raw)]
    if len(names) != 1:
        found = f"belongs to {' and '.join(names) or 'no study'} by its sections"
        fix = "put the file under params/<study>/<scale>/, or compare it with the examples there"
        raise StudyError(where, found, "the sections of one study: " + ", ".join(studies()), fix)
    return names[0]


def resolve(study: str, key: str, where: str = "key") -> str:
    """The dotted configuration key of a short name or a dotted name."""
    module = study_module(study)
    known, dotted = keys(module.Run), module.ALIASES.get(key, key)
    if dotted in known or dotted.startswith("optuna.search_space."):
        return dotted
    expected = f"a dotted key of {study}'s YAML or one of " + ", ".join(sorted(module.ALIASES))
    near = did_you_mean(key, [*known, *module.ALIASES], "")
    raise StudyError(f"{where} {key}", "no such configuration key", expected, near)


def is_local(name: str | None) -> bool:
    return bool(name) and name.startswith("/")


def is_hub_id(name: str | None) -> bool:
    return bool(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _absolute(value: Any) -> Any:
    """Paths are kept absolute, so that a notebook's working directory does not matter; hub ids stay as they are."""
    if not isinstance(value, str) or value.startswith("${"):
        return value
    written_as_path = value.startswith(("/", "./", "../", "~")) or Path(value).suffix in FILE_SUFFIXES
    if not written_as_path and not ("/" in value and Path(value).exists()):
        return value
    path = Path(value).expanduser()
    found = next((p for p in (Path.cwd() / path, ROOT / path) if p.exists()), Path.cwd() / path)
    try:
        return str(found.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself: the checks say so
        return str(found.absolute())


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


# ---- plain data -> run -> plain data


def build(study: str, raw: Mapping[str, Any], where: str, **context: Any) -> Run:
    """Plain data, in our names or the published ones, as the study's typed run."""
    module = study_module(study)
    try:
        raw = module.normalize(copy.deepcopy(dict(raw)))
    except StudyError as error:  # normalize names the key; the file is known here
        raise StudyError(f"{where}: {error.where}", error.found, error.expected, error.fix) from None
    marked = dict(_markers(raw, ""))
    searched = {key: marked[key] for key in keys(module.Run) if key in marked}
    choices, cell = _first(study, raw)
    filled = {key: value for key, value in {**choices, **cell}.items() if key in searched}
    for key, value in filled.items():
        put(raw, key, value)
    for key in module.PATHS:
        if get(raw, key) is not None:
            put(raw, key, _absolute(get(raw, key)))
    try:
        return module.Run.model_validate({**raw, **context, "study": study, "searched": searched})
    except ValidationError as error:
        of_cell = any(".".join(map(str, item["loc"])) in filled for item in error.errors())
        raise_faults(error, f"{where}: the grid's first cell" if of_cell else where, module.Run)


def _markers(raw: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted key, name) of every value of the sections to be searched that is written as ${opt.name}."""
    if isinstance(raw, dict):
        for key in raw if prefix else [key for key in TUNABLE if isinstance(raw.get(key), dict)]:
            yield from _markers(raw[key], f"{prefix}.{key}" if prefix else key)
    elif isinstance(raw, str) and (found := MARKER.fullmatch(raw)):
        yield prefix, found[1]


def _first(study: str, raw: dict) -> tuple[dict, dict]:
    """The first choice (of a range the low end) of each searched key, and the first cell of the grid, by dotted keys;
    of data that is not validated yet: what is malformed in it is left to the validation."""
    aliases = study_module(study).ALIASES
    try:
        space, block = get(raw, "optuna.search_space") or {}, (raw.get("grid") or [{}])[0]
        choices = {key: (entry.get("choices") or [entry.get("low")])[0] for key, entry in space.items()}
        cell = (block.get("cells") or [{}])[0] or {
            key: values[0] for key, values in (block.get("product") or {}).items()
        }
        return tuple({aliases.get(key, key): plain(value) for key, value in part.items()} for part in (choices, cell))
    except (AttributeError, LookupError, TypeError, ValueError):
        return {}, {}


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
        put(raw, resolve(run.study, key, where), plain(value))
    context = {key: getattr(run, key) for key in CONTEXT if key not in ("study", "searched")}
    return build(run.study, raw, where, **context)


def default_results(study: str, scale: str, mode: str) -> Path:
    return ROOT / "outputs" / f"{scale}-{mode}" / study


def _context(study: str, scale: str, mode: str, results_dir: str | Path | None, source: Path | None) -> dict:
    folder = Path(results_dir).expanduser() if results_dir else default_results(study, scale, mode)
    return {"scale": scale, "mode": mode, "results_dir": ROOT / folder, "source": source}


def _with_wandb(raw: dict) -> dict:
    """With params/wandb.yaml where the run itself says nothing of W&B."""
    path = ROOT / "params" / "wandb.yaml"
    if raw.get("wandb") is not None or not path.exists():
        return raw
    return {**raw, "wandb": validate(Wandb, path).model_dump()}


def load_run(
    path: str | Path,
    *,
    study: str | None = None,
    scale: str,
    mode: str,
    overrides: Mapping[str, str] | None = None,
    results_dir: str | Path | None = None,
) -> Run:
    """The run in a YAML file, `--set` overrides applied; in trial mode already in its trial form."""
    path = Path(path).absolute()
    raw = load_yaml(path)
    for key in CONTEXT:
        if key in raw:
            fix = f"remove it; use --{key}" if key in ("study", "scale") else "remove it"
            raise StudyError(f"{path}: {key}", "a matter of the command line, not of a YAML", "no such key", fix)
    if study is None:
        folder = path.parent.parent.name
        study = folder if folder in studies() and path.parent.name in ("laptop", "paper") else recognize(raw, str(path))
    run = build(study, _with_wandb(raw), str(path), **_context(study, scale, mode, results_dir, path))
    run = _override(run, overrides, str(path)) if overrides else run
    return trial(run) if mode == "trial" else run


def _override(run: Run, overrides: Mapping[str, str], where: str) -> Run:
    """With the values of --set, and what the study says that they bring along."""
    module, values = study_module(run.study), {}
    for key, text in overrides.items():
        if key.split(".")[0] in ("run_id", *CONTEXT):
            fix = "copy the YAML under another run_id" if key == "run_id" else f"use --{key}"
            raise StudyError(f"--set {key}", "not a setting of a run", "a key of the YAML or a short name", fix)
        dotted = resolve(run.study, key, "--set")
        values[dotted] = parse_yaml(text, f"--set {key}") if isinstance(text, str) else text
    implied = module.implied(run, values) if hasattr(module, "implied") else {}
    written = " ".join(f"--set {key}={text}" for key, text in overrides.items())
    run = apply(run, {**implied, **values}, where=f"{where} with {written}")
    return run.model_copy(update={"overrides": {key: str(text) for key, text in overrides.items()}})


def restore(
    values: Mapping[str, Any], *, study: str, scale: str, mode: str, results_dir: str | Path | None = None
) -> Run:
    """The run that `dump` wrote out, as it is: nothing is shrunk or filled in."""
    return build(study, values, str(values.get("run_id", "run")), **_context(study, scale, mode, results_dir, None))


def parameters(run: Run) -> dict:
    """One papermill variable per top-level key, and where the run stands."""
    return {**dump(run), "study": run.study, "scale": run.scale, "mode": run.mode, "results_dir": str(run.results_dir)}


def from_notebook(namespace: Mapping[str, Any]) -> Run:
    """The run described by a notebook's parameters: `from_notebook(globals())` in the cell after them.

    Unknown parameters are refused. In JupyterLab, where this cell may run again after later ones, only names that the
    parameters cells assigned are looked at; under the runner (which passes a nonce) every name of plain data is.
    """
    where = "notebook parameters"
    written = None if namespace.get("nonce") else _assigned_with_run_id(namespace.get("In"))
    given = {
        key: value
        for key, value in namespace.items()
        if not key.startswith("_") and key not in {*NOTEBOOK_OWN, "nonce"} and isinstance(value, PLAIN)
        if not written or key in written
    }
    study = given.pop("study", None) or recognize(given, where)
    module = study_module(study)
    known = [key for key in module.Run.model_fields if key not in ("source", "overrides", "searched", "study")]
    for key in given:
        if key not in known:
            near = did_you_mean(module.ALIASES.get(key, key), [*known, *keys(module.Run)])
            raise StudyError(f"{where}: {key}", "unknown parameter", "one of " + ", ".join(known), near)
    for key in known:
        if not isinstance(namespace.get(key), PLAIN):
            found = f"holds a {type(namespace[key]).__name__}"
            fix = "run the parameters cell again; give the other object another name"
            raise StudyError(f"{where}: {key}", found, "the parameter of that name", fix)
    mode, scale = given.pop("mode", "full"), given.pop("scale", "laptop")
    context = _context(study, scale, mode, given.pop("results_dir", None), None)
    run = build(study, _with_wandb(given), where, **context)
    return trial(run) if mode == "trial" else run


def _assigned_with_run_id(cells: Any) -> set[str]:
    """Names assigned by the cells that assign `run_id`, which are the parameters cells."""
    assigned: set[str] = set()
    for source in cells if isinstance(cells, list) else ():
        with contextlib.suppress(SyntaxError):  # magics
            statements = [s for s in ast.parse(source).body if isinstance(s, ast.Assign | ast.AnnAssign)]
            nodes = [node for statement in statements for node in ast.walk(statement)]
            names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            assigned |= names if "run_id" in names else set()
    return assigned


# ---- members: the grid's cells times its seeds; and a run's trial form, which has one


@dataclass(frozen=True)
class Member:
    """One training: a cell of the run's grid with one seed. `run` has the cell's values in place."""

    run: Run
    cell: dict[str, Any]
    cell_name: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.cell_name}-s{self.seed}"

    @property
    def run_id(self) -> str:
        return self.run.run_id


def search_space(run: Run) -> dict[str, Distribution]:
    """The search space by dotted keys."""
    return {resolve(run.study, key, "optuna.search_space"): entry for key, entry in run.optuna.search_space.items()}


def _format(value: Any) -> str:
    """%g where that is the value exactly, so that two cells never share a name; safe in a file name."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return re.sub(r"[^A-Za-z0-9._+]+", "_", str(value)).strip("_.") or "none"


def cell_name(study: str, cell: Mapping[str, Any]) -> str:
    """The same whatever order the cell is written in: short names in the order of the study's ALIASES."""
    names = {dotted: alias for alias, dotted in reversed(study_module(study).ALIASES.items())}
    order = list(dict.fromkeys(study_module(study).ALIASES.values()))
    ranked = sorted(cell, key=lambda key: (order.index(key) if key in order else len(order), key))
    return "-".join(names.get(key, key.rpartition(".")[2]) + _format(cell[key]) for key in ranked) or "default"


def _blocks(run: Run) -> list[tuple[list[dict], list[int]]]:
    """(cells, seeds) of each block. Without a grid, the categorical choices of the searched keys are the grid."""
    if not run.grid:
        space = search_space(run)
        for key, name in run.searched.items():
            if key not in space or space[key].type != "categorical":
                raise StudyError(f"{run.source or run.run_id}: {key}", *_not_supplied(f"${{opt.{name}}}", key))
        return [(_product({key: space[key].choices for key in run.searched}), run.seed_list)]
    return [(block.cells or _product(block.product), block.seeds or run.seed_list) for block in run.grid]


def _product(lists: Mapping[str, list]) -> list[dict]:
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _resolved(run: Run, written: Mapping[str, Any]) -> dict[str, Any]:
    """A cell by its dotted keys; refused where it would set what all members of a run share."""
    cell = {resolve(run.study, key, f"{run.run_id}: grid:"): value for key, value in written.items()}
    for key in cell:
        if key.split(".")[0] not in TUNABLE:
            found, fix = "not a key that differs between members", "write another run YAML for it"
            raise StudyError(f"{run.run_id}: grid: {key}", found, "keys of " + ", ".join(TUNABLE), fix)
    return cell


def member(run: Run, cell: Mapping[str, Any], seed: int) -> Member:
    """Any one member of a run, on its grid or not (a trial of the search)."""
    cell = _resolved(run, cell)
    name, where = cell_name(run.study, cell), run.source or run.run_id
    trained = apply(run, cell, where=f"{where}: grid cell {name}") if cell else run
    for key in trained.searched:
        fix = "add it to the cell, or write a value instead of ${opt...}"
        raise StudyError(f"{where}: {key}", f"not supplied by the cell {name}", "a value in every cell", fix)
    return Member(trained, cell, name, seed)


def members(run: Run, all_seeds: bool = False) -> list[Member]:
    """Union of the grid's blocks in the order written, each cell with its block's seeds (or with every seed)."""
    cells: dict[str, tuple[dict, list[int]]] = {}
    for block, seeds in _blocks(run):
        for written in block:
            cell = _resolved(run, written)
            name = cell_name(run.study, cell)
            known, have = cells.setdefault(name, (cell, []))
            if known != cell:
                out = f"two cells named {name}: {known} and {cell}"
                raise StudyError(f"{run.run_id}: grid", out, "cells that differ in their names", "drop one of them")
            have += [s for s in dict.fromkeys([*seeds, *(run.seed_list if all_seeds else ())]) if s not in have]
    out = []
    for cell, seeds in cells.values():
        first = member(run, cell, seeds[0])
        out += [replace(first, seed=seed) for seed in (sorted(seeds) if all_seeds else seeds)]
    return out


def first_cell(run: Run) -> dict[str, Any]:
    """The values of the first member's cell (of a continuous search: the low end)."""
    choices, cell = _first(run.study, dump(run))
    return {key: choices[key] for key in run.searched if key in choices} | _resolved(run, cell)


def at_most(run: Run, limits: Mapping[str, float]) -> dict[str, Any]:
    """{dotted key: its value, or the limit where that is smaller}, of the keys that have a value: for trial_changes."""
    raw = run.model_dump(mode="json")
    return {key: min(limit, value) for key, limit in limits.items() if (value := get(raw, key)) is not None}


def trial(run: Run) -> Run:
    """Does it run? The same run with 1 epoch, at most 2 batches in every phase, ONE cell, ONE seed, no search, no W&B.

    Applying it again changes nothing. A value that only a continuous search would supply takes its low end.
    """
    first, seed = first_cell(run), ((run.grid[0].seeds if run.grid else None) or run.seed_list)[0]
    changes = {
        **study_module(run.study).trial_changes(apply(run, first)),
        "compute.strategy": "none",
        "compute.processes": None,
        "compute.gpus": min(1, run.compute.gpus),
        "optuna.n_trials": 0,
        "seed_list": [seed],
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
    """online, offline or disabled: the YAML's word, else online at paper scale and offline at laptop scale."""
    if run.mode == "trial":
        return "disabled"
    return (run.wandb.mode if run.wandb else None) or ("online" if run.scale == "paper" else "offline")
