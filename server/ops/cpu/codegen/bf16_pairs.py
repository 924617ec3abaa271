"""Vectors of bfloat16 pairs: 16 lanes of 32 bits, two neighbours of the summed axis in each.

A CPU with `avx512bf16` multiplies both halves of 16 lanes and adds them to float32 in one
instruction; others get two float32 products. Either way products are exact and sums float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.ops.cpu.codegen.bfloat import BFloat, bits_of_bf16
from server.ops.cpu.codegen.vectors import F32, I32, I64, LANES, VECTOR, at, multiply_add
from server.ops.cpu.features import Form, chosen

WORDS = ir.VectorType(I32, LANES)
VECTORS = 4  # of lanes that share what is loaded for them
WIDTH = LANES * VECTORS  # lanes of a tile
STEP = 4  # rows of a tile: 16 sums stay in registers
ROW_BYTES = 4 * WIDTH
HIGH_HALF = -(1 << 16)


def words(value: int) -> Any:
    """A constant vector of one 32-bit word."""
    return ir.Constant(WORDS, [value] * LANES)


def floats(value: float) -> Any:
    """A constant vector of one float."""
    return ir.Constant(VECTOR, [value] * LANES)


def add_pair_products(context: Any, builder: Any, total: Any, a: Any, b: Any) -> Any:
    """``total[i] + a[i].low * b[i].low + a[i].high * b[i].high``; total float32, a, b words."""
    return chosen(context, PAIR_PRODUCTS)(context, builder, total, a, b)


def _by_dot_product(context: Any, builder: Any, total: Any, a: Any, b: Any) -> Any:
    halves = ir.VectorType(BFloat(), 2 * LANES)
    kind = ir.FunctionType(VECTOR, [VECTOR, halves, halves])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [total, builder.bitcast(a, halves), builder.bitcast(b, halves)])


def _by_float_products(context: Any, builder: Any, total: Any, a: Any, b: Any) -> Any:
    low = [builder.bitcast(builder.shl(x, words(16)), VECTOR) for x in (a, b)]
    high = [builder.bitcast(builder.and_(x, words(HIGH_HALF)), VECTOR) for x in (a, b)]
    lower = multiply_add(context, builder, low[0], low[1], total)
    return multiply_add(context, builder, high[0], high[1], lower)


PAIR_PRODUCTS = (Form(_by_dot_product, ("avx512f", "avx512bf16")), Form(_by_float_products))


def splat_word(builder: Any, address: Any) -> Any:
    """The 32-bit word at this address in every lane."""
    word = builder.load(builder.inttoptr(address, I32.as_pointer()), align=2)
    none = ir.Constant(WORDS, ir.Undefined)
    one = builder.insert_element(none, word, I32(0))
    return builder.shuffle_vector(one, none, words(0))


def load_floats(builder: Any, address: Any) -> Any:
    """16 float32 values."""
    return builder.load(at(builder, address, F32, I64(0), LANES), align=4)


def load_words(builder: Any, address: Any) -> Any:
    """16 words."""
    return builder.load(at(builder, address, I32, I64(0), LANES), align=4)


def store_floats(builder: Any, values: Any, address: Any) -> None:
    """Write 16 float32 values."""
    builder.store(values, at(builder, address, F32, I64(0), LANES), align=4)


def store_words(builder: Any, values: Any, address: Any) -> None:
    """Write 16 words."""
    builder.store(values, at(builder, address, I32, I64(0), LANES), align=4)


def plus(builder: Any, address: Any, offset: int) -> Any:
    """An address some bytes further."""
    return builder.add(address, I64(offset)) if offset else address


def exp2(context: Any, builder: Any, x: Any) -> Any:
    """``2^x`` for x <= 0, relative error below 3e-6; below -126 it is ``2^-126``. NaN stays NaN.

    x is split into its nearest integer, added to the exponent, and the rest, by Taylor's series.
    """
    low = floats(-126.0)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    magic = floats(12582912.0)  # 1.5 * 2^23: the sum's last bits are the nearest integer
    shifted = builder.fadd(x, magic)
    rest = builder.fsub(x, builder.fsub(shifted, magic))
    power = floats(1.3333558e-3)
    for coefficient in (9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
        power = multiply_add(context, builder, power, rest, floats(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, WORDS), words(23))
    return builder.bitcast(builder.add(builder.bitcast(power, WORDS), exponent), VECTOR)


def pack_pair(context: Any, builder: Any, low: Any, high: Any) -> Any:
    """Two float vectors rounded to bfloat16 -> words."""
    halves = [builder.zext(bits_of_bf16(context, builder, x), WORDS) for x in (low, high)]
    return builder.or_(halves[0], builder.shl(halves[1], words(16)))


def _pair_tile(*, keeps: bool) -> Any:
    """An intrinsic that sums products of STEP rows of words with WIDTH lanes of words.

    ``target[r, i] = (target[r, i] * factors[i] if keeps else 0)
    + sum_p rows[r][p].low * lanes[p, i].low + rows[r][p].high * lanes[p, i].high``
    Arguments, int64: the four rows' addresses, bytes from one of a row's words to the next, address
    of ``lanes [p, WIDTH]``, number of words, address of ``target [STEP, WIDTH]``, of the factors.
    """

    @intrinsic
    def tile(typingctx, row0, row1, row2, row3, stride, lanes, n, target, factors):
        signature = types.void(*[types.int64] * 9)
        return signature, _pair_tile_code(keeps)

    return tile


def _pair_tile_code(keeps: bool) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, (stride, lanes, n, target, factors) = args[:STEP], args[STEP:]
        vectors = [(r, v) for r in range(STEP) for v in range(VECTORS)]
        places = {key: plus(builder, target, ROW_BYTES * key[0] + 64 * key[1]) for key in vectors}
        totals = {}
        for key in vectors:
            first = floats(0.0)
            if keeps:
                factor = load_floats(builder, plus(builder, factors, 64 * key[1]))
                first = builder.fmul(load_floats(builder, places[key]), factor)
            totals[key] = cgutils.alloca_once_value(builder, first)
        with cgutils.for_range(builder, n) as loop:
            line = builder.add(lanes, builder.mul(loop.index, I64(ROW_BYTES)))
            loaded = [load_words(builder, plus(builder, line, 64 * v)) for v in range(VECTORS)]
            step = builder.mul(loop.index, stride)
            for r, row in enumerate(rows):
                word = splat_word(builder, builder.add(row, step))
                for v in range(VECTORS):
                    total = builder.load(totals[r, v])
                    added = add_pair_products(context, builder, total, word, loaded[v])
                    builder.store(added, totals[r, v])
        for key in vectors:
            store_floats(builder, builder.load(totals[key]), places[key])
        return context.get_dummy_value()

    return codegen


@intrinsic
def transpose_words(typingctx, sources, targets):
    """``targets[j][i] = sources[i][j]``: 16 x 16 words.

    Arguments: addresses of two int64 [16] arrays, each of the addresses of 16 words.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def address(array: Any, i: int) -> Any:
            pointer = builder.inttoptr(plus(builder, array, 8 * i), I64.as_pointer())
            return builder.load(pointer)

        rows = [load_words(builder, address(args[0], i)) for i in range(LANES)]
        distance = LANES // 2
        while distance:  # swap the off-diagonal quarters of ever smaller squares
            taken = [i // distance % 2 == 0 for i in range(LANES)]
            low = [j if taken[j] else LANES + j - distance for j in range(LANES)]
            high = [j + distance if taken[j] else LANES + j for j in range(LANES)]
            swapped = list(rows)
            for i in range(LANES):
                if taken[i]:
                    a, b = rows[i], rows[i + distance]
                    swapped[i] = builder.shuffle_vector(a, b, ir.Constant(WORDS, low))
                    swapped[i + distance] = builder.shuffle_vector(a, b, ir.Constant(WORDS, high))
            rows, distance = swapped, distance // 2
        for i, row in enumerate(rows):
            store_words(builder, row, address(args[1], i))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


pair_tile, pair_tile_onto = _pair_tile(keeps=False), _pair_tile(keeps=True)
