"""``python -m tests.server.ops.cpu.forms [run]``: make code for every table of forms.

For the CPU that numba's variables name; with "run" it is run on `inputs`, and the words that come
out are printed. A kernel takes seconds to compile, a form alone a tenth: every kind of CPU can be
tried every time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from server.ops.cpu.codegen.bf16_pairs import (
    HIGH_HALF,
    WORDS,
    add_pair_products,
    load_words,
    store_words,
)
from server.ops.cpu.codegen.bfloat import bits_of_bf16
from server.ops.cpu.codegen.piece_product import LOOK_UPS, SIXTEEN
from server.ops.cpu.codegen.vectors import I16, LANES, VECTOR, multiply_add, widen_halves
from server.ops.cpu.features import chosen

FIELD_VALUES = [-1.5, -0.5, 0.5, 1.5]  # of 2 bits
TABLE = [1.0 + i / 16 for i in range(LANES)]
SIGNATURE = types.void(*[types.int64] * 4)
Write = Callable[[Any, Any, Any, Any, Any], Any]


def inputs() -> list[np.ndarray[Any, Any]]:
    """Three vectors of words: floats, floats with what is special, and small indices."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, LANES)).astype(np.float32)
    b[:4] = np.nan, np.inf, -0.0, 3.0e38
    return [a.view(np.uint32), b.view(np.uint32), random.permutation(LANES).astype(np.uint32)]


def _floats(builder: Any, words: Any) -> Any:
    return builder.bitcast(words, VECTOR)


def _multiply_add(context: Any, builder: Any, a: Any, b: Any, c: Any) -> Any:
    return multiply_add(context, builder, *(_floats(builder, x) for x in (a, a, b)))


def _rounded(context: Any, builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.zext(bits_of_bf16(context, builder, _floats(builder, b)), WORDS)


def _widened(context: Any, builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Of float16 numbers with small exponents, subnormal ones among them."""
    few = builder.and_(a, ir.Constant(WORDS, [0x83FF + 0x800] * LANES))
    return widen_halves(context, builder, builder.trunc(few, ir.VectorType(I16, LANES)))


def _pairs(context: Any, builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Of words with the same number in both halves."""
    high = builder.and_(a, ir.Constant(WORDS, [HIGH_HALF] * LANES))
    pair = builder.or_(high, builder.lshr(a, ir.Constant(WORDS, [16] * LANES)))
    return add_pair_products(context, builder, _floats(builder, a), pair, pair)


def _looked_up(context: Any, builder: Any, a: Any, b: Any, c: Any) -> Any:
    return chosen(context, LOOK_UPS)(builder, a, 2, FIELD_VALUES)


def _of_sixteen(context: Any, builder: Any, a: Any, b: Any, c: Any) -> Any:
    return chosen(context, SIXTEEN)(builder, TABLE, c)


FORMS: dict[str, Write] = {
    "MULTIPLY_ADDS": _multiply_add,
    "ROUNDINGS": _rounded,
    "HALVES": _widened,
    "PAIR_PRODUCTS": _pairs,
    "LOOK_UPS": _looked_up,
    "SIXTEEN": _of_sixteen,
}


def compiled(write: Write) -> Any:
    """Machine code: reads three vectors of words, writes one."""

    @intrinsic
    def operation(typingctx, a, b, c, out):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            result = write(context, builder, *(load_words(builder, x) for x in args[:3]))
            store_words(builder, builder.bitcast(result, WORDS), args[3])
            return context.get_dummy_value()

        return SIGNATURE, codegen

    def kernel(a, b, c, out):  # type: ignore[no-untyped-def]
        operation(a, b, c, out)

    return cfunc(SIGNATURE)(kernel)


def main(*, runs: bool) -> None:
    words, found = inputs(), {}
    for name, write in FORMS.items():
        code, out = compiled(write), np.zeros(LANES, np.uint32)
        if runs:
            code.ctypes(*(array.ctypes.data for array in (*words, out)))
        found[name] = out.tolist()
    print(json.dumps(found))


if __name__ == "__main__":
    main(runs="run" in sys.argv)
