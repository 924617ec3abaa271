"""Slot arrays of ImPart's sparse factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.codecs.impart import ImpartTerm
from compressor.codecs.impart_qt import ImpartQtTerm
from compressor.codecs.term import Shape, Term
from server.deltas.pools.base import FactorPool, PoolParts
from server.ops.factors import ImpartFactors, impart_rows, rank_lists
from server.ops.kernels import Kernels
from server.ops.row_mapping import RowMapping


class ImpartPool(FactorPool):
    """Parts: u_values [bu, R, S], u_index [bu * S], v_values [bv, R, S], v_index, order [bv * S],
    first [min(m, n) + 1], sigma [min(m, n)] (zero past the term's rank); see `ImpartFactors`.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, kernels: Kernels
    ) -> None:
        super().__init__(shape, dtype, device)
        self.kernels = kernels

    def stage(self, term: Term) -> PoolParts:
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
        return ImpartFactors(u, u_index, v, *lists, sigma, self.places.shown, self.slot_map)

    def add_together_(
        self, pools: Sequence[Self], outputs: Sequence[Tensor], x: Tensor, rows: RowMapping
    ) -> None:
        self.kernels.impart_add_(outputs, x, rows, [pool.factors for pool in pools])

    def look_up(self, ids: Tensor, places: Tensor) -> Tensor:
        return impart_rows(ids, places, self.factors, self.shape[1])


def _in_blocks(values: Tensor, block_rows: int) -> Tensor:
    """``[rows, S]`` -> ``[blocks, R, S]``, the last block zero-padded."""
    n_blocks = -(-len(values) // block_rows)
    padded = F.pad(values, (0, 0, 0, n_blocks * block_rows - len(values)))
    return padded.view(n_blocks, block_rows, values.shape[1])
