"""Slot arrays: the resident terms of one parameter, all slots of one layout in one tensor.

A layout is what a grouped GEMM needs equal: number of blocks, rank, kept components. Variants
compressed with the same settings share a pool; others get a pool of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

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
    """Parts: dequantised blocks [s, mb, nb]."""

    def __init__(
        self, shape: Shape, n_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, dtype, device)
        m, n = shape
        mb, nb = -(-m // n_blocks), -(-n // n_blocks)
        row_place = _padded_places(m, n_blocks, mb)
        col_place = _padded_places(n, n_blocks, nb)
        self._place_of_row = row_place.to(device)
        self._row_map = None if m % n_blocks == 0 else self._place_of_row
        self._col_map: Tensor | None = None
        if n % n_blocks:
            col_map = torch.full((n_blocks * nb,), n)
            col_map[col_place] = torch.arange(n)
            self._col_map = col_map.to(device)

    def stage(self, term: Term) -> Staged:
        assert isinstance(term, BlockDiagTerm)
        return (term.blocks(self.dtype).values,)

    def add_(self, y: Tensor, x: Tensor, rows: RowPlan) -> None:
        for run in rows.runs(self.present):
            ops.blockdiag_add_(y, x, run, self.arrays[0], self._col_map, self._row_map)

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowPlan) -> None:
        for run in rows.runs(self.present):
            part = slice(run.start, run.end)
            ops.blockdiag_rows_add_(
                y[part],
                ids[part],
                rows.slot_of_row[part],
                self.arrays[0],
                self._place_of_row,
                self._col_map,
            )


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
