"""The order of training rows: a new one each epoch, through a shuffle buffer where one is asked for, bucketed by
length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lib.training import SeededOrder

WINDOW = 16  # batches that are sorted by length together


def buffered(size: int, buffer: int, rng: np.random.Generator) -> list[int]:
    """A stream's shuffle: `buffer` rows wait, one drawn at random is replaced by the next of the file."""
    if buffer >= size:
        return rng.permutation(size).tolist()
    waiting, order = list(range(buffer)), []
    for new in range(buffer, size):
        place = int(rng.integers(buffer))
        order.append(waiting[place])
        waiting[place] = new
    return order + [waiting[i] for i in rng.permutation(buffer)]


def bucketed(order: list[int], lengths: list[int], batch: int, rng: np.random.Generator) -> list[int]:
    """Rows of like length in one batch: sorted inside windows of 16 batches, whose batches are then shuffled. An
    incomplete batch stays the last."""
    found: list[int] = []
    for start in range(0, len(order), WINDOW * batch):
        rows = sorted(order[start : start + WINDOW * batch], key=lambda i: lengths[i])
        whole = len(rows) // batch
        for b in rng.permutation(whole):
            found += rows[b * batch : (b + 1) * batch]
        found += rows[whole * batch :]
    return found


class Bucketed(SeededOrder):
    """`lengths` of the rows in tokens; `buffer` None: every epoch is shuffled whole."""

    def __init__(self, lengths: list[int], batch: int, seed: int, buffer: int | None = None):
        super().__init__(len(lengths), seed)
        self.lengths, self.batch, self.buffer = lengths, batch, buffer

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        return iter(bucketed(buffered(self.size, self.buffer or self.size, rng), self.lengths, self.batch, rng))
