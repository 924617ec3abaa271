"""Rounding to bfloat16: one instruction where the CPU has it, half a dozen elsewhere."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from server.ops.cpu.features import Form, chosen


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's ``bfloat``, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def bits_of_bf16(context: Any, builder: Any, values: Any) -> Any:
    """Float32, one or a vector -> bits of the nearest bfloat16, ties to even; NaN stays NaN.

    Subnormal numbers may become 0.
    """
    return chosen(context, ROUNDINGS)(builder, values)


def _like(values: Any, element: Any) -> Any:
    """The type of `values` with other elements."""
    vector = isinstance(values.type, ir.VectorType)
    return ir.VectorType(element, values.type.count) if vector else element


def _by_instruction(builder: Any, values: Any) -> Any:
    rounded = builder.fptrunc(values, _like(values, BFloat()))
    return builder.bitcast(rounded, _like(values, ir.IntType(16)))


def _by_integers(builder: Any, values: Any) -> Any:
    wide = _like(values, ir.IntType(32))

    def constant(value: int) -> Any:
        n = getattr(wide, "count", 0)
        return ir.Constant(wide, [value] * n if n else value)

    bits = builder.bitcast(values, wide)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    nan = builder.or_(bits, constant(0x400000))
    either = builder.select(builder.fcmp_unordered("uno", values, values), nan, rounded)
    return builder.trunc(builder.lshr(either, constant(16)), _like(values, ir.IntType(16)))


ROUNDINGS = (Form(_by_instruction, ("avx512bf16", "avx512vl")), Form(_by_integers))
