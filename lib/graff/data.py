"""Problems: generated ones of one and two steps in GSM8K's form, GSM8K from a folder or the hub, GSM1k; the dev
split."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from lib import hub
from lib.errors import MissingError
from lib.graff import answers

NAMES = ("Tom", "Ann", "Ben", "Eve", "Sam", "Mia")
THINGS = ("pens", "eggs", "cups", "toys", "keys", "hats")
HIGH = (
    10  # operands lie below it; one-step problems start below twice that, so that every second step was seen as a first
)


def _step(rng, total: int) -> tuple[str, int, str]:
    """(sentence, operand, sign) of one change to `total`."""
    less = total > 2 and rng.random() < 0.5
    n = int(rng.integers(1, min(total, HIGH))) if less else int(rng.integers(1, HIGH))
    return ("gives away" if less else "gets"), n, "-" if less else "+"


def problem(rng, steps: int) -> dict:
    """{"question", "answer"} with `steps` additions and subtractions, one line of rationale each."""
    name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
    total = int(rng.integers(2, 2 * HIGH if steps == 1 else HIGH))
    said, worked = [f"{name} has {total} {thing}."], []
    for _ in range(steps):
        verb, n, sign = _step(rng, total)
        result = total + n if sign == "+" else total - n
        said.append(f"{name} {verb} {n}.")
        worked.append(f"{total}{sign}{n}=<<{total}{sign}{n}={result}>>{result} {thing}.")
        total = result
    return {
        "question": " ".join([*said, f"How many {thing} does {name} have?"]),
        "answer": "\n".join([*worked, f"#### {total}"]),
    }


def generated(count: int, seed: int, steps: int) -> list[dict]:
    rng = np.random.default_rng([seed, steps])
    return [problem(rng, steps) for _ in range(count)]


def read_jsonl(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return checked(rows, str(path))


def checked(rows: list[dict], where: str) -> list[dict]:
    """Questions and answers, every answer with its '####'."""
    for number, row in enumerate(rows, 1):
        answers.reference(row["answer"], f"{where}, row {number}")
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def load(name: str, split: str, revision: str | None = None, streaming: bool = False) -> list[dict]:
    """A split of GSM8K (or of a set in its form) from a folder of <split>.jsonl, a file, or the hub (`streaming`: row
    by row, without the hub's file on disk; the rows are held in memory either way)."""
    path = Path(name)
    if path.exists():
        file = path / f"{split}.jsonl" if path.is_dir() else path
        if not file.exists():
            raise MissingError(
                f"dataset.name = {name}", f"no {split}.jsonl", "a folder with train.jsonl and test.jsonl"
            )
        return read_jsonl(file)
    rows = hub.load_dataset(
        name, "main" if name == "openai/gsm8k" else None, split=split, revision=revision, streaming=streaming
    )
    try:
        rows = list(rows)
    except Exception as error:  # of a stream, which is fetched here
        raise hub.explain(error, name, kind="dataset", revision=revision) from error
    return checked(rows, name)


def split_dev(rows: list[dict], size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, dev): the `size` rows whose seeded hash is lowest are dev, whatever the order of the file."""
    ranked = sorted(
        range(len(rows)), key=lambda i: hashlib.sha256(f"{seed} {rows[i]['question']}".encode()).hexdigest()
    )
    dev = set(ranked[:size])
    return [r for i, r in enumerate(rows) if i not in dev], [rows[i] for i in ranked[:size]]
