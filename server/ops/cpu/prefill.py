"""Prefill attention over the paged cache, in bfloat16: what FlashAttention computes (Dao et al.,
arXiv 2205.14135), laid out for vector units.

A task is one KV head and a tile of WIDTH queries: the tokens of a chunk, each with the query heads
that share the KV head. Every lane is a query, so the softmax never reduces across lanes, keys and
values are read from their KV blocks in place, and only queries and results are transposed. Keys
nobody in the tile sees are skipped. Scores, weights' sums and results are float32; weights are
rounded to bfloat16 (ties upwards) before they multiply the values.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numba import njit
from torch import Tensor

from server.ops.attention import AttentionCall, AttentionMetadata, PrefillChunk
from server.ops.cpu.attention import float_sinks
from server.ops.cpu.codegen.bf16_pairs import (
    ROW_BYTES,
    STEP,
    WIDTH,
    pair_tile,
    pair_tile_onto,
    transpose_words,
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
from server.ops.cpu.codegen.online_softmax import HIDDEN, finish, soften
from server.ops.cpu.codegen.vectors import LANES
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.parallel import Parallel
from server.ops.cpu.rope import check_rows

U = np.uint64
KEYS = 64  # whose scores are in memory at a time
LOG2_E = 1.4426950408889634

# Places in the argument array. Strides are in elements.
(_Q, _Q_ROW, _Q_HEAD, _OUT, _K_CACHE, _V_CACHE, _BLOCK_TOKENS, _KV_HEADS) = range(1, 9)
(_GROUP, _DIM, _CHUNKS, _N_CHUNKS, _N_TILES, _WINDOW, _VALUE_DIM, _CHUNK) = range(9, 17)
(_SINKS, _SINKS_ROW, _SCALE, _N_ARGUMENTS) = range(17, 21)
# Of each chunk: first row, rows, tokens known before, address of its KV blocks, tiles before it.
_CHUNK_FIELDS = 5


class PrefillKernel:
    """The compiled kernel, shared by all layers."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._kernel = compile_kernel(_prefill)

    def takes(self, call: AttentionCall) -> bool:
        """Whether `prefill_` can compute this; server.ops.attend computes anything."""
        bf16 = call.q.dtype is torch.bfloat16
        even = call.q.shape[2] % STEP == 0 and call.v.shape[2] % STEP == 0
        return bf16 and even and call.softcap is None and call.scale > 0

    def prefill_(self, out: Tensor, call: AttentionCall) -> None:
        """See `server.ops.attend.prefill_`. `takes` is true of the call."""
        q, kv_heads = call.q, call.k_cache.shape[2]
        check_rows(q)
        group = q.shape[1] // kv_heads
        chunks, n_tiles = _chunk_table(call.metadata, group, call.chunk)
        sinks, sinks_row = float_sinks(call)
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
            call.v.shape[2],
            call.chunk or 0,
            0 if sinks is None else sinks.data_ptr(),
            sinks_row,
        )
        a[_SCALE : _SCALE + 1].view(np.float64)[:] = call.scale * LOG2_E
        self._parallel.run(self._kernel, a, n_tiles * kv_heads)


def _chunk_table(metadata: AttentionMetadata, group: int, reach: int | None) -> tuple[Tensor, int]:
    """int64 [chunks, fields] and the number of tiles of one KV head, made once per step.

    reach  cut at its multiples: all tokens of a chunk see from one position on (`AttentionCall`)
    """
    key = ("prefill", group, reach)
    if key not in metadata.made:
        rows, tiles = [], 0
        for chunk in metadata.prefill:
            for start, n, context in _cut(chunk, reach):
                rows.append([start, n, context, chunk.kv_blocks.data_ptr(), tiles])
                tiles += -(-n * group // WIDTH)
        metadata.made[key] = torch.tensor([*rows, [0, 0, 0, 0, tiles]])
    table = metadata.made[key]
    return table[:-1], int(table[-1, -1])


def _cut(chunk: PrefillChunk, reach: int | None) -> Iterator[tuple[int, int, int]]:
    """First row, rows and tokens known before of its stretches between multiples of `reach`."""
    position, end = chunk.context, chunk.context + chunk.end - chunk.start
    while position < end:
        limit = end if reach is None else min(end, (position // reach + 1) * reach)
        yield chunk.start + position - chunk.context, limit - position, position
        position = limit


def _prefill(address):
    a = i64_at(address)
    dim, kv_heads, n_tiles = a[_DIM], a[_KV_HEADS], a[_N_TILES]
    value_dim = a[_VALUE_DIM]
    # In lines of WIDTH words: queries (then results), scores, weights, sums, and one each of the
    # next three.
    lines = max(dim, value_dim) // 2 + KEYS + KEYS // 2 + value_dim + 3
    space = np.empty(lines * WIDTH + LANES, np.float32)
    values = np.empty(KEYS // 2 * value_dim, np.uint32)
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
    pairs, value_dim = dim // 2, a[_VALUE_DIM]
    queries = (space.ctypes.data + 63) // 64 * 64
    scores = queries + max(dim, value_dim) // 2 * ROW_BYTES
    weights = scores + KEYS * ROW_BYTES
    sums = weights + KEYS // 2 * ROW_BYTES
    largest = sums + value_dim * ROW_BYTES
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
    tops, ends = f32_at(largest), f32_at(totals)
    for r in range(U(WIDTH)):  # lanes past the end repeat the last query
        query_head = head * group + member
        rows[r] = a[_Q] + 2 * ((start + token) * a[_Q_ROW] + query_head * a[_Q_HEAD])
        query = (start + token) * a[_KV_HEADS] * group + query_head
        targets[r] = a[_OUT] + 2 * value_dim * query
        if a[_SINKS] != 0:
            sink = f32_at(a[_SINKS])[U((start + token) * a[_SINKS_ROW] + query_head)]
            tops[r], ends[r] = sink * np.float32(LOG2_E), np.float32(1)
        else:
            tops[r], ends[r] = np.float32(HIDDEN), np.float32(0)
        positions[r] = np.int32(context + token)
        if np.int64(r) + 1 < n_rows:
            member += 1
            if member == group:
                token, member = token + 1, np.int64(0)
    _load_queries(rows, queries, pairs, moves)
    zeros = f32_at(sums)
    for i in range(U(value_dim * WIDTH)):
        zeros[i] = np.float32(0)

    lowest, highest = np.int64(positions[0]), np.int64(positions[WIDTH - 1])
    window = a[_WINDOW] if a[_WINDOW] > 0 else np.int64(1 << 30)
    kv_heads = a[_KV_HEADS]
    first = max(np.int64(0), lowest - window + 1)
    if a[_CHUNK] > 0:
        first = max(first, lowest // a[_CHUNK] * a[_CHUNK])
    while first <= highest:
        n_keys = min(np.int64(KEYS), highest + 1 - first)
        n_even = (n_keys + STEP - 1) // STEP * STEP  # those past the end are hidden
        at_kv_block, within = first // block_tokens, first % block_tokens
        for i in range(U(n_even)):
            places[i] = (kv_blocks[U(at_kv_block)] * block_tokens + within) * kv_heads + head
            if np.int64(i) + 1 < n_keys:
                within += 1
                if within == block_tokens:
                    at_kv_block, within = at_kv_block + 1, np.int64(0)
        _score(a[_K_CACHE], places, 2 * dim, n_even, queries, pairs, scores)
        hides = first + n_even - 1 > lowest or first <= highest - window
        soften(
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
        _interleave(a[_V_CACHE], places, n_even, value_dim, values)
        source = values.ctypes.data
        for d in range(0, value_dim, STEP):
            column = source + 4 * d
            pair_tile_onto(
                column,
                column + 4,
                column + 8,
                column + 12,
                4 * value_dim,
                weights,
                n_even // 2,
                sums + d * ROW_BYTES,
                factors,
            )
        first += KEYS
    finish(sums, totals, value_dim // 2, queries)
    _store_results(targets, n_rows, queries, value_dim // 2, moves, weights)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _score(cache, places, key_bytes, n_keys, queries, pairs, scores):
    for i in range(0, n_keys, STEP):
        pair_tile(
            cache + places[U(i)] * key_bytes,
            cache + places[U(i + 1)] * key_bytes,
            cache + places[U(i + 2)] * key_bytes,
            cache + places[U(i + 3)] * key_bytes,
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
        low = u16_at(cache + 2 * dim * places[U(2) * i])
        high = u16_at(cache + 2 * dim * places[U(2) * i + U(1)])
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
