"""The pool's slots: whose turn it is among those that wait, and which GPUs it is then shown.

Bookkeeping without processes; lib/run/forkserver.py starts whom this names, and like it this knows no study code.
"""

from collections.abc import Collection, Iterator


class Slots:
    """`total` slots, numbered; `devices` are the GPUs behind them (slot by slot, in turns), [] where there is none."""

    def __init__(self, total: int, devices: list[str]):
        self.total, self.devices, self.free = total, devices, list(range(total))

    def turns(self, waiting: Collection, busy: set) -> Iterator:
        """Those of `waiting` (forkserver.Child) that may start now, each with its slots taken. `busy`: names at
        work."""
        for child in list(waiting):
            if child.takes_slot:
                wanted, name = min(child.request.get("slots", 1), self.total), child.request.get("name")
                short = len(self.free) < wanted
                if short and wanted > 1:
                    return  # what needs several slots waits for them at the head, or single ones would always take them
                if short or name in busy:
                    continue
                child.slots, self.free = self.free[:wanted], self.free[wanted:]
                busy.add(name)
            yield child

    def give_back(self, slots: list[int]) -> None:
        self.free = sorted([*self.free, *slots])

    def close(self) -> None:
        """Nobody gets a turn any more."""
        self.free = []

    def environment(self, child) -> dict[str, str]:
        """What a child on its slots is to see of the GPUs; nothing is said where there are none, or of who takes no
        slot."""
        if not self.devices or not child.slots:
            return {}
        given = dict.fromkeys(self.devices[slot % len(self.devices)] for slot in child.slots)
        return {"CUDA_VISIBLE_DEVICES": "" if child.request.get("cpu") else ",".join(given)}
