"""What numba lacks for kernels on raw addresses: typed views, bfloat16 and float16, a counter.

Indices into the views must be unsigned: numba wraps negative ones around, which costs the
vectoriser its loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from server.ops.cpu.codegen.bfloat import bits_of_bf16
from server.ops.cpu.codegen.vectors import prefetch

Codegen = tuple[Any, Callable[..., Any]]
UNBOUNDED = (1 << 40,)  # the views have no length of their own
# Fused multiply-add; NaN and infinity stay exact. No "reassoc": reordered products overflow.
FAST = dict.fromkeys(("contract", "nsz", "arcp"), True)
# For dot products: a vector loop has to reorder the sum.
FAST_SUMS = FAST | {"reassoc": True}
HALF_SHIFT = np.float32(2.0**112)  # float32's exponent bias over float16's


def _cast_to(element: Any, pointee: Callable[[], Any]) -> Any:
    @intrinsic
    def cast(typingctx: Any, address: Any) -> Codegen:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], pointee().as_pointer())

        return types.CPointer(element)(types.int64), codegen

    return cast


_f32_pointer = _cast_to(types.float32, ir.FloatType)
_f64_pointer = _cast_to(types.float64, ir.DoubleType)
_i64_pointer = _cast_to(types.int64, lambda: ir.IntType(64))
_u32_pointer = _cast_to(types.uint32, lambda: ir.IntType(32))
_u16_pointer = _cast_to(types.uint16, lambda: ir.IntType(16))
_u8_pointer = _cast_to(types.uint8, lambda: ir.IntType(8))


@intrinsic
def next_task(typingctx: Any, counter: Any) -> Codegen:
    """Count the int64 at this address up; return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        pointer = builder.inttoptr(args[0], i64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(i64, 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def add_and_publish(typingctx: Any, counter: Any) -> Codegen:
    """Count the int64 at this address up: who reads that sees all that was written before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        pointer = builder.inttoptr(args[0], i64.as_pointer())
        builder.atomic_rmw("add", pointer, ir.Constant(i64, 1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def read_published(typingctx: Any, counter: Any) -> Codegen:
    """Read an int64 that `add_and_publish` counts up."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def fetch(typingctx: Any, address: Any) -> Codegen:
    """Let the cache line at this address come into the second level cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _float_of_bits(typingctx: Any, bits: Any) -> Codegen:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@njit(inline="always")
def i64_at(address):
    """View int64 values from this address on."""
    return carray(_i64_pointer(address), UNBOUNDED)


@njit(inline="always")
def f32_at(address):
    """View float32 values from this address on."""
    return carray(_f32_pointer(address), UNBOUNDED)


@njit(inline="always")
def u32_at(address):
    """View 32-bit words from this address on."""
    return carray(_u32_pointer(address), UNBOUNDED)


@njit(inline="always")
def u16_at(address):
    """View 16-bit values (bfloat16, float16) from this address on."""
    return carray(_u16_pointer(address), UNBOUNDED)


@njit(inline="always")
def u8_at(address):
    """View bytes from this address on."""
    return carray(_u8_pointer(address), UNBOUNDED)


@njit(inline="always")
def from_bf16(h):
    """Bits of a bfloat16 -> float32."""
    return _float_of_bits(np.uint32(h) << np.uint32(16))


@intrinsic
def to_bf16(typingctx: Any, value: Any) -> Codegen:
    """Float32 -> bits of the nearest bfloat16, see `bits_of_bf16`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return bits_of_bf16(context, builder, args[0])

    return types.uint16(types.float32), codegen


@njit(inline="always")
def from_f16(h):
    """Bits of a finite float16 -> float32, exactly (subnormals too)."""
    sign = (np.uint32(h) & np.uint32(0x8000)) << np.uint32(16)
    magnitude = (np.uint32(h) & np.uint32(0x7FFF)) << np.uint32(13)
    return _float_of_bits(sign | magnitude) * HALF_SHIFT


@njit(inline="always", fastmath=FAST, error_model="numpy")
def load_row(out, offset, address, n, is_bf16):
    """``out[offset : offset + n]`` float32 = n values at `address` (bfloat16 or float32)."""
    if is_bf16:
        half = u16_at(address)
        for i in range(n):
            out[offset + i] = from_bf16(half[i])
    else:
        full = f32_at(address)
        for i in range(n):
            out[offset + i] = full[i]


@njit(inline="always", fastmath=FAST, error_model="numpy")
def store_row(address, values, offset, n, is_bf16):
    """n values at `address` = ``values[offset : offset + n]`` float32, rounded once."""
    if is_bf16:
        half = u16_at(address)
        for i in range(n):
            half[i] = to_bf16(values[offset + i])
    else:
        full = f32_at(address)
        for i in range(n):
            full[i] = values[offset + i]


@njit(inline="always")
def f64_at(address):
    """View float64 values from this address on."""
    return carray(_f64_pointer(address), UNBOUNDED)


@njit(inline="always")
def exp_f32(x):
    """``e^x`` in float32, relative error below 3e-7; overflows and underflows to 3e38 and 1e-38.

    ``2^n * e^r`` with ``|r| <= ln 2 / 2`` and a polynomial of degree 6 (Cephes' coefficients): no
    call, so that loops over it become vector code. NaN stays NaN.
    """
    bounded = min(max(x, np.float32(-87.3)), np.float32(88.0))
    n = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
    r = bounded - n * np.float32(0.693147181)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    power = _float_of_bits(np.uint32((np.int32(n) + np.int32(127)) << 23))
    return p * power if x == x else x
