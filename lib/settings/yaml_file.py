"""Reading a YAML file that somebody else wrote: safe loader, bounded size and expansion, no duplicate keys.

What YAML itself cannot know (types, ranges, names) is the business of lib/settings/schema.py.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from lib.errors import StudyError

MAX_BYTES = 1_000_000
MAX_NODES = 20_000  # after aliases are expanded; the largest shipped file has about 300


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice (YAML keeps the last one silently) and keys that are not names."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = key_node.value
            if not isinstance(key, str) or key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key if isinstance(key, str) else '(a list or mapping)'!r} is read as "
                    f"{key_node.tag.rsplit(':', 1)[-1]}, not as a name; write it in quotes",
                    key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _expanded(node: yaml.Node, done: dict[int, int], open_nodes: set[int]) -> int:
    """Number of nodes once every alias is written out; each shared node is visited once."""
    if id(node) in open_nodes:
        raise yaml.YAMLError("an alias that contains itself")
    if id(node) not in done:
        open_nodes.add(id(node))
        children = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        done[id(node)] = 1 + sum(_expanded(child, done, open_nodes) for child in children)
        open_nodes.discard(id(node))
    return done[id(node)]


def parse_yaml(text: str, where: str):
    """One YAML document as plain Python data; StudyError with line and column where it is not one."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        size = _expanded(node, {}, set())
        if size > MAX_NODES:
            raise StudyError(
                where,
                f"{size} nodes once its aliases are expanded",
                f"at most {MAX_NODES}",
                "write the values out instead of nesting aliases",
            )
        return loader.construct_document(node)
    except RecursionError:
        raise StudyError(where, "mappings or lists nested too deeply", "a few levels", "flatten the file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits, an impossible date
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise StudyError(
            place,
            getattr(error, "problem", None) or str(error),
            "one plain YAML document",
            "correct the line; tags such as !!python are not read",
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def load_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. Refused: > 1 MB, not UTF-8, empty, not a mapping, duplicate keys, alias bombs."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StudyError(
            str(path), error.strerror or str(error), "a readable YAML file", "check the path and its permissions"
        ) from None
    if len(data) > MAX_BYTES:
        raise StudyError(
            str(path),
            f"more than {MAX_BYTES:,} bytes",
            "a run YAML of a few kilobytes",
            "data belongs in files that dataset.name points to",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StudyError(
            str(path),
            f"byte {error.start} is not UTF-8",
            "a UTF-8 text file",
            f"iconv -t UTF-8 {path} > new.yaml, or save it as UTF-8 in the editor",
        ) from None
    content = parse_yaml(text, str(path))
    if content is None:
        raise StudyError(
            str(path),
            "an empty file",
            "a mapping of run_id, method, model, dataset, ...",
            "copy a YAML of params/ and edit it",
        )
    if not isinstance(content, dict):
        raise StudyError(
            str(path),
            f"a {type(content).__name__} at the top level",
            "a mapping (key: value lines)",
            "start the file with run_id: ...",
        )
    return content
