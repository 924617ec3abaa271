"""`blockdiag`: keep the diagonal blocks of the delta, rescaled, few bits each.

    dW ~ (n / n_b) * blockdiag(dW_11, ..., dW_ss)

Rows and columns are cut into `s` nearly equal runs; of row ``i`` only the columns of its own
block are kept, times the inverse of the share kept. That is one draw of an unbiased estimator
(as DARE's, arXiv 2311.03099, but dense): no index is stored, and applying it is one batched
product of small dense matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from compressor.codecs.packing import pack_bits, unpack_bits
from compressor.codecs.partition import Band, bands, kept_values
from compressor.codecs.quantize import (
    from_half,
    from_octaves,
    octave_unit,
    to_half,
    to_octaves,
    unit_for,
)
from compressor.codecs.term import Params, Shape
from compressor.codecs.validate import (
    bits_param,
    check_ids,
    check_names,
    check_part,
    check_shape,
    int_param,
    unit_param,
)

BLOCKDIAG_BITS = (2, 3, 4, 8, 16)
SCALE_BITS = (8, 16)


@dataclass(frozen=True, slots=True, eq=False)
class BlockDiagTerm:
    """Diagonal blocks of a matrix ``[m, n]``.

    codes   uint8 ``[N]``, one code a value (unpacked), or float16 ``[N]`` for 16 bits; block
            after block, each row-major, which is row after row of the matrix
    scales  float32 ``[m]``, the rescale ``n / n_b`` folded in; for 16 bits every one is `unit`
            (the values already hold the rescale)
    unit    what the numbers on disk are multiples of
    scale_bits  of a scale on disk: 16, float16, or 8, sixteenths of an octave (`to_octaves`);
            16 where there are none

    The value of code ``c`` in row ``i`` is ``(c - (2^bits - 1) / 2) * scales[i]``, and
    ``c * scales[i]`` for 16 bits. Float32 throughout.
    """

    codec: ClassVar[str] = "blockdiag"
    shape: Shape
    n_blocks: int
    bits: int
    codes: Tensor
    scales: Tensor
    unit: float
    scale_bits: int = 16

    def params(self) -> Params:
        params: Params = {"n_blocks": self.n_blocks, "bits": self.bits, "unit": self.unit}
        return params | ({"scale_bits": self.scale_bits} if self.scale_bits != 16 else {})

    def tensors(self) -> dict[str, Tensor]:
        if self.bits == 16:
            return {"values": self.codes}
        return {
            "codes": pack_bits(self.codes, self.bits),
            "scales": store_scales(self.scales, self.unit, self.scale_bits),
        }

    @classmethod
    def from_parts(cls, shape: Shape, params: Params, tensors: dict[str, Tensor]) -> Self:
        check_shape(cls.codec, shape)
        m, n = shape
        n_blocks = int_param(cls.codec, params, "n_blocks", 1, min(m, n))
        bits = bits_param(cls.codec, params, "bits", BLOCKDIAG_BITS)
        unit = unit_param(cls.codec, params, "unit")
        scale_bits = bits_param(cls.codec, {"scale_bits": 16} | params, "scale_bits", SCALE_BITS)
        n_values = kept_values(shape, n_blocks)
        if bits == 16:
            check_names(cls.codec, tensors, {"values"})
            codes = check_part(cls.codec, tensors, "values", torch.float16, (n_values,))
            scales = torch.full((m,), unit, dtype=torch.float32)
        else:
            check_names(cls.codec, tensors, {"codes", "scales"})
            dtype = torch.uint8 if scale_bits == 8 else torch.float16
            stored = check_part(cls.codec, tensors, "scales", dtype, (m,))
            scales = load_scales(stored, unit)
            codes = unpack_bits(tensors["codes"], bits, n_values)
        return cls(shape, n_blocks, bits, codes, scales, unit, scale_bits)

    def apply(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], self.shape[0], dtype=torch.float32)
        for band in bands(self.shape, self.n_blocks):
            width, height = band.count * band.cols, band.count * band.rows
            part = x[:, band.col : band.col + width].float()
            part = part.reshape(len(x), band.count, band.cols).transpose(0, 1)
            product = torch.bmm(part, self._band_values(band).transpose(1, 2))
            out[:, band.row : band.row + height] = product.transpose(0, 1).flatten(1)
        return out

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=torch.float32)
        for band in bands(self.shape, self.n_blocks):
            values = self._band_values(band)
            for block in range(band.count):
                row, col = band.row + block * band.rows, band.col + block * band.cols
                dense[row : row + band.rows, col : col + band.cols] = values[block]
        return dense

    def dense_rows(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.shape[0])
        out = torch.zeros(len(ids), self.shape[1], dtype=torch.float32)
        for band in bands(self.shape, self.n_blocks):
            mine = ((ids >= band.row) & (ids < band.row + band.count * band.rows)).nonzero()[:, 0]
            if not len(mine):
                continue
            local = ids[mine] - band.row
            inside = torch.arange(band.cols)
            source = band.code + local.unsqueeze(1) * band.cols + inside
            target = band.col + (local // band.rows).unsqueeze(1) * band.cols + inside
            values = self._values(self.codes[source], self.scales[ids[mine]])
            out[mine] = torch.zeros(len(mine), self.shape[1]).scatter_(1, target, values)
        return out

    def code_blocks(self) -> tuple[Tensor, Tensor]:
        """Return what a server keeps: codes ``[s, m_max, n_max]`` (uint8, or float16 values for 16
        bits) and scales ``[s, m_max]`` as on disk (`store_scales`); padding is zero.
        """
        m, n = (-(-size // self.n_blocks) for size in self.shape)
        codes = torch.zeros(self.n_blocks, m, n, dtype=self.codes.dtype)
        scales = torch.zeros(
            self.n_blocks, m, dtype=torch.uint8 if self.scale_bits == 8 else torch.float16
        )
        for band in bands(self.shape, self.n_blocks):
            height, blocks = band.count * band.rows, slice(band.first, band.first + band.count)
            part = self.codes[band.code : band.code + height * band.cols]
            codes[blocks, : band.rows, : band.cols] = part.view(band.count, band.rows, band.cols)
            part = self.scales[band.row : band.row + height]
            scale = store_scales(part, self.unit, self.scale_bits)
            scales[blocks, : band.rows] = scale.view(band.count, band.rows)
        return codes, scales

    def _band_values(self, band: Band) -> Tensor:
        """Float32 ``[count, rows, cols]`` of one band."""
        height = band.count * band.rows
        codes = self.codes[band.code : band.code + height * band.cols].view(height, band.cols)
        values = self._values(codes, self.scales[band.row : band.row + height])
        return values.view(band.count, band.rows, band.cols)

    def _values(self, codes: Tensor, scales: Tensor) -> Tensor:
        centred = codes.float()
        if self.bits != 16:
            centred -= ((1 << self.bits) - 1) / 2
        return centred.mul_(scales.unsqueeze(1))


def store_scales(scales: Tensor, unit: float, scale_bits: int) -> Tensor:
    """Scales ``[m]`` as they are on disk: float16, or uint8 for 8 bits."""
    return to_octaves(scales, unit) if scale_bits == 8 else to_half(scales, unit)


def as_stored(scales: Tensor, scale_bits: int) -> tuple[Tensor, float]:
    """Scales as a reader will see them, and their unit: what is written and served is one thing."""
    unit = octave_unit(scales) if scale_bits == 8 else unit_for(scales)
    return load_scales(store_scales(scales, unit, scale_bits), unit), unit


def load_scales(stored: Tensor, unit: float) -> Tensor:
    """Inverse of `store_scales`, float32."""
    return from_octaves(stored, unit) if stored.dtype == torch.uint8 else from_half(stored, unit)
