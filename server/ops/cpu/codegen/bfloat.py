"""Rounding to bfloat16: one instruction where the CPU has it, half a dozen elsewhere."""

from __future__ import annotations

from typing import Any

from llvmlite import ir


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's ``bfloat``, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def has_bf16_units(context: Any) -> bool:
    """Whether the CPU that code is made for multiplies and rounds to bfloat16 (`avx512bf16`)."""
    features: str = context.codegen().magic_tuple()[2]
    return "+avx512bf16" in features.split(",")


def bits_of_bf16(context: Any, builder: Any, values: Any) -> Any:
    """Float32, one or a vector -> bits of the nearest bfloat16, ties to even; NaN stays NaN.

    Subnormal numbers may become 0.
    """
    n = values.type.count if isinstance(values.type, ir.VectorType) else 0

    def of(element: Any) -> Any:
        return ir.VectorType(element, n) if n else element

    def constant(value: int) -> Any:
        return ir.Constant(of(ir.IntType(32)), [value] * n if n else value)

    half = of(ir.IntType(16))
    if has_bf16_units(context):
        return builder.bitcast(builder.fptrunc(values, of(BFloat())), half)
    bits = builder.bitcast(values, of(ir.IntType(32)))
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    nan = builder.or_(bits, constant(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", values, values), nan, rounded)
    return builder.trunc(builder.lshr(chosen, constant(16)), half)
