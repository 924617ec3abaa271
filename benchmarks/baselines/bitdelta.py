"""BitDelta: one bit a value (Liu et al., NeurIPS 2024, 2402.10193)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.baselines.base import Encoded, Matrix
from compressor.codecs import Params
from compressor.codecs.packing import pack_bits, unpack_bits
from compressor.codecs.quantize import from_half, to_half, unit_for

_UNIT_BYTES = 4


class BitDelta:
    """The sign of every value times the mean magnitude, of the matrix or of the row.

    These are the scales of least squared error, the paper's initialisation. The paper then trains
    them on the fine-tune's logits; this does not.
    """

    draws = False
    fixed_ratio = 16.0
    keeps_vectors = True

    def __init__(self, *, per_row: bool) -> None:
        self.per_row = per_row

    def plan(self, matrices: Sequence[Matrix], budget_bytes: float) -> list[Params | None]:
        """Nothing to choose."""
        del budget_bytes
        return [{} for _ in matrices]

    def encode(self, name: str, delta: Tensor, params: Params, seed: int) -> Encoded:
        """Zero counts as negative, as in the paper's code."""
        del name, params, seed
        magnitude = delta.abs()
        scales = magnitude.mean(1, keepdim=True) if self.per_row else magnitude.mean().view(1, 1)
        unit = unit_for(scales)
        half = to_half(scales, unit)
        codes = pack_bits((delta > 0).to(torch.uint8).view(-1), 1)
        signs = unpack_bits(codes, 1, delta.numel()).view(delta.shape).float() * 2 - 1
        return Encoded(signs * from_half(half, unit), codes.nbytes + half.nbytes + _UNIT_BYTES)
