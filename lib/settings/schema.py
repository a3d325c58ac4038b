"""The sections that every study's run YAML has, as frozen pydantic types.

A study's own sections are typed in lib/<study>/config.py; lib/config.py reads, shrinks and expands runs.
"""

from __future__ import annotations

import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lib import witness

MARKER = re.compile(r"\$\{opt\.([A-Za-z_][\w.]*)\}")
# YAML 1.1 reads 1e-5 (no dot) as a string; so do the shells that --set values come through.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
CONTEXT = ("study", "scale", "mode", "results_dir", "source", "overrides")  # known to a run, never written in its YAML


class Marker(str):
    """`${opt.name}`: the value is supplied by the search (or by a grid cell) before a member trains."""

    @property
    def name(self) -> str:
        return MARKER.fullmatch(self).group(1)


@dataclass(frozen=True)
class Finding:
    """Something about a run that a person should know before it starts. An error keeps the run from starting."""

    level: Literal["error", "warning"]
    key: str
    what: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.key}: {self.what}" + (f" — {self.mend}" if self.mend else "")


def fault(found: str, expected: str, mend: str = "", key: str = "") -> PydanticCustomError:
    """A validation error that carries its own wording; `key` is relative to the section that raises it."""
    return PydanticCustomError("study", "{expected}", {"found": found, "expected": expected, "mend": mend, "key": key})


def plain(value: Any) -> Any:
    """A value of a search space, a grid or --set as plain data, numeric strings turned into numbers at any depth."""
    if isinstance(value, str):
        if NUMBER.fullmatch(value):
            number = float(value)
            return int(value) if re.fullmatch(r"[-+]?\d+", value) and len(value) < 20 else plain(number)
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise fault(str(value), "a finite number")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
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
Count = Annotated[int, BeforeValidator(not_bool), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(not_bool), Field(ge=0, lt=2**32)]
Positive = Annotated[float, BeforeValidator(not_bool), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(not_bool), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(not_bool), Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$")]  # a folder name: no separator, no ..


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Section(Frozen):
    """A section of a run YAML. Any of its keys but a whole section may be `${opt.name}`."""

    searchable: ClassVar[bool] = True

    @field_validator("*", mode="wrap")
    @classmethod
    def _marker_or_value(cls, value: Any, handler, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        marked = cls.searchable and isinstance(value, str) and MARKER.fullmatch(value)
        if marked and not any(_is_section(kind) for kind in kinds):
            return Marker(value)
        if bool in kinds and not isinstance(value, bool) and value is not None and str not in kinds:
            raise fault(repr(value), "true or false")  # pydantic would take 1, "on", "y"
        return handler(value)


class Fixed(Section):
    """A section that no search and no grid cell may set."""

    searchable: ClassVar[bool] = False


class Distribution(Fixed):
    """One entry of a search space."""

    type: Literal["categorical", "loguniform", "uniform", "int"]
    choices: list[Value] | None = None
    low: Number | None = None
    high: Number | None = None
    step: Positive | None = None

    @model_validator(mode="after")
    def _complete(self):
        if self.type == "categorical":
            if not self.choices:
                raise fault("no choices", "a list of at least one value", "choices: [...]", "choices")
            if self.low is not None or self.high is not None or self.step is not None:
                raise fault("low, high or step", "choices alone", "remove them, or use uniform or int", "type")
            return self
        if self.choices is not None:
            raise fault("choices", "low and high", "remove them, or use type: categorical", "choices")
        if self.low is None or self.high is None or not self.low < self.high:
            raise fault(f"low {self.low}, high {self.high}", "low below high", "", "low")
        if self.type == "loguniform" and (self.low <= 0 or self.step is not None):
            raise fault(f"low {self.low}, step {self.step}", "low above 0 and no step", "", "low")
        if self.type == "int" and any(x is not None and x != int(x) for x in (self.low, self.high, self.step)):
            raise fault(f"low {self.low}, high {self.high}, step {self.step}", "whole numbers", "type: uniform", "low")
        return self


class Optuna(Fixed):
    n_trials: Annotated[int, BeforeValidator(not_bool), Field(ge=0)] = 0
    direction: Literal["maximize", "minimize"] = "maximize"
    objective_metric: Name
    seed: Seed = 0
    search_space: dict[str, Distribution] = {}
    storage: str | None = None  # null: a journal file; a data base URL where several machines search together


class Compute(Fixed):
    gpus: Annotated[int, BeforeValidator(not_bool), Field(ge=0)] = 0  # that ONE member trains on; 0: the CPU
    gpu_type: str | None = None
    strategy: Literal["none", "fsdp"] = "none"  # fsdp: one member's weights sharded over its GPUs
    processes: Count | None = None  # of one member under fsdp; null: one per GPU (a number shards on the CPU too)
    threads: Count = 1
    min_gpu_memory_gb: Positive | None = None
    seconds_per_step: NonNegative = (
        0.0  # of one member; with prepare_seconds, what `plan` goes by before it has a record
    )
    prepare_seconds: NonNegative = 0.0

    @property
    def devices(self) -> int:
        """Processes that train one member together, each with its part of the weights."""
        return (self.processes or max(1, self.gpus)) if self.strategy == "fsdp" else 1


class Wandb(Fixed):
    entity: str | None = None
    project: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None  # null: online at paper scale, offline on the laptop


class Block(Frozen):
    """Grid cells: written out, or the product of lists. `seeds` null: the run's seed_list."""

    cells: list[Annotated[dict[str, Value], Field(min_length=1)]] | None = None
    product: dict[str, Annotated[list[Value], Field(min_length=1)]] | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self):
        if bool(self.cells) == bool(self.product):
            raise fault(
                "both" if self.cells else "neither",
                "either cells or product",
                "cells: [{beta: 0.05}] or product: {beta: [0.01, 0.05]}",
            )
        return self


class Run(Frozen):
    """What every study's run has. A study's Run gives the sections their types and adds its own rules."""

    run_id: RunId
    method: Name
    role: Literal["proposed", "comparative", "ablation", "control"]
    model: Section
    dataset: Section
    training: Section
    loss: Section
    compute: Compute = Compute()
    evaluation: Section
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

    @field_validator("seed_list")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise fault(str(seeds), "seeds that differ", "remove the repeated one")
        return seeds


def _kinds(annotation: Any) -> tuple:
    """The alternatives of an annotation, Annotated[] stripped: `Peft | None` -> (Peft, NoneType)."""
    if typing.get_origin(annotation) is Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(annotation) for kind in _kinds(part))
    return (annotation,)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def rename(section: Any, names: dict[str, str]) -> Any:
    """A section with published keys under our names; where both are written the published one stays, to be refused."""
    if not isinstance(section, dict):
        return section
    return {names[key] if key in names and names[key] not in section else key: value for key, value in section.items()}


def split_role(method: Any) -> tuple[str | None, Any]:
    """(role, method): published files write the role under `method`, as `proposed` or `comparative-1`."""
    role = method.split("-")[0] if isinstance(method, str) else None
    return (role, None) if role in ("proposed", "comparative", "ablation", "control") else (None, method)


def section_type(annotation: Any) -> type[BaseModel] | None:
    return next((kind for kind in _kinds(annotation) if _is_section(kind)), None)


if witness.FOLDER:  # a trial that is watched
    witness.install(Section)
