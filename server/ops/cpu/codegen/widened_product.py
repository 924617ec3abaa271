"""Rows of float32 times a panel of bfloat16 weights that are widened in registers.

Widening a bfloat16 is a shift, or a mask of the upper half of a word, so a line of words gives two
vectors of weights for one load: half the bytes of float32 weights, and no bfloat16 unit is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.ops.cpu.codegen.bf16_pairs import (
    HIGH_HALF,
    floats,
    load_words,
    plus,
    store_floats,
    words,
)
from server.ops.cpu.codegen.vectors import (
    F32,
    I64,
    LANES,
    VECTOR,
    multiply_add,
    splat,
)

WIDTH = LANES  # outputs of a panel: with 6 rows, 12 registers of 8 sums on AVX2
LINE_BYTES = 4 * WIDTH


def _widened_rows(n_rows: int) -> Any:
    """An intrinsic that multiplies up to `n_rows` rows with a panel.

    ``target[r, i] = sum_p row(r)[2 p] * panel[p, i].low + row(r)[2 p + 1] * panel[p, i].high``,
    float32, summed in this order whatever `n_rows`. Arguments, int64: address of the first row;
    bytes from one row to the next; the last row's number (rows after it repeat it); address of
    ``panel [p, WIDTH]`` words; number of words; address of ``target [n_rows, WIDTH]`` float32.
    """

    @intrinsic
    def rows(typingctx, first, stride, last, panel, n, target):
        return types.void(*[types.int64] * 6), _rows_code(n_rows)

    return rows


def _rows_code(n_rows: int) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first, stride, last, panel, n, target = args
        totals = [cgutils.alloca_once_value(builder, floats(0.0)) for _ in range(n_rows)]
        addresses = [_row_address(builder, first, stride, last, r) for r in range(n_rows)]
        with cgutils.for_range(builder, n) as loop:
            line = builder.add(panel, builder.mul(loop.index, I64(LINE_BYTES)))
            loaded = load_words(builder, line)
            low = builder.bitcast(builder.shl(loaded, words(16)), VECTOR)
            high = builder.bitcast(builder.and_(loaded, words(HIGH_HALF)), VECTOR)
            step = builder.mul(loop.index, I64(8))
            for address, place in zip(addresses, totals, strict=True):
                x = builder.inttoptr(builder.add(address, step), F32.as_pointer())
                total = builder.load(place)
                for index, weights in enumerate((low, high)):
                    value = builder.load(builder.gep(x, [I64(index)]), align=4)
                    factor = splat(builder, value, LANES)
                    total = multiply_add(context, builder, factor, weights, total)
                builder.store(total, place)
        for r, place in enumerate(totals):
            store_floats(builder, builder.load(place), plus(builder, target, LINE_BYTES * r))
        return context.get_dummy_value()

    return codegen


def _row_address(builder: Any, first: Any, stride: Any, last: Any, r: int) -> Any:
    if r == 0:
        return first
    exists = builder.icmp_signed("<", I64(r), last)
    row = builder.select(exists, I64(r), last)
    return builder.add(first, builder.mul(row, stride))


one_row, two_rows, four_rows, six_rows = map(_widened_rows, (1, 2, 4, 6))
