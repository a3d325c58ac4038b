"""The study's examples as rows {text_a, text_b, label}, split into train, tuning and validation: generated, a local
folder with GLUE's columns, or GLUE from the hub. Tuning is a seeded share of train; validation is only reported on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lib import hub
from lib.errors import MissingError, StudyError
from lib.iw_lora import generated

COLUMNS = {"mnli": ("premise", "hypothesis"), "sst2": ("sentence", None), "rte": ("sentence1", "sentence2")}
LABELS = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "sst2": ("negative", "positive"),
    "rte": ("entailment", "not_entailment"),
    "generated": ("entailment", "not_entailment"),
}
SPLITS = ("train", "tuning", "validation")


def task_of(dataset) -> str:
    """mnli, sst2, rte or generated; a local folder of the task's name needs no `subset`."""
    if dataset.subset:
        return dataset.subset
    if dataset.name == "generated" or Path(dataset.name).name in COLUMNS:
        return Path(dataset.name).name
    raise StudyError(
        "dataset.subset",
        f"none, and {dataset.name} does not tell the task",
        "mnli, sst2 or rte",
        "--set dataset.subset=rte",
    )


def checked(rows: list[dict], task: str, where: str) -> list[dict]:
    """GLUE's rows as ours. Raises StudyError for an absent column or a label that is none (the test split's -1)."""
    first, second = COLUMNS[task]
    found = []
    for number, row in enumerate(rows, 1):
        for column in filter(None, (first, second, "label")):
            if column not in row:
                raise StudyError(
                    f"{where}, row {number}",
                    f"no column {column} (it has {', '.join(row)})",
                    f"the columns of {task}: {', '.join(filter(None, (first, second, 'label')))}",
                    "set dataset.subset to the task whose data this is",
                )
        if type(row["label"]) is not int or not 0 <= row["label"] < len(LABELS[task]):
            raise StudyError(
                f"{where}, row {number}: label",
                repr(row["label"]),
                ", ".join(f"{i} {name}" for i, name in enumerate(LABELS[task])),
                "GLUE's test split has no labels: evaluate on validation",
            )
        found.append({"text_a": row[first], "text_b": row[second] if second else "", "label": row["label"]})
    return found


def _read(folder: Path, split: str) -> list[dict]:
    path = folder / f"{split}.jsonl"
    if not path.exists() and split == "validation":
        path = folder / "validation_matched.jsonl"
    if not path.exists():
        raise MissingError(
            f"dataset.name = {folder}",
            f"no {split}.jsonl",
            "train.jsonl and validation.jsonl",
            "--set dataset.name=<folder of one task>",
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _raw(dataset, task: str, split: str) -> list[dict]:
    if Path(dataset.name).is_dir():
        return checked(_read(Path(dataset.name), split), task, f"{dataset.name}/{split}")
    name = "nyu-mll/glue" if dataset.name == "glue" else dataset.name
    rows = hub.load_dataset(name, task, split=split, revision=dataset.revision)
    return checked(rows.to_list(), task, f"{name}/{task}/{split}")


def load_splits(dataset, stand_in: bool = False) -> dict[str, list[dict]]:
    """Rows by split; `stand_in`: generated ones whatever the name (trial without the hub)."""
    if dataset.name == "generated" or stand_in:
        train = generated.examples(dataset.train_examples or 64, 11)
        validation = generated.examples(dataset.validation_examples or 64, 12)
    else:
        task = task_of(dataset)
        train, validation = _raw(dataset, task, dataset.splits.train), _raw(dataset, task, dataset.splits.validation)
    order = np.random.default_rng(dataset.split_seed).permutation(len(train)).tolist()
    held = max(1, round(dataset.tuning_fraction * len(train)))
    splits = {
        "train": [train[i] for i in order[held:]],
        "tuning": [train[i] for i in order[:held]],
        "validation": validation,
    }
    return {name: rows[: dataset.limit] for name, rows in splits.items()}


def bag_of_words(splits: dict) -> float | None:
    """Validation accuracy of a logistic regression on word counts of both texts apart; None where there are too few
    rows."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, validation = splits["train"][:20_000], splits["validation"]
    if len(train) < 20 or len({row["label"] for row in train}) < 2:
        return None
    columns = []
    for side in ("text_a", "text_b"):
        if any(row[side] for row in train):
            counter = CountVectorizer(max_features=20_000, token_pattern=r"(?u)\b\w+\b").fit(
                [row[side] for row in train]
            )
            columns.append([counter.transform([row[side] for row in rows]) for rows in (train, validation)])
    x, y = (hstack(parts) for parts in zip(*columns, strict=True))
    model = LogisticRegression(max_iter=1000, C=0.1).fit(x, [row["label"] for row in train])
    return float(model.score(y, [row["label"] for row in validation]))
