"""The study's examples {text_a, text_b, label}, split into train, tuning and validation, and what all members share.

Examples are generated or read (lib/data.py) with GLUE's columns. Tuning is a seeded share of train; validation is only
reported on. `prepare` writes them, tokenized, beside the base model; models.load_inputs reads them.
"""

import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import DebertaV2Config, DebertaV2Model, get_linear_schedule_with_warmup

from lib import data, hub, made
from lib.data import BadRow, describe, require_text
from lib.errors import StudyError

COLUMNS = {"mnli": ("premise", "hypothesis"), "sst2": ("sentence",), "rte": ("sentence1", "sentence2")}
LABELS = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "sst2": ("negative", "positive"),
    "rte": ("entailment", "not_entailment"),
    "generated": ("entailment", "not_entailment"),
}
ALSO = {"premise": "sentence1", "hypothesis": "sentence2"}  # as GLUE's own files have them

# ---- generated entailment, which bags of words cannot solve
# A premise states a fact, and the hypothesis restates it, rightly (entailment) or not. `roles`: in the active or the passive
# voice, or with the roles swapped; both have the same words whatever the label, and only who does what to whom tells it.
# `kinds`: with a thing's kind in its place, or another kind, which an encoder knows that has read of them.

NOUNS = ["dog", "cat", "fox", "hen", "cow", "pig", "rat", "owl", "bee", "ant", "elk", "ape", "bat", "cod", "eel", "emu"]
VERBS = ["sees", "hears", "likes", "hunts", "helps", "leads"]
KINDS = {"bird": "robin crow goose swan eagle finch", "fish": "trout salmon carp herring perch pike"}
KINDS |= {"tree": "oak birch maple willow cedar elm", "flower": "rose tulip daisy lily poppy iris"}
KINDS |= {"fruit": "apple pear plum cherry melon lemon", "metal": "iron copper silver zinc nickel tin"}
KINDS |= {"vehicle": "car truck bus tram van tractor", "tool": "hammer saw drill wrench chisel shovel"}
ENTAILMENT, NOT_ENTAILMENT = 0, 1
JUDGED = 2**32  # the seed of the validation rows: none that a member can have


def _clause(fact: tuple[str, str, str], rng: np.random.Generator) -> str:
    """The fact as a sentence, active or passive."""
    subject, verb, thing = fact
    return f"{thing} is {verb} by {subject}" if rng.integers(2) else f"{subject} {verb} {thing}"


def _fact(rng: np.random.Generator) -> tuple[str, str, str]:
    subject, thing = rng.choice(len(NOUNS), 2, replace=False)
    return NOUNS[subject], VERBS[rng.choice(len(VERBS), 1, replace=False)[0]], NOUNS[thing]


def generate(count: int, seed: int, about: str = "roles") -> list[dict]:
    """`count` rows {text_a, text_b, label}, half of them entailed; the same for the same count and seed."""
    rows = []
    for place in range(count):
        rng = np.random.default_rng([seed, place])
        fact, label = _fact(rng), place % 2
        if about == "kinds":
            kind, other = rng.choice([*KINDS], 2, replace=False)
            start, thing = f"the {fact[0]} {fact[1]}", rng.choice(KINDS[kind].split())
            first, second = f"{start} the {thing}", f"{start} a {other if label == NOT_ENTAILMENT else kind}"
        else:
            first, second = _clause(fact, rng), _clause(fact[::-1] if label == NOT_ENTAILMENT else fact, rng)
        rows.append({"text_a": first, "text_b": second, "label": label})
    return [rows[i] for i in np.random.default_rng([seed, count]).permutation(count)]


def mislabel(rows: list[dict], share: float, seed: int) -> list[dict]:
    """`rows`, about a `share` of them with the other label."""
    wrong = np.random.default_rng([seed, len(rows)]).random(len(rows)) < share
    return [{**row, "label": row["label"] ^ int(other)} for row, other in zip(rows, wrong, strict=True)]


def generate_corpus(count: int, seed: int) -> list[tuple[str, str]]:
    """Unlabeled pairs of sentences for pretraining: a fact, and the same fact again (always truly)."""
    generators = (np.random.default_rng([seed, place, 1]) for place in range(count))
    facts = ((_fact(rng), rng) for rng in generators)
    return [(_clause(fact, rng), _clause(fact, rng)) for fact, rng in facts]


# ---- reading a task


def to_example(row: dict, task: str) -> dict:
    """A row of GLUE as ours; raises BadRow. A label is its number or its name (the test split's -1 is none)."""
    columns, names = [ALSO[own] if ALSO.get(own) in row else own for own in COLUMNS[task]], LABELS[task]
    first, second = (*(require_text(row, column) for column in columns), "")[:2]
    given = data.require(row, "gold_label" if "label" not in row and "gold_label" in row else "label")
    said = re.sub(r"\.0\Z", "", str(given).strip())  # of a column with gaps
    label = next((i for i, name in enumerate(names) if said in (name, str(i))), None)
    if label is None:
        expected = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        none = "; GLUE's test split has none" * (said == "-1")
        raise BadRow(f"unknown label (expected {expected}{none})", describe(given))
    return {"text_a": first, "text_b": second, "label": label}


def read_task(dataset, task: str) -> tuple[dict[str, list[dict]], dict]:
    """({train, validation, and MNLI's mismatched where it is there}, report): GLUE's of the hub, a folder's or a file's."""
    is_hub = hub.local_path(dataset.name) is None and dataset.name != "nyu-mll/glue"  # whose one task has no such name
    sources, chosen = data.read(dataset.name, dataset.revision, None if is_hub else task), {}
    for ours, theirs in dataset.splits:
        split = next((s for s in (theirs, f"{theirs}_matched") if s in sources), None)
        if split and sources[split] not in chosen.values():  # rows named for two splits are carved
            chosen[ours] = sources[split]
        elif not split and theirs != "validation" and len(sources) > 1:
            found, fix = f"no split {theirs} in {dataset.name}", f"--set dataset.splits.{ours}=<split>"
            raise StudyError(f"dataset.splits.{ours}", found, ", ".join(sources), fix)
    parse, key = lambda row, _: to_example(row, task), lambda row: str(list(row.values())[:2])
    expected = f"the columns of {task}: {', '.join(COLUMNS[task])}, label"
    splits, report = data.make_splits(chosen or sources, ("validation", "train"), parse, key, expected, vars(dataset))
    if (other := sources.get("validation_mismatched")) and other not in chosen.values():
        splits |= data.convert({"mismatched": other}, parse, expected, vars(dataset))[0]
    return splits, report


def load_splits(dataset, task: str) -> tuple[dict[str, list[dict]], dict]:
    """(rows by split, those of the task `generated` made here; the reader's report)."""
    if task == "generated":
        sizes, report, about = (dataset.train_examples or 64, dataset.validation_examples or 64), {}, dataset.about
        train = mislabel(generate(sizes[0], dataset.split_seed, about), dataset.label_noise, dataset.split_seed)
        splits = {"train": train, "validation": generate(sizes[1], JUDGED, about)}
    else:
        splits, report = read_task(dataset, task)
    train = splits["train"]
    order = np.random.default_rng(dataset.split_seed).permutation(len(train)).tolist()
    held = max(1, round(dataset.tuning_fraction * len(train)))
    splits |= {"train": [train[i] for i in order[held:]], "tuning": [train[i] for i in order[:held]]}
    return {name: rows[: dataset.limit] for name, rows in splits.items()}, report


def bag_of_words(splits: dict) -> float | None:
    """Validation accuracy of a logistic regression on word counts of both texts apart; None where there are too few
    rows."""
    from scipy.sparse import hstack
    from sklearn.linear_model import LogisticRegression

    train, validation = splits["train"][:20_000], splits["validation"]
    if len(train) < 20 or len({row["label"] for row in train}) < 2:
        return None
    texts = [[[row[side] for row in rows] for rows in (train, validation)] for side in ("text_a", "text_b")]
    columns = [data.word_counts(own[0], *own, token_pattern=r"(?u)\b\w+\b") for own in texts if any(own[0])]
    x, y = (hstack(parts) for parts in zip(*columns, strict=True))
    model = LogisticRegression(max_iter=1000, C=0.1).fit(x, [row["label"] for row in train])
    return float(model.score(y, [row["label"] for row in validation]))


# ---- the small base model: a word tokenizer and a tiny DeBERTa-v2, pretrained without labels
# By replaced-token detection: some tokens are replaced by others of the same text (in place of ELECTRA's generator
# network), and the encoder learns, token by token, which ones were, and at [CLS] whether any was: binary cross-entropy.
# Without the latter [CLS], which classifiers read, holds nothing of use, and where training found it was luck.

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
WORDS = pre_tokenizers.BertPreTokenizer()
REPLACED = 0.5  # largest share of a row's tokens; each row has its own, so that there are easy and hard ones
LONGEST = 64
PRETRAINING_PAIRS = 20_000
OTHER_VOCABULARY = 8192  # words at most for text that is not generated


def word_tokenizer(texts: list[str], vocab_size: int):
    """Whole lower-case words and punctuation marks, the `vocab_size` most frequent ones."""
    counts = Counter(word for text in texts for word, _ in WORDS.pre_tokenize_str(text.lower()))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - len(SPECIAL)]
    return made.word_tokenizer(ranked, SPECIAL, pre_tokenizer=WORDS, normalizer=normalizers.Lowercase())


def make_tokenizer(pairs: list[tuple[str, str]] | None, recipe: dict) -> tuple:
    """(tokenizer, `pairs`) for the made model; None: generated ones, of which there are few words."""
    words = max(recipe["vocab_size"], OTHER_VOCABULARY) if pairs else recipe["vocab_size"]
    pairs = pairs or generate_corpus(PRETRAINING_PAIRS, recipe["seed"])
    return word_tokenizer([text for pair in pairs for text in pair], words), pairs


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
    shares = REPLACED * torch.rand(len(ids), 1, generator=generator)
    chosen = (torch.rand(ids.shape, generator=generator) < shares) & ~special
    drawn = (~special).float()
    drawn[drawn.sum(1) == 0] = 1.0  # a row of special tokens alone (all its words unknown): nothing is replaced there
    places = torch.multinomial(drawn, ids.shape[1], replacement=True, generator=generator)
    corrupted = torch.where(chosen, ids.gather(1, places), ids)
    return corrupted, (corrupted != ids).float()


def make_base(pairs: list[tuple[str, str]] | None, recipe: dict, history: Path) -> made.Base:
    """Tokenizer and encoder, pretrained on `pairs` (None: generated ones); the closing loss is in nats per token."""
    tokenizer, pairs = make_tokenizer(pairs, recipe)
    first, second = (list(side) for side in zip(*pairs, strict=True))
    ids = tokenizer(first, second if any(second) else None, truncation=True, max_length=LONGEST)
    # padded once: batch by batch it is 8 % of a step
    rows, marks = tokenizer.pad(ids, return_tensors="pt")["input_ids"], torch.tensor(tokenizer.all_special_ids)
    generator, order = torch.Generator().manual_seed(recipe["seed"]), np.random.default_rng(recipe["seed"])
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = tiny_deberta(recipe, len(tokenizer), tokenizer.pad_token_id)
        head = nn.Linear(model.config.hidden_size, 1)

    def loss() -> Tensor:
        tokens = rows[torch.from_numpy(order.integers(len(rows), size=recipe["pretrain_batch_size"]))]
        tokens = tokens[:, : (tokens != tokenizer.pad_token_id).sum(1).max()]
        special = torch.isin(tokens, marks)
        corrupted, replaced = replace_tokens(tokens, special, generator)
        special[:, 0], replaced[:, 0] = False, replaced.amax(1)  # [CLS]
        hidden = model(input_ids=corrupted, attention_mask=(tokens != tokenizer.pad_token_id).long()).last_hidden_state
        logits = head(hidden).squeeze(-1)
        return nn.functional.binary_cross_entropy_with_logits(logits[~special], replaced[~special])

    steps, parameters = recipe["pretrain_steps"], [*model.train().parameters(), *head.parameters()]
    optimizer = AdamW(parameters, lr=recipe["pretrain_learning_rate"], weight_decay=0.01, foreach=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    return model, tokenizer, made.pretrain(loss, optimizer, schedule, steps, history)


# ---- what all members share


def encode(tokenizer, rows: list[dict], dataset, **options) -> list[dict]:
    """{"input_ids", "label"} of each row, truncated to max_seq_length, and "token_type_ids" where the tokenizer has them
    (BERT reads from them which text is which). `options` are the tokenizer's."""
    first, second = [row["text_a"] for row in rows], [row["text_b"] for row in rows]
    limits = {"truncation": dataset.preprocessing.truncation, "max_length": dataset.max_seq_length} | options
    encoded = tokenizer(first, second if any(second) else None, **limits)
    columns = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return [{**{name: encoded[name][i] for name in columns}, "label": row["label"]} for i, row in enumerate(rows)]


def compared(row: dict) -> tuple[str, tuple[str, ...], str]:
    """What data.audit compares: the texts and the label."""
    text = f"{row['text_a']}\n{row['text_b']}"
    return text, (str(row["label"]),), text


def audit(run) -> dict:
    """The audit of the run's data."""
    task, (name, source) = run.dataset.task, data.source_of(run)
    task = task if name == source else name
    splits, report = load_splits(run.dataset, task)
    splits = {split: splits[split] for split in ("train", "tuning", "validation")}
    pairs, recipe = [(row["text_a"], row["text_b"]) for row in splits["train"]], run.model.recipe
    texts = None if (task, run.dataset.about) == ("generated", "roles") else pairs
    make = partial(make_tokenizer, texts, recipe and recipe.model_dump())
    tokenizer = made.tokenizer_of(run, (text for pair in pairs for text in pair), lambda: make()[0])

    def measure(_: str, rows: list[dict]) -> tuple[dict, dict]:
        lengths = [len(row["input_ids"]) for row in encode(tokenizer, rows, run.dataset, truncation=False)]
        cut = sum(length > run.dataset.max_seq_length for length in lengths)
        return {"text": lengths}, {"truncated": cut * run.dataset.preprocessing.truncation}

    counts = {split: Counter(row["label"] for row in rows) for split, rows in splits.items()}
    labels = {split: {label: found[i] for i, label in enumerate(LABELS[task])} for split, found in counts.items()}
    return data.audit(splits, {**report, "source": source}, compared, tokenizer, measure, labels=labels)


def prepare(run, folder: Path) -> None:
    """Fill `folder`. The steps of a made base model's pretraining go to history.jsonl there."""
    task, (name, source) = run.dataset.task, data.source_of(run)
    splits, report = load_splits(run.dataset, task if name == source else name)
    pairs = [(row["text_a"], row["text_b"]) for row in splits["train"]]
    make = partial(make_base, None if (task, run.dataset.about) == ("generated", "roles") else pairs)
    tokenizer, facts = made.base_model(run, folder, [text for pair in pairs for text in pair], make)
    labels = [row["label"] for row in splits["validation"]]
    report |= {
        **facts,
        "task": task,
        "labels": LABELS[task],
        "source": source,
        "examples": {name: len(split) for name, split in splits.items()},
        "bag_of_words_baseline": bag_of_words(splits),
        "majority_baseline": max(Counter(labels).values()) / len(labels),
    }
    rows = {name: encode(tokenizer, split, run.dataset) for name, split in splits.items()}
    made.write_inputs(folder, tokenizer, report, rows=rows, texts=splits)
