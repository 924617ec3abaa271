"""The product of a few rows with packed codes of up to 48 outputs.

Two byte rows make 16 words, in whose halves one field after the other is looked up in a table: it
becomes its code less the centre, as bfloat16 (exact: a centred code of 8 bits has 8 significant
ones). Rows of bfloat16 are multiplied with such pairs, rows of float32 with what they widen to.
Sums are float32, scaled once and added to what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from server.ops.cpu.codegen.bf16_pairs import (
    HIGH_HALF,
    WORDS,
    add_pair_products,
    floats,
    plus,
    splat_word,
    words,
)
from server.ops.cpu.codegen.vectors import (
    F32,
    I16,
    I64,
    LANES,
    VECTOR,
    at,
    first_lanes,
    masked_load,
    multiply_add,
    prefetch,
    splat,
    widen_halves,
)
from server.ops.cpu.features import Form, chosen

MOST_SUMS = 16  # vectors of them that stay in registers beside codes and inputs
PAIR_BYTES, FLOAT_BYTES = 2, 4  # of an input: bfloat16, float32
OCTAVES, HALF_SCALES, NO_SCALES = range(3)  # kinds of scales
I8 = ir.IntType(8)
HALVES = ir.VectorType(I16, 2 * LANES)


def _planes(bits: int) -> list[tuple[int, list[float]]]:
    """Bits of a field of each plane of codes, and what its values count."""
    if bits == 3:
        return [(2, [code - 3.5 for code in range(4)]), (1, [0.0, 4.0])]
    return [(bits, [code - ((1 << bits) - 1) / 2 for code in range(1 << bits)])]


def make_piece_product(bits: int, vectors: int, rows: int, item: int) -> Any:
    """An intrinsic for up to ``16 * vectors`` outputs and so many rows; see `add_piece`."""

    @intrinsic
    def product(
        typingctx, codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead
    ):
        signature = types.void(*[types.int64] * 10, types.float32, types.int64)
        return signature, _codegen(bits, vectors, rows, item)

    @njit(inline="always")
    def call(codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead):
        product(codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead)

    return call


def _codegen(bits: int, vectors: int, rows: int, item: int) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead = args
        # Only the last vector may be in part outside.
        masks = [None] * (vectors - 1)
        masks += [first_lanes(builder, builder.sub(count, I64(LANES * (vectors - 1))))]
        keys = [(r, v) for r in range(rows) for v in range(vectors)]
        totals = {key: cgutils.alloca_once_value(builder, floats(0.0)) for key in keys}
        for total in totals.values():
            builder.store(floats(0.0), total)
        x_rows = [builder.add(x, builder.mul(x_step, I64(r))) for r in range(rows)]
        for plane in _planes(bits):
            code_rows = builder.lshr(builder.add(builder.mul(nb, I64(plane[0])), I64(7)), I64(3))
            geometry = (codes, mb, code_rows, ahead)
            _add_plane(context, builder, geometry, masks, x_rows, totals, plane, item)
            codes = builder.add(codes, builder.mul(code_rows, mb))
        units = splat(builder, unit, LANES)
        for v, mask in enumerate(masks):
            factors = builder.fmul(_scales(context, builder, scales, v, mask, kind), units)
            for r in range(rows):
                row = builder.add(sums, builder.mul(sums_step, I64(r)))
                place = at(builder, plus(builder, row, 4 * LANES * v), F32, I64(0), LANES)
                found = builder.load(totals[r, v])
                old = builder.load(place, align=4)
                added = multiply_add(context, builder, found, factors, old)
                # A masked store takes several times as long on some CPUs.
                added = added if mask is None else builder.select(mask, added, old)
                builder.store(added, place, align=4)
        return context.get_dummy_value()

    return codegen


def _load(builder: Any, place: Any, mask: Any, element: Any) -> Any:
    if mask is None:
        return builder.load(place, align=4 if element is F32 else 1)
    return masked_load(builder, place, mask, element)


def _add_plane(
    context: Any,
    builder: Any,
    geometry: tuple[Any, Any, Any, Any],
    masks: list[Any],
    x_rows: list[Any],
    totals: dict[tuple[int, int], Any],
    plane: tuple[int, list[float]],
    item: int,
) -> None:
    codes, mb, code_rows, ahead = geometry
    field_bits, values = plane
    # A code of 8 bits has more values than a table of 32.
    look_up = chosen(context, LOOK_UPS) if field_bits < 8 else _look_up_by_arithmetic

    def bytes_of(row: Any) -> list[Any]:
        first = builder.add(codes, builder.mul(row, mb))
        found = []
        for v, mask in enumerate(masks):
            place = at(builder, plus(builder, first, LANES * v), I8, I64(0), LANES)
            found.append(builder.zext(_load(builder, place, mask, I8), WORDS))
        prefetch(builder, builder.add(first, ahead))
        return found

    def multiply(row: Any, packed: list[Any], present: int) -> None:
        """Both code rows in `packed`, of which the halves `present` count, with all of x."""
        for field in range(8 // field_bits):
            weights = []
            for word in packed:
                moved = builder.lshr(word, words(field * field_bits)) if field else word
                pair = look_up(builder, moved, field_bits, values)
                weights.append(pair if present == -1 else builder.and_(pair, words(present)))
            step = builder.mul(builder.add(row, builder.mul(code_rows, I64(field))), I64(item))
            if item == PAIR_BYTES:
                _multiply_pairs(context, builder, weights, x_rows, step, totals)
            else:
                _multiply_floats(context, builder, weights, x_rows, step, totals, present)

    with cgutils.for_range(builder, builder.lshr(code_rows, I64(1))) as loop:
        row = builder.shl(loop.index, I64(1))
        first, second = bytes_of(row), bytes_of(builder.add(row, I64(1)))
        joined = [
            builder.or_(low, builder.shl(high, words(16)))
            for low, high in zip(first, second, strict=True)
        ]
        multiply(row, joined, -1)
    with builder.if_then(builder.trunc(code_rows, ir.IntType(1))):
        last = builder.sub(code_rows, I64(1))
        multiply(last, bytes_of(last), 0xFFFF)


def _multiply_pairs(
    context: Any,
    builder: Any,
    weights: list[Any],
    x_rows: list[Any],
    step: Any,
    totals: dict[tuple[int, int], Any],
) -> None:
    for r, x in enumerate(x_rows):
        word = splat_word(builder, builder.add(x, step))
        for v, pair in enumerate(weights):
            total = totals[r, v]
            added = add_pair_products(context, builder, builder.load(total), pair, word)
            builder.store(added, total)


def _multiply_floats(
    context: Any,
    builder: Any,
    weights: list[Any],
    x_rows: list[Any],
    step: Any,
    totals: dict[tuple[int, int], Any],
    present: int,
) -> None:
    """The lower halves with one input, the upper ones with the next if they are `present`."""
    parts = [[builder.bitcast(builder.shl(pair, words(16)), VECTOR) for pair in weights]]
    if present == -1:
        high = [builder.and_(pair, words(HIGH_HALF)) for pair in weights]
        parts.append([builder.bitcast(pair, VECTOR) for pair in high])
    for r, x in enumerate(x_rows):
        first = builder.inttoptr(builder.add(x, step), F32.as_pointer())
        for index, factors in enumerate(parts):
            value = builder.load(builder.gep(first, [I64(index)]), align=4)
            one = splat(builder, value, LANES)
            for v, factor in enumerate(factors):
                total = totals[r, v]
                added = multiply_add(context, builder, factor, one, builder.load(total))
                builder.store(added, total)


def _look_up_by_permutation(builder: Any, words_: Any, bits: int, values: list[float]) -> Any:
    # Bits above a field are other fields: the table repeats itself.
    table = ir.Constant(HALVES, [_bf16_bits(values[i % len(values)]) for i in range(2 * LANES)])
    kind = ir.FunctionType(HALVES, [HALVES, HALVES])
    name = "llvm.x86.avx512.permvar.hi.512"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.bitcast(builder.call(function, [table, builder.bitcast(words_, HALVES)]), WORDS)


def _look_up_by_arithmetic(builder: Any, words_: Any, bits: int, values: list[float]) -> Any:
    """The values are evenly spaced: the first, and so many steps as the code says."""
    step, mask = floats(values[1] - values[0]), words((1 << bits) - 1)

    def bits_of(code: Any) -> Any:
        number = builder.sitofp(builder.and_(code, mask), VECTOR)
        value = builder.fadd(builder.fmul(number, step), floats(values[0]))
        return builder.bitcast(value, WORDS)

    low = builder.lshr(bits_of(words_), words(16))
    high = bits_of(builder.lshr(words_, words(16)))
    return builder.or_(low, builder.and_(high, words(HIGH_HALF)))


# (builder, words, bits of a field, its values) -> words: the value of the lowest field of each
# half, as bfloat16.
LOOK_UPS = (
    Form(_look_up_by_permutation, ("avx512f", "avx512bw")),
    Form(_look_up_by_arithmetic),
)


def _bf16_bits(value: float) -> int:
    (bits,) = np.array([value], np.float32).view(np.uint32)
    return int(bits) >> 16


def _scales(context: Any, builder: Any, scales: Any, vector: int, mask: Any, kind: Any) -> Any:
    """What the 16 scales of a vector stand for."""
    found = cgutils.alloca_once_value(builder, floats(1.0))
    builder.store(floats(1.0), found)
    first = I64(LANES * vector)
    with builder.if_then(builder.icmp_unsigned("==", kind, I64(OCTAVES))):
        raw = _load(builder, at(builder, scales, I8, first, LANES), mask, I8)
        builder.store(_octaves(context, builder, builder.zext(raw, WORDS)), found)
    with builder.if_then(builder.icmp_unsigned("==", kind, I64(HALF_SCALES))):
        raw = _load(builder, at(builder, scales, I16, first, LANES), mask, I16)
        builder.store(widen_halves(context, builder, raw), found)
    return builder.load(found)


def _octaves(context: Any, builder: Any, code: Any) -> Any:
    """``2^((code - 255) / 16)``, as the table `server.ops.packed.octaves` has it; 0 for 0."""
    sixteenths = [float(np.float32(2.0 ** (i / 16))) for i in range(LANES)]
    steps = builder.add(code, words(1))  # -255 is one more than a multiple of 16
    within = builder.and_(steps, words(15))
    mantissa = chosen(context, SIXTEEN)(builder, sixteenths, within)
    octave = builder.sub(builder.lshr(steps, words(4)), words(16))
    bits = builder.add(builder.bitcast(mantissa, WORDS), builder.shl(octave, words(23)))
    zero = builder.icmp_unsigned("==", code, words(0))
    return builder.select(zero, floats(0.0), builder.bitcast(bits, VECTOR))


def _sixteen_by_permutation(builder: Any, values: list[float], index: Any) -> Any:
    kind = ir.FunctionType(VECTOR, [VECTOR, WORDS])
    name = "llvm.x86.avx512.permvar.sf.512"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [ir.Constant(VECTOR, values), index])


def _sixteen_by_selection(builder: Any, values: list[float], index: Any) -> Any:
    """Halve the values that are left by one bit of the index after the other, the lowest first."""
    left, bit = [floats(value) for value in values], 1
    while len(left) > 1:
        unset = builder.icmp_unsigned("==", builder.and_(index, words(bit)), words(0))
        pairs = zip(left[::2], left[1::2], strict=True)
        left, bit = [builder.select(unset, even, odd) for even, odd in pairs], 2 * bit
    return left[0]


# (builder, 16 values, words) -> floats: the value that each word below 16 stands for.
SIXTEEN = (Form(_sixteen_by_permutation, ("avx512f",)), Form(_sixteen_by_selection))
