"""Slot arrays: the resident terms of one parameter, all slots of one layout in one tensor.

A layout is what a grouped GEMM needs equal: number of blocks, rank, kept components. Variants
compressed with the same settings share a pool; others get a pool of their own.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.codecs.blockdiag import BlockDiagTerm
from compressor.codecs.impart import ImpartTerm
from compressor.codecs.impart_qt import ImpartQtTerm
from compressor.codecs.lowrank import LowRankTerm
from compressor.codecs.quantize import QUANT_BITS
from compressor.codecs.term import Shape, Term
from server.ops import delta as ops
from server.ops.delta import BlockDiagOp
from server.ops.kernels import Kernels
from server.ops.lowrank import PackedLowRank
from server.ops.packed import PackedBlocks, pack_columns, packed_rows
from server.ops.rows import BASE_SLOT, RowPlan

Layout = tuple[str, tuple[int, ...]]
Staged = tuple[Tensor, ...]
RANK_STEP = 4  # ranks of packed factors are rounded up to a multiple: variants then share pools


class TermPool(ABC):
    """One array per part, slot-major. A loader thread may write a slot's `places` while a step
    reads others; `reserve`, `show` and `hide` belong to the engine thread.
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

    def places(self, slot: int) -> Staged:
        """Where the parts of a slot that no running step reads are to be written."""
        return tuple(array[slot] for array in self.arrays)

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


class BlockLayout(NamedTuple):
    """What variants must share to be applied in one product."""

    n_blocks: int
    bits: int
    scale_bits: int


class LowRankLayout(NamedTuple):
    """What variants must share to be applied in one product of packed factors."""

    rank: int
    bits: int


class BlockDiagPool(TermPool):
    """Parts: packed codes [s, byte rows, mb], scales float16 or uint8 [s, mb], unit float32 [1].

    shared  set if the arrays are slices of ones that a whole projection group uses
    """

    def __init__(
        self, shape: Shape, layout: BlockLayout, kernels: Kernels, device: torch.device
    ) -> None:
        super().__init__(shape, torch.float32, device)
        self.n_blocks, self.bits, self.scale_bits = layout
        self.shared: SharedBlocks | None = None
        self.kernels = kernels
        self._op: BlockDiagOp | None = None

    @property
    def block_shape(self) -> Shape:
        return -(-self.shape[0] // self.n_blocks), -(-self.shape[1] // self.n_blocks)

    def reserve(self, example: Staged, n_slots: int) -> None:
        if self.shared is not None:
            self.shared.reserve(n_slots)
            return
        if n_slots > self.capacity:
            super().reserve(example, n_slots)
            self._op = self.kernels.blockdiag(self._own_blocks())

    def stage(self, term: Term) -> Staged:
        assert isinstance(term, BlockDiagTerm)
        codes, scales = term.code_blocks()
        unit = torch.tensor([term.unit], dtype=torch.float32)
        return pack_columns(codes.transpose(1, 2), self.bits).contiguous(), scales, unit

    def hide(self, slot: int) -> None:
        super().hide(slot)
        if self.shared is not None and slot < self.capacity:
            # The group's product may go on for this slot: a unit of 0 takes this member out of it.
            self.arrays[2][slot] = 0

    def add_(self, y: Tensor, x: Tensor, rows: RowPlan) -> None:
        if self.shared is not None:
            self.shared.add_([y if pool is self else None for pool in self.shared.pools], x, rows)
            return
        segments = rows.table(self.present)
        if segments.n and self._op is not None:
            self._op.add_([y], x, segments)

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowPlan) -> None:
        for slot, part in _segments(rows, self.present):
            slots = torch.full_like(ids[part], slot)
            ops.blockdiag_rows_add_(y[part], ids[part], slots, self._own_blocks())

    def _own_blocks(self) -> PackedBlocks:
        codes, scales, units = self.arrays
        return PackedBlocks(codes, scales, units, (self.shape[0],), self.shape[1], self.bits)


class SharedBlocks:
    """One set of arrays for matrices that read the same input (q, k, v): outputs side by side.

    Each member pool's own arrays are slices of them, so loading stays per parameter while one
    product serves them all.
    """

    def __init__(self, pools: Sequence[BlockDiagPool]) -> None:
        self.pools = tuple(pools)
        self._ends = list(itertools.accumulate(p.block_shape[0] for p in pools))
        self._arrays: Staged = ()
        self._capacity = 0
        self._op: BlockDiagOp | None = None
        for pool in pools:
            pool.shared = self

    def reserve(self, n_slots: int) -> None:
        """Make room for `n_slots` in every member."""
        if n_slots <= self._capacity:
            return
        first, width = self.pools[0], self._ends[-1]
        s, nb = first.n_blocks, first.block_shape[1]
        code_rows = packed_rows(nb, first.bits)
        code_dtype = torch.float16 if first.bits == 16 else torch.uint8
        scale_dtype = torch.uint8 if first.scale_bits == 8 else torch.float16
        device = first.device
        # Zeros: a member that lacks a slot has scale 0 there.
        arrays = (
            torch.zeros((n_slots, s, code_rows, width), dtype=code_dtype, device=device),
            torch.zeros((n_slots, s, width), dtype=scale_dtype, device=device),
            torch.zeros((n_slots, len(self.pools)), dtype=torch.float32, device=device),
        )
        for new, old in zip(arrays, self._arrays, strict=False):
            new[: self._capacity] = old
        self._arrays, self._capacity = arrays, n_slots
        codes, scales, units = arrays
        for i, (pool, end) in enumerate(zip(self.pools, self._ends, strict=True)):
            own = slice(end - pool.block_shape[0], end)
            pool.arrays = (codes[..., own], scales[..., own], units[:, i : i + 1])
            pool.capacity = n_slots
        sizes = tuple(pool.shape[0] for pool in self.pools)
        blocks = PackedBlocks(codes, scales, units, sizes, first.shape[1], first.bits)
        self._op = first.kernels.blockdiag(blocks)

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, rows: RowPlan) -> None:
        """Add each member's deltas to its own ``[T, m]`` of `outputs`; None leaves it out."""
        present = frozenset[int]().union(*(pool.present for pool in self.pools))
        segments = rows.table(present)
        if segments.n and self._op is not None:
            self._op.add_(outputs, x, segments)


class PackedLowRankPool(TermPool):
    """Parts: those of `PackedLowRank` without the slot axis, of a rank rounded up so that variants
    of about the same rank share the pool; components that are not there have scale 0.
    """

    def __init__(
        self, shape: Shape, layout: LowRankLayout, kernels: Kernels, device: torch.device
    ) -> None:
        super().__init__(shape, torch.float32, device)
        self.rank, self.bits = layout
        self.kernels = kernels
        self._op: PackedLowRank | None = None

    def reserve(self, example: Staged, n_slots: int) -> None:
        if n_slots > self.capacity:
            super().reserve(example, n_slots)
            self._op = PackedLowRank(
                *self.arrays, n=self.shape[1], bits=self.bits, make_op=self.kernels.blockdiag
            )

    def stage(self, term: Term) -> Staged:
        assert isinstance(term, LowRankTerm)
        down, up = term.factor_codes()
        missing = self.rank - term.rank
        codes = [F.pad(part.codes, (0, 0, 0, missing)) for part in (down, up)]
        return (
            pack_columns(codes[0].T, self.bits).contiguous(),
            F.pad(down.scales, (0, missing)),
            torch.tensor([down.unit], dtype=torch.float32),
            pack_columns(codes[1], self.bits).contiguous(),
            F.pad(up.scales.float() * up.unit, (0, missing)),
        )

    def add_(self, y: Tensor, x: Tensor, rows: RowPlan) -> None:
        segments = rows.table(self.present)
        if segments.n and self._op is not None:
            self._op.add_(y, x, rows.places_in(self.capacity), segments)

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowPlan) -> None:
        for slot, part in _segments(rows, self.present):
            if self._op is not None:
                self._op.add_rows_(y[part], ids[part], slot)


class LowRankPool(TermPool):
    """Parts: a [r, n], b [r, m], in the compute dtype. For factors stored in 16 or 32 bits."""

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
        assert isinstance(term, ImpartTerm | ImpartQtTerm)
        parts = term.factors()
        sigma = torch.zeros(min(self.shape), dtype=self.dtype)
        sigma[: len(parts.sigma)] = parts.sigma.to(self.dtype)
        return (
            _in_blocks(parts.u_values.to(self.dtype), parts.block_rows),
            parts.u_index.long().flatten(),
            _in_blocks(parts.v_values.to(self.dtype), parts.block_rows),
            parts.v_index.long().flatten(),
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
    padded = F.pad(values, (0, 0, 0, n_blocks * block_rows - len(values)))
    return padded.view(n_blocks, block_rows, values.shape[1])


def layout_of(term: Term) -> Layout:
    """What must be equal for two terms to share a pool."""
    if isinstance(term, BlockDiagTerm):
        return "blockdiag", (term.n_blocks, term.bits, term.scale_bits)
    if isinstance(term, LowRankTerm):
        if term.bits in QUANT_BITS:
            return "packed_lowrank", (-(-term.rank // RANK_STEP) * RANK_STEP, term.bits)
        return "lowrank", (term.rank,)
    if isinstance(term, ImpartTerm):
        return "impart", (term.block_rows, term.u_index.shape[1])
    if isinstance(term, ImpartQtTerm):
        return "impart", (term.block_rows, sum(term.kept))
    return "dense", ()


def make_pool(
    layout: Layout, shape: Shape, dtype: torch.dtype, device: torch.device, kernels: Kernels
) -> TermPool:
    """Create the empty pool of a layout."""
    kind, sizes = layout
    if kind == "blockdiag":
        return BlockDiagPool(shape, BlockLayout(*sizes), kernels, device)
    if kind == "packed_lowrank":
        return PackedLowRankPool(shape, LowRankLayout(*sizes), kernels, device)
    makers: dict[str, Callable[[Shape, torch.dtype, torch.device], TermPool]] = {
        "lowrank": LowRankPool,
        "impart": ImpartPool,
        "dense": DensePool,
    }
    return makers[kind](shape, dtype, device)
