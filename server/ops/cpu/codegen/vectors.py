"""Dot product and scaled sum of short rows in vector registers, for float32 and bfloat16 rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.ops.cpu.features import Form, chosen

LANES = 16
F32, I32, I16, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)


def at(builder: Any, address: Any, element: Any, index: Any, lanes: int) -> Any:
    """Pointer to a vector of `lanes` elements at ``address[index]``."""
    pointer = builder.gep(builder.inttoptr(address, element.as_pointer()), [index])
    return builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer())


def multiply_add(context: Any, builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of float vectors, rounded once; twice where no instruction does both."""
    return chosen(context, MULTIPLY_ADDS)(builder, a, b, c)


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{a.type.count}f32")
    return builder.call(function, [a, b, c])


def _multiply_then_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b), c)


# Where there is no such instruction LLVM would call a function for every lane.
MULTIPLY_ADDS = (Form(_fused, ("fma",)), Form(_fused, ("neon",)), Form(_multiply_then_add))


def widen_halves(context: Any, builder: Any, bits: Any) -> Any:
    """Bits of finite float16, a vector of 16-bit words -> float32, exactly (subnormals too)."""
    return chosen(context, HALVES)(builder, bits)


def _halves_by_instruction(builder: Any, bits: Any) -> Any:
    n = bits.type.count
    halves = builder.bitcast(bits, ir.VectorType(ir.HalfType(), n))
    return builder.fpext(halves, ir.VectorType(F32, n))


def _halves_by_integers(builder: Any, bits: Any) -> Any:
    wide = ir.VectorType(I32, bits.type.count)

    def constant(value: int) -> Any:
        return ir.Constant(wide, [value] * wide.count)

    word = builder.zext(bits, wide)
    sign = builder.shl(builder.and_(word, constant(0x8000)), constant(16))
    magnitude = builder.shl(builder.and_(word, constant(0x7FFF)), constant(13))
    scaled = builder.bitcast(builder.or_(sign, magnitude), ir.VectorType(F32, wide.count))
    bias = ir.Constant(scaled.type, [2.0**112] * wide.count)  # float32's exponent bias over half's
    return builder.fmul(scaled, bias)


# Elsewhere LLVM would call a library function that nothing links.
HALVES = (
    Form(_halves_by_instruction, ("f16c",)),
    Form(_halves_by_instruction, ("fullfp16",)),
    Form(_halves_by_integers),
)


def prefetch(builder: Any, address: Any) -> None:
    """Let the cache line at this address come into the second level cache."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), I32(0), I32(2), I32(1)])


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector with `value` in every lane."""
    vector = ir.VectorType(F32, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    order = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), order)


def sum_of_lanes(builder: Any, values: Any) -> Any:
    """One float of 16."""
    kind = ir.FunctionType(F32, [F32, VECTOR])
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    reduce = cgutils.get_or_insert_function(builder.module, kind, name)
    # "reassoc": in any order, else the lanes are added one after the other.
    return builder.call(reduce, [F32(0.0), values], fastmath=("reassoc",))


def _load(builder: Any, address: Any, index: Any, is_bf16: bool) -> Any:
    if not is_bf16:
        return builder.load(at(builder, address, F32, index, LANES), align=4)
    return _widen(builder, builder.load(at(builder, address, I16, index, LANES), align=2))


def _make_dot(is_bf16: bool) -> Any:
    @intrinsic
    def dot(typingctx, query, row, n):
        """Sum of ``query[i] * row[i]``; query float32, n a multiple of 16."""
        return types.float32(types.int64, types.int64, types.int64), _dot_code(is_bf16)

    return dot


def _dot_code(is_bf16: bool) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        query, row, n = args
        total = cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES))
        with cgutils.for_range(builder, builder.udiv(n, I64(LANES))) as loop:
            first = builder.mul(loop.index, I64(LANES))
            a = _load(builder, query, first, False)
            b = _load(builder, row, first, is_bf16)
            builder.store(multiply_add(context, builder, a, b, builder.load(total)), total)
        return sum_of_lanes(builder, builder.load(total))

    return codegen


def _make_add_scaled(is_bf16: bool) -> Any:
    @intrinsic
    def add_scaled(typingctx, sums, row, factor, n):
        """``sums[i] += factor * row[i]``; sums and factor float32, n a multiple of 16."""
        signature = types.void(types.int64, types.int64, types.float32, types.int64)
        return signature, _add_scaled_code(is_bf16)

    return add_scaled


def _add_scaled_code(is_bf16: bool) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, row, factor, n = args
        factors = splat(builder, factor, LANES)
        with cgutils.for_range(builder, builder.udiv(n, I64(LANES))) as loop:
            first = builder.mul(loop.index, I64(LANES))
            values = _load(builder, row, first, is_bf16)
            place = at(builder, sums, F32, first, LANES)
            added = multiply_add(context, builder, values, factors, builder.load(place, align=4))
            builder.store(added, place, align=4)
        return context.get_dummy_value()

    return codegen


def _widen(builder: Any, raw: Any) -> Any:
    """Bits of bfloat16 -> float32."""
    wide = ir.VectorType(I32, LANES)
    bits = builder.shl(builder.zext(raw, wide), ir.Constant(wide, [16] * LANES))
    return builder.bitcast(bits, VECTOR)


def first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes."""
    kind = ir.VectorType(I32, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), builder.trunc(count, I32), I32(0))
    order = ir.Constant(kind, [0] * LANES)
    counts = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), order)
    return builder.icmp_unsigned("<", ir.Constant(kind, list(range(LANES))), counts)


def masked_load(builder: Any, place: Any, mask: Any, element: Any) -> Any:
    """16 elements, 0 where the mask is not set: nothing is read there."""
    vector = ir.VectorType(element, LANES)
    kind = ir.FunctionType(vector, [place.type, I32, mask.type, vector])
    name = f"llvm.masked.load.v{LANES}{_name(element)}.p0"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    none = ir.Constant(vector, None)
    return builder.call(function, [place, I32(_bytes(element)), mask, none])


def _name(element: Any) -> str:
    return "f32" if element is F32 else f"i{element.width}"


def _bytes(element: Any) -> int:
    return 4 if element is F32 else int(element.width) // 8


dot_bf16, dot_f32 = _make_dot(True), _make_dot(False)
add_scaled_bf16, add_scaled_f32 = _make_add_scaled(True), _make_add_scaled(False)
