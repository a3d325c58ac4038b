"""Rows of a data set from a local file, a local directory or the hub, file by file, as its columns are written.

A line that cannot be read becomes a BadRow in its place: it is refused (or dropped and counted) with the other bad
rows.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import hub
from lib.errors import StudyError
from lib.td_dpo.pairs import BadRow, unpack

ROOT = Path(__file__).resolve().parents[2]
SPLIT_OF = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
FILE_OF_SPLIT = re.compile(r"^(train|validation|valid|val|dev|test)([-.].*)?$")

Rows = list[Any]  # one entry per source row: the row, or the BadRow that stands for a line that could not be read
Source = tuple[str, str, Rows]  # (split, file as named in messages, rows)


def read_jsonl(path: Path) -> Rows:
    """One JSON value per line; a line that cannot be read becomes a BadRow in its place."""
    rows: Rows = []
    for line_number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            rows.append(
                BadRow("a line that is not UTF-8", f"line {line_number}, byte {error.start}: 0x{line[error.start]:02x}")
            )
        except (ValueError, RecursionError) as error:
            rows.append(
                BadRow("a line that is not JSON", f"line {line_number}: {str(error)[:80]}; it begins {line[:40]!r}")
            )
    return rows


def decode(path: Path) -> str:
    """A whole file as text, or the line where it stops being UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise StudyError(
            f"{path}, line {line}",
            f"byte 0x{content[error.start]:02x} at offset {error.start} is not UTF-8",
            "a UTF-8 file",
            f"iconv -f LATIN1 -t UTF-8 '{path}' > converted{path.suffix} (where it is Latin-1)",
        ) from None


def read_json(path: Path) -> Rows:
    """A JSON array of rows, an object whose `data` is one, or (as many hub files are) one row per line."""
    content = decode(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith("{") and "\n" in content.strip():
            return read_jsonl(path)
        raise StudyError(
            str(path), f"not JSON: {str(error)[:120]}", "an array of rows, or one JSON object per line"
        ) from None
    found = found["data"] if isinstance(found, dict) and isinstance(found.get("data"), list) else found
    if isinstance(found, dict) and ({"chosen", "completion_a"} & found.keys()):
        return [found]  # a .json of one line
    if not isinstance(found, list):
        raise StudyError(str(path), f"JSON {type(found).__name__}", "an array of rows, or one JSON object per line")
    return found


def read_csv(path: Path) -> Rows:
    """Rows as strings; a cell that holds a JSON message list becomes that list."""
    before = csv.field_size_limit(1 << 30)  # rows that are too long are refused later, with their number
    reader = csv.DictReader(io.StringIO(decode(path), newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        if len(set(header)) != len(header):
            raise StudyError(str(path), f"column names that repeat: {', '.join(header)}", "each name once")
        rows: Rows = []
        for row in reader:
            extra = row.pop(None, None)
            rows.append(
                BadRow("more fields than the header has", f"line {reader.line_num}: {len(extra)} too many")
                if extra
                else {name: unpack(cell) for name, cell in row.items()}
            )
        return rows
    except csv.Error as error:
        raise StudyError(
            f"{path}, line {reader.line_num}", f"not CSV: {error}", 'comma-separated values, quoted by "'
        ) from None
    finally:
        csv.field_size_limit(before)


def read_parquet(path: Path) -> Rows:
    """Rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read().to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StudyError(
            str(path),
            f"not readable as Parquet: {str(error)[:160]}",
            "a complete Parquet file with UTF-8 text",
            "fetch or write the file again",
        ) from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
}


def read_file(path: Path) -> Rows:
    """Rows of one local file by its suffix."""
    if path.suffix not in READERS:
        raise StudyError(str(path), f"a file of type '{path.suffix or 'none'}'", f"one of {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except PermissionError:
        raise StudyError(
            str(path), "not readable (permission denied)", "a readable file", f"chmod u+r '{path}'"
        ) from None


def files_of(folder: Path) -> dict[str, list[Path]]:
    """Data files of a directory by split: data/train-*.parquet as on the hub, or train.*, test.*, validation.* in
    it."""
    for place in (folder, folder / "data"):
        candidates = (
            sorted(path for path in place.iterdir() if path.suffix in SUFFIXES and path.is_file())
            if place.is_dir()
            else []
        )
        named = [(match, path) for path in candidates if (match := FILE_OF_SPLIT.match(path.stem))]
        if named or len(candidates) == 1:
            break
    found: dict[str, list[Path]] = defaultdict(list)
    for match, path in named:
        found[SPLIT_OF[match[1]]].append(path)
    if not named and len(candidates) == 1:
        found["train"] = candidates
    for split, paths in found.items():
        if len({path.suffix for path in paths}) > 1 or (
            len(paths) > 1 and any(path.stem in SPLIT_OF for path in paths)
        ):
            raise StudyError(
                str(folder),
                f"several files for {split}: {', '.join(path.name for path in paths)}",
                "one file per split, or its shards <split>-00000-of-00002.parquet, ...",
                "remove or rename the others",
            )
    if not found:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise StudyError(
            str(folder),
            f"no data files for a split; it holds {names}",
            "train.*, test.*, validation.* or data/train-*.parquet (.jsonl, .json, .csv, .parquet)",
            "rename the files, or name one file",
        )
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


def from_hub(name: str, revision: str | None) -> list[Source]:
    """Splits of a hub data set (or of its copy in the local cache)."""
    from datasets import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # they flood a log
    found = hub.load_dataset(name, revision=revision)
    unknown = [split for split in found if split not in SPLIT_OF]
    if unknown and "train" not in found and len(found) > 1:
        raise StudyError(
            f"dataset.name = {name}",
            f"splits {', '.join(found)}",
            "a train split",
            "save the splits to use as train.jsonl, test.jsonl in a directory and name that",
        )
    return [
        (SPLIT_OF.get(split, "train") if len(found) > 1 else "train", f"{name}[{split}]", rows.to_list())
        for split, rows in found.items()
        if split in SPLIT_OF or len(found) == 1
    ]


def find_sources(name: str, revision: str | None) -> list[Source]:
    """All rows of the named data set, file by file."""
    path = hub.local_path(name)
    if path is None:
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in SUFFIXES
        if looks_local or not hub.HUB_ID.match(name):
            raise StudyError(
                f"dataset.name = {name}",
                f"no such file or directory (from {Path.cwd()} or {ROOT})",
                "an existing path, a hub id, or 'generated'",
                "--set dataset.name=<path>",
            )
        return from_hub(name, revision)
    if path.is_file():
        return [("train", str(path), read_file(path))]
    return [(split, str(file), read_file(file)) for split, files in files_of(path).items() for file in files]
