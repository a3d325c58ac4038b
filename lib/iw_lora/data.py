"""The study's examples {text_a, text_b, label}, split into train, tuning and validation, and what all members share.

Examples are generated, read from a local folder with GLUE's columns, or GLUE's from the hub. Tuning is a seeded share
of train; validation is only reported on. `prepare` writes them, tokenized, beside the base model; `load` reads them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models as tokenizer_models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from lib import hub, made, models, record
from lib.errors import MissingError, StudyError

COLUMNS = {"mnli": ("premise", "hypothesis"), "sst2": ("sentence",), "rte": ("sentence1", "sentence2")}
LABELS = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "sst2": ("negative", "positive"),
    "rte": ("entailment", "not_entailment"),
    "generated": ("entailment", "not_entailment"),
}
SPLITS = ("train", "tuning", "validation")

# ---- generated entailment, which bags of words cannot solve
# A premise states a fact, the hypothesis restates it in the active or the passive voice: rightly (entailment), or with
# its roles swapped. Both have the same words whatever the label; only who does what to whom tells it.

NOUNS = ["dog", "cat", "fox", "hen", "cow", "pig", "rat", "owl", "bee", "ant", "elk", "ape", "bat", "cod", "eel", "emu"]
VERBS = ["sees", "hears", "likes", "hunts", "helps", "leads"]
ENTAILMENT, NOT_ENTAILMENT = 0, 1


def _clause(fact: tuple[str, str, str], rng: np.random.Generator) -> str:
    """The fact as a sentence, active or passive."""
    subject, verb, thing = fact
    return f"{thing} is {verb} by {subject}" if rng.integers(2) else f"{subject} {verb} {thing}"


def _fact(rng: np.random.Generator) -> tuple[str, str, str]:
    subject, thing = rng.choice(len(NOUNS), 2, replace=False)
    return NOUNS[subject], VERBS[rng.choice(len(VERBS), 1, replace=False)[0]], NOUNS[thing]


def generate(count: int, seed: int) -> list[dict]:
    """`count` rows {text_a, text_b, label}, half of them entailed; the same for the same count and seed."""
    rows = []
    for place in range(count):
        rng = np.random.default_rng([seed, place])
        fact, label = _fact(rng), place % 2
        restated = fact[::-1] if label == NOT_ENTAILMENT else fact
        rows.append({"text_a": _clause(fact, rng), "text_b": _clause(restated, rng), "label": label})
    return [rows[i] for i in np.random.default_rng([seed, count]).permutation(count)]


def generate_corpus(count: int, seed: int) -> list[tuple[str, str]]:
    """Unlabeled pairs of sentences for pretraining: a fact, and the same fact again (always truly)."""
    pairs = []
    for place in range(count):
        rng = np.random.default_rng([seed, place, 1])
        fact = _fact(rng)
        pairs.append((_clause(fact, rng), _clause(fact, rng)))
    return pairs


# ---- reading a task


def task_of(dataset) -> str:
    """mnli, sst2, rte or generated; a local folder of the task's name needs no `subset`."""
    task = dataset.name if dataset.name == "generated" else dataset.subset or Path(dataset.name).name
    if task not in LABELS:
        found = f"none, and {dataset.name} does not tell the task"
        raise StudyError("dataset.subset", found, "mnli, sst2 or rte", "--set dataset.subset=rte")
    return task


def check_rows(rows: list[dict], task: str, where: str) -> list[dict]:
    """GLUE's rows as ours. Raises StudyError for an absent column or a label that is none (the test split's -1)."""
    columns, labels = COLUMNS[task], LABELS[task]
    for number, row in enumerate(rows, 1):
        for column in (*columns, "label"):
            if column not in row:
                found, expected = (
                    f"no column {column} (it has {', '.join(row)})",
                    f"{task}'s: {', '.join(columns)}, label",
                )
                fix = "set dataset.subset to the task whose data this is"
                raise StudyError(f"{where}, row {number}", found, expected, fix)
        if type(row["label"]) is not int or not 0 <= row["label"] < len(labels):
            expected = ", ".join(f"{i} {name}" for i, name in enumerate(labels))
            fix = "GLUE's test split has no labels: evaluate on validation"
            raise StudyError(f"{where}, row {number}: label", repr(row["label"]), expected, fix)
    first, *second = columns
    return [{"text_a": r[first], "text_b": r[second[0]] if second else "", "label": r["label"]} for r in rows]


def read_task(dataset, task: str, split: str) -> list[dict]:
    """The rows of one split, from a folder of <split>.jsonl or from GLUE on the hub."""
    folder = Path(dataset.name)
    if not folder.is_dir():
        rows = hub.load_dataset(dataset.name, task, split=split, revision=dataset.revision).to_list()
        return check_rows(rows, task, f"{dataset.name}/{task}/{split}")
    path = folder / f"{split}.jsonl"
    if not path.exists() and split == "validation":
        path = folder / "validation_matched.jsonl"
    if not path.exists():
        where, fix = f"dataset.name = {folder}", "--set dataset.name=<folder of one task>"
        raise MissingError(where, f"no {split}.jsonl", "train.jsonl and validation.jsonl", fix)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return check_rows(rows, task, f"{folder}/{split}")


def load_splits(dataset, task: str) -> dict[str, list[dict]]:
    """Rows by split, those of the task `generated` made here."""
    if task == "generated":
        train = generate(dataset.train_examples or 64, 11)
        validation = generate(dataset.validation_examples or 64, 12)
    else:
        train, validation = (read_task(dataset, task, s) for s in (dataset.splits.train, dataset.splits.validation))
    order = np.random.default_rng(dataset.split_seed).permutation(len(train)).tolist()
    held = max(1, round(dataset.tuning_fraction * len(train)))
    splits = {"train": [train[i] for i in order[held:]], "tuning": [train[i] for i in order[:held]]}
    return {name: rows[: dataset.limit] for name, rows in {**splits, "validation": validation}.items()}


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
            counter = CountVectorizer(max_features=20_000, token_pattern=r"(?u)\b\w+\b").fit(r[side] for r in train)
            columns.append([counter.transform(row[side] for row in rows) for rows in (train, validation)])
    x, y = (hstack(parts) for parts in zip(*columns, strict=True))
    model = LogisticRegression(max_iter=1000, C=0.1).fit(x, [row["label"] for row in train])
    return float(model.score(y, [row["label"] for row in validation]))


# ---- the small base model: a word tokenizer and a tiny DeBERTa-v2, pretrained without labels
# By replaced-token detection: some tokens are replaced by others of the same text (in place of ELECTRA's generator
# network), and the encoder learns, token by token, which ones were: binary cross-entropy.

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
REPLACED = 0.15
LONGEST = 64
PRETRAINING_PAIRS = 20_000
OTHER_VOCABULARY = 8192  # words at most for text that is not generated


def word_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Whole lower-case words and punctuation marks, the `vocab_size` most frequent ones."""
    split = pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text.lower()))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - len(SPECIAL)]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *ranked])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **SPECIAL)


def tiny_deberta(recipe: dict, tokens: int, pad: int) -> DebertaV2Model:
    """DeBERTa-v3's relative attention with shared query and key projections, small; no dropout."""
    hidden = recipe["hidden_size"]
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "pooler_hidden_size": hidden}
    sizes |= {"num_hidden_layers": recipe["layers"], "num_attention_heads": recipe["heads"]}
    sizes |= {"vocab_size": tokens, "max_position_embeddings": 256, "position_buckets": 32, "initializer_range": 0.1}
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout"), 0.0)
    return DebertaV2Model(DebertaV2Config(pad_token_id=pad, **{**made.DEBERTA_V3, **sizes, **dropout}))


def replace_tokens(ids: Tensor, special: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(corrupted ids, 1.0 where a token now differs), both (B, L). A replacement is a token from elsewhere in the same
    row, which only its place betrays; special tokens (`special`, bool) are neither replaced nor drawn."""
    chosen = (torch.rand(ids.shape, generator=generator) < REPLACED) & ~special
    drawn = (~special).float()
    drawn[drawn.sum(1) == 0] = 1.0  # a row of special tokens alone (all its words unknown): nothing is replaced there
    places = torch.multinomial(drawn, ids.shape[1], replacement=True, generator=generator)
    corrupted = torch.where(chosen, ids.gather(1, places), ids)
    return corrupted, (corrupted != ids).float()


def make_base(
    pairs: list[tuple[str, str]], recipe: dict, folder: Path, on_step: made.OnStep = lambda *_: None
) -> float:
    """Tokenizer and pretrained encoder saved in `folder`; returns the closing loss in nats per token."""
    tokenizer = word_tokenizer([text for pair in pairs for text in pair], recipe["vocab_size"])
    first, second = (list(side) for side in zip(*pairs, strict=True))
    ids = tokenizer(first, second if any(second) else None, truncation=True, max_length=LONGEST)["input_ids"]
    marks = torch.tensor(tokenizer.all_special_ids)
    generator, order = torch.Generator().manual_seed(recipe["seed"]), np.random.default_rng(recipe["seed"])
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = tiny_deberta(recipe, len(tokenizer), tokenizer.pad_token_id).train()
        head = nn.Linear(model.config.hidden_size, 1)
    steps, parameters = recipe["pretrain_steps"], [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe["pretrain_learning_rate"], weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)

    def loss() -> Tensor:
        rows = [ids[i] for i in order.integers(len(ids), size=recipe["pretrain_batch_size"])]
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        special = torch.isin(padded["input_ids"], marks)
        corrupted, replaced = replace_tokens(padded["input_ids"], special, generator)
        hidden = model(input_ids=corrupted, attention_mask=padded["attention_mask"]).last_hidden_state
        logits = head(hidden).squeeze(-1)
        return nn.functional.binary_cross_entropy_with_logits(logits[~special], replaced[~special])

    closing = made.pretrain(loss, parameters, optimizer, schedule, steps, on_step)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return closing


# ---- what all members share


@dataclass
class Inputs:
    """`rows` by split: {"ids": token ids, "label": int}; `texts` the same rows as text; `report` counts and
    baselines; `base` name or folder of the base model."""

    tokenizer: Any
    rows: dict[str, list[dict]]
    texts: dict[str, list[dict]]
    report: dict
    base: str


def prepare(run, folder: Path) -> None:
    """Fill `folder`. The steps of a made base model's pretraining go to history.jsonl there."""
    standing_in = run.mode == "trial" and hub.out_of_reach(run.dataset.name)
    task = task_of(run.dataset)
    splits = load_splits(run.dataset, "generated" if standing_in else task)
    pairs = [(row["text_a"], row["text_b"]) for row in splits["train"]]

    def make(place: Path, on_step: made.OnStep) -> float:
        recipe = run.model.recipe.model_dump()
        if task == "generated":
            return make_base(generate_corpus(PRETRAINING_PAIRS, recipe["seed"]), recipe, place, on_step)
        recipe["vocab_size"] = max(recipe["vocab_size"], OTHER_VOCABULARY)  # real text has more words
        return make_base(pairs, recipe, place, on_step)

    base, closing = made.base_model(run, folder, [text for pair in pairs for text in pair], make)
    tokenizer = models.load_tokenizer(base, run.model.revision, trust_remote_code=run.model.trust_remote_code)
    rows = {name: encode(tokenizer, split, run.dataset) for name, split in splits.items()}
    labels = [row["label"] for row in splits["validation"]]
    report = {
        "task": task,
        "labels": LABELS[task],
        "base": base,
        "stand_in": base != run.model.name != "made",
        "source": f"generated, standing in for {run.dataset.name}" if standing_in else run.dataset.name,
        "examples": {name: len(split) for name, split in splits.items()},
        "pretraining_loss": closing,
        "bag_of_words_baseline": bag_of_words(splits),
        "majority_baseline": max(Counter(labels).values()) / len(labels),
    }
    tokenizer.save_pretrained(folder / "tokenizer")
    record.write_text(folder / "rows.json", json.dumps(rows))
    record.write_text(folder / "texts.json", json.dumps(splits, ensure_ascii=False))
    record.write_json(folder / "report.json", report)


def encode(tokenizer, rows: list[dict], dataset) -> list[dict]:
    """{"ids", "label"} of each row, truncated to max_seq_length."""
    first, second = [row["text_a"] for row in rows], [row["text_b"] for row in rows]
    limits = {"truncation": dataset.preprocessing.truncation, "max_length": dataset.max_seq_length}
    encoded = tokenizer(first, second if any(second) else None, **limits)
    return [{"ids": ids, "label": row["label"]} for ids, row in zip(encoded["input_ids"], rows, strict=True)]


def load(folder: Path) -> Inputs:
    """The inputs that `prepare` put into `folder` (which may have been renamed since)."""
    folder = Path(folder)
    rows, texts, report = (record.read_json(folder / f"{name}.json") for name in ("rows", "texts", "report"))
    base = str(folder / "base") if (folder / "base").is_dir() else report["base"]
    return Inputs(models.load_tokenizer(str(folder / "tokenizer")), rows, texts, report, base)


def load_base(run, given: Inputs) -> nn.Module:
    """The classifier on the base model in the configured dtype; its new head is drawn from torch's generator."""
    return AutoModelForSequenceClassification.from_pretrained(
        given.base,
        num_labels=len(given.report["labels"]),
        dtype=getattr(torch, run.model.torch_dtype),
        ignore_mismatched_sizes=True,
        revision=run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
    )
