"""The text of a YAML mapping as a tree of lines: keys can be set, added and dropped, and every other line, comment,
number and quote stays as it was written.

PyYAML says where each key and value stands; nothing is dumped again. (ruamel.yaml's round trip was tried first: it
hangs a comment on the value before it, so that dropping or replacing a value takes the next key's comment along, and it
rewrites null, columns and blank lines.) A comment line or blank line belongs to the key that follows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import yaml

from lib.errors import StudyError


@dataclass
class Entry:
    """One key. `value`: text on the key's line, a Tree, or the lines of anything longer, the first being what follows
    the colon. `comment`: behind the value or the colon, with the gap before it. `above`: comment and blank lines before
    the key."""

    key: str
    written: str
    value: str | list[str] | Tree
    comment: str = ""
    above: list[str] = field(default_factory=list)


@dataclass
class Tree:
    """A mapping. `flow`: written {as: this}, in one line. `tail`: comments behind the last key."""

    entries: list[Entry]
    flow: bool = False
    tail: list[str] = field(default_factory=list)

    def entry(self, key: str, where: str) -> Entry:
        """The entry of a key that the file has. Refused: a {mapping} over several lines, whose parts are not told
        apart."""
        for entry in self.entries:
            if entry.key == key:
                return entry
        raise StudyError(where, "inside a {mapping} over several lines", "a mapping on one line, or in block form", "")

    def get(self, *keys: str) -> Tree:
        """The mapping under these keys, one inside the other; an empty one where there is none."""
        tree = self
        for key in keys:
            tree = next((e.value for e in tree.entries if e.key == key and isinstance(e.value, Tree)), Tree([]))
        return tree


# ---- reading


def read(text: str, where: str) -> Tree:
    """The tree of a document that is a mapping (and that lib/settings/yaml_file.py has read without a fault)."""
    for token in yaml.scan(text):
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
            mark = token.start_mark
            raise StudyError(
                f"{where}:{mark.line + 1}:{mark.column + 1}",
                "an anchor or alias (&, *)",
                "values written out: they are copied into files of their own",
                "`like:` takes a method over",
            )
    lines = text.splitlines()
    return _block(yaml.compose(text, Loader=yaml.SafeLoader), lines, 0, len(lines))


def _block(node: yaml.MappingNode, lines: list[str], start: int, stop: int) -> Tree:
    """The mapping whose keys stand in lines[start:stop]."""
    firsts = [key.start_mark.line for key, _ in node.value]
    tree, column = Tree([]), node.value[0][0].start_mark.column
    above = lines[start : firsts[0]]
    for (key, value), first, following in zip(node.value, firsts, [*firsts[1:], stop], strict=True):
        end = following
        if _on_one_line(key, value):
            end = first + 1
        while end > first + 1 and _before_a_key(lines[end - 1], column):
            end -= 1
        entry = _entry(key, value, lines, end)
        entry.above = [line.strip() for line in above]
        tree.entries.append(entry)
        above = lines[end:following]
    tree.tail = [line.strip() for line in above]
    return tree


def _before_a_key(line: str, column: int) -> bool:
    bare = line.lstrip()
    return not bare or (bare.startswith("#") and len(line) - len(bare) <= column)


def _on_one_line(key: yaml.Node, value: yaml.Node) -> bool:
    empty = isinstance(value, yaml.ScalarNode) and not value.value and value.style is None
    return empty or key.start_mark.line == value.start_mark.line == value.end_mark.line


def _entry(key: yaml.Node, value: yaml.Node, lines: list[str], end: int) -> Entry:
    first, column = key.start_mark.line, key.start_mark.column
    line = lines[first].rstrip()
    written = line[column : key.end_mark.column]
    behind = line[key.end_mark.column :].lstrip()[1:]
    if _on_one_line(key, value):
        text = _flow(value, line)
        return Entry(key.value, written, text, line[value.end_mark.column :] if text else behind)
    if isinstance(value, yaml.MappingNode) and not value.flow_style:
        return Entry(key.value, written, _block(value, lines, first + 1, end), behind)
    return Entry(key.value, written, [behind, *(line[column:].rstrip() for line in lines[first + 1 : end])])


def _flow(value: yaml.Node, line: str) -> str | Tree:
    """A value that stands on one line."""
    if not isinstance(value, yaml.MappingNode):
        return line[value.start_mark.column : value.end_mark.column]
    pairs = [(k.value, line[k.start_mark.column : k.end_mark.column], v) for k, v in value.value]
    return Tree([Entry(key, written, _flow(v, line)) for key, written, v in pairs], flow=True)


# ---- writing


def write(tree: Tree, indent: str = "") -> list[str]:
    """Its lines."""
    lines = []
    for entry in tree.entries:
        head = f"{indent}{entry.written}:"
        lines += [indent + line if line else "" for line in entry.above]
        if isinstance(entry.value, list):
            lines += [head + entry.value[0], *(indent + line if line else "" for line in entry.value[1:])]
        elif isinstance(entry.value, Tree) and not entry.value.flow and entry.value.entries:
            lines += [head + entry.comment, *write(entry.value, indent + "  ")]
        else:
            lines.append(f"{head} {one_line(entry.value)}".rstrip() + entry.comment)
    return lines + [indent + line if line else "" for line in tree.tail]


def one_line(value: str | Tree) -> str:
    if isinstance(value, str):
        return value
    return "{" + ", ".join(f"{e.written}: {one_line(e.value)}" for e in value.entries) + "}"


# ---- changing


def locate(tree: Tree, dotted: str, line: Entry | None = None) -> tuple[Tree, Entry, Entry] | None:
    """(its mapping, the entry, the entry whose line it stands on) of a dotted key; None where there is none. Keys may
    hold dots themselves, as those of a search space do."""
    for entry in tree.entries:
        own = line if tree.flow and line else entry
        if entry.key == dotted:
            return tree, entry, own
        if dotted.startswith(entry.key + ".") and isinstance(entry.value, Tree):
            found = locate(entry.value, dotted[len(entry.key) + 1 :], own)
            if found:
                return found
    return None


def put(tree: Tree, dotted: str, given: Entry, where: str = "") -> None:
    """Another value for a key that is there. Without a comment of its own a value on one line keeps the comment of the
    one it replaces; an empty one (#) takes it away."""
    home, entry, line = locate(tree, dotted)
    _fits(home, given, where or dotted)
    short = [_short(entry), _short(given)]
    entry.value = copy.deepcopy(given.value)
    if line is not entry:
        _remark(line, given)
    elif given.comment or not all(short):
        entry.comment = given.comment if given.comment.strip() != "#" else ""
    entry.above = [blank for blank in entry.above if not blank] + own_lines(given) if own_lines(given) else entry.above


def add(tree: Tree, dotted: str, given: Entry, order: Callable[[str], list[str]], where: str = "") -> None:
    """A key that is not there, before the first of its neighbours that `order(mapping's dotted key)` has behind it."""
    home, rest, line = _home(tree, dotted)
    _fits(home, given, where or dotted)
    names = order(dotted[: -len(rest) - 1])
    later = names[names.index(rest) + 1 :] if rest in names else []
    at = next((i for i, entry in enumerate(home.entries) if entry.key in later), len(home.entries))
    entry = Entry(rest, rest, copy.deepcopy(given.value), given.comment, own_lines(given))
    if home.flow and line:
        _remark(line, given)
    if home is tree and tree.entries:
        entry.above = ["", *entry.above]
    home.entries.insert(at, entry)


def drop(tree: Tree, dotted: str) -> None:
    home, entry, _ = locate(tree, dotted)
    home.entries.remove(entry)


def _short(entry: Entry) -> bool:
    return isinstance(entry.value, str) or (isinstance(entry.value, Tree) and entry.value.flow)


def _fits(home: Tree, given: Entry, where: str) -> None:
    if home.flow and not _short(given):
        raise StudyError(
            where, "a value of several lines", "one line: it goes inside a {mapping}", "a [list] or {mapping}"
        )


def _home(tree: Tree, dotted: str, line: Entry | None = None) -> tuple[Tree, str, Entry | None]:
    """(the innermost mapping that a dotted key belongs to, the rest of the key, the entry whose line it stands on)."""
    for entry in tree.entries:
        if dotted.startswith(entry.key + ".") and isinstance(entry.value, Tree):
            return _home(entry.value, dotted[len(entry.key) + 1 :], line if tree.flow and line else entry)
    return tree, dotted, line


def own_lines(given: Entry) -> list[str]:
    return [line for line in given.above if line]


def _remark(line: Entry, given: Entry) -> None:
    """Inside {a flow mapping} there is no room for a comment: it goes behind those of its line."""
    if given.comment.strip(" #"):
        line.comment = f"{line.comment}; {given.comment.strip(' #')}" if line.comment else given.comment
