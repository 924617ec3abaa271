"""Which slot arrays a term goes to."""

from __future__ import annotations

import torch

from compressor.codecs.blockdiag import BlockDiagTerm
from compressor.codecs.impart import ImpartTerm
from compressor.codecs.impart_qt import ImpartQtTerm
from compressor.codecs.lowrank import LowRankTerm
from compressor.codecs.quantize import QUANT_BITS
from compressor.codecs.rows import RowsTerm
from compressor.codecs.term import Shape, Term
from server.deltas.pools.base import TermPool
from server.deltas.pools.blockdiag import BlockDiagPool, BlockGeometry
from server.deltas.pools.dense import DensePool
from server.deltas.pools.impart import ImpartPool
from server.deltas.pools.lowrank import RANK_STEP, LowRankGeometry, LowRankPool, PackedLowRankPool
from server.deltas.pools.rows import RowsGeometry, RowsPool, padded_count
from server.ops.kernels import Kernels

TermGeometry = tuple[str, tuple[int, ...]]


def geometry_of(term: Term) -> TermGeometry:
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
    geometry: TermGeometry, shape: Shape, dtype: torch.dtype, device: torch.device, kernels: Kernels
) -> TermPool:
    """Create the empty pool of a geometry."""
    kind, sizes = geometry
    if kind == "blockdiag":
        return BlockDiagPool(shape, BlockGeometry(*sizes), kernels, device)
    if kind == "rows":
        return RowsPool(shape, RowsGeometry(*sizes), kernels, device)
    if kind == "packed_lowrank":
        return PackedLowRankPool(shape, LowRankGeometry(*sizes), kernels, device)
    if kind == "lowrank":
        return LowRankPool(shape, dtype, device, kernels)
    if kind == "impart":
        return ImpartPool(shape, dtype, device, kernels)
    assert kind == "dense"
    return DensePool(shape, dtype, device)
