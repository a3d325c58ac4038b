"""One reader for all studies: rows of a local file or folder, or of the hub; checked one by one, and split.

A row keeps its file and its number (from 0), so that every fault names its place. Nothing is cached: a file is read as
it is now. What `datasets` does not do and the studies need is done here: rows of differing types, which its schema
refuses with the whole file (or turns into others: text that looks like a date), lines that cannot be read, and all
faults of a data set in one error. The way of a data set: `read` (files to rows by split), then `make_splits` (a study's
own function makes of each row what it trains on; what is missing is carved from train).
"""

import ast
import contextlib
import csv
import hashlib
import io
import itertools
import json
import lzma
import re
import shlex
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import hub
from lib.errors import StudyError

SPLIT_OF = {name: name for name in ("train", "validation", "test")}
SPLIT_OF |= dict.fromkeys(("valid", "val", "dev", "eval"), "validation")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
Splits = dict[str, list[dict]]
Sources = dict[str, list["Row"]]
Parse = Callable[[dict, int], dict]  # what a study makes of a row at its place in the split; raises BadRow
Key = Callable[[dict], str]  # rows of the same key belong in the same split
# Columns that change what a row says: a study uses them or refuses them. Any other (ids, scores, sources, names of
# models) may be left over, which the audit lists.
MEANING = {"system", "system_prompt", "history", "input", "context", "tools", "functions", "tool_calls"}
MEANING |= {"reasoning_content", "reasoning", "thinking", "function_call", "documents"}
MEANING |= {"image", "images", "video", "videos", "audio", "audios"}


RIGHT, LATIN = "correct these rows", "iconv -f LATIN1 -t UTF-8 FILE > NEW, where it is Latin-1"


class BadRow(Exception):
    """What is wrong with one row: `kind` is the same for all rows with this fault, `detail` says what this row holds,
    `fix` what is to be done about it."""

    def __init__(self, kind: str, detail: str = "", fix: str = RIGHT):
        self.kind, self.detail, self.fix = kind, detail, fix
        super().__init__(f"{kind}: {detail}" if detail else kind)


class Fields(dict):
    """A row under the names that a study knows. `columns` is dataset.columns; what `take` asks for counts as used."""

    def __init__(self, row: Mapping, columns: Mapping[str, str | None]):
        for name, theirs in columns.items():
            if theirs is not None and theirs not in row:
                fix = f"--set dataset.columns.{name}=<a column of the file>"
                raise BadRow(f"missing {theirs}", f"columns: {', '.join(map(str, row))}"[:200], fix)
        known = {theirs: name for name, theirs in columns.items()}
        self.names = {theirs: known.get(theirs, theirs) for theirs in row if theirs in known or theirs not in columns}
        self.used: set[str] = set()
        super().__init__({name: row[theirs] for theirs, name in self.names.items()})

    def left_over(self) -> set[str]:
        """The file's own names of columns that were not used. Raises BadRow where one of them has a MEANING."""
        left = {theirs: name for theirs, name in self.names.items() if name not in self.used}
        refuse_meaning({word: self[name] for theirs, name in left.items() for word in (theirs, name)})
        return {*left}


def refuse_meaning(left: Mapping[str, Any], fix: str = "") -> None:
    """Raise BadRow where something that is left over has a MEANING and holds anything; `fix`: where it is no column."""
    for name, value in left.items():
        if name in MEANING and value == value and str(value or "").strip("[]{} \n") not in ("", "None", "null"):
            raise BadRow(f"{name}, which this study does not read", describe(value), fix or leave_out(name))


def leave_out(column: str) -> str:
    """What to do about a column that a study does not use and that says something."""
    return f"--set dataset.columns.{column}=null leaves it out on purpose"


class Row(NamedTuple):
    file: str  # as messages name it
    number: int  # in its file, from 0
    value: Any  # the row, or the BadRow that stands in its place


def describe(value: Any, limit: int = 60) -> str:
    """A value for an error message: its type and its beginning."""
    text = repr(value[: 2 * limit] if isinstance(value, (str, list)) else value)
    return f"{type(value).__name__} {text[:limit]}{'...' if len(text) > limit else ''}"


def take(row: dict, column: str) -> Any:
    """The value of `column`, which then counts as used; None where there is none."""
    if isinstance(row, Fields):
        row.used.add(column)
    return row.get(column)


def require(row: dict, column: str) -> Any:
    """The value of `column`. Raises BadRow where it is missing, null, blank or an empty list."""
    value = take(row, column)
    if value is None:
        fix = RIGHT if column in row else f"--set dataset.columns.{column}=<the file's name for it>"
        raise BadRow(f"missing {column}", f"columns: {', '.join(map(str, row))}"[:200], fix)
    if value == [] or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"empty {column}")
    return value


def require_text(row: dict, column: str) -> str:
    """The same where it must be text, and not text that stands for messages."""
    if not isinstance(value := decode(require(row, column), column), str):
        raise BadRow(f"wrong type in {column} (expected text)", describe(value))
    return value


# ---- texts that stand for structures: messages as JSON, as Python's repr, or as pandas and `datasets` write them to CSV

STRUCTURE = re.compile(r"""\s*\[?\s*\{.*?['"](role|content|from|value)['"]\s*:""", re.DOTALL)
NO_MESSAGES = ValueError, SyntaxError, RecursionError, tokenize.TokenError, TypeError, AttributeError
MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")  # can be nothing else


def decode(value: Any, column: str) -> Any:
    """The message or list of messages that a text holds; any other value as it is. Raises BadRow where a text begins
    as messages do and cannot be read."""
    if not (isinstance(value, str) and STRUCTURE.match(value)):
        return value
    for parse in (json.loads, ast.literal_eval, _of_array):
        with contextlib.suppress(*NO_MESSAGES):
            found = parse(value)
            messages = found if isinstance(found, list) else [found]
            if all(each.keys() & {"role", "from"} and each.keys() & {"content", "value"} for each in messages):
                return found
    if MESSAGES.match(value):
        raise BadRow(f"text in {column} that is neither an answer nor readable messages", describe(value))
    return value


def _of_array(text: str) -> Any:
    """Of an array of objects as numpy prints it: without commas between its elements."""
    tokens = [each.string for each in tokenize.generate_tokens(io.StringIO(text).readline) if each.string.strip()]
    pairs = itertools.pairwise([*tokens, ""])
    return ast.literal_eval(" ".join(one + "," * ((one, other) == ("}", "{")) for one, other in pairs))


# ---- files to rows


def read_json(text: bytes) -> list:
    """A JSON array of rows or one row per line, whatever the suffix says (many .json files of the hub have lines).
    A line that cannot be read becomes a BadRow in its place."""
    text = text.removeprefix(b"\xef\xbb\xbf")
    whole = json.loads(text.decode()) if text.lstrip().startswith(b"[") else _one_object(text)
    if whole is not None:
        odd = SURROGATE.search(text)
        return [_valid(row) if odd else row for row in whole]
    rows: list = []
    for number, line in enumerate(text.split(b"\n"), start=1):
        try:
            if line.strip():
                row = json.loads(line.decode())
                rows.append(_valid(row) if SURROGATE.search(line) else row)
        except (ValueError, RecursionError) as error:
            said = f"line {number}: {str(error)[:80]}; it begins {line[:40]!r}"
            rows.append(BadRow("a line that is not JSON", said, LATIN if isinstance(error, UnicodeError) else RIGHT))
    return rows


def _one_object(text: bytes) -> list | None:
    """The rows of a file that is one object: pandas' columns of numbered values, or {"data": [rows]}. None of any other."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text.decode())
        columns = [*found.values()] if isinstance(found, dict) else []
        if len(columns) == 1 and found.keys() <= {"data", "rows"} and isinstance(columns[0], list):
            return columns[0]
        if columns and all(isinstance(column, dict) and "0" in column for column in columns):
            return [{name: column.get(number) for name, column in found.items()} for number in columns[0]]
    return None


SURROGATE = re.compile(rb"\\u[dD]")  # an escape, with which alone JSON can spell what is not valid Unicode


def _valid(row: Any) -> Any:
    """The row, or a BadRow in its place."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
        return row
    except UnicodeEncodeError:
        return BadRow("text that is not valid Unicode (a lone surrogate)")


QUOTED = re.compile('"(?:[^"]|"")*"')  # a whole field as CSV quotes it


def read_csv(text: bytes) -> list:
    """Rows as strings. The header shows what separates fields; tabs may separate raw text (GLUE's files), in which a
    quotation mark means itself: where some field begins with one and is not quoted as a whole."""
    csv.field_size_limit(1 << 30)
    lines = text.decode("utf-8-sig")
    tab = max(",;\t", key=lines.partition("\n")[0].count)
    rows = [line.rstrip("\r").split("\t") for line in lines.strip("\r\n").split("\n")] if tab == "\t" else []
    begun = [field for row in rows for field in row if field.startswith('"')]
    raw = len(set(map(len, rows))) == 1 and not all(map(QUOTED.fullmatch, begun))
    quoting = csv.QUOTE_NONE if raw else csv.QUOTE_MINIMAL
    reader = csv.DictReader(io.StringIO(lines, newline=""), strict=True, delimiter=tab, quoting=quoting)
    header = reader.fieldnames or []
    if len(set(header)) != len(header):
        raise ValueError(f"column names that repeat: {', '.join(header)}")
    return list(reader)


def read_arrow(content: pa.BufferReader) -> list:
    """Arrow's stream, which `datasets` writes, or its file format."""
    form = pa.ipc.open_file if content.read(6) == b"ARROW1" else pa.ipc.open_stream
    content.seek(0)
    return form(content).read_all().to_pylist()


READERS: dict[str, Callable[[bytes], list]] = {
    ".parquet": lambda content: pq.read_table(pa.BufferReader(content)).to_pylist(),
    ".arrow": lambda content: read_arrow(pa.BufferReader(content)),
    ".jsonl": read_json,
    ".ndjson": read_json,
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
        # pyarrow has no xz; fsspec's zst would be one more package
        with lzma.open(path) if path.suffix == ".xz" else pa.input_stream(path, compression="detect") as file:
            content = file.read()
        if content.startswith(b"version https://git-lfs"):
            raise StudyError(str(path), "a pointer of git-lfs, not the file", "the file itself", "git lfs pull")
        rows = READERS[form](content)
    except (OSError, ValueError, RecursionError, EOFError, lzma.LZMAError, csv.Error, pa.ArrowException) as error:
        found, fix = f"not {form[1:].upper()} in UTF-8: {str(error)[:160]}", isinstance(error, UnicodeError) and LATIN
        raise StudyError(str(path), found, "a complete file of rows", fix or "") from None
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
    splits: dict[str, list[Path]] = {}
    inner = [place for place in sorted(folder.glob("[!.]*/")) if any(form_of(path) for path in place.iterdir())]
    places = (*ours, folder, folder / "data", *(inner if len(inner) == 1 else ()))
    # a file that names no split is the data only where none does: older data sets of the hub have a dataset_infos.json
    for is_alone, place in itertools.product((False, True), places):
        files = [path for path in sorted(place.glob("*")) if form_of(path) and path.is_file()]
        for path in files:
            if split := split_of(path.name) or (is_alone and len(files) == 1 and "train"):
                splits.setdefault(split, []).append(path)
        if splits:
            break
    for split, paths in splits.items():
        if len(paths) > 1 and not all("-of-" in path.name for path in paths):
            found = f"several files for {split}: {', '.join(path.name for path in paths)}"
            raise StudyError(str(folder), found, "one file per split, or its shards", "remove or rename the others")
        stated = {int(number) for path in paths for number in re.findall(r"-of-(\d+)", path.name)}
        if stated and stated != {len(paths)}:
            found = f"{len(paths)} shards of {split}, which say that they are {' or '.join(map(str, sorted(stated)))}"
            raise StudyError(str(folder), found, "every shard, of one version", "download the folder again")
    if not splits and inner and all(split_of(place.name) for place in inner):  # train/0000.parquet
        named = {split_of(place.name): place for place in inner}
        splits = {split: [path for path in sorted(place.iterdir()) if form_of(path)] for split, place in named.items()}
    if not splits:
        found = f"no data files for a split; it holds {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}"
        expected = f"train.*, test.*, validation.* or data/train-*.parquet ({', '.join(READERS)})"
        fix = " or ".join(f"--set {shlex.quote(f'dataset.name={place}')}" for place in (inner or [folder / "FILE"])[:8])
        raise StudyError(str(folder), found, expected, fix)
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
    looks_local = looks_local or ("/" in name and hub.local_path(name.rpartition("/")[0]))
    if not path and (looks_local or not hub.is_hub_id(name)):
        found = f"no such file or directory (from {Path.cwd()} or {hub.ROOT})"
        expected = "an existing path, a hub id, or 'generated'"
        raise StudyError(f"dataset.name = {name}", found, expected, "--set dataset.name=<path>")
    datasets.disable_progress_bars()  # they flood a log
    options |= {"config": config, "revision": revision}
    try:
        tables = datasets.load_from_disk(str(path)) if path else hub.load_dataset(name, **options)
        tables = tables if isinstance(tables, dict) else {"train": tables}
        if len({split_of(split) or split for split in tables}) < len(tables):
            fix = "keep one of each: save_to_disk, and dataset.name=<its folder>"
            raise StudyError(name, f"splits {', '.join(tables)}", "one that means train, one that means test", fix)
        return {
            split_of(split) or split: [Row(f"{name}[{split}]", number, row) for number, row in enumerate(rows)]
            for split, rows in tables.items()
        }
    except StudyError:
        raise
    except Exception as error:  # of a stream, which is fetched here, or of a folder that is not whole
        if path:
            found = f"cannot be read: {type(error).__name__}: {str(error)[:160]}"
            raise StudyError(str(path), found, "a folder that save_to_disk wrote whole", "write it again") from None
        raise hub.explain(error, name, kind="dataset", revision=revision) from error


def source_of(run) -> tuple[str, str]:
    """(name of the run's data set, what the record calls it); in a trial without the hub, generated rows stand in."""
    name = run.dataset.name
    if run.mode == "trial" and hub.out_of_reach(name):
        return "generated", f"generated, standing in for {name}"
    return name, name


# ---- rows to examples


def convert(sources: Sources, parse: Parse, expected: str, section: Mapping) -> tuple[Splits, dict]:
    """({split: what `parse` makes of every row}, report: what was dropped, which columns were used and left over).
    All faults of all files are one StudyError, unless the section's `on_bad_row` is "drop"."""
    splits: Splits = {split: [] for split in sources}  # present even where every row is bad
    faults, cures, columns = {}, {}, section.get("columns") or {}
    used, left = set(), set()
    values = (row.value for rows in sources.values() for row in rows) if columns else ()
    there = {name for value in values if isinstance(value, dict) for name in value}
    for split, rows in sources.items():
        for place, row in enumerate(rows):
            try:
                value = _check(row.value)  # a column that other rows have may be missing in one
                fields = Fields(value, {c: name for c, name in columns.items() if name in value or name not in there})
                example = parse(fields, place)
                left |= (over := fields.left_over())
                used |= fields.names.keys() - over
                splits[split].append(example)
            except BadRow as fault:
                entry = {"file": row.file, "reason": fault.kind, "example": fault.detail, "rows": []}
                faults.setdefault((row.file, fault.kind), entry)["rows"].append(row.number)
                cures[fault.fix] = None
    if faults and section.get("on_bad_row") != "drop":
        where = ", ".join(dict.fromkeys(file for file, _ in faults))[:300]
        found = "; ".join(_describe_fault(**entry) for entry in faults.values())
        # a cure only where every split keeps a row
        leave = ["or leave them out and have them counted: --set dataset.on_bad_row=drop"] * all(splits.values())
        raise StudyError(where, found, f"{expected}; rows are counted from 0", ", ".join([*cures, *leave]))
    dropped = {"count": sum(len(entry["rows"]) for entry in faults.values()), "reasons": [*faults.values()]}
    return splits, {"dropped": dropped, "columns": {"used": sorted(used), "left_over": sorted(left - used)}}


def _check(value: Any) -> dict:
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow("a row that is not an object with named columns", describe(value))
    if None in value:  # csv.DictReader's key
        raise BadRow("more fields than the header has", describe(value[None]))
    return value


def _describe_fault(file: str, reason: str, example: str, rows: list[int]) -> str:
    """'3 rows: empty chosen (rows 4, 9, 11; row 4: no messages) in train.jsonl'."""
    several, numbers = "s" * (len(rows) > 1), ", ".join(map(str, rows[:5])) + ", ..." * (len(rows) > 5)
    more = f"; row {rows[0]}: {example}" if several and example else f": {example}" if example else ""
    return f"{len(rows)} row{several}: {reason} (row{several} {numbers}{more}) in {Path(file).name}"


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


def make_splits(
    sources: Sources, wanted: Sequence[str], parse: Parse, key: Key, expected: str, section: Mapping
) -> tuple[Splits, dict]:
    """(the `wanted` splits, report: `convert`'s, files, {split carved from train: fraction}). The rows of a source
    with one split are those of the last one wanted (train), from which what is missing is carved by `key`, so that no
    key is in two splits: the first one wanted, which is judged, is the same whatever the seed. `section` may have
    columns, on_bad_row, split_seed, validation_fraction."""
    last, carved, fraction = wanted[-1], {}, section.get("validation_fraction") or 0.1
    files = {split: list(dict.fromkeys(row.file for row in rows)) for split, rows in sources.items()}
    where = ", ".join(itertools.chain(*files.values()))[:300]
    if len(sources) == 1:
        sources = {last: next(iter(sources.values()))}
    if last not in sources:
        raise StudyError(where, f"splits {', '.join(sources)}", f"a {last} split", f"name the file to use {last}.*")
    unused = [split for split in sources if split not in wanted]
    sources = {split: rows for split, rows in sources.items() if split in wanted}
    splits, report = convert(sources, parse, expected, section)
    for split in wanted:
        if split not in splits:
            seed = 0 if split == wanted[0] else section.get("split_seed") or 0
            splits[last], splits[split] = carve(splits[last], key, fraction, seed, split)
            carved[split] = fraction
    for split, rows in splits.items():
        if not rows:
            gone = f"dropped: {report['dropped']['count']}; held out: {', '.join(carved) or 'none'}"
            found = f"no usable row for split {split} ({gone})"
            expected = "at least one row, and different rows of which to hold out the splits that are not given"
            raise StudyError(where, found, expected, f"give a {split}.* file that has rows")
    report |= {"files": files, "carved_from_train": carved, "unused": unused}
    return {split: splits[split] for split in wanted}, report


# ---- the audit: what to know of the data before training on it

# (what is asked, the answers to it with the right one first, all text) of an example
Facts = Callable[[dict], tuple[str, tuple[str, ...], str]]
KINDS = {  # of a count that is above zero: what a warning says of these rows
    "duplicates": "repeat an earlier row of their split",
    "contradictory": "have an answer that an earlier row of their split contradicts",
    "special_tokens": "spell a special token in their text",
    "truncated": "are cut to the length limit",
    "eos_dropped": "lose their end token by it (answers)",
    "prompt_truncated": "have a cut prompt",
    "prompt_not_prefix": "have a prompt that is tokenized differently before its answer",
    "identical_after_truncation": "have the same answers once they are cut",
    "refused_by_template": "are not written whole by the chat template",
    "dropped": "are left out of training",
}


def normalize(text: str) -> str:
    """Text as it is compared: without differences of case, of white space and of Unicode's forms."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def _row_numbers(rows: list[dict], facts: Facts, special: re.Pattern | None) -> tuple[dict[str, list[int]], list[int]]:
    """({kind: numbers of rows in their split}, a hash of what each row asks)."""
    asked, found, answers = [], {"duplicates": [], "contradictory": [], "special_tokens": []}, {}
    for number, row in enumerate(rows):
        question, given, text = facts(row)
        asked.append(hash(normalize(question)))
        right, *others = (hash(normalize(answer)) for answer in given)
        before = answers.setdefault((asked[-1], *sorted([right, *others]) * bool(others)), set())
        if before:
            found["duplicates" if right in before else "contradictory"].append(number)
        before.add(right)
        if special and special.search(text):
            found["special_tokens"].append(number)
    return found, asked


def audit(splits: Splits, report: Mapping, facts: Facts, tokenizer, measure: Callable, **more: Any) -> dict:
    """What the reader did with a data set and what is in it, for audit.json: `counts` of each split, {kind: {count, first
    row numbers}}, lengths in tokens (median, 95 %, longest), `more`, and in words `summary` and `warnings`.

    `measure`(split, rows): ({part of a row: its length in tokens in each}, {kind: rows}), of a `tokenizer` that is not
    None, as it is where it is not on this machine."""
    added = [] if tokenizer is None else tokenizer.added_tokens_decoder.values()
    marks = {token.content for token in added if token.special or token.content.strip()}  # runs of spaces are none
    special = re.compile("|".join(map(re.escape, marks | {*tokenizer.all_special_tokens}))) if added else None
    counts, earlier, lengths, rows = {}, {}, {}, {split: len(each) for split, each in splits.items()}
    for split, each in splits.items():
        found, asked = _row_numbers(each, facts, special)
        for other, known in earlier.items():
            found[f"in_{other}"] = [number for number, key in enumerate(asked) if key in known]
        earlier[split] = set(asked)
        parts, measured = ({}, {}) if tokenizer is None else measure(split, each)
        counts[split] = {kind: {"count": len(numbers), "first": numbers[:5]} for kind, numbers in found.items()}
        counts[split] |= {kind: {"count": measured[kind], "first": []} for kind in measured.keys() & KINDS.keys()}
        levels = {part: np.quantile(some, (0.5, 0.95, 1)).tolist() for part, some in parts.items()}
        lengths[split] = {part: dict(zip(("median", "95 %", "longest"), q, strict=True)) for part, q in levels.items()}
    known = ("source", "files", "dropped", "columns", "carved_from_train", "unused")
    made = {key: report[key] for key in known if key in report}
    made |= {"rows": rows, "counts": counts, "tokens": lengths} | more
    unmeasured = ["lengths in tokens: not counted, the tokenizer is not on this machine"] * (tokenizer is None)
    return made | {"summary": _summarize(made), "warnings": _warnings(made) + unmeasured}


def _summarize(audit: Mapping) -> list[str]:
    lines = [", ".join(f"{split} {count:,}" for split, count in audit["rows"].items()) + f" rows of {audit['source']}"]
    if columns := audit.get("columns"):
        lines.append(f"columns: {', '.join(columns['used'])}; left over: {', '.join(columns['left_over']) or 'none'}")
    held = ", ".join(f"{split} {share:.0%}" for split, share in audit.get("carved_from_train", {}).items())
    lines += [f"held out of train: {held}"] * bool(held)
    lines += [f"splits that are not used: {', '.join(audit.get('unused', ()))}"] * bool(audit.get("unused"))
    named = {"turns": audit.get("turns", {})} | {f"labels of {k}": v for k, v in audit.get("labels", {}).items()}
    lines += [f"{name}: " + ", ".join(f"{k} {n:,}" for k, n in each.items()) for name, each in named.items() if each]
    for split, parts in ((split, parts) for split, parts in audit["tokens"].items() if parts):
        said = (f"{part} {' / '.join(f'{number:.0f}' for number in each.values())}" for part, each in parts.items())
        lines.append(f"tokens of {split} (median / 95 % / longest): {', '.join(said)}")
    return lines


def _warnings(audit: Mapping) -> list[str]:
    """A sentence for everything that is above zero."""
    found = [_describe_fault(**entry) + ": left out" for entry in audit.get("dropped", {}).get("reasons", ())]
    for split, kinds in audit["counts"].items():
        for kind in sorted(kinds):
            count, first = kinds[kind]["count"], ", ".join(map(str, kinds[kind]["first"]))
            says = KINDS.get(kind) or f"are also in {kind.removeprefix('in_')}"
            which = f" (rows {first}{', ...' * (count > 5)})" if first else ""
            found += [f"{split}: {count:,} of {audit['rows'][split]:,} rows {says}{which}"] * bool(count)
    for split, labels in audit.get("labels", {}).items():
        found += [f"{split}: no row has the label {label}" for label, count in labels.items() if not count]
    return found


# ---- baselines


def word_counts(fit: Sequence[str], *texts: Sequence[str], **options) -> list:
    """Counts of the words of `fit` (at most 20,000) in each of `texts`, (texts, words): what a baseline that knows no
    order learns from."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(max_features=20_000, **options).fit(fit)
    return [counter.transform(each) for each in texts]
