"""The values of a run: which study's types they have, reading one by its dotted name, setting others, writing them out.

Part of lib/config.py's interface, apart from it so that lib/settings/grid.py can use it too.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lib import witness
from lib.errors import StudyError
from lib.settings.faults import did_you_mean, keys, raise_faults
from lib.settings.schema import CONTEXT, Marker, Run, plain, section_type

ROOT = Path(__file__).resolve().parents[2]
TUNABLE = ("model", "dataset", "training", "loss", "evaluation")  # sections that grid cells and searches may set
FILE_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".pt", ".safetensors"}


def studies() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "lib").glob("*/config.py"))


@functools.cache  # asked for every member: the folder would be listed each time
def study_module(study: str) -> types.ModuleType:
    """lib/<study>/config.py."""
    if study not in studies():
        near = did_you_mean(str(study), studies())
        raise StudyError("study", repr(study), "one of " + ", ".join(studies()), "" if near == "remove it" else near)
    return importlib.import_module(f"lib.{study}.config")


def recognise(raw: dict, where: str) -> str:
    """The study a YAML belongs to, by its sections (published files carry no study name)."""
    found = [study for study in studies() if study_module(study).recognises(raw)]
    if len(found) != 1:
        raise StudyError(
            where,
            "belongs to " + (" and ".join(found) or "no study") + " by its sections",
            "the sections of one study: " + ", ".join(studies()),
            "put the file under params/<study>/<scale>/, or compare it with the examples there",
        )
    return found[0]


def resolve(study: str, key: str, where: str = "key") -> str:
    """The dotted configuration key of a short name or a dotted name."""
    module = study_module(study)
    known = keys(module.Run)
    dotted = module.ALIASES.get(key, key)
    if dotted in known or dotted.startswith("optuna.search_space."):
        return dotted
    near = did_you_mean(key, known + list(module.ALIASES))
    raise StudyError(
        f"{where} {key}",
        "no such configuration key",
        f"a dotted key of {study}'s YAML or one of " + ", ".join(sorted(module.ALIASES)),
        "" if near == "remove it" else near,
    )


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
    candidates = [Path.cwd() / path, ROOT / path]
    found = next((p for p in candidates if p.exists()), candidates[0])
    try:
        return str(found.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself: lib/settings/checks.py says so
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


def build(study: str, raw: dict, where: str, **context: Any) -> Run:
    """Plain data, in our names or the published ones, as the study's typed run."""
    module = study_module(study)
    try:
        raw = module.normalise(copy.deepcopy(raw))
    except StudyError as error:  # normalise names the key; the file is known here
        raise StudyError(f"{where}: {error.where}", error.found, error.expected, error.mend) from None
    for key in module.PATHS:
        if get(raw, key) is not None:
            put(raw, key, _absolute(get(raw, key)))
    try:
        run = module.Run.model_validate({**raw, **context, "study": study})
    except ValidationError as error:
        raise_faults(error, where, module.Run)
    witness.own(run)
    return run


def default_results(study: str, scale: str, mode: str) -> Path:
    return ROOT / "outputs" / f"{scale}-{mode}" / study


def dump(run: Run) -> dict:
    """The complete YAML of a run as plain types, without the context fields."""
    return run.model_dump(mode="json", exclude=set(CONTEXT), warnings=False)


def apply(run: Run, values: Mapping[str, Any], where: str = "") -> Run:
    """The run with other values, validated again. Keys are dotted or the study's short names."""
    raw = dump(run)
    for key, value in values.items():
        put(raw, resolve(run.study, key, where or run.run_id), value if isinstance(value, Marker) else plain(value))
    return build(run.study, raw, where or run.run_id, **{key: getattr(run, key) for key in CONTEXT if key != "study"})


def markers(run: Run) -> dict[str, str]:
    """{dotted key: name in the search space} of the values that the search still has to supply."""

    def walk(section, prefix):
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, Marker):
                yield prefix + name, value.name
            elif section_type(type(value)):
                yield from walk(value, f"{prefix}{name}.")

    with witness.unseen():
        return dict(walk(run, ""))
