"""The delta as plain integers, rounded to nearest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.baselines.base import Encoded, Matrix
from compressor.codecs import Params
from compressor.codecs.packing import pack_bits, unpack_bits
from compressor.codecs.quantize import from_half, to_half, unit_for

_UNIT_BYTES = 4


class RoundToNearest:
    """4- or 8-bit integers, symmetric, the row's largest value at the end of the range."""

    draws = False
    keeps_vectors = True

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.fixed_ratio = 16 / bits

    def plan(self, matrices: Sequence[Matrix], budget_bytes: float) -> list[Params | None]:
        """Nothing to choose."""
        del budget_bytes
        return [{} for _ in matrices]

    def encode(self, name: str, delta: Tensor, params: Params, seed: int) -> Encoded:
        """``round(value / scale)`` within ``-top .. top``, stored with `top` added."""
        del name, params, seed
        top = (1 << (self.bits - 1)) - 1
        scales = delta.abs().amax(1, keepdim=True) / top
        unit = unit_for(scales)
        half = to_half(scales, unit)
        stored = from_half(half, unit)
        ratio = torch.where(stored > 0, delta / stored, torch.zeros_like(delta))
        levels = ratio.round().clamp(-top, top)
        codes = pack_bits((levels + top).to(torch.uint8).view(-1), self.bits)
        restored = unpack_bits(codes, self.bits, delta.numel()).view(delta.shape).float() - top
        return Encoded(restored * stored, codes.nbytes + half.nbytes + _UNIT_BYTES)
