"""Prefill attention over the paged cache, in bfloat16: what FlashAttention computes (Dao et al.,
arXiv 2205.14135), laid out for vector units.

A task is one KV head and a tile of WIDTH queries: the tokens of a chunk, each with the query heads
that share the KV head. Every lane is a query, so the softmax never reduces across lanes, keys and
values are read from their KV blocks in place, and only queries and results are transposed. Keys
nobody in the tile sees are skipped. Scores, weights' sums and results are float32; weights are
rounded to bfloat16 (ties upwards) before they multiply the values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from server.ops.attention import AttentionCall, AttentionMetadata
from server.ops.cpu.codegen.bf16_pairs import (
    HIGH_HALF,
    ROW_BYTES,
    STEP,
    VECTORS,
    WIDTH,
    exp2,
    floats,
    load_floats,
    load_words,
    pack_pair,
    pair_tile,
    pair_tile_onto,
    plus,
    store_floats,
    store_words,
    transpose_words,
    words,
)
from server.ops.cpu.codegen.intrinsics import (
    FAST,
    f32_at,
    f64_at,
    i64_at,
    next_task,
    u16_at,
    u32_at,
)
from server.ops.cpu.codegen.vectors import F32, I32, I64, LANES, multiply_add, splat
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.parallel import Parallel
from server.ops.cpu.rope import check_rows

U = np.uint64
KEYS = 64  # whose scores are in memory at a time
HIDDEN = -3e38  # the score of a key that a query does not see
LOG2_E = 1.4426950408889634

# Places in the argument array. Strides are in elements.
(_Q, _Q_ROW, _Q_HEAD, _OUT, _K_CACHE, _V_CACHE, _BLOCK_TOKENS, _KV_HEADS) = range(1, 9)
(_GROUP, _DIM, _CHUNKS, _N_CHUNKS, _N_TILES, _WINDOW, _SCALE, _N_ARGUMENTS) = range(9, 17)
# Of each chunk: first row, rows, tokens known before, address of its KV blocks, tiles before it.
_CHUNK_FIELDS = 5


class PrefillKernel:
    """The compiled kernel, shared by all layers."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._kernel = compile_kernel(_prefill)

    def takes(self, call: AttentionCall) -> bool:
        """Whether `prefill_` can compute this; server.ops.attention computes anything."""
        bf16 = call.q.dtype is torch.bfloat16
        return bf16 and call.softcap is None and call.q.shape[2] % STEP == 0 and call.scale > 0

    def prefill_(self, out: Tensor, call: AttentionCall) -> None:
        """See `server.ops.attention.prefill_`. `takes` is true of the call."""
        q, kv_heads = call.q, call.k_cache.shape[2]
        check_rows(q)
        group = q.shape[1] // kv_heads
        chunks, n_tiles = _chunk_table(call.metadata, group)
        a = np.zeros(_N_ARGUMENTS, np.int64)
        a[_Q:_SCALE] = (
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            out.data_ptr(),
            call.k_cache.data_ptr(),
            call.v_cache.data_ptr(),
            call.k_cache.shape[1],
            kv_heads,
            group,
            q.shape[2],
            chunks.data_ptr(),
            len(chunks),
            n_tiles,
            call.window or 0,
        )
        a[_SCALE : _SCALE + 1].view(np.float64)[:] = call.scale * LOG2_E
        self._parallel.run(self._kernel, a, n_tiles * kv_heads)


def _chunk_table(metadata: AttentionMetadata, group: int) -> tuple[Tensor, int]:
    """int64 [chunks, fields] and the number of tiles of one KV head, made once per step."""
    key = ("prefill", group)
    if key not in metadata.made:
        rows, tiles = [], 0
        for chunk in metadata.prefill:
            n = chunk.end - chunk.start
            rows.append([chunk.start, n, chunk.context, chunk.kv_blocks.data_ptr(), tiles])
            tiles += -(-n * group // WIDTH)
        metadata.made[key] = torch.tensor([*rows, [0, 0, 0, 0, tiles]])
    table = metadata.made[key]
    return table[:-1], int(table[-1, -1])


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
def _soften(
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
def _finish(typingctx, sums, totals, n_pairs, target):
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


def _prefill(address):
    a = i64_at(address)
    dim, kv_heads, n_tiles = a[_DIM], a[_KV_HEADS], a[_N_TILES]
    pairs = dim // 2
    # In lines of WIDTH words: queries, scores, weights, sums, and one each of the next three.
    lines = pairs + KEYS + KEYS // 2 + dim + 3
    space = np.empty(lines * WIDTH + LANES, np.float32)
    values = np.empty(KEYS // 2 * dim, np.uint32)
    positions = np.empty(WIDTH, np.int32)
    rows, targets = np.empty(WIDTH, np.int64), np.empty(WIDTH, np.int64)
    places, moves = np.empty(KEYS, np.int64), np.empty(2 * LANES, np.int64)
    while True:
        task = next_task(address)
        if task >= n_tiles * kv_heads:
            break
        # The last tiles of a chunk see most keys: they begin first.
        tile, head = n_tiles - 1 - task // kv_heads, task % kv_heads
        _tile(address, tile, head, space, values, positions, rows, targets, places, moves)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _tile(address, tile, head, space, values, positions, rows, targets, places, moves):
    a = i64_at(address)
    group, dim, block_tokens = a[_GROUP], a[_DIM], a[_BLOCK_TOKENS]
    pairs = dim // 2
    queries = (space.ctypes.data + 63) // 64 * 64
    scores = queries + pairs * ROW_BYTES
    weights = scores + KEYS * ROW_BYTES
    sums = weights + KEYS // 2 * ROW_BYTES
    largest = sums + dim * ROW_BYTES
    totals, factors = largest + ROW_BYTES, largest + 2 * ROW_BYTES
    scale = np.float32(f64_at(address + 8 * _SCALE)[U(0)])

    chunk = a[_N_CHUNKS] - 1
    while i64_at(a[_CHUNKS] + 8 * _CHUNK_FIELDS * chunk)[U(4)] > tile:
        chunk -= 1
    fields = i64_at(a[_CHUNKS] + 8 * _CHUNK_FIELDS * chunk)
    start, n_tokens, context = fields[U(0)], fields[U(1)], fields[U(2)]
    kv_blocks = i64_at(fields[U(3)])
    first_row = (tile - fields[U(4)]) * WIDTH
    n_rows = min(np.int64(WIDTH), n_tokens * group - first_row)
    token, member = first_row // group, first_row % group
    for r in range(U(WIDTH)):  # lanes past the end repeat the last query
        query_head = head * group + member
        rows[r] = a[_Q] + 2 * ((start + token) * a[_Q_ROW] + query_head * a[_Q_HEAD])
        targets[r] = a[_OUT] + 2 * dim * ((start + token) * a[_KV_HEADS] * group + query_head)
        positions[r] = np.int32(context + token)
        if np.int64(r) + 1 < n_rows:
            member += 1
            if member == group:
                token, member = token + 1, np.int64(0)
    _load_queries(rows, queries, pairs, moves)
    zeros = f32_at(sums)
    for i in range(U(dim * WIDTH)):
        zeros[i] = np.float32(0)
    tops, ends = f32_at(largest), f32_at(totals)
    for i in range(U(WIDTH)):
        tops[i], ends[i] = np.float32(HIDDEN), np.float32(0)

    lowest, highest = np.int64(positions[0]), np.int64(positions[WIDTH - 1])
    window = a[_WINDOW] if a[_WINDOW] > 0 else np.int64(1 << 30)
    key_bytes = 2 * dim * a[_KV_HEADS]
    first = max(np.int64(0), lowest - window + 1)
    while first <= highest:
        n_keys = min(np.int64(KEYS), highest + 1 - first)
        n_even = (n_keys + STEP - 1) // STEP * STEP  # those past the end are hidden
        at_kv_block, within = first // block_tokens, first % block_tokens
        for i in range(U(n_even)):
            places[i] = (
                kv_blocks[U(at_kv_block)] * block_tokens + within
            ) * key_bytes + 2 * dim * head
            if np.int64(i) + 1 < n_keys:
                within += 1
                if within == block_tokens:
                    at_kv_block, within = at_kv_block + 1, np.int64(0)
        _score(a[_K_CACHE], places, n_even, queries, pairs, scores)
        hides = first + n_even - 1 > lowest or first <= highest - window
        _soften(
            scores,
            n_even,
            first,
            np.int64(1) if hides else np.int64(0),
            positions.ctypes.data,
            window,
            scale,
            largest,
            totals,
            factors,
            weights,
        )
        _interleave(a[_V_CACHE], places, n_even, dim, values)
        source = values.ctypes.data
        for d in range(0, dim, STEP):
            column = source + 4 * d
            pair_tile_onto(
                column,
                column + 4,
                column + 8,
                column + 12,
                4 * dim,
                weights,
                n_even // 2,
                sums + d * ROW_BYTES,
                factors,
            )
        first += KEYS
    _finish(sums, totals, pairs, queries)
    _store_results(targets, n_rows, queries, pairs, moves, weights)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _score(cache, places, n_keys, queries, pairs, scores):
    for i in range(0, n_keys, STEP):
        pair_tile(
            cache + places[U(i)],
            cache + places[U(i + 1)],
            cache + places[U(i + 2)],
            cache + places[U(i + 3)],
            np.int64(4),
            queries,
            pairs,
            scores + i * ROW_BYTES,
            np.int64(0),
        )


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _interleave(cache, places, n_keys, dim, values):
    """Words of two tokens' values side by side: [n_keys / 2, dim]."""
    for i in range(U(n_keys // 2)):
        low, high = u16_at(cache + places[U(2) * i]), u16_at(cache + places[U(2) * i + U(1)])
        for d in range(U(dim)):
            values[i * U(dim) + d] = np.uint32(low[d]) | (np.uint32(high[d]) << np.uint32(16))


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _load_queries(rows, queries, pairs, moves):
    """Transpose WIDTH rows of words: -> [pairs, WIDTH]."""
    whole = pairs // LANES * LANES
    for first in range(0, whole, LANES):
        for v in range(0, WIDTH, LANES):
            for i in range(LANES):
                moves[U(i)] = rows[U(v + i)] + 4 * first
                moves[U(LANES + i)] = queries + (first + i) * ROW_BYTES + 4 * v
            transpose_words(moves.ctypes.data, moves.ctypes.data + 8 * LANES)
    for p in range(whole, pairs):
        line = u32_at(queries + p * ROW_BYTES)
        for r in range(U(WIDTH)):
            line[r] = u32_at(rows[r] + 4 * p)[U(0)]


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _store_results(targets, n_rows, results, pairs, moves, spare):
    """Transpose back: ``results [pairs, WIDTH]`` words to the rows' places."""
    whole = pairs // LANES * LANES
    for first in range(0, whole, LANES):
        for v in range(0, n_rows, LANES):
            for i in range(LANES):
                moves[U(i)] = results + (first + i) * ROW_BYTES + 4 * v
                target = targets[U(v + i)] + 4 * first
                moves[U(LANES + i)] = target if v + i < n_rows else spare
            transpose_words(moves.ctypes.data, moves.ctypes.data + 8 * LANES)
    for p in range(whole, pairs):
        line = u32_at(results + p * ROW_BYTES)
        for r in range(U(n_rows)):
            u32_at(targets[r] + 4 * p)[U(0)] = line[r]
