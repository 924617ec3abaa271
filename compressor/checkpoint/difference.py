"""``dW = W_ft - W_base`` of one matrix, read piece by piece for the encoders."""

from __future__ import annotations

from torch import Tensor

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.pairing import TensorPair
from compressor.codecs.term import Shape

# A difference up to this size is kept: encoders that pass over it several times read it once.
_KEPT_BYTES = 64 << 20


class DeltaSource:
    """A MatrixSource over two checkpoints, in ``[out, in]`` orientation, the base's rows only.

    device  where blocks are returned, and so where encoders compute
    """

    def __init__(
        self, base: Checkpoint, tuned: Checkpoint, pair: TensorPair, device: str = "cpu"
    ) -> None:
        m, n = pair.base_shape
        self.shape: Shape = (m, n)
        self._base, self._tuned, self._pair, self._device = base, tuned, pair, device
        self._kept: Tensor | None = None
        if 4 * m * n <= _KEPT_BYTES:
            self._kept = self._read(0, m, 0, n)

    def block(self, row_start: int, row_end: int, col_start: int, col_end: int) -> Tensor:
        if self._kept is not None:
            return self._kept[row_start:row_end, col_start:col_end].clone()
        return self._read(row_start, row_end, col_start, col_end)

    def _read(self, row_start: int, row_end: int, col_start: int, col_end: int) -> Tensor:
        """Return the float32 difference of the float32 values; one rounding, of the result."""
        where = (row_start, row_end, col_start, col_end)
        if self._pair.transposed:
            where = (col_start, col_end, row_start, row_end)
        delta = self._tuned.slice(self._pair.tuned_key, *where)
        delta -= self._base.slice(self._pair.base_key, *where)
        if self._pair.transposed:
            delta = delta.T.contiguous()
        if self._pair.scales is not None:
            delta = self._pair.scales.of_block(delta, row_start, row_end, col_start, col_end)
        return delta.to(self._device)
