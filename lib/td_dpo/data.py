"""Preference pairs from anywhere, through one loader: generated, a local file or directory, or the hub.

load_splits(dataset section) -> ({"train", "validation", "test"}: lists of pairs, report). Bad rows are refused with
their numbers (`on_bad_row: drop` counts and leaves them out); a split the source does not have is carved from train by
prompt, so that no prompt is in both.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.errors import StudyError
from lib.td_dpo.pairs import LAYOUTS, BadRow, choice_number, to_pair
from lib.td_dpo.sources import Source, find_sources

SPLITS = ("train", "validation", "test")
GENERATED = {"train": 640, "validation": 400, "test": 400}  # pairs where the section does not say how many
ROWS_SHOWN = 5
MEND = "correct these rows, or leave them out and have them counted: --set dataset.on_bad_row=drop"


# ---- rows to pairs ----


def layout_of(file: str, rows: list) -> str:
    """'pair' or 'choice' for one file, from the columns that occur in any of its rows; an error where neither is
    complete."""
    columns = {column for row in rows if isinstance(row, dict) for column in row}
    if not columns or {"chosen", "rejected"} <= columns:
        return "pair"
    if {"completion_a", "completion_b", "choice"} <= columns:
        return "choice"
    wanted = ["completion_a", "completion_b", "choice"] if "completion_a" in columns else ["chosen", "rejected"]
    missing = ", ".join(column for column in wanted if column not in columns)
    raise StudyError(
        file,
        f"missing column {missing} (in all {len(rows)} rows, from row 0 on); columns found: {', '.join(sorted(columns)[:20])}",
        LAYOUTS,
        "rename the columns",
    )


def choice_base(sources: list[Source]) -> int:
    """The number that means completion_a in all files: 0 where choices are 0/1, 1 where they are 1/2; ambiguity is an
    error."""
    numbers = {
        choice_number(row.get("choice")): (file, index)
        for _, file, rows in sources
        for index, row in enumerate(rows)
        if isinstance(row, dict)
    }
    numbers.pop(None, None)
    if {0, 2} <= numbers.keys() or numbers.keys() == {1}:
        file, row = numbers[min(numbers)]
        raise StudyError(
            f"{file}, row {row}",
            f"the numbers in column choice are {', '.join(map(str, sorted(numbers)))}: 1 could be either completion",
            "0 and 1, or 1 and 2, or a and b",
            "write a and b in column choice",
        )
    return 1 if 2 in numbers else 0


def convert(sources: list[Source], *, drop: bool) -> tuple[dict[str, list[dict]], dict]:
    """(pairs by split, report of what was left out). Without `drop`, all faults of all files are one StudyError."""
    layouts = {file: layout_of(file, rows) for _, file, rows in sources}
    base = choice_base([source for source in sources if layouts[source[1]] == "choice"])
    splits: dict[str, list[dict]] = defaultdict(list)
    faults: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)  # (file, kind) -> [(row, detail)]
    offset: dict[str, int] = defaultdict(int)  # rows in a split's earlier shards
    for split, file, rows in sources:
        splits[split]  # present even where every row is bad
        for index, row in enumerate(rows):
            try:
                if isinstance(row, BadRow):
                    raise row
                splits[split].append(to_pair(row, offset[split] + index, layouts[file], base))
            except BadRow as fault:
                faults[file, fault.kind].append((index, fault.detail))
        offset[split] += len(rows)
    if faults and not drop:
        files = list(dict.fromkeys(file for file, _ in faults))
        where = ", ".join(files[:3]) + (f" and {len(files) - 3} more files" if len(files) > 3 else "")
        found = "; ".join(
            describe(kind, found) + (f" in {Path(file).name}" if len(files) > 1 else "")
            for (file, kind), found in faults.items()
        )
        raise StudyError(
            where,
            found,
            f"{LAYOUTS}; every row a prompt that ends with a user turn and two different answers; rows are counted from 0",
            MEND,
        )
    dropped = [
        {"file": file, "reason": kind, "count": len(found), "rows": [row for row, _ in found]}
        for (file, kind), found in faults.items()
    ]
    for split in splits:
        if not splits[split]:
            lost = sum(entry["count"] for entry in dropped)
            raise StudyError(
                ", ".join(file for part, file, _ in sources if part == split),
                f"0 usable rows in split {split} ({lost} dropped)" if lost else f"0 rows in split {split}",
                "at least one preference pair",
                "give a file that has rows, or remove the empty one",
            )
    return dict(splits), {"count": sum(entry["count"] for entry in dropped), "reasons": dropped}


def describe(kind: str, found: list[tuple[int, str]]) -> str:
    """'3 rows: empty chosen (rows 4, 9, 11; row 4: no messages)'."""
    several = "s" * (len(found) > 1)
    rows = (
        f"row{several} "
        + ", ".join(str(row) for row, _ in found[:ROWS_SHOWN])
        + (", ..." if len(found) > ROWS_SHOWN else "")
    )
    first, detail = found[0]
    if detail:
        rows += f"; row {first}: {detail}" if several else f": {detail}"
    return f"{len(found)} row{several}: {kind} ({rows})"


# ---- splits ----


def prompt_key(pair: dict) -> str:
    """The prompt's content as one string: pairs with the same key belong in the same split."""
    return json.dumps(pair["prompt"], sort_keys=True, ensure_ascii=False)


def carve(pairs: list[dict], fraction: float, seed: int, salt: str) -> tuple[list[dict], list[dict]]:
    """(kept, held out): a seeded `fraction` of the pairs, whole prompts at a time, both in source order."""
    groups: dict[str, int] = defaultdict(int)
    for pair in pairs:
        groups[prompt_key(pair)] += 1
    target = max(1, round(fraction * len(pairs)))
    # Ordered by a hash of seed and prompt: a prompt's place depends on no other row of the file.
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{salt}:{seed}:{key}".encode()).digest())
    held: set[str] = set()
    count = 0
    for key in order[:-1]:  # at least one prompt stays
        if count >= target:
            break
        held.add(key)
        count += groups[key]
    return [pair for pair in pairs if prompt_key(pair) not in held], [
        pair for pair in pairs if prompt_key(pair) in held
    ]


def fingerprint(splits: dict[str, list[dict]]) -> str:
    """sha256 of the content (splits, prompts, answers, order); where it was read from does not matter."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for pair in splits.get(split, []):
            digest.update(
                json.dumps([split, pair["prompt"], pair["chosen"], pair["rejected"]], sort_keys=True).encode()
            )
    return digest.hexdigest()


def load_splits(dataset: Any, *, generated: Callable[..., dict] | None = None) -> tuple[dict[str, list[dict]], dict]:
    """({"train", "validation", "test"}: pairs, report) of a `dataset` section (typed or a plain dict).

    report: source, files, rows per split, carved splits, dropped rows with reasons, overlap of test with train,
    fingerprint.
    """
    section = dataset if isinstance(dataset, dict) else dataset.model_dump()
    name, seed, fraction = (
        str(section["name"]),
        section.get("split_seed") or 0,
        section.get("validation_fraction") or 0.1,
    )
    carved: dict[str, float] = {}
    if name == "generated":
        if generated is None:
            from lib.td_dpo.generated import make_pairs as generated
        splits = generated(*(section.get(f"{split}_pairs") or size for split, size in GENERATED.items()), seed=seed)
        files, dropped = {}, {"count": 0, "reasons": []}
    else:
        sources = find_sources(name, section.get("revision"))
        files = {split: [file for part, file, _ in sources if part == split] for split in SPLITS}
        splits, dropped = convert(sources, drop=section.get("on_bad_row") == "drop")
        if len(splits) == 1:
            splits = {"train": next(iter(splits.values()))}
        if "train" not in splits:
            raise StudyError(
                f"dataset.name = {name}",
                f"splits {', '.join(splits)}",
                "a train split",
                "name the file to train on train.*",
            )
        for split in ("test", "validation"):
            if split not in splits:
                splits["train"], splits[split] = carve(splits["train"], fraction, seed, split)
                carved[split] = fraction
                if not splits[split]:
                    raise StudyError(
                        f"dataset.name = {name}",
                        f"too few different prompts in train to hold out a {split} split",
                        "at least three different prompts, or files for all splits",
                        f"give a {split}.* file beside train.*",
                    )
    limit = section.get("limit")
    splits = {split: splits[split][:limit] for split in SPLITS}
    seen = {prompt_key(pair) for pair in splits["train"]}
    report = {
        "source": name,
        "revision": section.get("revision"),
        "files": files,
        "rows": {split: len(splits[split]) for split in SPLITS},
        "carved_from_train": carved,
        "split_seed": seed if carved else None,
        "dropped": dropped,
        "test_pairs_with_a_train_prompt": sum(prompt_key(pair) in seen for pair in splits["test"]),
        "fingerprint": fingerprint(splits),
    }
    return splits, report
