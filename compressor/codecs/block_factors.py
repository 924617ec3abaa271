"""Factors of a matrix in which all rows of a block keep the same components.

    dW = Uhat diag(sigma) Vhat^T

What `impart` and `impart-qt` decode to, and what a server stages. A block is a dense ``[R, S]``
matrix and S component numbers, so products are small dense ones with a gather on the rank axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.codecs.term import Shape
from compressor.codecs.validate import check_ids


@dataclass(frozen=True, slots=True, eq=False)
class BlockFactors:
    """Block-sparse factors of a matrix ``[m, n]``; a component's column is zero elsewhere.

    block_rows  rows a block, R; the last block may be shorter
    u_index     ints ``[ceil(m / R), S]``, distinct within a block, below the rank r
    u_values    any float ``[m, S]``: row i's values for the components of its block
    v_index, v_values  the same for the n columns
    sigma       float32 ``[r]``, weights on the rank axis

    The values are of order 1, so that products in half precision neither overflow nor vanish.
    """

    shape: Shape
    block_rows: int
    u_index: Tensor
    u_values: Tensor
    v_index: Tensor
    v_values: Tensor
    sigma: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x @ dW^T`` in float32: ``x [T, n]`` any float -> ``[T, m]``."""
        m = self.shape[0]
        blocks_in = _in_blocks(x.float().T, self.block_rows)  # [bv, R, T]
        partial = torch.bmm(_in_blocks(self.v_values.float(), self.block_rows).mT, blocks_in)
        ranked = torch.zeros(len(self.sigma), x.shape[0]).index_add_(
            0, self.v_index.long().flatten(), partial.flatten(0, 1)
        )
        ranked *= self.sigma.unsqueeze(1)
        chosen = ranked[self.u_index.long()]  # [bu, S, T]
        out = torch.bmm(_in_blocks(self.u_values.float(), self.block_rows), chosen)
        return out.flatten(0, 1)[:m].T.contiguous()

    def to_dense(self) -> Tensor:
        """Return ``dW [m, n]`` in float32."""
        right = self._right()
        dense = torch.empty(self.shape, dtype=torch.float32)
        for block, start in enumerate(range(0, self.shape[0], self.block_rows)):
            rows = self.u_values[start : start + self.block_rows].float()
            dense[start : start + self.block_rows] = rows @ right[self.u_index[block].long()]
        return dense

    def dense_rows(self, ids: Tensor) -> Tensor:
        """Return ``dW[ids]``: ``ids [T]`` int64 -> ``[T, n]`` float32."""
        check_ids(ids, self.shape[0])
        index = self.u_index[ids // self.block_rows].long()
        values = self.u_values[ids].float()
        spread = torch.zeros(len(ids), len(self.sigma)).scatter_(1, index, values)
        return spread @ self._right()

    def _right(self) -> Tensor:
        """``diag(sigma) Vhat^T`` as dense float32 ``[r, n]``."""
        n = self.shape[1]
        index = self.v_index.long().repeat_interleave(self.block_rows, dim=0)[:n]
        spread = torch.zeros(n, len(self.sigma)).scatter_(1, index, self.v_values.float())
        return spread.T * self.sigma.unsqueeze(1)


def select_kept(values: Tensor, index: Tensor, block_rows: int) -> Tensor:
    """Of ``values [size, r]`` keep each row's block's components: ``[size, S]``."""
    return values.gather(1, index_by_row(index, block_rows, values.shape[0]))


def index_by_row(index: Tensor, block_rows: int, size: int) -> Tensor:
    """``[blocks, S]`` -> int64 ``[size, S]``: each row's components."""
    return index.long().repeat_interleave(block_rows, dim=0)[:size]


def _in_blocks(rows: Tensor, block_rows: int) -> Tensor:
    """``[size, k]`` -> ``[ceil(size / R), R, k]``, zero-padded."""
    n_blocks = -(-rows.shape[0] // block_rows)
    padding = n_blocks * block_rows - rows.shape[0]
    padded = torch.nn.functional.pad(rows, (0, 0, 0, padding))
    return padded.view(n_blocks, block_rows, rows.shape[1])
