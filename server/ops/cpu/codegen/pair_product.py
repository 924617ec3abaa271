"""`tile_product` where x is bfloat16 and codes have 2, 3 or 4 bits: two inputs at a time.

Codes become bfloat16 without a conversion: the bits 0x4300 are 128, whose last seven bits count
units, so 0x4300 | code is exactly 128 + code. What is too much is the same for every output, a
multiple of the sum of x (`offset_of`), and the caller begins the sums with it taken away. Products
are exact, sums float32: the cancelled 128 costs 6 of their bits, of which bfloat16 results show 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from server.ops.cpu.codegen.bf16_pairs import WORDS, add_pair_products, floats, splat_word, words
from server.ops.cpu.codegen.tile_product import CHAINS, I8, TILE, make_plane
from server.ops.cpu.codegen.vectors import F32, I32, I64, LANES, at, sum_of_lanes

BIAS = 128.0
BIAS_BITS = 0x4300
SUMMED = 2 * LANES  # values that `sum_of_halves` takes at a time
U = np.uint64


def _plane(bits: int) -> Any:
    return make_plane(lambda rows: _vector_product(bits, rows), 1)


def _vector_product(bits: int, rows: int) -> Any:
    """An intrinsic for 16 columns and `rows` rows of x.

    Arguments, all int64: address of codes, their row stride in elements, code rows, address of x,
    x's row stride in elements, address of the sums, their row stride in elements.
    """

    @intrinsic
    def product(typingctx, codes, mb, code_rows, x, stride, sums, tile):
        i64 = types.int64
        signature = types.void(i64, i64, i64, i64, i64, i64, i64)
        return signature, _codegen(bits, rows)

    return product


def _codegen(bits: int, rows: int) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, mb, code_rows, x, stride, sums, tile = args
        zeros = floats(0.0)
        totals = [
            [cgutils.alloca_once_value(builder, zeros) for _ in range(CHAINS)] for _ in range(rows)
        ]

        def bytes_of(row: Any) -> Any:
            place = at(builder, codes, I8, builder.mul(row, mb), LANES)
            return builder.zext(builder.load(place, align=1), WORDS)

        def multiply(row: Any, packed: Any, present: int) -> None:
            """Both code rows in `packed`, of which the bits `present` count, with all of x."""
            mask, bias = (words(value & present) for value in (_twice(bits), BIAS_TWICE))
            for field in range(8 // bits):
                moved = builder.lshr(packed, words(field * bits)) if field else packed
                weights = builder.or_(builder.and_(moved, mask), bias)
                first = builder.add(row, builder.mul(code_rows, I64(field)))
                for r, chains in enumerate(totals):
                    index = builder.add(first, builder.mul(stride, I64(r)))
                    word = splat_word(builder, builder.add(x, builder.mul(index, I64(2))))
                    total = chains[field % CHAINS]
                    added = add_pair_products(context, builder, builder.load(total), weights, word)
                    builder.store(added, total)

        with cgutils.for_range(builder, builder.udiv(code_rows, I64(2))) as loop:
            row = builder.mul(loop.index, I64(2))
            later = builder.shl(bytes_of(builder.add(row, I64(1))), words(16))
            multiply(row, builder.or_(bytes_of(row), later), -1)
        with builder.if_then(builder.trunc(code_rows, ir.IntType(1))):
            last = builder.sub(code_rows, I64(1))
            multiply(last, bytes_of(last), 0xFFFF)
        for r, chains in enumerate(totals):
            index = builder.mul(tile, I64(r))
            place = at(builder, sums, F32, index, LANES)
            total = builder.load(place, align=4)
            for chain in chains:
                total = builder.fadd(total, builder.load(chain))
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    return codegen


def _twice(bits: int) -> int:
    """A mask of one field in both halves of a word."""
    return ((1 << bits) - 1) * 0x10001


BIAS_TWICE = BIAS_BITS * 0x10001
_plane_1, _plane_2, _plane_4 = _plane(1), _plane(2), _plane(4)


@njit(inline="always")
def takes_pairs(bits):
    """Whether codes of so many bits can be multiplied here."""
    return bits == 2 or bits == 3 or bits == 4


@njit(inline="always")
def offset_of(bits):
    """What sums begin with, in multiples of the sum of x."""
    if bits == 4:
        return np.float32(-BIAS - 7.5)
    if bits == 2:
        return np.float32(-BIAS - 1.5)
    return np.float32((-5 * BIAS - 3.5) / 4)  # the high plane is summed first, then multiplied


@intrinsic
def sum_of_halves(typingctx, address, n_vectors):
    """Sum of bfloat16 values, 32 in each vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, n_vectors = args
        total = cgutils.alloca_once_value(builder, floats(0.0))
        with cgutils.for_range(builder, n_vectors) as loop:
            place = builder.add(address, builder.mul(loop.index, I64(4 * LANES)))
            loaded = builder.load(at(builder, place, I32, I64(0), LANES), align=2)
            ones = words(0x3F803F80)
            added = add_pair_products(context, builder, builder.load(total), loaded, ones)
            builder.store(added, total)
        return sum_of_lanes(builder, builder.load(total))

    return types.float32(types.int64, types.int64), codegen


@njit(inline="always")
def pair_product(bits, codes, mb, x, offset, stride, nb, sums, width, n_rows):
    """As `tile_product` with x uint16 (bfloat16), and sums begun with `offset_of` of each row's."""
    rows = x.ctypes.data + 2 * offset
    if bits == 4:
        _plane_4(codes, mb, (nb + 1) // 2, rows, stride, sums, width, n_rows)
    elif bits == 2:
        _plane_2(codes, mb, (nb + 3) // 4, rows, stride, sums, width, n_rows)
    else:
        low_rows = (nb + 3) // 4
        _plane_1(codes + low_rows * mb, mb, (nb + 7) // 8, rows, stride, sums, width, n_rows)
        for r in range(U(n_rows)):
            for i in range(U(width)):
                sums[r * U(TILE) + i] *= np.float32(4)
        _plane_2(codes, mb, low_rows, rows, stride, sums, width, n_rows)
