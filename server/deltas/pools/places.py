"""Places in slot arrays: who has which, and how much room to make."""

from __future__ import annotations

import itertools

import torch


class PlaceTable:
    """Which place of some arrays each slot has: the lowest free one. Slots are many, the variants
    of one layout few; arrays by slot would be as long as the highest slot for a single variant.
    """

    def __init__(self) -> None:
        self._places: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, slot: int) -> bool:
        return slot in self._places

    def __getitem__(self, slot: int) -> int:
        return self._places[slot]

    def add(self, slot: int) -> int:
        """The slot's place, a free one if it has none."""
        if slot not in self._places:
            taken = set(self._places.values())
            self._places[slot] = next(i for i in itertools.count() if i not in taken)
        return self._places[slot]

    def remove(self, slot: int) -> None:
        """Free the slot's place, if it has one."""
        self._places.pop(slot, None)


def slack(device: torch.device) -> float:
    """What part of arrays may be room that nobody has taken: a quarter or a sixteenth more at a
    time. More costs memory; less copies arrays often, and on a GPU what a captured graph reads has
    moved then, and it is captured again.
    """
    return 1 / 4 if device.type == "cuda" else 1 / 16


def grown(capacity: int, place: int, device: torch.device) -> int:
    """Room to make for `place`."""
    return max(place + 1, capacity + int(capacity * slack(device)))
