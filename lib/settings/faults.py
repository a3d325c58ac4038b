"""Faults of a YAML in words a person can act on: file, key, what was found, what was expected, and the nearest known
key."""

from __future__ import annotations

import difflib
import functools
import re
import typing

from pydantic import BaseModel, ValidationError

from lib.errors import StudyError
from lib.settings.schema import CONTEXT, section_type


def keys(run_type: type[BaseModel]) -> list[str]:
    """Every dotted key of a run's YAML, sections included."""
    return list(_keys(run_type, ""))


@functools.cache  # asked for every key of every grid cell
def _keys(run_type: type[BaseModel], prefix: str) -> tuple[str, ...]:
    found = []
    for name, field in run_type.model_fields.items():
        if not prefix and name in CONTEXT:
            continue
        found.append(prefix + name)
        inner = section_type(field.annotation)
        if inner is not None:
            found += _keys(inner, f"{prefix}{name}.")
    return tuple(found)


def did_you_mean(key: str, known: list[str]) -> str:
    """A sentence naming the nearest known key: a slip of the pen in the same section, or the section it belongs to."""
    section, _, leaf = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    near = difflib.get_close_matches(leaf, siblings, 1, 0.6)
    if near:
        return f"did you mean {section + '.' if section else ''}{near[0]}?"
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf] or difflib.get_close_matches(key, known, 1, 0.7)
    if not elsewhere:
        leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
        elsewhere = [leaves[name] for name in difflib.get_close_matches(leaf, list(leaves), 1, 0.75)]
    return f"did you mean {elsewhere[0]}?" if elsewhere else "remove it"


def _describe(error: dict, known: list[str]) -> tuple[str, str, str, str]:
    """(key, found, expected, mend) of one pydantic error. The value of an unknown key is never shown: it may be
    secret."""
    context = error.get("ctx", {})
    parts = [str(part) for part in error["loc"]] + ([context["key"]] if context.get("key") else [])
    key = ".".join(parts) or "(top level)"
    if error["type"] == "extra_forbidden":
        return key, "unknown key", "a key of this section", did_you_mean(key, known)
    if error["type"] == "missing":
        return key, "missing", "this key", f"write {key}: ... (params/ has complete examples)"
    if error["type"] == "study":
        return key, context["found"], context["expected"], context["mend"]
    if error["loc"] == ("run_id",):
        return key, repr(error["input"])[:80], "a file name of letters, digits and . _ + -", "rename the run"
    found = repr(error["input"])
    return key, found if len(found) <= 80 else found[:77] + "...", re.sub(r"^Input should be ", "", error["msg"]), ""


def raise_faults(error: ValidationError, where: str, run_type: type[BaseModel]) -> typing.NoReturn:
    """All faults of a file in one StudyError: file, key, found, expected, mend for each."""
    known = keys(run_type)
    faults = [_describe(item, known) for item in error.errors(include_url=False)]
    if len(faults) == 1:
        key, found, expected, mend = faults[0]
        raise StudyError(f"{where}: {key}", found, expected, mend) from None
    lines = [
        f"\n  {key}: {found}; expected {expected}" + (f"; {mend}" if mend else "")
        for key, found, expected, mend in faults
    ]
    raise StudyError(
        where,
        f"{len(faults)} faults" + "".join(lines),
        "known keys with values of the right type and range",
        "correct each of them; params/ has complete examples",
    ) from None
