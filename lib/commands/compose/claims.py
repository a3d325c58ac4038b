"""From a design to the text of claims.yaml: the design's own lines; the methods' labels as `names`; a claim with
`each: {<level>: <id>, ...}` once for each of these levels, <dataset> and <dataset.label> (or another kind) filled
in."""

from __future__ import annotations

import re

import yaml

from lib.commands.compose import layout
from lib.commands.compose.design import FACTORS, Design
from lib.commands.compose.runs import MADE
from lib.config import did_you_mean
from lib.errors import StudyError

MARK = re.compile(r"<(\w+)(\.label)?>")


def text(design: Design) -> str | None:
    """claims.yaml, None for a design that has no claims."""
    if design.claims is None:
        return None
    where = f"{design.path}: claims"
    for key in ("study", "names"):
        if key in design.claims:
            raise StudyError(f"{where}.{key}", "written by compose", "no such key", "label: of a method is its name")
    tree = design.tree.get("claims")
    body = layout.Tree([entry for entry in tree.entries if entry.key != "about"], tail=tree.tail)
    listed = next((entry for entry in body.entries if entry.key == "claims"), None)
    if listed and isinstance(listed.value, list) and all(isinstance(claim, dict) for claim in design.claims["claims"]):
        listed.value = [listed.value[0], *_expanded(design, listed.value[1:], where)]
    names = {name: factor.level.label for name, factor in design.methods.items() if factor.level.label}
    flow = yaml.safe_dump(
        names, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    ).strip()
    about = [
        f"# {line}".rstrip()
        for line in (*str(design.claims.get("about") or "").splitlines(), MADE.format("design.yaml"))
    ]
    return (
        "\n".join([*about, f"study: {design.study}", *([f"names: {flow}"] if names else []), *layout.write(body)])
        + "\n"
    )


def _expanded(design: Design, lines: list[str], where: str) -> list[str]:
    """The lines of the list of claims; in the order of their ids where one stands for several."""
    found: list[tuple[str, list[str]]] = []
    several = False
    for above, item in _items(lines):
        claim = layout.read("\n".join(["  " + item[0][2:], *item[1:]]), where)
        each = next((entry for entry in claim.entries if entry.key == "each"), None)
        if each is None:
            found.append((next((e.value for e in claim.entries if e.key == "id"), ""), [*above, *item]))
            continue
        several = True
        if not isinstance(each.value, layout.Tree) or any(entry.key == "id" for entry in claim.entries):
            raise StudyError(f"{where}.each", "no mapping, or an id beside it", "each: {<level>: <the claim's id>}", "")
        for entry in each.value.entries:
            name = layout.one_line(entry.value)
            rest = [layout.Entry("id", "id", name), *(other for other in claim.entries if other is not each)]
            written = _filled(design, layout.write(layout.Tree(rest, tail=claim.tail)), entry.key, f"{where}.each")
            found.append((name, [*above, "- " + written[0], *("  " + line if line else "" for line in written[1:])]))
    if several:
        found.sort(key=lambda pair: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", pair[0])])
    return ["  " + line if line else "" for _, item in found for line in item]


def _items(lines: list[str]) -> list[tuple[list[str], list[str]]]:
    """(blank and comment lines before it, its lines) of each item of a block sequence; the first column is its dash."""
    column = next(len(line) - len(line.lstrip()) for line in lines if line.lstrip()[:2] in ("- ", "-"))
    found: list[tuple[list[str], list[str]]] = []
    above: list[str] = []
    for line in lines:
        line = line[column:]
        if line[:2] in ("- ", "-"):
            found.append((above, [line]))
            above = []
        elif not line.strip() or line.startswith("#"):
            above.append(line)
        else:
            found[-1][1].extend([*above, line])
            above = []
    found[-1][1].extend(above)
    return found


def _filled(design: Design, lines: list[str], name: str, where: str) -> list[str]:
    known = {
        level: (kind, factor.level.label)
        for scale in design.scales
        for kind, levels in design.factors(scale).items()
        for level, factor in levels.items()
    }
    if name not in known:
        near = did_you_mean(name, list(known))
        raise StudyError(where, repr(name), "a method, model, data set or variant", near if near != "remove it" else "")
    kind, label = known[name]

    def fill(match: re.Match) -> str:
        if match[1] not in FACTORS:
            return match[0]
        if match[1] != kind or (match[2] and not label):
            raise StudyError(
                where,
                match[0] + ("" if label else f", and {name} has no label"),
                f"<{kind}> or <{kind}.label>",
                "" if label else f"label: of {name}",
            )
        return label if match[2] else name

    return [MARK.sub(fill, line) for line in lines]
