"""Generated preference data with a known reward: list requests, answers of varying care, Bradley-Terry labels.

A request names a topic, a count, a tone and a style ("List three fruits in a calm tone as bullet points."). A second
turn changes some of them. Six qualities of an answer are measured, each a share in [0, 1], and added with fixed
weights; the sum is the latent reward that labels the pairs, and its clipped linear image is the 1-10 "oracle score"
that a judge would give. Nothing is learned here: whoever knows this file knows the best possible policy.

The pairs have the message form of argilla/dpo-mix-7k. Which split an instruction belongs to is a fixed property of its
text (a checksum), so that no instruction, first turn or second, is shared between splits or with the questions,
whatever the seed and the sizes.

At the end, requests to a pretrained model with a constraint each that code can check; their pairs are made of the
model's own answers (data.sample_pairs).
"""

import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

from lib.errors import StudyError

TOPICS: dict[str, tuple[str, ...]] = {
    "fruits": ("apple", "pear", "plum", "cherry", "mango", "peach", "grape", "banana", "lemon", "melon"),
    "animals": ("horse", "tiger", "rabbit", "camel", "otter", "panda", "zebra", "goat", "wolf", "mouse"),
    "cities": ("Paris", "Tokyo", "Cairo", "Lima", "Oslo", "Berlin", "Delhi", "Madrid", "Dublin", "Seoul"),
    "colors": ("red", "blue", "green", "yellow", "purple", "pink", "brown", "white", "black", "orange"),
    "tools": ("hammer", "saw", "drill", "wrench", "pliers", "chisel", "shovel", "rake", "axe", "file"),
    "sports": ("tennis", "hockey", "rugby", "golf", "boxing", "rowing", "judo", "cricket", "skiing", "fencing"),
    "instruments": ("piano", "violin", "flute", "drum", "guitar", "harp", "cello", "trumpet", "oboe", "banjo"),
    "vegetables": ("carrot", "onion", "potato", "cabbage", "spinach", "leek", "radish", "pea", "celery", "garlic"),
    "birds": ("eagle", "sparrow", "robin", "owl", "heron", "crow", "swan", "duck", "parrot", "pigeon"),
    "drinks": ("water", "coffee", "tea", "milk", "juice", "cider", "cocoa", "wine", "beer", "soda"),
    "trees": ("oak", "pine", "maple", "birch", "willow", "cedar", "elm", "ash", "spruce", "poplar"),
    "metals": ("iron", "gold", "silver", "copper", "zinc", "lead", "tin", "nickel", "chrome", "steel"),
}
# tone -> (openers, closers); an answer in the right tone has one of each
TONES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "calm": (("Gently now:", "Slowly then:"), ("Breathe easy.", "All is well.")),
    "cheerful": (("What fun!", "Oh yay!"), ("Have a lovely day!", "Enjoy them all!")),
    "formal": (("Dear reader:", "Please note:"), ("Yours faithfully.", "With kind regards.")),
    "pirate": (("Ahoy matey!", "Avast ye!"), ("Arr me hearties!", "Shiver me timbers!")),
    "sleepy": (("Yawn, well:", "Mmm, maybe:"), ("Good night.", "So tired.")),
}
STYLES: dict[str, str] = {"line": "on one line", "bullets": "as bullet points", "numbers": "as a numbered list"}
COUNTS: dict[str, int] = {"two": 2, "three": 3, "four": 4, "five": 5}

# reward = 3 topicality + 2 count + 2 tone + 1 style - 2 duplicates - 3 junk
WEIGHTS: dict[str, float] = {
    "topicality": 3.0, "count": 2.0, "tone": 2.0, "style": 1.0, "duplicates": -2.0, "junk": -3.0,
}  # fmt: skip
BEST_REWARD = sum(weight for weight in WEIGHTS.values() if weight > 0)

_TOPIC_OF = {item.lower(): topic for topic, items in TOPICS.items() for item in items}
_TONE_OF = {phrase.lower(): tone for tone, ends in TONES.items() for end in ends for phrase in end}
_PHRASES = re.compile("|".join(re.escape(phrase) for phrase in sorted(_TONE_OF, key=len, reverse=True)))
_TOKENS = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")
_LINE_STYLES = {"bullets": re.compile(r"^- (\w+)$"), "numbers": re.compile(r"^\d+\. (\w+)$")}
_SYMBOLS_PER_ITEM = 2  # a number and its point, or a comma: what the three styles need


class Request(NamedTuple):
    """What the last user turn asks for, earlier turns taken into account."""

    topic: str
    count: int
    tone: str
    style: str
    listed: frozenset[str] = frozenset()  # items of earlier answers that "more" must not repeat


def parse_request(messages: Sequence[dict]) -> Request:
    """The request that `messages` (ending with a user turn) make; each user turn overrides what it names."""
    topic, count, tone, style, listed = None, None, "", "line", frozenset()
    earlier: set[str] = set()
    for message in messages:
        text = message["content"].lower()
        if message["role"] == "assistant":
            earlier |= {word for word in _TOKENS.findall(text) if word in _TOPIC_OF}
            continue
        words = re.findall(r"\w+", text)
        topic = next((word for word in words if word in TOPICS), topic)
        count = next((COUNTS[word] for word in words if word in COUNTS), count)
        named = re.search(r"in a (\w+) tone", text)
        tone = named.group(1) if named and named.group(1) in TONES else tone
        style = next((name for name, phrase in STYLES.items() if phrase in text), style)
        listed = frozenset(earlier) if "more" in words else frozenset()
    if topic is None or count is None or not messages or messages[-1]["role"] != "user":
        found = f"not a generated list request: {messages[-1]['content'][:80] if messages else 'no message'!r}"
        fix = "use evaluation.judge=none (or mt_bench) with data that were not generated here"
        raise StudyError("oracle", found, "a request with a topic and a count, ending with a user turn", fix)
    return Request(topic, count, tone, style, listed)


def _styled_items(text: str, style: str) -> int:
    """How many items of `text` (lower case, tone phrases cut out) stand in the layout that `style` asks for."""
    lines = [line.strip() for line in text.splitlines()]
    if style != "line":
        items = [match.group(1) for line in lines if (match := _LINE_STYLES[style].match(line))]
        return sum(word in _TOPIC_OF for word in items)
    if any(re.match(r"^(-|\d+\.)", line) for line in lines):  # none may be a bullet or a number
        return 0
    return max((sum(word in _TOPIC_OF for word in _TOKENS.findall(line)) for line in lines), default=0)


def qualities(messages: Sequence[dict], answer: str) -> dict[str, float]:
    """The six qualities of `answer`, each in [0, 1]; of duplicates and junk less is better.

    topicality  share of the listed items that belong to the topic
    count       1 - |listed - asked| / asked, not below 0
    tone        half for a right opening or closing phrase, one for two of them, half taken off for each wrong one
    style       share of the listed items in the layout asked for
    duplicates  share of the listed items listed before (or, for "more", in an earlier answer)
    junk        share of words and symbols that are neither items, "and", tone phrases nor the layout's own marks
    """
    request = parse_request(messages)
    text = answer.lower()
    phrases = [_TONE_OF[phrase] for phrase in _PHRASES.findall(text)]
    body = _PHRASES.sub("", text)
    tokens = _TOKENS.findall(body)
    items = [token for token in tokens if token in _TOPIC_OF]
    words = [token for token in tokens if token[0].isalpha() and token not in _TOPIC_OF and token != "and"]
    symbols = sum(not token[0].isalpha() for token in tokens)
    junk = len(words) + max(0, symbols - _SYMBOLS_PER_ITEM * len(items))
    # a tone phrase said more than twice is padding, not tone
    junk += max(0, len(phrases) - 2)
    right = min(2, sum(tone == request.tone for tone in phrases))
    wrong = sum(tone != request.tone for tone in phrases)
    repeated = len(items) - len(set(items) - request.listed)
    listed = max(1, len(items))
    return {
        "topicality": sum(_TOPIC_OF[item] == request.topic for item in items) / listed,
        "count": max(0.0, 1 - abs(len(items) - request.count) / request.count),
        "tone": max(0, right - wrong) / 2,
        "style": _styled_items(body, request.style) / listed,
        "duplicates": repeated / listed,
        "junk": junk / max(1, junk + len(items)),
    }


def reward(messages: Sequence[dict], answer: str) -> float:
    """Latent reward: the weighted sum of the qualities, from -3 (nothing but junk) to 8 (faultless)."""
    measured = qualities(messages, answer)
    return sum(weight * measured[name] for name, weight in WEIGHTS.items())


def score(messages: Sequence[dict], answer: str) -> float:
    """Oracle score: 1 + 9 * reward / 8, cut to [1, 10]; an empty answer has reward 0 and score 1."""
    return min(10.0, max(1.0, 1 + 9 * reward(messages, answer) / BEST_REWARD))


# ---- requests, answers and labels ----

OPENINGS = ("List", "Name", "Give me", "Write down")
JUNK = ("blah", "um", "qux", "foo", "etc", "lorem", "zap", "hmm")
TWO_TURN_SHARE = 0.4
LABEL_TEMPERATURE = 1.0  # of the Bradley-Terry labels, in units of reward: about 14 % of labels go against the reward

# Twentieths of the checksum space; a larger share than a split needs costs nothing.
_SLOTS = ["train"] * 10 + ["validation"] * 4 + ["test"] * 4 + ["questions"] * 2


def _split_of(instruction: str) -> str:
    return _SLOTS[zlib.crc32(instruction.encode()) % len(_SLOTS)]


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
    return "\n".join(f"{'-' if style == 'bullets' else f'{k}.'} {item}" for k, item in enumerate(items, start=1))


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
    """Bradley-Terry: the probability that the answer with reward `first` is labeled the better one."""
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
    """Pairs for the three splits, each drawn on its own: a smaller split is the beginning of a larger one, and the test
    pairs are the same for every seed."""
    sizes = {"train": (train, seed), "validation": (validation, seed), "test": (test, 0)}
    return {split: _make_split(split, *size) for split, size in sizes.items()}


def questions(n: int, seed: int = 0) -> list[dict]:
    """`n` two-turn questions in the manner of MT-Bench; their instructions occur in no split of the pairs."""
    rng = random.Random(f"questions {seed}")
    first, second = (_draws(rng, choices) for choices in _instructions("questions"))
    turns = [[next(first), next(second)] for _ in range(n)]
    topics = [parse_request([_user(opening)]).topic for opening, _ in turns]
    return [{"id": i + 1, "category": topics[i], "turns": turns[i]} for i in range(n)]


def label_noise(pairs: Sequence[dict]) -> dict[str, float]:
    """`flipped`: share of labels against the reward; `ceiling`: 1 - flipped; `bayes_accuracy`: its expectation, the
    accuracy on labels drawn as these were of always naming the answer with the higher reward."""
    rewards = [[reward(pair["prompt"], pair[side][0]["content"]) for side in ("chosen", "rejected")] for pair in pairs]
    flipped = sum(chosen < rejected for chosen, rejected in rewards) / len(pairs)
    bayes = sum(label_probability(max(both), min(both)) for both in rewards) / len(pairs)
    return {"flipped": flipped, "ceiling": 1 - flipped, "bayes_accuracy": bayes}


# ---- verifiable requests: one constraint each, which code can check

ASKS = ("Tell me about {}.", "Describe {}.", "Say something about {}.", "What should I know about {}?", "Explain {}.")
SUBJECTS = tuple(TOPICS) + ("the sea", "winter", "trains", "a good friend", "sleep", "bread", "the moon", "music")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {  # kind -> what is asked, and what for
    "word": ('Use the word "{}".', ("never", "small", "people", "because", "water", "often")),
    "short": ("Use at most {} words.", ("15", "20", "25", "30")),
    "avoid": ('Do not use the word "{}".', ("the", "and", "is", "of")),
    "sign": ('Use the sign "{}".', ("?", "!", ":", "-")),
    "without": ('Do not use the sign "{}".', (",", "'", "-", "!")),
}
_ASKED = {kind: re.compile(re.escape(text).replace(r"\{\}", r"(\S+)")) for kind, (text, _) in KINDS.items()}


def constraint(prompt: str) -> tuple[str, str]:
    """(kind, what for) of a verifiable request."""
    return next((kind, match[1]) for kind, asked in _ASKED.items() if (match := asked.search(prompt)))


def fulfilled(prompt: str, answer: str) -> float:
    """How far `answer` does what `prompt` asks for, in [0, 1]; an empty one does nothing."""
    kind, asked = constraint(prompt)
    words = re.findall(r"\w+", answer.lower())
    if not words:
        return 0.0
    if kind == "short":
        return min(1.0, int(asked) / len(words))
    counted = answer.count(asked) if kind in ("sign", "without") else words.count(asked)
    return float(counted > 0) if kind in ("word", "sign") else 1 / (1 + counted)


def requests(split: str, seed: int) -> list[str]:
    """All verifiable requests of a split, in an order of this seed's."""
    asked = [text.format(value) for text, values in KINDS.values() for value in values]
    every = [f"{ask.format(subject)} {more}" for ask, subject, more in product(ASKS, SUBJECTS, asked)]
    mine = [request for request in every if _split_of(request) == split]
    return random.Random(f"{split} {seed}").sample(mine, len(mine))


def verifiable_questions(n: int) -> list[dict]:
    """`n` questions of one turn, the same for every seed, whose category is the kind of their constraint."""
    asked = requests("questions", 0)[:n]
    return [{"id": i, "category": constraint(text)[0], "turns": [text]} for i, text in enumerate(asked, start=1)]


def verifier_score(messages: Sequence[dict], answer: str) -> float:
    """1 to 10: how far the answer does what the last message asks for."""
    return 1 + 9 * fulfilled(messages[-1]["content"], answer)


JUDGES = {"oracle": (questions, score), "verifier": (verifiable_questions, verifier_score)}  # by evaluation.judge
JUDGE_OF = {"generated": "oracle", "verifiable": "verifier"}  # the judge of each data set that is made here
