"""Slot arrays: the resident terms of one parameter, all slots of one layout in one tensor.

A layout is what a grouped GEMM needs equal: number of blocks, rank, kept components. Variants
compressed with the same settings share a pool; others get a pool of their own.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compressor.codecs.blockdiag import BlockDiagTerm
from compressor.codecs.impart import ImpartTerm
from compressor.codecs.lowrank import LowRankTerm
from compressor.codecs.term import Shape, Term
from server.ops import delta as ops
from server.ops.rows import BASE_SLOT, RowPlan

Layout = tuple[str, tuple[int, ...]]
Staged = tuple[Tensor, ...]


class TermPool(ABC):
    """One array per part, slot-major. `store` writes only its own slot, so a loader thread may
    call it while a step reads others; `reserve`, `show` and `hide` belong to the engine thread.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.present: frozenset[int] = frozenset()
        self.capacity = 0
        self.arrays: Staged = ()

    def reserve(self, example: Staged, n_slots: int) -> None:
        """Make room for `n_slots`; existing slots keep their values."""
        if n_slots <= self.capacity:
            return
        grown = tuple(
            torch.empty((n_slots, *part.shape), dtype=part.dtype, device=self.device)
            for part in example
        )
        for new, old in zip(grown, self.arrays, strict=False):
            new[: self.capacity] = old
        self.arrays, self.capacity = grown, n_slots

    def store(self, slot: int, staged: Staged) -> None:
        """Copy staged parts into a slot that no running step reads."""
        for array, part in zip(self.arrays, staged, strict=True):
            array[slot].copy_(part)

    def show(self, slot: int) -> None:
        """From the next step on, rows of `slot` get this pool's terms."""
        self.present |= {slot}

    def hide(self, slot: int) -> None:
        """The slot's terms are no longer applied; its memory may be overwritten."""
        self.present -= {slot}

    @abstractmethod
    def stage(self, term: Term) -> Staged:
        """Decode a term into this pool's parts, on the host."""

    @abstractmethod
    def add_(self, y: Tensor, x: Tensor, rows: RowPlan) -> None:
        """``y [T, m] += x [T, n] @ dW[slot of row]^T`` for every row whose slot is present."""

    @abstractmethod
    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowPlan) -> None:
        """``y [T, n] += dW[slot of row][id]``: the embedding's side of the same matrix."""


def _segments(rows: RowPlan, present: frozenset[int]) -> list[tuple[int, slice]]:
    return [
        (s.slot, slice(s.start, s.end))
        for s in rows.segments
        if s.slot != BASE_SLOT and s.slot in present
    ]


class BlockDiagPool(TermPool):
    """Parts: dequantised blocks, transposed [s, nb, mb].

    shared  set if the array is a slice of one that a whole projection group uses
    """

    def __init__(
        self, shape: Shape, n_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, dtype, device)
        m, n = shape
        self.n_blocks = n_blocks
        self.block_shape = (-(-m // n_blocks), -(-n // n_blocks))
        self.place_of_row = _padded_places(m, n_blocks, self.block_shape[0]).to(device)
        self.row_map = None if m % n_blocks == 0 else self.place_of_row
        self.col_map: Tensor | None = None
        if n % n_blocks:
            col_map = torch.full((n_blocks * self.block_shape[1],), n)
            col_map[_padded_places(n, n_blocks, self.block_shape[1])] = torch.arange(n)
            self.col_map = col_map.to(device)
        self.shared: SharedBlocks | None = None

    def reserve(self, example: Staged, n_slots: int) -> None:
        if self.shared is None:
            super().reserve(example, n_slots)
        else:
            self.shared.reserve(n_slots)

    def stage(self, term: Term) -> Staged:
        assert isinstance(term, BlockDiagTerm)
        return (term.blocks(self.dtype).values.transpose(1, 2).contiguous(),)

    def add_(self, y: Tensor, x: Tensor, rows: RowPlan) -> None:
        outputs = [ops.BlockOutput(y, 0, self.block_shape[0], self.row_map)]
        for run in rows.runs(self.present):
            ops.blockdiag_add_(outputs, x, run, self.arrays[0], self.col_map)

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowPlan) -> None:
        for run in rows.runs(self.present):
            part = slice(run.start, run.end)
            ops.blockdiag_rows_add_(
                y[part],
                ids[part],
                rows.slot_of_row[part],
                self.arrays[0],
                self.place_of_row,
                self.col_map,
            )


class SharedBlocks:
    """One array ``[C, s, nb, sum of mb]`` for matrices that read the same input (q, k, v).

    Each member pool's own array is a slice of it, so loading stays per parameter while one product
    serves them all.
    """

    def __init__(self, pools: Sequence[BlockDiagPool]) -> None:
        self._pools = tuple(pools)
        self._ends = list(itertools.accumulate(p.block_shape[0] for p in pools))
        self._array = torch.empty(0)
        self._capacity = 0
        for pool in pools:
            pool.shared = self

    def reserve(self, n_slots: int) -> None:
        """Make room for `n_slots` in every member."""
        if n_slots <= self._capacity:
            return
        first = self._pools[0]
        shape = (n_slots, first.n_blocks, first.block_shape[1], self._ends[-1])
        array = torch.empty(shape, dtype=first.dtype, device=first.device)
        if self._capacity:
            array[: self._capacity] = self._array
        self._array, self._capacity = array, n_slots
        for pool, end in zip(self._pools, self._ends, strict=True):
            pool.arrays = (array[..., end - pool.block_shape[0] : end],)
            pool.capacity = n_slots

    def covers(self, rows: RowPlan) -> bool:
        """Whether all members hold the same slots of this batch, so that one product is right."""
        active = {pool.present & rows.slots for pool in self._pools}
        return len(active) == 1

    def add_(self, parts: Sequence[Tensor], x: Tensor, rows: RowPlan) -> None:
        """Add every member's deltas to its own ``[T, m]`` of `parts`."""
        outputs = [
            ops.BlockOutput(y, end - pool.block_shape[0], end, pool.row_map)
            for y, pool, end in zip(parts, self._pools, self._ends, strict=True)
        ]
        for run in rows.runs(self._pools[0].present):
            ops.blockdiag_add_(outputs, x, run, self._array, self._pools[0].col_map)


def _padded_places(size: int, n_blocks: int, block: int) -> Tensor:
    """Place of each row when every block of a balanced partition is padded to `block` rows."""
    long, rest = divmod(size, n_blocks)[1], size // n_blocks
    sizes = torch.tensor([rest + 1] * long + [rest] * (n_blocks - long))
    starts = torch.arange(n_blocks) * block - (sizes.cumsum(0) - sizes)
    return torch.arange(size) + torch.repeat_interleave(starts, sizes)


class LowRankPool(TermPool):
    """Parts: a [r, n], b [r, m]."""

    def stage(self, term: Term) -> Staged:
        assert isinstance(term, LowRankTerm)
        return (term.a.to(self.dtype), term.b.to(self.dtype))

    def add_(self, y: Tensor, x: Tensor, rows: RowPlan) -> None:
        for run in rows.runs(self.present):
            ops.lowrank_add_(y, x, run, *self.arrays)

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowPlan) -> None:
        a, b = self.arrays
        for slot, part in _segments(rows, self.present):
            y[part] += b[slot][:, ids[part]].T @ a[slot]


class DensePool(TermPool):
    """Parts: dW [m, n]. Used where a whole matrix is stored exactly."""

    def stage(self, term: Term) -> Staged:
        return (term.to_dense().to(self.dtype),)

    def add_(self, y: Tensor, x: Tensor, rows: RowPlan) -> None:
        for run in rows.runs(self.present):
            ops.dense_add_(y, x, run, self.arrays[0])

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowPlan) -> None:
        for slot, part in _segments(rows, self.present):
            y[part] += self.arrays[0][slot, ids[part]]


class ImpartPool(TermPool):
    """Parts: u_values [bu, R, S], u_index [bu * S], v_values [bv, R, S], v_index [bv * S],
    sigma [min(m, n)] (zero past the term's rank).
    """

    def stage(self, term: Term) -> Staged:
        assert isinstance(term, ImpartTerm)
        sigma = torch.zeros(min(self.shape), dtype=self.dtype)
        sigma[: len(term.sigma)] = term.sigma.to(self.dtype)
        return (
            _in_blocks(term.u_values.to(self.dtype), term.block_rows),
            term.u_index.long().flatten(),
            _in_blocks(term.v_values.to(self.dtype), term.block_rows),
            term.v_index.long().flatten(),
            sigma,
        )

    def add_(self, y: Tensor, x: Tensor, rows: RowPlan) -> None:
        for run in rows.runs(self.present):
            ops.impart_add_(y, x, run, *self.arrays)

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowPlan) -> None:
        for slot, part in _segments(rows, self.present):
            u, u_index, v, v_index, sigma = (array[slot] for array in self.arrays)
            n = self.shape[1]
            y[part] += ops.impart_rows(ids[part], u, u_index, v, v_index, sigma, n)


def _in_blocks(values: Tensor, block_rows: int) -> Tensor:
    """``[rows, S]`` -> ``[blocks, R, S]``, the last block zero-padded."""
    n_blocks = -(-len(values) // block_rows)
    padded = torch.nn.functional.pad(values, (0, 0, 0, n_blocks * block_rows - len(values)))
    return padded.view(n_blocks, block_rows, values.shape[1])


def layout_of(term: Term) -> Layout:
    """What must be equal for two terms to share a pool."""
    if isinstance(term, BlockDiagTerm):
        return "blockdiag", (term.n_blocks,)
    if isinstance(term, LowRankTerm):
        return "lowrank", (len(term.a),)
    if isinstance(term, ImpartTerm):
        return "impart", (term.block_rows, term.u_index.shape[1])
    return "dense", ()


def make_pool(layout: Layout, shape: Shape, dtype: torch.dtype, device: torch.device) -> TermPool:
    """Create the empty pool of a layout."""
    kind, sizes = layout
    if kind == "blockdiag":
        return BlockDiagPool(shape, sizes[0], dtype, device)
    makers: dict[str, Callable[[Shape, torch.dtype, torch.device], TermPool]] = {
        "lowrank": LowRankPool,
        "impart": ImpartPool,
        "dense": DensePool,
    }
    return makers[kind](shape, dtype, device)
