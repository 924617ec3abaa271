"""Slot arrays: the resident terms of one parameter, all those of one layout in one tensor.

A layout is what a grouped GEMM needs equal: number of blocks, rank, kept components. Variants
compressed with the same settings share a pool; others get a pool of their own.

Tensor parallelism: parts shard as the modules of their layouts say (`server.ops.packed` for
blocks, `server.ops.factors` and `server.ops.lowrank` for factors; a whole matrix by rows or by
columns, with the base's), before they are staged: a rank would have the same pools over shorter
arrays. Vectors (norms, biases) shard with their outputs; places and segments are the same on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.codecs.blockdiag import BlockDiagTerm
from compressor.codecs.impart import ImpartTerm
from compressor.codecs.impart_qt import ImpartQtTerm
from compressor.codecs.lowrank import LowRankTerm
from compressor.codecs.quantize import QUANT_BITS
from compressor.codecs.rows import RowsTerm
from compressor.codecs.term import Shape, Term
from server.deltas.blockdiag_pools import BlockDiagPool, BlockLayout
from server.deltas.lowrank_pools import RANK_STEP, LowRankLayout, LowRankPool, PackedLowRankPool
from server.deltas.pool import FactorPool, Staged, TermPool, segments_at
from server.deltas.rows_pools import RowsLayout, RowsPool, padded_count
from server.ops import delta as ops
from server.ops.factors import ImpartFactors, impart_rows, rank_lists
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


class ImpartPool(FactorPool):
    """Parts: u_values [bu, R, S], u_index [bu * S], v_values [bv, R, S], v_index, order [bv * S],
    first [min(m, n) + 1], sigma [min(m, n)] (zero past the term's rank); see `ImpartFactors`.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, kernels: Kernels
    ) -> None:
        super().__init__(shape, dtype, device)
        self.kernels = kernels

    def stage(self, term: Term) -> Staged:
        assert isinstance(term, ImpartTerm | ImpartQtTerm)
        parts = term.factors()
        sigma = torch.zeros(min(self.shape), dtype=self.dtype)
        sigma[: len(parts.sigma)] = parts.sigma.to(self.dtype)
        v_index = parts.v_index.int().flatten()
        return (
            _in_blocks(parts.u_values.to(self.dtype), parts.block_rows),
            parts.u_index.int().flatten(),
            _in_blocks(parts.v_values.to(self.dtype), parts.block_rows),
            v_index,
            *rank_lists(v_index, len(sigma)),
            sigma,
        )

    @property
    def factors(self) -> ImpartFactors:
        u, u_index, v, v_index, order, first, sigma = self.arrays
        lists = (v_index, order, first)
        return ImpartFactors(u, u_index, v, *lists, sigma, self.present, self.slot_map)

    def add_together_(
        self, pools: Sequence[Self], outputs: Sequence[Tensor], x: Tensor, rows: RowPlan
    ) -> None:
        self.kernels.impart_add_(outputs, x, rows, [pool.factors for pool in pools])

    def look_up(self, ids: Tensor, places: Tensor) -> Tensor:
        return impart_rows(ids, places, self.factors, self.shape[1])


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
    if isinstance(term, RowsTerm):
        return "rows", (padded_count(term), term.bits)
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
    if kind == "rows":
        return RowsPool(shape, RowsLayout(*sizes), kernels, device)
    if kind == "packed_lowrank":
        return PackedLowRankPool(shape, LowRankLayout(*sizes), kernels, device)
    if kind == "lowrank":
        return LowRankPool(shape, dtype, device, kernels)
    if kind == "impart":
        return ImpartPool(shape, dtype, device, kernels)
    assert kind == "dense"
    return DensePool(shape, dtype, device)
