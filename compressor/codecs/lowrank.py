"""`lowrank`: the strongest singular components, dense. Also what an imported LoRA becomes.

dW ~ b^T a        a [k, n], b [k, m], the root of the singular value in each
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

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


class FactorCodes(NamedTuple):
    """One quantised factor as a server keeps it.

    codes   uint8 ``[k, size]``
    scales  float16 ``[k]``, one per component, in units of
    unit    a power of two
    """

    codes: Tensor
    scales: Tensor
    unit: float


@dataclass(frozen=True, slots=True, eq=False)
class LowRankTerm:
    """Factors of a matrix ``[m, n]`` of rank k.

    a, b    float32 ``[k, n]`` and ``[k, m]``, dequantised
    stored  the same two as they are on disk: float32 (32 bits), float16 in `units` (16), or
            packed codes and one float16 scale per component row
    units   what the float16 numbers of a and of b are multiples of; ones for 32 bits
    """

    codec: ClassVar[str] = "lowrank"
    shape: Shape
    bits: int
    a: Tensor
    b: Tensor
    units: tuple[float, float]
    stored: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """Number of components k."""
        return self.a.shape[0]

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
        a = _load_factor("a", (rank, n), bits, units[0], tensors)
        b = _load_factor("b", (rank, m), bits, units[1], tensors)
        return cls(shape, bits, a, b, units, dict(tensors))

    def factor_codes(self) -> tuple[FactorCodes, FactorCodes]:
        """Return the codes of a and of b. Only for factors of 8 bits or less."""
        assert self.bits in QUANT_BITS
        a, b = (
            FactorCodes(
                unpack_bits(self.stored[name], self.bits, factor.numel()).view(factor.shape),
                self.stored[f"{name}_scales"],
                unit,
            )
            for name, factor, unit in (("a", self.a, self.units[0]), ("b", self.b, self.units[1]))
        )
        return a, b

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


def _store_factor(name: str, factor: Tensor, bits: int) -> tuple[dict[str, Tensor], float]:
    """One factor's parts on disk, and its unit."""
    if bits == 32:
        return {name: factor.contiguous()}, 1.0
    if bits == 16:
        unit = unit_for(factor)
        return {name: to_half(factor, unit).contiguous()}, unit
    codes, scales = quantize_rows(factor, bits)
    unit = unit_for(scales)
    parts = {name: pack_bits(codes.reshape(-1), bits), f"{name}_scales": to_half(scales, unit)}
    return parts, unit


def _load_factor(
    name: str, shape: tuple[int, int], bits: int, unit: float, tensors: dict[str, Tensor]
) -> Tensor:
    """Validate one factor's parts and return it in float32."""
    codec = LowRankTerm.codec
    if bits == 32:
        return check_part(codec, tensors, name, torch.float32, shape)
    if bits == 16:
        return from_half(check_part(codec, tensors, name, torch.float16, shape), unit)
    stored = check_part(codec, tensors, f"{name}_scales", torch.float16, shape[:1])
    codes = unpack_bits(tensors[name], bits, shape[0] * shape[1]).view(shape)
    return dequantize(codes, from_half(stored, unit), bits)
