"""Packed diagonal blocks as they lie in device memory, for all slots of one geometry.

Codes are packed along the inputs, in the order that `compressor.codecs.columns` describes.

value = ``(code - (2^bits - 1) / 2) * scale * unit``, for 16 bits ``value * scale * unit``.
Tensor parallelism: blocks are independent; shard the s axis together with the outputs' rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.codecs.columns import unpack_columns
from compressor.codecs.quantize import from_octaves


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """Blocks of one matrix or of several that read the same x (their outputs side by side).

    codes   uint8 [C, s, byte rows, sum of mb], or float16 [C, s, nb, sum of mb] for 16 bits
    scales  [C, s, sum of mb], 0 for padding: float16, or uint8 where ``c`` stands for
            ``2^((c - 255) / 16)`` and 0 for 0 (`compressor.codecs.quantize.to_octaves`); slots may
            share theirs (a stride of 0)
    units   float32 [C, number of matrices]
    sizes   outputs m of each matrix; its longest block has ``mb = ceil(m / s)``
    n       inputs; the longest block has ``nb = ceil(n / s)``
    bits    2, 3, 4, 8 or 16
    place_of  int32 [slots]: place + 1 in the arrays, 0 where the slot has nothing here; asked where
            a step's rows are data (`static_row_mapping`)

    Block b of a balanced partition of m has ``m // s + (b < m % s)`` rows and starts at
    ``b * (m // s) + min(b, m % s)``; columns likewise.
    """

    codes: Tensor
    scales: Tensor
    units: Tensor
    sizes: tuple[int, ...]
    n: int
    bits: int
    place_of: Tensor | None = None

    @property
    def n_blocks(self) -> int:
        return self.codes.shape[1]

    def block_rows(self) -> list[int]:
        """`mb` of each matrix: its share of the last axis."""
        return [-(-m // self.n_blocks) for m in self.sizes]

    def place(self, slot: int) -> int:
        """Place of a slot, -1 if it has none; asks the device."""
        assert self.place_of is not None
        return int(self.place_of[slot]) - 1 if slot < len(self.place_of) else -1

    def values(self, slot: int) -> Tensor:
        """Dequantise one slot: float32 [s, nb, sum of mb]. Padding is zero."""
        return self._values(self.codes[slot], self.scales[slot], self.units[slot])

    def values_of(self, slots: Tensor) -> Tensor:
        """Dequantise a slot per entry of ``slots [t]``: float32 [t, s, nb, sum of mb]."""
        return self._values(self.codes[slots], self.scales[slots], self.units[slots])

    def _values(self, packed: Tensor, scales: Tensor, units: Tensor) -> Tensor:
        nb = -(-self.n // self.n_blocks)
        codes = unpack_columns(packed, self.bits, nb).float()
        if self.bits != 16:
            codes -= ((1 << self.bits) - 1) / 2
        parts = [units[..., g : g + 1].expand(*units.shape[:-1], mb) for g, mb in self._numbered()]
        gains = scale_values(scales) * torch.cat(parts, dim=-1).unsqueeze(-2)
        values = codes.mul_(gains.unsqueeze(-2))
        short = self.n % self.n_blocks
        if short:  # the last column of the shorter blocks is padding
            values[..., short:, nb - 1, :] = 0
        return values

    def _numbered(self) -> list[tuple[int, int]]:
        return list(enumerate(self.block_rows()))


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Some rows of a matrix ``[m, n]``, stored whole, for all slots of one geometry.

    blocks  one block: the outputs are the K stored rows
    index   int64 [C, K], increasing: which rows of the matrix they are. Rows that only fill up to K
            have scale 0
    """

    blocks: PackedBlocks
    index: Tensor
    m: int


def octaves() -> Tensor:
    """[256] float32: what one-byte scales stand for."""
    return scale_values(torch.arange(256, dtype=torch.uint8))


def scale_values(scales: Tensor) -> Tensor:
    """Stored scales -> float32, still in units of the term's unit."""
    return from_octaves(scales, 1.0) if scales.dtype is torch.uint8 else scales.float()
