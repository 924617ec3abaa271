"""The product of a few rows with packed codes of up to 48 outputs, as pairs of bfloat16.

Two byte rows make 16 words, in whose halves one field after the other is looked up in a table: it
becomes its code less the centre, as bfloat16. Sums are float32, scaled once and added to what is
there.
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
I8 = ir.IntType(8)
HALVES = ir.VectorType(I16, 2 * LANES)


def _planes(bits: int) -> list[tuple[int, list[float]]]:
    """Bits of a field of each plane of codes, and what its values count."""
    if bits == 3:
        return [(2, [code - 3.5 for code in range(4)]), (1, [0.0, 4.0])]
    return [(bits, [code - ((1 << bits) - 1) / 2 for code in range(1 << bits)])]


def _make(bits: int, vectors: int, rows: int) -> Any:
    @intrinsic
    def product(
        typingctx, codes, mb, nb, x, x_step, sums, sums_step, count, scales, halves, unit, ahead
    ):
        signature = types.void(*[types.int64] * 10, types.float32, types.int64)
        return signature, _codegen(bits, vectors, rows)

    @njit(inline="always")
    def call(codes, mb, nb, x, x_step, sums, sums_step, count, scales, halves, unit, ahead):
        product(codes, mb, nb, x, x_step, sums, sums_step, count, scales, halves, unit, ahead)

    return call


def _codegen(bits: int, vectors: int, rows: int) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, mb, nb, x, x_step, sums, sums_step, count, scales, halves, unit, ahead = args
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
            _add_plane(context, builder, geometry, masks, x_rows, totals, plane)
            codes = builder.add(codes, builder.mul(code_rows, mb))
        units = splat(builder, unit, LANES)
        for v, mask in enumerate(masks):
            factors = builder.fmul(_scales(context, builder, scales, v, mask, halves), units)
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
) -> None:
    codes, mb, code_rows, ahead = geometry
    field_bits, values = plane
    look_up = chosen(context, LOOK_UPS)

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
            step = builder.shl(builder.add(row, builder.mul(code_rows, I64(field))), I64(1))
            for r, x in enumerate(x_rows):
                word = splat_word(builder, builder.add(x, step))
                for v, pair in enumerate(weights):
                    total = totals[r, v]
                    added = add_pair_products(context, builder, builder.load(total), pair, word)
                    builder.store(added, total)

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


def _scales(context: Any, builder: Any, scales: Any, vector: int, mask: Any, halves: Any) -> Any:
    """What the 16 scales of a vector stand for, one byte each or float16 (`halves` not 0)."""
    found = cgutils.alloca_once_value(builder, floats(0.0))
    first = I64(LANES * vector)
    with builder.if_else(builder.icmp_unsigned("==", halves, I64(0))) as (is_octave, is_half):
        with is_octave:
            raw = _load(builder, at(builder, scales, I8, first, LANES), mask, I8)
            builder.store(_octaves(context, builder, builder.zext(raw, WORDS)), found)
        with is_half:
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


def _any_rows(bits: int, vectors: int) -> Any:
    four, two, one = (_make(bits, vectors, rows) for rows in (4, 2, 1))
    # More sums than fit the registers would cost more than unpacking the codes twice.
    eight = _make(bits, vectors, 8) if 8 * vectors <= MOST_SUMS else None

    @njit(inline="always")
    def product(
        codes, mb, nb, x, x_step, sums, sums_step, count, scales, halves, unit, ahead, n_rows
    ):
        t = np.int64(0)
        while t < n_rows:
            left, to, own = n_rows - t, sums + t * sums_step, x + t * x_step
            if eight is not None and left >= 8:
                eight(codes, mb, nb, own, x_step, to, sums_step, count, scales, halves, unit, ahead)
                t += 8
            elif left >= 4:
                four(codes, mb, nb, own, x_step, to, sums_step, count, scales, halves, unit, ahead)
                t += 4
            elif left >= 2:
                two(codes, mb, nb, own, x_step, to, sums_step, count, scales, halves, unit, ahead)
                t += 2
            else:
                one(codes, mb, nb, own, x_step, to, sums_step, count, scales, halves, unit, ahead)
                t += 1

    return product


def _any_count(bits: int) -> Any:
    one, two, three = (_any_rows(bits, vectors) for vectors in (1, 2, 3))

    @njit(inline="always")
    def add_piece(
        codes, mb, nb, x, x_step, sums, sums_step, count, scales, halves, unit, ahead, n_rows
    ):
        """``sums[r, i] += scale[i] * unit * sum_j value(code[j, i]) x[r, j]``.

        codes   address of the first output's; byte rows are `mb` apart; nb inputs
        x       address of the first row's inputs, bfloat16, rows `x_step` bytes apart; zero, or
                never read, where a byte row's fields go past the inputs
        sums    address of the first, float32, rows `sums_step` bytes apart; up to 15 behind the
                last are read, and written as they were
        count   outputs, at most 48
        ahead   bytes from these codes to what is wanted next: it comes into the cache meanwhile
        scales  address of the first, one byte each (`_octaves`), float16 where `halves` is not 0
        """
        if count > 32 and n_rows < 8:
            three(
                codes,
                mb,
                nb,
                x,
                x_step,
                sums,
                sums_step,
                count,
                scales,
                halves,
                unit,
                ahead,
                n_rows,
            )
            return
        if count > 16:
            n = min(count, 32)
            two(codes, mb, nb, x, x_step, sums, sums_step, n, scales, halves, unit, ahead, n_rows)
            codes, sums, scales = codes + n, sums + 4 * n, scales + (1 + halves) * n
            count -= n
        if count > 0:
            one(
                codes,
                mb,
                nb,
                x,
                x_step,
                sums,
                sums_step,
                count,
                scales,
                halves,
                unit,
                ahead,
                n_rows,
            )

    return add_piece


add_piece_two, add_piece_three, add_piece_four = (_any_count(bits) for bits in (2, 3, 4))
