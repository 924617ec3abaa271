"""The online softmax of prefill attention (Milakov and Gimelshein, arXiv 1805.02867), in LLVM.

Every lane is a query; scores and weights lie in lines of WIDTH.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.ops.cpu.codegen.bf16_pairs import (
    HIGH_HALF,
    ROW_BYTES,
    VECTORS,
    exp2,
    floats,
    load_floats,
    load_words,
    pack_pair,
    plus,
    store_floats,
    store_words,
    words,
)
from server.ops.cpu.codegen.vectors import F32, I32, I64, LANES, multiply_add, splat

HIDDEN = -3e38  # the score of a key that a query does not see


def _soften_code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    (scores, n, first, masked, positions, window, scale, largest, totals, factors, weights) = args
    factor, key = splat(builder, scale, LANES), builder.trunc(first, I32)
    reach = _splat_word(builder, builder.trunc(window, I32))
    for v in range(VECTORS):
        place = [plus(builder, x, 64 * v) for x in (scores, largest, totals, factors, weights)]
        scores_at, largest_at, totals_at, factors_at, weights_at = place
        with builder.if_then(builder.icmp_signed("!=", masked, I64(0))):
            position = load_words(builder, plus(builder, positions, 64 * v))
            with cgutils.for_range(builder, n) as loop:
                line = builder.add(scores_at, builder.mul(loop.index, I64(ROW_BYTES)))
                now = _splat_word(builder, builder.add(key, builder.trunc(loop.index, I32)))
                age = builder.sub(position, now)
                seen = builder.and_(
                    builder.icmp_signed(">=", age, words(0)), builder.icmp_signed("<", age, reach)
                )
                hidden = builder.select(seen, load_floats(builder, line), floats(HIDDEN))
                store_floats(builder, hidden, line)
        before = load_floats(builder, largest_at)
        top = cgutils.alloca_once_value(builder, before)
        with cgutils.for_range(builder, n) as loop:
            line = builder.add(scores_at, builder.mul(loop.index, I64(ROW_BYTES)))
            score = builder.fmul(load_floats(builder, line), factor)
            higher = builder.fcmp_ordered(">", score, builder.load(top))
            builder.store(builder.select(higher, score, builder.load(top)), top)
        highest = builder.load(top)
        store_floats(builder, highest, largest_at)
        shrunk = exp2(context, builder, builder.fsub(before, highest))
        store_floats(builder, shrunk, factors_at)
        total = cgutils.alloca_once_value(
            builder, builder.fmul(load_floats(builder, totals_at), shrunk)
        )
        minus = builder.fneg(highest)
        with cgutils.for_range(builder, builder.udiv(n, I64(2))) as loop:
            line = builder.add(scores_at, builder.mul(loop.index, I64(2 * ROW_BYTES)))
            pair = (load_floats(builder, plus(builder, line, o)) for o in (0, ROW_BYTES))
            low, high = (
                exp2(context, builder, multiply_add(context, builder, score, factor, minus))
                for score in pair
            )
            builder.store(builder.fadd(builder.load(total), builder.fadd(low, high)), total)
            target = builder.add(weights_at, builder.mul(loop.index, I64(ROW_BYTES)))
            store_words(builder, _pack_weights(builder, low, high), target)
        store_floats(builder, builder.load(total), totals_at)
    return context.get_dummy_value()


def _splat_word(builder: Any, word: Any) -> Any:
    return builder.bitcast(splat(builder, builder.bitcast(word, F32), LANES), words(0).type)


def _pack_weights(builder: Any, low: Any, high: Any) -> Any:
    """Pairs of weights (in [0, 1], or NaN) in bfloat16, ties upwards."""
    near = [builder.add(builder.bitcast(x, words(0).type), words(0x8000)) for x in (low, high)]
    return builder.or_(builder.lshr(near[0], words(16)), builder.and_(near[1], words(HIGH_HALF)))


@intrinsic
def soften(
    typingctx,
    scores,
    n,
    first,
    masked,
    positions,
    window,
    scale,
    largest,
    totals,
    factors,
    weights,
):
    """One block of the online softmax (Milakov and Gimelshein, arXiv 1805.02867).

    scores float32 [n, WIDTH] of the keys `first`..; hidden first from who does not see them, if
    masked: positions int32 [WIDTH], of which `window` are seen. scale (times log2 e) float32.
    largest, totals float32 [WIDTH] go on; factors: what former results shrink by; weights: words
    [n / 2, WIDTH]. n is even.
    """
    i64 = types.int64
    signature = types.void(i64, i64, i64, i64, i64, i64, types.float32, i64, i64, i64, i64)
    return signature, _soften_code


@intrinsic
def finish(typingctx, sums, totals, n_pairs, target):
    """``target[p, i]`` words = ``sums[2p .. 2p + 1, i] / totals[i]``, rounded."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, totals, n_pairs, target = args
        for v in range(VECTORS):
            total = load_floats(builder, plus(builder, totals, 64 * v))
            inverse = builder.fdiv(floats(1.0), total)
            with cgutils.for_range(builder, n_pairs) as loop:
                line = builder.add(sums, builder.mul(loop.index, I64(2 * ROW_BYTES)))
                low, high = (
                    builder.fmul(load_floats(builder, plus(builder, line, o + 64 * v)), inverse)
                    for o in (0, ROW_BYTES)
                )
                place = builder.add(target, builder.mul(loop.index, I64(ROW_BYTES)))
                store_words(
                    builder, pack_pair(context, builder, low, high), plus(builder, place, 64 * v)
                )
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, i64), codegen
