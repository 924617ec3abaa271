"""Places in slot arrays: who has which, and how much room to make."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from server.ops.row_mapping import Places, ShownPlaces


class SlotPlaces:
    """The one map of a pool: which place of its arrays each slot has, and which slots are shown.

    A slot gets the lowest free place. Slots are many, the variants of one geometry few; arrays by
    slot would be as long as the highest slot for a single variant. Of experts there are thousands
    of slots: each call takes about the same time however many have a place.

    shown     (slot, place) of the slots that steps apply, and `slots`, those slots alone
    place_of  `shown` as data, see `PackedBlocks`; None where no step needs it so
    members   the maps of pools whose arrays are slices of one set: this map is then the set's. A
              slot has one place in all of them; it is taken while any member has the slot, and
              shown while any member shows it
    """

    def __init__(self, place_of: Tensor | None = None, members: Sequence[SlotPlaces] = ()) -> None:
        self.place_of = place_of
        self._shown: dict[int, int] = {}
        self._known: ShownPlaces | None = None  # `_shown` as it was asked for, until it changes
        self._places: dict[int, int] = {}
        self._n_used = 0
        self._given_back: list[int] = []  # places below `_n_used` that nobody has, as a heap
        self._members = tuple(members)
        self._whole: SlotPlaces | None = None
        for member in members:
            member._whole = self

    @property
    def shown(self) -> Places:
        return self._snapshot()

    @property
    def slots(self) -> frozenset[int]:
        return self._snapshot().slots

    def _snapshot(self) -> ShownPlaces:
        if self._known is None:
            self._known = ShownPlaces(self._shown.items())
        return self._known

    def __contains__(self, slot: int) -> bool:
        return slot in self._places

    def __getitem__(self, slot: int) -> int:
        return self._places[slot]

    @property
    def idle(self) -> bool:
        """Whether no slot has a place in the arrays."""
        return not (self._whole or self)._places

    @property
    def taken(self) -> frozenset[int]:
        """Places that some slot has."""
        return frozenset(self._places.values())

    def reserve(self, slot: int) -> int:
        """Return the slot's place; it gets a free one if it has none."""
        if slot not in self._places:
            self._places[slot] = self._free() if self._whole is None else self._whole.reserve(slot)
        return self._places[slot]

    def show(self, slot: int) -> None:
        """Name the slot to steps from now on; it has a place."""
        place = self._places[slot]
        self._shown[slot], self._known = place, None
        if self.place_of is not None:
            self.place_of[slot] = place + 1
        if self._whole is not None:
            self._whole.show(slot)

    def release(self, slot: int) -> None:
        """Hide the slot and free its place, if it has one."""
        if slot in self._places:
            self._hide(slot)
            place = self._places.pop(slot)
            if self._whole is not None:
                self._whole._released_by_member(slot)
            else:
                heapq.heappush(self._given_back, place)

    def _hide(self, slot: int) -> None:
        self._shown.pop(slot, None)
        self._known = None
        if self.place_of is not None:
            self.place_of[slot] = 0

    def _released_by_member(self, slot: int) -> None:
        if not any(slot in member for member in self._members):
            self.release(slot)
        elif not any(slot in member._shown for member in self._members):
            self._hide(slot)

    def _free(self) -> int:
        if self._given_back:
            return heapq.heappop(self._given_back)
        self._n_used += 1
        return self._n_used - 1


def slack(device: torch.device) -> float:
    """What part of arrays may be room that nobody has taken: a quarter or a sixteenth more at a
    time. More costs memory; less copies arrays often, and on a GPU what a captured graph reads has
    moved then, and it is captured again.
    """
    return 1 / 4 if device.type == "cuda" else 1 / 16


def grown(capacity: int, place: int, device: torch.device) -> int:
    """Room to make for `place`."""
    return max(place + 1, capacity + int(capacity * slack(device)))
