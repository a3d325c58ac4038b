"""One reader for all studies: rows of a local file or folder, or of the hub; checked one by one, and split.

A row keeps its file and its number (from 0), so that every fault names its place. Nothing is cached: a file is read as
it is now. What `datasets` does not do and the studies need is done here: rows of differing types, which its schema
refuses with the whole file (or turns into others: text that looks like a date), lines that cannot be read, and all
faults of a data set in one error.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from lib import hub
from lib.errors import StudyError

SPLIT_OF = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval"), "validation"
)
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
LONGEST_ROW = 1_000_000  # bytes
_as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode  # made once: that of every row takes longer
Splits = dict[str, list[dict]]
Key = Callable[[dict], str]  # rows of the same key belong in the same split


class BadRow(Exception):
    """What is wrong with one row: `kind` is the same for all rows with this fault, `detail` says what this row
    holds."""

    def __init__(self, kind: str, detail: str = ""):
        self.kind, self.detail = kind, detail
        super().__init__(f"{kind}: {detail}" if detail else kind)


class Row(NamedTuple):
    file: str  # as messages name it
    number: int  # in its file, from 0
    value: Any  # the row, or the BadRow that stands in its place


def describe(value: Any, limit: int = 60) -> str:
    """A value for an error message: its type and its beginning."""
    text = repr(value[: 2 * limit] if isinstance(value, (str, list)) else value)
    return f"{type(value).__name__} {text[:limit]}{'...' if len(text) > limit else ''}"


def require(row: dict, column: str) -> Any:
    """The value of `column`. Raises BadRow where it is missing, null or blank."""
    value = row.get(column)
    if value is None:
        raise BadRow(f"missing {column}", f"columns: {', '.join(map(str, row))}"[:200])
    if isinstance(value, str) and not value.strip():
        raise BadRow(f"empty {column}")
    return value


def require_text(row: dict, column: str) -> str:
    """The same where it must be text."""
    if not isinstance(value := require(row, column), str):
        raise BadRow(f"wrong type in {column} (expected text)", describe(value))
    return value


# ---- files to rows


def read_jsonl(text: bytes) -> list:
    """One JSON value per line; a line that cannot be read becomes a BadRow in its place."""
    rows = []
    for number, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            if line.strip():
                rows.append(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            rows.append(BadRow("a line that is not JSON", f"line {number}: {str(error)[:80]}; it begins {line[:40]!r}"))
    return rows


def read_json(text: bytes) -> list:
    """A JSON array of rows, an object whose `data` is one, or (as many hub files are) one row per line."""
    if text.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") and b"\n" in text.strip():
        return read_jsonl(text)
    value = json.loads(text.decode("utf-8-sig"))
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise ValueError(f"JSON {type(value).__name__}, not an array of rows")
    return value


def read_csv(text: bytes) -> list:
    """Rows as strings. The header shows what separates fields; tabs may separate raw text (GLUE's files), in which a
    quotation mark means itself."""
    csv.field_size_limit(1 << 30)  # rows that are too long are refused later, with their number
    lines = text.decode("utf-8-sig")
    tab = max(",;\t", key=lines.partition("\n")[0].count)
    raw = tab == "\t" and '""' not in lines and len({line.count(tab) for line in lines.strip("\r\n").split("\n")}) == 1
    quoting = csv.QUOTE_NONE if raw else csv.QUOTE_MINIMAL
    reader = csv.DictReader(io.StringIO(lines, newline=""), strict=True, delimiter=tab, quoting=quoting)
    header = reader.fieldnames or []
    if len(set(header)) != len(header):
        raise ValueError(f"column names that repeat: {', '.join(header)}")
    fault = "more fields than the header has"
    return [BadRow(fault, f"line {reader.line_num}") if None in row else row for row in reader]


READERS: dict[str, Callable[[bytes], list]] = {
    ".parquet": lambda content: pq.read_table(pa.BufferReader(content)).to_pylist(),
    ".arrow": lambda content: datasets.Dataset.from_buffer(pa.py_buffer(content)).to_list(),
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}


def form_of(path: Path) -> str:
    """The suffix that says how a file is read: .jsonl of 'train.jsonl.gz'; '' where there is none."""
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return suffix if suffix in READERS else ""


def read_file(path: Path) -> list[Row]:
    """Rows of one local file by its suffix, decompressed by the one after it."""
    if not (form := form_of(path)):
        raise StudyError(str(path), f"a file of type '{path.suffix or 'none'}'", f"one of {', '.join(READERS)}")
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            rows = READERS[form](file.read())
    except (OSError, ValueError, RecursionError, EOFError, csv.Error, pa.ArrowException) as error:
        found = f"not {form[1:].upper()} in UTF-8: {str(error)[:160]}"
        raise StudyError(str(path), found, "a complete file of rows") from None
    if not rows:
        raise StudyError(str(path), "0 rows", "at least one row", "give a file that has rows")
    return [Row(str(path), number, row) for number, row in enumerate(rows)]


def split_of(name: str) -> str | None:
    """The split that a file's or a split's own name means: 'validation_matched' of 'dev_matched.tsv', 'train' of
    'train_prefs-00000-of-00001.parquet'; None where it means none."""
    head, _, more = re.split(r"[-.]", name)[0].partition("_")
    split = SPLIT_OF.get(head.lower())
    return f"{split}_{more}" if split and more not in ("", "prefs") else split


def files_of(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """Data files of a folder by split: train.*, test.*, validation.* in it or, as on the hub, shards such as
    data/train-00000-of-00002.parquet, or in the folder of `config`; a single file is the train split."""
    ours = [place for place in sorted(folder.iterdir()) if re.sub(r"\W", "", place.name).lower() == config]
    splits: dict[str, list[Path]] = defaultdict(list)
    for place in (*ours, folder, folder / "data"):
        files = [path for path in sorted(place.glob("*")) if form_of(path) and path.is_file()]
        for path in files:
            if split := split_of(path.name):
                splits[split].append(path)
        if not splits and len(files) == 1:
            splits["train"] = files
        if splits:
            break
    for split, paths in splits.items():
        if len(paths) > 1 and not all("-of-" in path.name for path in paths):
            found = f"several files for {split}: {', '.join(path.name for path in paths)}"
            raise StudyError(str(folder), found, "one file per split, or its shards", "remove or rename the others")
    if not splits:
        found = f"no data files for a split; it holds {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}"
        expected = f"train.*, test.*, validation.* or data/train-*.parquet ({', '.join(READERS)})"
        raise StudyError(str(folder), found, expected, "name the folder or the file that has the rows")
    return splits


def read(name: str, revision: str | None = None, config: str | None = None, **options) -> dict[str, list[Row]]:
    """All rows of the named data set by split (train, validation, test; others under their own names). `name`: a file,
    a folder (of files, or one that `save_to_disk` wrote) or a hub id; `options` go to the hub's load_dataset."""
    path = hub.local_path(name)
    if path and path.is_file():
        return {"train": read_file(path)}
    if path and not any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        files = files_of(path, config)
        return {split: [row for file in paths for row in read_file(file)] for split, paths in files.items()}
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or form_of(Path(name))
    if not path and (looks_local or not hub.HUB_ID.match(name)):
        found = f"no such file or directory (from {Path.cwd()} or {hub.ROOT})"
        expected = "an existing path, a hub id, or 'generated'"
        raise StudyError(f"dataset.name = {name}", found, expected, "--set dataset.name=<path>")
    datasets.disable_progress_bars()  # they flood a log
    options |= {"revision": revision} | ({"config": config} if config else {})
    tables = datasets.load_from_disk(str(path)) if path else hub.load_dataset(name, **options)
    tables = tables if isinstance(tables, dict) else {"train": tables}
    try:
        return {
            split_of(split) or split: [Row(f"{name}[{split}]", number, row) for number, row in enumerate(rows)]
            for split, rows in tables.items()
        }
    except Exception as error:  # of a stream, which is fetched here
        raise hub.explain(error, name, kind="dataset", revision=revision) from error


def source_of(run) -> tuple[str, str]:
    """(name of the run's data set, what the record calls it); in a trial without the hub, generated rows stand in."""
    name = run.dataset.name
    if run.mode == "trial" and hub.out_of_reach(name):
        return "generated", f"generated, standing in for {name}"
    return name, name


# ---- rows checked


def convert(
    sources: dict[str, list[Row]], parse: Callable[[dict, int], dict], expected: str, drop: bool | None = None
) -> tuple[Splits, dict]:
    """({split: what `parse(row, its place in the split)` makes of every row}, report of what was left out). Without
    `drop`, all faults of all files are one StudyError; None: the study has no key that drops rows."""
    splits: Splits = {split: [] for split in sources}  # present even where every row is bad
    faults: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)  # (file, kind) -> [(row, detail)]
    for split, rows in sources.items():
        for place, row in enumerate(rows):
            try:
                splits[split].append(parse(_check(row.value), place))
            except BadRow as fault:
                faults[row.file, fault.kind].append((row.number, fault.detail))
    if faults and not drop:
        where = ", ".join(dict.fromkeys(file for file, _ in faults))[:300]
        found = "; ".join(f"{_describe_fault(kind, bad)} in {Path(file).name}" for (file, kind), bad in faults.items())
        leave = "" if drop is None else ", or leave them out and have them counted: --set dataset.on_bad_row=drop"
        raise StudyError(where, found, f"{expected}; rows are counted from 0", f"correct these rows{leave}")
    dropped = [
        {"file": file, "reason": kind, "count": len(bad), "rows": [row for row, _ in bad]}
        for (file, kind), bad in faults.items()
    ]
    lost = sum(entry["count"] for entry in dropped)
    for split, kept in splits.items():
        if not kept:
            where = ", ".join(dict.fromkeys(row.file for row in sources[split]))
            found = f"0 usable rows in split {split} ({lost} dropped)"
            raise StudyError(where or split, found, "at least one row", "give a file that has rows")
    return splits, {"count": lost, "reasons": dropped}


def _check(value: Any) -> dict:
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow("a row that is not an object with named columns", describe(value))
    try:
        size = len(_as_json(value).encode())
    except UnicodeEncodeError:
        raise BadRow("text that is not valid Unicode (a lone surrogate)") from None
    if size > LONGEST_ROW:
        raise BadRow(f"a row of more than {LONGEST_ROW:,} bytes", f"{size:,} bytes")
    return value


def _describe_fault(kind: str, bad: list[tuple[int, str]]) -> str:
    """'3 rows: empty chosen (rows 4, 9, 11; row 4: no messages)'."""
    several, (first, detail) = "s" * (len(bad) > 1), bad[0]
    rows = ", ".join(str(row) for row, _ in bad[:5]) + ", ..." * (len(bad) > 5)
    more = f"; row {first}: {detail}" if several and detail else f": {detail}" if detail else ""
    return f"{len(bad)} row{several}: {kind} (row{several} {rows}{more})"


# ---- splits


def carve(rows: list[dict], key: Key, fraction: float, seed: int, salt: str) -> tuple[list[dict], list[dict]]:
    """(kept, held out): a seeded `fraction` of the rows, all rows of one key together, both in source order."""
    groups = Counter(map(key, rows))
    target = max(1, round(fraction * len(rows)))
    # Ordered by a hash of seed and key: a row's place depends on no other row of the file.
    order = sorted(groups, key=lambda each: hashlib.sha256(f"{salt}:{seed}:{each}".encode()).digest())
    before = itertools.accumulate((groups[each] for each in order), initial=0)
    held = {each for each, count in zip(order[:-1], before, strict=False) if count < target}  # at least one key stays
    return [row for row in rows if key(row) not in held], [row for row in rows if key(row) in held]


def complete(
    splits: Splits, wanted: Sequence[str], key: Key, where: str, seed: int = 0, fraction: float = 0.1
) -> tuple[Splits, dict[str, float]]:
    """(the `wanted` splits, of which train is one, {split carved from train: fraction}). A source with one split gives
    its rows to train, from which what is missing is carved by `key`, so that no key is in two splits."""
    splits, carved = dict(splits), {}
    if len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    if "train" not in splits:
        raise StudyError(where, f"splits {', '.join(splits)}", "a train split", "name the file to train on train.*")
    for split in wanted:
        if split not in splits:
            splits["train"], splits[split] = carve(splits["train"], key, fraction, seed, split)
            carved[split] = fraction
            if not splits[split]:
                found, fix = f"too few different rows in train to hold out a {split} split", f"give a {split}.* file"
                raise StudyError(where, found, "rows that differ, or files for all splits", fix)
    return {split: splits[split] for split in wanted}, carved


def word_counts(fit: Sequence[str], *texts: Sequence[str], **options) -> list:
    """Counts of the words of `fit` (at most 20,000) in each of `texts`, (texts, words): what a baseline that knows no
    order learns from."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(max_features=20_000, **options).fit(fit)
    return [counter.transform(each) for each in texts]
