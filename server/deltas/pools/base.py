"""What all slot arrays have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from compressor.codecs.term import Shape, Term
from server.deltas.pools.places import SlotPlaces, grown
from server.ops.joined import Joined, TermArrays
from server.ops.row_mapping import Places, RowMapping
from server.ops.static_row_mapping import StaticRowMapping

PoolParts = tuple[Tensor, ...]


class ArrayStore(Protocol):
    """Arrays of one pool, or of several that one product reads."""

    capacity: int
    arrays: PoolParts

    def grown_arrays(self, example: PoolParts, place: int) -> PoolParts: ...
    def adopt(self, arrays: PoolParts) -> None: ...


class TermPool(ABC):
    """One array per part, with a place for each slot that has these terms.

    A loader thread may write to a place that no step reads and make larger arrays (`Room`) while
    steps read what there is; `adopt`, `show` and `hide` belong to the engine thread.
    """

    joins: tuple[Joined, ...] = ()  # products that add its terms as part of theirs

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.places = SlotPlaces()
        self.capacity = 0
        self.arrays: PoolParts = ()

    @property
    def as_data(self) -> bool:
        """Whether `add_` and `add_rows_` can take `StaticRowMapping`."""
        return False

    def map_slots(self, place_of: Tensor) -> None:
        """Keep ``place_of int32 [slots]`` (zeros) up to date. Before anything is reserved."""
        self.places.place_of = place_of

    def join(self, products: Iterable[Joined]) -> None:  # noqa: B027  packed codes alone are joined
        """Let these products add its terms, those that can. Before there are any arrays."""

    @property
    def idle(self) -> bool:
        """Whether no slot has a place here: the pool may go."""
        return self.places.idle

    @property
    def store(self) -> ArrayStore:
        """Whose arrays this pool's are."""
        return self

    def grown_arrays(self, example: PoolParts, place: int) -> PoolParts:
        """Return larger arrays with room for `place`, and the values of the places so far; nothing
        that is here changes.
        """
        capacity = grown(self.capacity, place, self.device)
        arrays = tuple(
            torch.empty((capacity, *part.shape), dtype=part.dtype, device=self.device)
            for part in example
        )
        copy_into(arrays, self.arrays)
        return arrays

    def adopt(self, arrays: PoolParts) -> None:
        """From now on these are the arrays; if that fails, what there was stays."""
        self._take(arrays)
        self.arrays, self.capacity = arrays, len(arrays[0])

    def _take(self, arrays: PoolParts) -> None:  # noqa: B027  most have nothing to make
        """Make what reads these arrays from now on; if that fails, what there was stays."""

    def own_arrays(self, arrays: PoolParts) -> PoolParts:
        """The part of its store's arrays that is this pool's."""
        return arrays

    def show(self, slot: int) -> None:
        """From the next step on, rows of `slot` get this pool's terms."""
        self.places.show(slot)

    def hide(self, slot: int) -> None:
        """The slot's terms are no longer applied; its place may be given away."""
        self.places.release(slot)

    def leave(self) -> None:  # noqa: B027  who is joined tells the product
        """Nobody has a place here any more, and the arrays go."""

    @property
    def slot_map(self) -> Tensor:
        """Places by slot as data; asked once the pool has a place for some slot."""
        assert self.places.place_of is not None
        return self.places.place_of

    def places_of(self, rows: RowMapping) -> Tensor:
        """[T] int64: place of each row's slot in the arrays, -1 where it has none."""
        if isinstance(rows, StaticRowMapping):
            return rows.places(self.slot_map)
        return rows.held_rows(self.places.shown)

    @abstractmethod
    def stage(self, term: Term) -> PoolParts:
        """Decode a term into this pool's parts, on the host."""

    @abstractmethod
    def add_(self, y: Tensor, x: Tensor, rows: RowMapping) -> None:
        """``y [T, m] += x [T, n] @ dW[slot of row]^T`` for every row whose slot is present."""

    @abstractmethod
    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowMapping) -> None:
        """``y [T, n] += dW[slot of row][id]``: the embedding's side of the same matrix."""


class PackedPool(TermPool):
    """A pool of packed codes, which products may add as part of theirs."""

    bits: int

    def join(self, products: Iterable[Joined]) -> None:
        self.joins = tuple(product for product in products if product.terms.takes(self.bits))

    @abstractmethod
    def joined_arrays(self, arrays: PoolParts) -> TermArrays:
        """What a product gets of these arrays."""

    def adopt(self, arrays: PoolParts) -> None:
        super().adopt(arrays)
        for terms, first in self.joins:
            terms.put(self, self.joined_arrays(arrays), first)

    def show(self, slot: int) -> None:
        super().show(slot)
        for terms, _ in self.joins:
            terms.show(self, slot, self.places[slot])

    def hide(self, slot: int) -> None:
        for terms, _ in self.joins:
            terms.hide(self, slot)
        super().hide(slot)

    def leave(self) -> None:
        for terms, _ in self.joins:
            terms.drop(self)


class FactorPool(TermPool):
    """A pool whose kernel takes the pools of several matrices that read one x in one call."""

    @property
    def as_data(self) -> bool:
        return True

    @property
    def kind(self) -> Hashable:
        """Pools of one kind can go into one call."""
        return type(self)

    def add_(self, y: Tensor, x: Tensor, rows: RowMapping) -> None:
        self.add_together_([self], [y], x, rows)

    @abstractmethod
    def add_together_(
        self, pools: Sequence[Self], outputs: Sequence[Tensor], x: Tensor, rows: RowMapping
    ) -> None:
        """`add_` of pools of this kind, each of another matrix that reads x."""

    @abstractmethod
    def look_up(self, ids: Tensor, places: Tensor) -> Tensor:
        """``dW[place][id]``: ids int64 [t], places int64 [t] or [1] -> [t, n]."""

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowMapping) -> None:
        if isinstance(rows, StaticRowMapping):
            held = rows.places(self.slot_map)
            add_where_(y, self.look_up(ids, held.clamp(min=0)).float(), held >= 0)
            return
        for place, part in segments_at(rows, self.places.shown):
            y[part] += self.look_up_at(ids[part], place)

    def look_up_at(self, ids: Tensor, place: int) -> Tensor:
        """`look_up` of one place that the host knows: not in a step whose rows are data."""
        return self.look_up(ids, torch.tensor([place], device=ids.device))


def copy_into(arrays: PoolParts, old: PoolParts) -> None:
    """Copy the places of smaller arrays (none at first) to the beginning of larger ones."""
    for new, smaller in zip(arrays, old, strict=False):
        new[: len(smaller)] = smaller


def segments_at(rows: RowMapping, shown: Places) -> list[tuple[int, slice]]:
    """Place and rows of each segment."""
    places = dict(shown)
    return [(places[s.slot], slice(s.start, s.end)) for s in rows.segments if s.slot in places]


def add_where_(y: Tensor, added: Tensor, wanted: Tensor) -> None:
    """``y [T, n] += added`` (float32) in the rows that are `wanted [T]`; in others `added` may be
    anything, NaN too.
    """
    y.copy_(torch.where(wanted.unsqueeze(1), y.float() + added, y.float()))
