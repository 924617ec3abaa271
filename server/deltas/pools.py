"""Slot arrays: the resident terms of one parameter, all those of one layout in one tensor.

A layout is what a grouped GEMM needs equal: number of blocks, rank, kept components. Variants
compressed with the same settings share a pool; others get a pool of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.codecs.blockdiag import BlockDiagTerm
from compressor.codecs.impart import ImpartTerm
from compressor.codecs.impart_qt import ImpartQtTerm
from compressor.codecs.lowrank import LowRankTerm
from compressor.codecs.quantize import QUANT_BITS
from compressor.codecs.term import Shape, Term
from server.deltas.blockdiag_pools import BlockDiagPool, BlockLayout
from server.deltas.lowrank_pools import RANK_STEP, LowRankLayout, LowRankPool, PackedLowRankPool
from server.deltas.pool import Staged, TermPool, segments_at
from server.ops import delta as ops
from server.ops.kernels import Kernels
from server.ops.rows import RowPlan

Layout = tuple[str, tuple[int, ...]]


class DensePool(TermPool):
    """Parts: dW [m, n]. Used where a whole matrix is stored exactly."""

    def stage(self, term: Term) -> Staged:
        return (term.to_dense().to(self.dtype),)

    def add_(self, y: Tensor, x: Tensor, rows: RowPlan) -> None:
        for run in rows.runs(self.present):
            ops.dense_add_(y, x, run, self.arrays[0])

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowPlan) -> None:
        for place, part in segments_at(rows, self.present):
            y[part] += self.arrays[0][place, ids[part]]


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
        for place, part in segments_at(rows, self.present):
            u, u_index, v, v_index, sigma = (array[place] for array in self.arrays)
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
