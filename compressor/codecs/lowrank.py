"""`lowrank`: the strongest singular components, dense. Also what an imported LoRA becomes.

dW ~ b^T a        a [k, n], b [k, m], the root of the singular value in each
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from compressor.codecs.columns import (
    fills_bytes,
    pack_columns,
    packed_rows,
    stored_codes,
    unpack_columns,
)
from compressor.codecs.packing import pack_bits, packed_size, unpack_bits
from compressor.codecs.quantize import (
    QUANT_BITS,
    dequantize,
    from_half,
    quantize_rows,
    to_half,
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
from compressor.errors import InputError

LOWRANK_BITS = (2, 3, 4, 8, 16, 32)


Factor = Literal["a", "b"]


@dataclass(frozen=True, eq=False)
class LowRankTerm:
    """Factors of a matrix ``[m, n]`` of rank k.

    stored  both as they are on disk: float32 (32 bits), float16 in `units` (16), or packed codes
            and one float16 scale per component row. Codes are a bit stream, or in the order of
            kernels where they fill their bytes, each factor by itself: a, packed along n, is uint8
            ``[n * bits / 8, k]``; b, packed along k, is uint8 ``[k * bits / 8, m]``
    units   what the float16 numbers of a and of b are multiples of; ones for 32 bits
    """

    codec: ClassVar[str] = "lowrank"
    shape: Shape
    bits: int
    rank: int
    units: tuple[float, float]
    stored: dict[str, Tensor]

    @cached_property
    def a(self) -> Tensor:
        """float32 ``[k, n]``, dequantised when first asked for."""
        return self._values("a", self.units[0])

    @cached_property
    def b(self) -> Tensor:
        """float32 ``[k, m]``, dequantised when first asked for."""
        return self._values("b", self.units[1])

    def params(self) -> Params:
        params: Params = {"rank": self.rank, "bits": self.bits}
        if self.bits != 32:
            params |= {"unit_a": self.units[0], "unit_b": self.units[1]}
        return params

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.stored)

    @classmethod
    def from_parts(cls, shape: Shape, params: Params, tensors: dict[str, Tensor]) -> Self:
        check_shape(cls.codec, shape)
        m, n = shape
        # A LoRA's rank may exceed the matrix; the parts present bound it anyway.
        rank = int_param(cls.codec, params, "rank", 1, 1 << 20)
        bits = bits_param(cls.codec, params, "bits", LOWRANK_BITS)
        units = (1.0, 1.0)
        if bits != 32:
            units = (
                unit_param(cls.codec, params, "unit_a"),
                unit_param(cls.codec, params, "unit_b"),
            )
        check_names(cls.codec, tensors, set(_part_names(bits)))
        _check_factor("a", (rank, n), bits, tensors)
        _check_factor("b", (rank, m), bits, tensors)
        return cls(shape, bits, rank, units, dict(tensors))

    def in_columns(self, factor: Factor) -> bool:
        """Whether the codes of a factor of 8 bits or less are in the order of kernels."""
        return self.bits in QUANT_BITS and self.stored[factor].ndim > 1

    def codes(self, factor: Factor) -> Tensor:
        """uint8 ``[k, size]`` of a factor of 8 bits or less, unpacked anew with every call."""
        assert self.bits in QUANT_BITS
        packed, size = self.stored[factor], self.shape[1 if factor == "a" else 0]
        if not self.in_columns(factor):
            return unpack_bits(packed, self.bits, self.rank * size).view(self.rank, size)
        if factor == "a":
            return unpack_columns(packed, self.bits, size).T.contiguous()
        return unpack_columns(packed, self.bits, self.rank)

    def _values(self, factor: Factor, unit: float) -> Tensor:
        if self.bits == 32:
            return self.stored[factor]
        if self.bits == 16:
            return from_half(self.stored[factor], unit)
        scales = from_half(self.stored[f"{factor}_scales"], unit)
        return dequantize(self.codes(factor), scales, self.bits)

    def apply(self, x: Tensor) -> Tensor:
        return (x.float() @ self.a.T) @ self.b

    def to_dense(self) -> Tensor:
        return self.b.T @ self.a

    def dense_rows(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.shape[0])
        return self.b[:, ids].T @ self.a


def lowrank_from_factors(a: Tensor, b: Tensor, bits: int = 16) -> LowRankTerm:
    """Store given factors: ``a [k, n]``, ``b [k, m]`` (component-major), ``dW = b^T a``.

    bits is 2, 3, 4, 8 (one scale per component row), 16, or 32 where exactness matters.
    Raises InputError if the factors do not fit together, are not finite, or bits is unknown.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0] or 0 in (*a.shape, *b.shape):
        raise InputError(
            f"low-rank factors must be [k, n] and [k, m], found {list(a.shape)}, {list(b.shape)}"
        )
    if bits not in LOWRANK_BITS:
        raise InputError(f"lowrank: bits must be one of {list(LOWRANK_BITS)}, got {bits}")
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise InputError("low-rank factors hold NaN or infinity; check the adapter's weights")
    shape = (b.shape[1], a.shape[1])
    a_parts, unit_a = _store_factor("a", a.float(), bits)
    b_parts, unit_b = _store_factor("b", b.float(), bits)
    params: Params = {"rank": a.shape[0], "bits": bits, "unit_a": unit_a, "unit_b": unit_b}
    return LowRankTerm.from_parts(shape, params, a_parts | b_parts)


def lowrank_size(shape: Shape, rank: int, bits: int) -> int:
    """Payload bytes of a `LowRankTerm`."""
    if bits in (16, 32):
        return rank * sum(shape) * bits // 8
    return sum(packed_size(rank * size, bits) + 2 * rank for size in shape)


def _part_names(bits: int) -> tuple[str, ...]:
    return ("a", "b") if bits in (16, 32) else ("a", "a_scales", "b", "b_scales")


def _store_factor(name: Factor, factor: Tensor, bits: int) -> tuple[dict[str, Tensor], float]:
    """One factor's parts on disk, and its unit."""
    if bits == 32:
        return {name: factor.contiguous()}, 1.0
    if bits == 16:
        unit = unit_for(factor)
        return {name: to_half(factor, unit).contiguous()}, unit
    codes, scales = quantize_rows(factor, bits)
    unit = unit_for(scales)
    if _columns_shape(name, (codes.shape[0], codes.shape[1]), bits) is None:
        packed = pack_bits(codes.reshape(-1), bits)
    else:
        packed = pack_columns(codes.T if name == "a" else codes, bits).contiguous()
    return {name: packed, f"{name}_scales": to_half(scales, unit)}, unit


def _check_factor(
    name: Factor, shape: tuple[int, int], bits: int, tensors: dict[str, Tensor]
) -> None:
    """Validate the parts of one factor ``[k, size]``; nothing is unpacked."""
    codec = LowRankTerm.codec
    if bits in (16, 32):
        check_part(codec, tensors, name, torch.float32 if bits == 32 else torch.float16, shape)
        return
    check_part(codec, tensors, f"{name}_scales", torch.float16, shape[:1])
    columns = _columns_shape(name, shape, bits)
    stored_codes(codec, tensors, name, bits, shape[0] * shape[1], columns)


def _columns_shape(name: Factor, shape: tuple[int, int], bits: int) -> tuple[int, int] | None:
    """Shape of the codes of a factor ``[k, size]`` in the order of kernels; None if they do not
    fill their bytes.
    """
    rank, size = shape
    along, others = (size, rank) if name == "a" else (rank, size)
    return (packed_rows(along, bits), others) if fills_bytes(along, bits) else None
