"""`blockdiag`: keep the diagonal blocks of the delta, rescaled, few bits each.

    dW ~ (n / n_b) * blockdiag(dW_11, ..., dW_ss)

Rows and columns are cut into `s` nearly equal runs; of row ``i`` only the columns of its own
block are kept, times the inverse of the share kept. That is one draw of an unbiased estimator
(as DARE's, arXiv 2311.03099, but dense): no index is stored, and applying it is one batched
product of small dense matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from compressor.codecs.columns import (
    fills_bytes,
    pack_columns,
    packed_rows,
    stored_codes,
    unpack_columns,
)
from compressor.codecs.packing import codes_at, pack_bits, unpack_bits
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

    packed  the codes as on disk: uint8 ``[ceil(N * bits / 8)]``, a bit stream, or uint8
            ``[s, n / s * bits / 8, m / s]`` in the order of kernels (`block_columns_shape`); for
            16 bits float16 values ``[N]``
    stored_scales  ``[m]`` as on disk, the rescale ``n / n_b`` folded in: float16, or uint8 for 8
            `scale_bits`; ones for 16 bits (the values already hold the rescale)
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
    packed: Tensor
    stored_scales: Tensor
    unit: float
    scale_bits: int = 16

    @property
    def in_columns(self) -> bool:
        """Whether the codes are in the order of kernels."""
        return self.packed.ndim > 1

    @property
    def codes(self) -> Tensor:
        """uint8 ``[N]``, one code a value, unpacked anew with every call; float16 for 16 bits.

        Block after block, each row-major, which is row after row of the matrix.
        """
        if self.bits == 16:
            return self.packed
        if self.in_columns:
            n_inputs = self.shape[1] // self.n_blocks
            return unpack_columns(self.packed, self.bits, n_inputs).transpose(1, 2).flatten()
        return unpack_bits(self.packed, self.bits, kept_values(self.shape, self.n_blocks))

    @property
    def scales(self) -> Tensor:
        """float32 ``[m]``, computed anew with every call; for 16 bits every one is `unit`."""
        return load_scales(self.stored_scales, self.unit)

    def rescaled(self, factor: float) -> Self:
        """Return the term times `factor`, a power of two: nothing is rounded."""
        return replace(self, unit=self.unit * factor)

    def params(self) -> Params:
        params: Params = {"n_blocks": self.n_blocks, "bits": self.bits, "unit": self.unit}
        return params | ({"scale_bits": self.scale_bits} if self.scale_bits != 16 else {})

    def tensors(self) -> dict[str, Tensor]:
        if self.bits == 16:
            return {"values": self.packed}
        return {"codes": self.packed, "scales": self.stored_scales}

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
            packed = check_part(cls.codec, tensors, "values", torch.float16, (n_values,))
            stored, scale_bits = torch.ones(m, dtype=torch.float16), 16
        else:
            check_names(cls.codec, tensors, {"codes", "scales"})
            dtype = torch.uint8 if scale_bits == 8 else torch.float16
            stored = check_part(cls.codec, tensors, "scales", dtype, (m,))
            columns = block_columns_shape(shape, n_blocks, bits)
            packed = stored_codes(cls.codec, tensors, "codes", bits, n_values, columns)
        return cls(shape, n_blocks, bits, packed, stored, unit, scale_bits)

    def apply(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], self.shape[0], dtype=torch.float32)
        codes, scales = self.codes, self.scales
        for band in bands(self.shape, self.n_blocks):
            width, height = band.count * band.cols, band.count * band.rows
            part = x[:, band.col : band.col + width].float()
            part = part.reshape(len(x), band.count, band.cols).transpose(0, 1)
            product = torch.bmm(part, self._band_values(band, codes, scales).transpose(1, 2))
            out[:, band.row : band.row + height] = product.transpose(0, 1).flatten(1)
        return out

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=torch.float32)
        codes, scales = self.codes, self.scales
        for band in bands(self.shape, self.n_blocks):
            values = self._band_values(band, codes, scales)
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
            target = band.col + (local // band.rows).unsqueeze(1) * band.cols + inside
            scales = load_scales(self.stored_scales[ids[mine]], self.unit)
            values = self._values(self._row_codes(band, local), scales)
            out[mine] = torch.zeros(len(mine), self.shape[1]).scatter_(1, target, values)
        return out

    def code_blocks(self) -> tuple[Tensor, Tensor]:
        """Return what a server keeps: codes ``[s, m_max, n_max]`` (uint8, or float16 values for 16
        bits) and scales ``[s, m_max]`` as on disk (`store_scales`); padding is zero.
        """
        m, n = (-(-size // self.n_blocks) for size in self.shape)
        unpacked = self.codes
        codes = torch.zeros(self.n_blocks, m, n, dtype=unpacked.dtype)
        scales = torch.zeros(self.n_blocks, m, dtype=self.stored_scales.dtype)
        for band in bands(self.shape, self.n_blocks):
            height, blocks = band.count * band.rows, slice(band.first, band.first + band.count)
            part = unpacked[band.code : band.code + height * band.cols]
            codes[blocks, : band.rows, : band.cols] = part.view(band.count, band.rows, band.cols)
            part = self.stored_scales[band.row : band.row + height]
            scales[blocks, : band.rows] = part.view(band.count, band.rows)
        return codes, scales

    def _row_codes(self, band: Band, rows: Tensor) -> Tensor:
        """Codes ``[t, cols]`` of rows ``[t]`` counted within one band; unpacks no others."""
        if self.in_columns:
            columns = self.packed[rows // band.rows, :, rows % band.rows].unsqueeze(-1)
            return unpack_columns(columns, self.bits, band.cols).squeeze(-1)
        places = band.code + rows.unsqueeze(1) * band.cols + torch.arange(band.cols)
        return self.packed[places] if self.bits == 16 else codes_at(self.packed, self.bits, places)

    def _band_values(self, band: Band, codes: Tensor, scales: Tensor) -> Tensor:
        """Float32 ``[count, rows, cols]`` of one band, from all codes and scales."""
        height = band.count * band.rows
        own = codes[band.code : band.code + height * band.cols].view(height, band.cols)
        values = self._values(own, scales[band.row : band.row + height])
        return values.view(band.count, band.rows, band.cols)

    def _values(self, codes: Tensor, scales: Tensor) -> Tensor:
        centred = codes.float()
        if self.bits != 16:
            centred -= ((1 << self.bits) - 1) / 2
        return centred.mul_(scales.unsqueeze(1))


def blockdiag_from_codes(
    shape: Shape,
    n_blocks: int,
    bits: int,
    codes: Tensor,
    scales: Tensor,
    unit: float,
    scale_bits: int = 16,
) -> BlockDiagTerm:
    """Pack ``codes [N]`` (`BlockDiagTerm.codes`), in the order of kernels if they fill its bytes.

    scales  float32 ``[m]``, as `as_stored` returns them; not used for 16 bits
    """
    if bits == 16:
        parts = {"values": codes}
    else:
        columns = block_columns_shape(shape, n_blocks, bits)
        if columns is None:
            packed = pack_bits(codes, bits)
        else:
            by_row = codes.view(n_blocks, columns[2], shape[1] // n_blocks)
            packed = pack_columns(by_row.transpose(1, 2), bits).contiguous()
        parts = {"codes": packed, "scales": store_scales(scales, unit, scale_bits)}
    params: Params = {"n_blocks": n_blocks, "bits": bits, "unit": unit, "scale_bits": scale_bits}
    return BlockDiagTerm.from_parts(shape, params, parts)


def block_columns_shape(shape: Shape, n_blocks: int, bits: int) -> tuple[int, int, int] | None:
    """``[s, byte rows, rows of a block]`` of codes in the order of kernels; None if not all blocks
    are alike and fill their bytes.
    """
    (m, m_rest), (n, n_rest) = (divmod(size, n_blocks) for size in shape)
    if m_rest or n_rest or not fills_bytes(n, bits):
        return None
    return n_blocks, packed_rows(n, bits), m


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
