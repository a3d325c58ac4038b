"""A generated entailment task that bags of words cannot solve, and the label-free text a tiny model is pretrained on.

A premise states facts, the hypothesis restates one of them in the active or the passive voice: rightly (entailment), or
with its roles swapped. Premise and hypothesis have the same words whatever the label, so neither the words nor their
overlap tell the label; only who does what to whom does.
"""

from __future__ import annotations

import numpy as np

NOUNS = ["dog", "cat", "fox", "hen", "cow", "pig", "rat", "owl", "bee", "ant", "elk", "ape", "bat", "cod", "eel", "emu"]
VERBS = ["sees", "hears", "likes", "hunts", "helps", "leads"]
ENTAILMENT, NOT_ENTAILMENT = 0, 1
FACTS = 1


def _clause(fact: tuple[str, str, str], passive: bool) -> str:
    subject, verb, thing = fact
    return f"{thing} is {verb} by {subject}" if passive else f"{subject} {verb} {thing}"


def _facts(rng: np.random.Generator) -> list[tuple[str, str, str]]:
    nouns = [NOUNS[i] for i in rng.choice(len(NOUNS), 2 * FACTS, replace=False)]
    verbs = [VERBS[i] for i in rng.choice(len(VERBS), FACTS, replace=False)]
    return [(nouns[2 * i], verbs[i], nouns[2 * i + 1]) for i in range(FACTS)]


def _premise(facts: list, rng: np.random.Generator) -> str:
    return " and ".join(_clause(fact, bool(rng.integers(2))) for fact in facts)


def examples(count: int, seed: int) -> list[dict]:
    """`count` rows {text_a, text_b, label}, half of them entailed; the same for the same count and seed."""
    rows = []
    for place in range(count):
        rng = np.random.default_rng([seed, place])
        facts, label = _facts(rng), place % 2
        fact = facts[int(rng.integers(FACTS))]
        told = fact[::-1] if label == NOT_ENTAILMENT else fact
        rows.append({"text_a": _premise(facts, rng), "text_b": _clause(told, bool(rng.integers(2))), "label": label})
    return [rows[i] for i in np.random.default_rng([seed, count]).permutation(count)]


def corpus(count: int, seed: int) -> list[tuple[str, str]]:
    """Unlabelled pairs of sentences for pretraining: facts, then one of them told again (always truly)."""
    pairs = []
    for place in range(count):
        rng = np.random.default_rng([seed, place, 1])
        facts = _facts(rng)
        pairs.append((_premise(facts, rng), _clause(facts[int(rng.integers(FACTS))], bool(rng.integers(2)))))
    return pairs
