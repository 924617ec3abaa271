"""Matrix sources: views of a ``dW`` that is read piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.codecs.lowrank import LowRankTerm
from compressor.codecs.term import MatrixSource, Shape
from compressor.errors import UnsupportedTensor

_LARGEST = 1e18


class TensorSource:
    """A matrix already in memory."""

    def __init__(self, matrix: Tensor) -> None:
        assert matrix.ndim == 2
        self._matrix = matrix
        self.shape: Shape = (matrix.shape[0], matrix.shape[1])

    def block(self, row_start: int, row_end: int, col_start: int, col_end: int) -> Tensor:
        """Return a new float32 tensor."""
        return self._matrix[row_start:row_end, col_start:col_end].to(torch.float32, copy=True)


class Transposed:
    """``dW^T`` of another source."""

    def __init__(self, source: MatrixSource) -> None:
        self._source = source
        self.shape: Shape = (source.shape[1], source.shape[0])

    def block(self, row_start: int, row_end: int, col_start: int, col_end: int) -> Tensor:
        """Return a new float32 tensor."""
        return self._source.block(col_start, col_end, row_start, row_end).T.contiguous()


class WithInputs:
    """A matrix and what its layer is applied to.

    hessian  float ``[n, n]``, the second moment ``E[x x^T]`` of the layer's input
    """

    def __init__(self, source: MatrixSource, hessian: Tensor) -> None:
        assert hessian.shape == (source.shape[1], source.shape[1])
        self._source = source
        self.hessian = hessian
        self.shape: Shape = source.shape

    def block(self, row_start: int, row_end: int, col_start: int, col_end: int) -> Tensor:
        """Return a new float32 tensor."""
        return self._source.block(row_start, row_end, col_start, col_end)


class Residual:
    """``dW`` minus an importance head."""

    def __init__(self, source: MatrixSource, head: LowRankTerm) -> None:
        self._source = source
        self._head = head
        self.shape: Shape = source.shape

    def block(self, row_start: int, row_end: int, col_start: int, col_end: int) -> Tensor:
        """Return a new float32 tensor."""
        block = self._source.block(row_start, row_end, col_start, col_end)
        b, a = self._head.b[:, row_start:row_end], self._head.a[:, col_start:col_end]
        return block.sub_(b.to(block.device).T @ a.to(block.device))


def finite_block(
    name: str, source: MatrixSource, row_start: int, row_end: int, col_start: int, col_end: int
) -> Tensor:
    """Read a block and refuse NaN, infinity and values no float16 with a unit can rescale."""
    block = source.block(row_start, row_end, col_start, col_end)
    if not bool((block.abs() <= _LARGEST).all()):  # also false for NaN
        raise UnsupportedTensor(
            f"{name}: the difference between fine-tune and base holds NaN, infinity or values "
            f"beyond {_LARGEST:.0e}; one of the two checkpoints is damaged: get it again"
        )
    return block
