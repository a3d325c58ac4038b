"""Generated preference data: list requests, answers of varying care, and Bradley-Terry labels from the oracle's reward.

The pairs have the message form of argilla/dpo-mix-7k. Which split an instruction belongs to is a fixed property of its
text (a checksum), so that no instruction, first turn or second, is shared between splits or with the questions,
whatever the seed and the sizes.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product

from lib.errors import StudyError
from lib.td_dpo.oracle import COUNTS, STYLES, TONES, TOPICS, Request, parse_request, reward, score

OPENINGS = ("List", "Name", "Give me", "Write down")
JUNK = ("blah", "um", "qux", "foo", "etc", "lorem", "zap", "hmm")
TWO_TURN_SHARE = 0.4
LABEL_TEMPERATURE = 1.0  # of the Bradley-Terry labels, in units of reward: about 14 % of labels go against the reward

# twentieths of the checksum space; a larger share than a split needs costs nothing
_SHARES = {"train": 10, "validation": 4, "test": 4, "questions": 2}


def _split_of(instruction: str) -> str:
    slot = zlib.crc32(instruction.encode()) % sum(_SHARES.values())
    for split, share in _SHARES.items():
        if slot < share:
            return split
        slot -= share
    raise AssertionError("unreachable: the slot is below the sum of the shares")


@cache
def _instructions(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All first-turn and all second-turn instructions of a split."""
    manners = [f"in a {tone} tone {phrase}" for tone, phrase in product(TONES, STYLES.values())]
    tones = [f"in a {tone} tone" for tone in TONES]
    first = [f"{o} {n} {t} {m}." for o, n, t, m in product(OPENINGS, COUNTS, TOPICS, manners + tones)]
    second = [f"Now {n} {t} {m}." for n, t, m in product(COUNTS, TOPICS, tones)]
    second += [f"{o} {n} more {m}." for o, n, m in product(("Add", *OPENINGS), COUNTS, manners)]
    second += [f"{o} {m}." for o, m in product(("Say that again", "Once again", "Repeat that"), manners)]
    return tuple(x for x in first if _split_of(x) == split), tuple(x for x in second if _split_of(x) == split)


def _draws(rng: random.Random, choices: Sequence[str]) -> Iterator[str]:
    """Endless draws without replacement; begins a new shuffle when all are used up."""
    while True:
        yield from rng.sample(choices, len(choices))


def _layout(items: Sequence[str], style: str) -> str:
    if style == "line":
        return ", ".join(items)
    marks = ("-" for _ in items) if style == "bullets" else (f"{k}." for k in range(1, len(items) + 1))
    return "\n".join(f"{mark} {item}" for mark, item in zip(marks, items, strict=False))


def write_answer(rng: random.Random, request: Request, care: float) -> str:
    """An answer to `request`; each of the six qualities fails on its own, more often with less `care` (in [0, 1])."""

    def slips(rate: float) -> bool:
        return rng.random() < rate * (1 - care)

    count = request.count + (rng.choice((-1, 1, 2)) if slips(0.6) else 0)
    fresh = [item for item in TOPICS[request.topic] if item.lower() not in request.listed] or TOPICS[request.topic]
    items = rng.sample(fresh, min(count, len(fresh)))
    other = rng.choice([topic for topic in TOPICS if topic != request.topic])
    stray = slips(0.7)
    for k in range(len(items)):
        if stray and rng.random() < 0.6:
            items[k] = rng.choice(TOPICS[other])
    if slips(0.5):
        items[rng.randrange(len(items))] = items[0]
    if slips(0.5):
        for _ in range(rng.choice((1, 2, 3))):
            items.insert(rng.randrange(len(items) + 1), rng.choice(JUNK))
    style = rng.choice(list(STYLES)) if slips(0.5) else request.style
    tone = rng.choice(list(TONES)) if slips(0.7) else request.tone
    opener, closer = ("" if slips(0.4) else rng.choice(phrases) for phrases in TONES[tone])
    parts = [opener, _layout(items, style), closer]
    return (" " if style == "line" else "\n").join(part for part in parts if part)


def _user(content: str) -> dict:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def label_probability(first: float, second: float) -> float:
    """Bradley-Terry: the probability that the answer with reward `first` is labelled the better one."""
    return 1 / (1 + math.exp((second - first) / LABEL_TEMPERATURE))


def _make_split(split: str, size: int, seed: int) -> list[dict]:
    rng = random.Random(f"{split} {seed}")
    first, second = (_draws(rng, choices) for choices in _instructions(split))
    pairs: list[dict] = []
    while len(pairs) < size:
        prompt = [_user(next(first))]
        if rng.random() < TWO_TURN_SHARE:
            prompt += [_assistant(write_answer(rng, parse_request(prompt), rng.uniform(0.5, 1))), _user(next(second))]
        request = parse_request(prompt)
        one, two = (write_answer(rng, request, rng.random()) for _ in range(2))
        rewards = reward(prompt, one), reward(prompt, two)
        if rewards[0] == rewards[1]:  # no preference to state; identical answers are among these
            continue
        if rng.random() >= label_probability(*rewards):
            one, two = two, one
        pairs.append({"prompt": prompt, "chosen": [_assistant(one)], "rejected": [_assistant(two)], "row": len(pairs)})
    return pairs


def make_pairs(train: int, validation: int, test: int, seed: int = 0) -> dict[str, list[dict]]:
    """Pairs for the three splits, each drawn on its own: a smaller split is the beginning of a larger one."""
    sizes = {"train": train, "validation": validation, "test": test}
    for split, size in sizes.items():
        if size < 0:
            raise StudyError(f"dataset.{split}_pairs", str(size), "a number of pairs, 0 or more")
    return {split: _make_split(split, size, seed) for split, size in sizes.items()}


def questions(n: int, seed: int = 0) -> list[dict]:
    """`n` two-turn questions in the manner of MT-Bench; their instructions occur in no split of the pairs."""
    rng = random.Random(f"questions {seed}")
    first, second = (_draws(rng, choices) for choices in _instructions("questions"))
    made = []
    for number in range(1, n + 1):
        turns = [next(first), next(second)]
        made.append({"id": number, "category": parse_request([_user(turns[0])]).topic, "turns": turns})
    return made


def _rewards(pair: dict) -> tuple[float, float]:
    return tuple(reward(pair["prompt"], pair[side][0]["content"]) for side in ("chosen", "rejected"))


def bayes_accuracy(pairs: Sequence[dict]) -> float:
    """Expected accuracy, on labels drawn as these were, of always naming the answer with the higher reward."""
    return sum(label_probability(max(both), min(both)) for both in map(_rewards, pairs)) / len(pairs)


def label_noise(pairs: Sequence[dict]) -> dict[str, float]:
    """`flipped`: share of labels against the reward; `ceiling`: 1 - flipped; `bayes_accuracy`: its expectation."""
    flipped = sum(chosen < rejected for chosen, rejected in map(_rewards, pairs)) / len(pairs)
    return {"flipped": flipped, "ceiling": 1 - flipped, "bayes_accuracy": bayes_accuracy(pairs)}


def to_dpo_mix_rows(pairs: Sequence[dict]) -> list[dict]:
    """Rows with the columns of argilla/dpo-mix-7k. Ratings are oracle scores; a flipped label has them crossed."""
    rows = []
    for pair in pairs:
        sides = ("chosen", "rejected")
        row: dict = {"dataset": "generated/list-requests"}
        for side in sides:
            messages = [*pair["prompt"], *pair[side]]
            row[side] = [{"content": message["content"], "role": message["role"]} for message in messages]
        row |= {f"{side}_rating": score(pair["prompt"], pair[side][0]["content"]) for side in sides}
        rows.append(row)
    return rows
