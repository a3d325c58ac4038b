"""What all members share, made once and kept on disk by content: examples, tokenizer, base model and tokenised rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForSequenceClassification

from lib import hub, made, models, record
from lib.iw_lora import base_model, data, generated

PRETRAINING_PAIRS = 20_000
OTHER_VOCABULARY = 8192  # words at most of a small model made for text that is not generated


@dataclass
class Inputs:
    """`rows` by split: {"ids": token ids, "label": int}; `texts` the same rows as text; `report` what was found."""

    tokenizer: object
    rows: dict[str, list[dict]]
    texts: dict[str, list[dict]]
    report: dict
    base: str


def prepare(run, folder: Path) -> None:
    """Fill `folder`; a made base model's pretraining is told in history.jsonl, for the live line."""
    standing_in = run.mode == "trial" and hub.out_of_reach(run.dataset.name)
    task = run.dataset.subset if standing_in else data.task_of(run.dataset)
    splits = data.load_splits(run.dataset, standing_in)
    pairs = [(row["text_a"], row["text_b"]) for row in splits["train"]]

    def make(place: Path, on_step) -> float:
        recipe = run.model.recipe.model_dump()
        if task != "generated":  # real text has more words than the generated task's few dozen
            recipe["vocab_size"] = max(recipe["vocab_size"], OTHER_VOCABULARY)
        corpus = generated.corpus(PRETRAINING_PAIRS, recipe["seed"]) if task == "generated" else pairs
        return base_model.make_base(corpus, recipe, place, on_step)

    base, closing = made.base_model(run, folder, [text for pair in pairs for text in pair], make)
    tokenizer = models.load_tokenizer(base, run.model.revision, trust_remote_code=run.model.trust_remote_code)
    rows = {name: encode(tokenizer, mine, run.dataset) for name, mine in splits.items()}
    tokenizer.save_pretrained(folder / "tokenizer")
    record.write_text(folder / "rows.json", json.dumps(rows))
    record.write_text(folder / "texts.json", json.dumps(splits, ensure_ascii=False))
    record.write_json(
        folder / "report.json",
        {
            "task": task,
            "labels": data.LABELS[task],
            "base": base,
            "stand_in": base != run.model.name != "made",
            "source": f"generated, standing in for {run.dataset.name}" if standing_in else run.dataset.name,
            "examples": {name: len(mine) for name, mine in splits.items()},
            "pretraining_loss": closing,
            "bag_of_words_baseline": data.bag_of_words(splits),
            "majority_baseline": _majority(splits),
        },
    )


def _majority(splits: dict) -> float:
    labels = [row["label"] for row in splits["validation"]]
    return max(labels.count(label) for label in set(labels)) / len(labels)


def encode(tokenizer, rows: list[dict], dataset) -> list[dict]:
    """Token ids of each row, truncated to max_seq_length, padded where the configuration pads every row."""
    second = [row["text_b"] for row in rows] if any(row["text_b"] for row in rows) else None
    encoded = tokenizer(
        [row["text_a"] for row in rows],
        second,
        truncation=dataset.preprocessing.truncation,
        max_length=dataset.max_seq_length,
    )
    return [{"ids": ids, "label": row["label"]} for ids, row in zip(encoded["input_ids"], rows, strict=True)]


def load(folder: Path) -> Inputs:
    """The inputs that `prepare` made in `folder` (which may have been renamed since)."""
    folder = Path(folder)
    report = record.read_json(folder / "report.json")
    base = str(folder / "base") if (folder / "base").is_dir() else report["base"]
    return Inputs(
        models.load_tokenizer(str(folder / "tokenizer")),
        record.read_json(folder / "rows.json"),
        record.read_json(folder / "texts.json"),
        report,
        base,
    )


def load_base(run, given: Inputs):
    """The classifier on the base model in float32 (or the configured dtype); its new head is drawn from torch's
    generator."""
    labels = given.report["labels"]
    return AutoModelForSequenceClassification.from_pretrained(
        given.base,
        num_labels=len(labels),
        dtype=models.dtype_of(run.model.torch_dtype),
        ignore_mismatched_sizes=True,
        revision=run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
    )
