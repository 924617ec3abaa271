"""`rows`: some rows of the delta whole, few bits a value; the others are zero.

For matrices with a row a token (embeddings, output layers). What a low-rank head leaves of them is
spread over the whole vocabulary, but what a task needs of that lies in the rows of its own words,
and those are among the ones that the fine-tune moved most (measured, benchmarks/notes/auto.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from compressor.codecs.blockdiag import load_scales, store_scales
from compressor.codecs.columns import (
    fills_bytes,
    pack_columns,
    packed_rows,
    stored_codes,
    unpack_columns,
)
from compressor.codecs.packing import codes_at, pack_bits, packed_size, unpack_bits
from compressor.codecs.quantize import QUANT_BITS, dequantize
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
from compressor.errors import Corrupt

SCALE_BITS = 8


@dataclass(frozen=True, slots=True, eq=False)
class RowsTerm:
    """K rows of a matrix ``[m, n]``.

    index   int64 ``[K]``, strictly increasing; on disk a bit for each of the m rows
    packed  the codes as on disk: uint8 ``[ceil(K * n * bits / 8)]``, a bit stream, or uint8
            ``[n * bits / 8, K]`` in the order of kernels, where n codes fill their bytes
    stored_scales  uint8 ``[K]`` as on disk, sixteenths of an octave (`to_octaves`)
    unit    what they are multiples of

    The value of code ``c`` in stored row ``k`` is ``(c - (2^bits - 1) / 2) * scales[k]``. Float32
    throughout.
    """

    codec: ClassVar[str] = "rows"
    shape: Shape
    bits: int
    index: Tensor
    packed: Tensor
    stored_scales: Tensor
    unit: float

    @property
    def in_columns(self) -> bool:
        """Whether the codes are in the order of kernels."""
        return self.packed.ndim > 1

    @property
    def codes(self) -> Tensor:
        """uint8 ``[K, n]``, one code a value, unpacked anew with every call."""
        n = self.shape[1]
        if self.in_columns:
            return unpack_columns(self.packed, self.bits, n).T.contiguous()
        return unpack_bits(self.packed, self.bits, len(self.index) * n).view(-1, n)

    @property
    def scales(self) -> Tensor:
        """float32 ``[K]``."""
        return load_scales(self.stored_scales, self.unit)

    def params(self) -> Params:
        return {"n_rows": len(self.index), "bits": self.bits, "unit": self.unit}

    def tensors(self) -> dict[str, Tensor]:
        return {
            "mask": pack_bits(self._mask(), 1),
            "codes": self.packed,
            "scales": self.stored_scales,
        }

    @classmethod
    def from_parts(cls, shape: Shape, params: Params, tensors: dict[str, Tensor]) -> Self:
        check_shape(cls.codec, shape)
        m, n = shape
        n_rows = int_param(cls.codec, params, "n_rows", 1, m)
        bits = bits_param(cls.codec, params, "bits", QUANT_BITS)
        unit = unit_param(cls.codec, params, "unit")
        check_names(cls.codec, tensors, {"mask", "codes", "scales"})
        index = unpack_bits(tensors["mask"], 1, m).nonzero()[:, 0]
        if len(index) != n_rows:
            raise Corrupt(f"{cls.codec}: the mask names {len(index)} rows, not {n_rows}")
        stored = check_part(cls.codec, tensors, "scales", torch.uint8, (n_rows,))
        columns = row_columns_shape(n, n_rows, bits)
        packed = stored_codes(cls.codec, tensors, "codes", bits, n_rows * n, columns)
        return cls(shape, bits, index, packed, stored, unit)

    def apply(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], self.shape[0], dtype=torch.float32)
        out[:, self.index] = x.float() @ self._values().T
        return out

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=torch.float32)
        dense[self.index] = self._values()
        return dense

    def dense_rows(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.shape[0])
        place = torch.searchsorted(self.index, ids).clamp(max=len(self.index) - 1)
        scales = load_scales(self.stored_scales[place], self.unit)
        values = dequantize(self._row_codes(place), scales, self.bits)
        return torch.where((self.index[place] == ids).unsqueeze(1), values, 0.0)

    def _row_codes(self, stored: Tensor) -> Tensor:
        """Codes ``[t, n]`` of stored rows ``[t]``; unpacks no others."""
        n = self.shape[1]
        if self.in_columns:
            return unpack_columns(self.packed[:, stored], self.bits, n).T
        return codes_at(self.packed, self.bits, stored.unsqueeze(1) * n + torch.arange(n))

    def _mask(self) -> Tensor:
        mask = torch.zeros(self.shape[0], dtype=torch.uint8)
        mask[self.index] = 1
        return mask

    def _values(self) -> Tensor:
        return dequantize(self.codes, self.scales, self.bits)


def rows_from_codes(
    shape: Shape, bits: int, index: Tensor, codes: Tensor, scales: Tensor, unit: float
) -> RowsTerm:
    """Pack ``codes [K, n]``, in the order of kernels if they fill its bytes.

    scales  float32 ``[K]``, as `as_stored` returns them
    """
    if row_columns_shape(shape[1], len(index), bits) is None:
        packed = pack_bits(codes.flatten(), bits)
    else:
        packed = pack_columns(codes.T, bits).contiguous()
    return RowsTerm(shape, bits, index, packed, store_scales(scales, unit, SCALE_BITS), unit)


def row_columns_shape(n: int, n_rows: int, bits: int) -> tuple[int, int] | None:
    """``[byte rows, K]`` of codes in the order of kernels; None if they do not fill their bytes."""
    return (packed_rows(n, bits), n_rows) if fills_bytes(n, bits) else None


def rows_size(shape: Shape, n_rows: int, bits: int) -> int:
    """Payload bytes of a `RowsTerm`."""
    m, n = shape
    return packed_size(m, 1) + packed_size(n_rows * n, bits) + n_rows * SCALE_BITS // 8


def most_rows(shape: Shape, budget_bytes: float, bits: int) -> int:
    """Return how many rows fit into about that many bytes; at least 1."""
    one = rows_size(shape, 1, bits)
    each = rows_size(shape, 9, bits) - one  # of eight, whatever the bits
    return min(max(1, 1 + int((budget_bytes - one) * 8 / each)), shape[0])
