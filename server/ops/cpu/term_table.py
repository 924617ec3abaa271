"""The terms of everything resident that one product adds, as data for its kernel.

Every set of arrays (`PackedBlocks`, `PackedLowRank`, `PackedRows`) is a descriptor: how its codes
are to be read, and where. A slot has a list of the descriptors whose arrays have a place for it.
What a step costs in Python does not grow with either: a call names the lists, the segments of its
rows, and room for what the heads shrink to.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from compressor.codecs.columns import PLANES
from server.ops.cpu import panel_terms as at
from server.ops.cpu.codegen.piece_product import HALF_SCALES, OCTAVES
from server.ops.cpu.pieces import KnownPieces
from server.ops.joined import TermArrays
from server.ops.linear import LinearOp
from server.ops.lowrank import PackedLowRank
from server.ops.packed import PackedBlocks, PackedRows
from server.ops.row_mapping import RowMapping, SlotSegments

HEAD_ROWS = 16  # of one task that shrinks heads, at most


class TermCall(NamedTuple):
    """What a kernel gets of a table for one call, after which the next may be made.

    n_tasks  those of `panel_terms.shrink`
    """

    address: int
    n_tasks: int


class JoinedLinear(LinearOp, Protocol):
    """A product that terms are added to before its one rounding."""

    def with_terms(self, x: Tensor, terms: TermCall) -> Tensor:
        """The product without a bias, plus the terms of `TermTable.call`."""
        ...


class _Listed(NamedTuple):
    """A slot's entry: descriptor, place in its arrays, bytes a row of what it shrinks to."""

    descriptor: int
    place: int
    hidden_bytes: int


class Scratch(threading.local):
    """Memory of one call after the other. Each thread has its own: a loader tries terms."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        self._address = 0

    def of(self, n_bytes: int) -> int:
        """Address of so many bytes, until the next call."""
        if n_bytes > len(self._bytes):
            self._bytes = np.empty(max(n_bytes, 2 * len(self._bytes)), np.uint8)
            self._address = self._bytes.ctypes.data
        return self._address


class TermTable:
    """Descriptors and lists of one product with outputs in panels. One thread at a time."""

    def __init__(
        self, n_outputs: int, width: int, item: int, pieces: KnownPieces, scratch: Scratch
    ) -> None:
        """item: bytes of an input."""
        self._n_panels = -(-n_outputs // width)
        self._item, self._pieces, self._scratch = item, pieces, scratch
        self._descriptors = np.zeros((8, at.N_FIELDS), np.int64)
        self._free: list[int] = []  # descriptors below `_n_used` that nobody has
        self._n_used = 0
        self._of_key: dict[Hashable, tuple[int, ...]] = {}
        self._alive: dict[Hashable, tuple[object, ...]] = {}
        self._entries: dict[int, dict[Hashable, _Listed]] = {}
        self._lists = np.zeros((8, 1 + at.ENTRY * 4), np.int64)
        self._arguments = np.zeros(at.N_TERM_ARGUMENTS, np.int64)
        self._address: int = self._arguments.ctypes.data
        self._hidden_bytes: dict[int, int] = {}
        self._name_arrays()

    def put(self, key: Hashable, arrays: TermArrays, first: int) -> None:
        """These arrays are what `key` stands for from now on: terms of the outputs from `first`."""
        if key not in self._of_key:
            n = 2 if isinstance(arrays, PackedLowRank) else 1
            self._of_key[key] = tuple(self._free_descriptor() for _ in range(n))
        own, *down = self._of_key[key]
        if isinstance(arrays, PackedLowRank):
            self._describe_head(own, down[0], arrays, first)
            self._alive[key] = (arrays,)
        elif isinstance(arrays, PackedRows):
            self._describe_rows(own, arrays, first)
            self._alive[key] = (arrays,)
        else:
            pieces = self._pieces.of(arrays, first, self._n_panels)
            d = self._describe(own, arrays)
            d[at.D_KIND], d[at.D_FIRST] = at.BLOCKS, first
            d[at.D_PIECES : at.D_ENDS + 1] = pieces.table.ctypes.data, pieces.ends.ctypes.data
            self._alive[key] = (arrays, pieces)
        padded = self._descriptors[: self._n_used, at.D_PADDED]
        self._arguments[at.T_PADDED] = padded.max(initial=0)

    def drop(self, key: Hashable) -> None:
        """Nothing is left of what `key` stood for; no slot is shown there."""
        self._free += self._of_key.pop(key, ())
        self._alive.pop(key, None)

    def show(self, key: Hashable, slot: int, place: int) -> None:
        """Rows of `slot` get the terms at `place` from now on."""
        own = self._of_key[key][0]
        hidden_bytes = int(self._descriptors[own, at.D_HIDDEN_BYTES])
        self._entries.setdefault(slot, {})[key] = _Listed(own, place, hidden_bytes)
        self._write_list(slot)

    def show_every_place(self, key: Hashable, n_places: int) -> None:
        """Rows of slot p get the terms at place p, for all places; the table has nothing else."""
        (own,) = self._of_key[key]
        self._lists = np.zeros((n_places, 1 + at.ENTRY), np.int64)
        self._lists[:, 0], self._lists[:, 1] = 1, own
        self._lists[:, 2] = np.arange(n_places)
        self._name_arrays()

    def hide(self, key: Hashable, slot: int) -> None:
        """They no longer do."""
        entries = self._entries.get(slot)
        if entries is not None and entries.pop(key, None) is not None:
            if not entries:
                del self._entries[slot]
            self._write_list(slot)

    def call(self, rows: RowMapping) -> TermCall | None:
        """What a kernel needs for these rows; None if none of them has terms here."""
        if rows.slots.isdisjoint(self._entries):
            return None
        return self.call_at(rows.by_slot(), rows.split(HEAD_ROWS) if self._hidden_bytes else None)

    def call_at(self, segments: SlotSegments, tasks: SlotSegments | None) -> TermCall:
        """As `call`, of segments by slot; tasks: the same in pieces of at most `HEAD_ROWS` rows,
        None if nothing is to be shrunk.
        """
        a = self._arguments
        a[at.T_SEGMENTS], a[at.T_N_SEGMENTS] = segments.address, segments.n
        a[at.T_N_TASKS] = a[at.T_DONE] = n_tasks = 0
        if tasks is not None and tasks.n:
            step = max(self._hidden_bytes.values())
            hidden = self._scratch.of(tasks.end * step)
            a[at.T_HIDDEN], a[at.T_HIDDEN_STEP] = hidden, step
            a[at.T_TASKS], a[at.T_N_TASKS] = tasks.address, tasks.n
            n_tasks = tasks.n
        return TermCall(self._address, n_tasks)

    def _describe(self, descriptor: int, blocks: PackedBlocks) -> np.ndarray:
        d: np.ndarray = self._descriptors[descriptor]
        d[:] = 0
        codes, scales, bits, s = blocks.codes, blocks.scales, blocks.bits, blocks.n_blocks
        nb = -(-blocks.n // s)
        fields = max(8 // plane for plane in PLANES[bits])
        d[at.D_BITS], d[at.D_N_INPUTS] = bits, nb
        d[at.D_CODES : at.D_STRIDE + 1] = codes.data_ptr(), codes.stride(0), codes.stride(-2)
        # Fields of a byte row past a block's last input must meet zeros: unless there are none, its
        # inputs are copied.
        fits = blocks.n % s == 0 and nb % (2 * fields) == 0
        d[at.D_PADDED] = 0 if fits else nb + 16
        item = scales.element_size()
        d[at.D_SCALES : at.D_SCALE_KIND + 1] = (
            scales.data_ptr(),
            scales.stride(0) * item,
            OCTAVES if scales.dtype is torch.uint8 else HALF_SCALES,
        )
        units = blocks.units
        d[at.D_UNITS : at.D_UNIT_BYTES + 1] = units.data_ptr(), 4 * units.stride(0)
        d[at.D_M] = sum(blocks.sizes)
        return d

    def _describe_head(self, own: int, down: int, head: PackedLowRank, first: int) -> None:
        self._describe(down, head.down)
        d = self._describe(own, head.up)
        d[at.D_KIND], d[at.D_FIRST], d[at.D_DOWN] = at.HEAD, first, down
        d[at.D_GAINS : at.D_GAIN_BYTES + 1] = head.gains.data_ptr(), 4 * head.gains.stride(0)
        # Fields of a byte row past the last component, and the word they are in, meet zeros.
        d[at.D_WIDTH], d[at.D_PADDED] = (head.rank + 15) // 8 * 8, 0
        d[at.D_HIDDEN_BYTES] = d[at.D_WIDTH] * self._item

    def _describe_rows(self, own: int, rows: PackedRows, first: int) -> None:
        d = self._describe(own, rows.blocks)
        d[at.D_KIND], d[at.D_FIRST], d[at.D_M] = at.ROW_TERM, first, rows.m
        index = rows.index
        d[at.D_INDEX : at.D_COUNT + 1] = index.data_ptr(), 8 * index.stride(0), index.shape[1]
        # A product touches up to 15 sums behind its last.
        d[at.D_HIDDEN_BYTES] = 4 * (index.shape[1] + 16)

    def _free_descriptor(self) -> int:
        if self._free:
            return self._free.pop()
        if self._n_used == len(self._descriptors):
            self._descriptors = np.concatenate(
                [self._descriptors, np.zeros_like(self._descriptors)]
            )
            self._name_arrays()
        self._n_used += 1
        return self._n_used - 1

    def _write_list(self, slot: int) -> None:
        entries = self._entries.get(slot, {}).values()
        items = 1 + at.ENTRY * len(entries)
        if slot >= len(self._lists) or items > self._lists.shape[1]:
            self._grow_lists(slot, items)
        row, hidden = self._lists[slot], 0
        row[0] = len(entries)
        for i, (descriptor, place, hidden_bytes) in enumerate(entries):
            row[1 + at.ENTRY * i : 1 + at.ENTRY * (i + 1)] = descriptor, place, hidden
            hidden += -(-hidden_bytes // 16) * 16
        if hidden:
            self._hidden_bytes[slot] = hidden
        else:
            self._hidden_bytes.pop(slot, None)

    def _grow_lists(self, slot: int, items: int) -> None:
        n, width = self._lists.shape
        grown = np.zeros((max(n, 1 << slot.bit_length()), max(width, 2 * items)), np.int64)
        grown[:n, :width] = self._lists
        self._lists = grown
        self._name_arrays()

    def _name_arrays(self) -> None:
        """Where the arrays are, which have moved."""
        a, lists = self._arguments, self._lists
        a[at.T_DESCRIPTORS] = self._descriptors.ctypes.data
        a[at.T_LISTS : at.T_N_LISTS + 1] = lists.ctypes.data, lists.shape[1], lists.shape[0]
