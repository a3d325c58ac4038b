"""Reading a YAML file that somebody else wrote: a safe loader, bounded size, no key twice, no key that is not a name.

What YAML itself cannot know (types, ranges, names of keys) is the business of lib/config.py.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import yaml

from lib.errors import StudyError

MAX_BYTES = 1_000_000
MAX_ALIASES = 20


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice (YAML keeps the last one silently) and keys that are not names."""

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
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
        if aliases > MAX_ALIASES:  # nested, a few dozen stand for billions of values
            fix = "write the values out instead of nesting aliases"
            raise StudyError(where, f"{aliases} aliases", f"at most {MAX_ALIASES}", fix)
        content = yaml.load(text, _Loader)  # a SafeLoader
        json.dumps(content, default=str)  # ValueError: an alias that contains itself
        return content
    except RecursionError:
        raise StudyError(where, "mappings or lists nested too deeply", "a few levels", "flatten the file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits, an impossible date
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        found, fix = (
            getattr(error, "problem", None) or str(error),
            "correct the line; tags such as !!python are not read",
        )
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
    if content is None:
        refuse("an empty file", "a mapping of run_id, method, model, ...", "copy a YAML of params/ and edit it")
    if not isinstance(content, dict):
        found = f"a {type(content).__name__} at the top level"
        refuse(found, "a mapping (key: value lines)", "start the file with run_id: ...")
    return content
