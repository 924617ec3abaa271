"""The terms of all variants in a batch, added to a panel's sums while those are in the cache.

Which terms a slot has, where their codes lie and how they are to be read is data: lists of
descriptors (`server.ops.cpu.term_table` lays them out). A step has segments of rows, each of one
slot. Two parts:

    shrink      what does not belong to one panel, tasks of their own before those: hidden =
                ``gains * a x`` of every head of a segment's slot, and the products with stored
                rows (few of them lie in one panel: its vectors would stay half empty)
    add_terms   a panel's share of every term: pieces of blocks, columns of a head's b times
                hidden, and what the stored rows that lie in the panel gave

Products are exact, sums float32; hidden is rounded once to the dtype of x. A row's sums do not
depend on what else is in the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from server.ops.cpu.codegen.add_piece import add_piece_to_floats, add_piece_to_pairs
from server.ops.cpu.codegen.intrinsics import (
    add_and_publish,
    f32_at,
    fetch,
    i64_at,
    read_published,
    to_bf16,
    u16_at,
)
from server.ops.cpu.codegen.piece_product import FLOAT_BYTES, NO_SCALES, PAIR_BYTES
from server.ops.cpu.pieces import PIECE_BYTES

U = np.uint64
ROWS = 8  # that are padded, shrunk or scattered at a time
ROOM_COLUMNS = 64  # of their sums: 48 outputs, and 16 that products may touch behind the last
ROOM_BYTES = 4 * ROWS * ROOM_COLUMNS

BLOCKS, HEAD, ROW_TERM = range(3)  # kinds of terms
# A descriptor, int64. "Bytes": from one place to the next. Codes of a head are those of b.
(D_KIND, D_BITS, D_CODES, D_CODE_BYTES, D_STRIDE, D_N_INPUTS, D_PADDED) = range(7)
(D_SCALES, D_SCALE_BYTES, D_SCALE_KIND, D_UNITS, D_UNIT_BYTES, D_FIRST, D_M) = range(7, 14)
(D_PIECES, D_ENDS, D_INDEX, D_INDEX_BYTES, D_COUNT) = range(14, 19)
(D_DOWN, D_GAINS, D_GAIN_BYTES, D_WIDTH, D_HIDDEN_BYTES, N_FIELDS) = range(19, 25)
# A slot's list, int64: how many terms, then for each: descriptor, place, byte of a hidden row.
ENTRY = 3
# What a call gets: addresses and numbers, int64.
(T_DESCRIPTORS, T_LISTS, T_LIST_ITEMS, T_N_LISTS, T_SEGMENTS, T_N_SEGMENTS) = range(6)
(T_HIDDEN, T_HIDDEN_STEP, T_TASKS, T_N_TASKS, T_DONE, T_PADDED, N_TERM_ARGUMENTS) = range(6, 13)


def _make(item: int) -> tuple[Any, Any]:
    """`shrink` and `add_terms` for x of bfloat16 or float32: `item` bytes."""
    add_piece = add_piece_to_pairs if item == PAIR_BYTES else add_piece_to_floats

    @njit
    def pad(x, x_step, n, n_rows, room, stride):
        """Copy some rows' inputs, zeros behind them: fields past the last meet those."""
        for t in range(n_rows):
            if item == PAIR_BYTES:
                source, target = u16_at(x + t * x_step), u16_at(room + 2 * t * stride)
                for i in range(U(n)):
                    target[i] = source[i]
                for i in range(U(n), U(stride)):
                    target[i] = np.uint16(0)
            else:
                full, place = f32_at(x + t * x_step), f32_at(room + 4 * t * stride)
                for i in range(U(n)):
                    place[i] = full[i]
                for i in range(U(n), U(stride)):
                    place[i] = np.float32(0)

    @njit
    def multiply(d, codes, x, x_step, n, sums, sums_step, count, scales, unit, ahead, n_rows, room):
        """Add the product of some rows' n inputs with neighbouring outputs of a term."""
        bits, stride, nb, kind = d[D_BITS], d[D_STRIDE], d[D_N_INPUTS], d[D_SCALE_KIND]
        if d[D_PADDED] == 0:
            add_piece(
                bits, codes, stride, nb, x, x_step, sums, sums_step, count, scales, kind, unit,
                ahead, n_rows,
            )  # fmt: skip
            return
        for t in range(0, n_rows, ROWS):
            n_padded, step = min(np.int64(ROWS), n_rows - t), item * d[D_PADDED]
            pad(x + t * x_step, x_step, n, n_padded, room, d[D_PADDED])
            add_piece(
                bits, codes, stride, nb, room, step, sums + t * sums_step, sums_step, count,
                scales, kind, unit, ahead, n_padded,
            )  # fmt: skip

    @njit
    def add_blocks(d, place, panel, following, x, x_step, n_rows, sums, sums_step, room):
        ends, scale_bytes = i64_at(d[D_ENDS]), d[D_SCALE_KIND] + 1
        codes = d[D_CODES] + place * d[D_CODE_BYTES]
        scales = d[D_SCALES] + place * d[D_SCALE_BYTES]
        unit = f32_at(d[D_UNITS] + place * d[D_UNIT_BYTES])[U(0)]
        begin, stop = ends[U(panel)], ends[U(panel + 1)]
        next_begin, next_stop = ends[U(following)], ends[U(following + 1)]
        for piece in range(begin, stop):
            p = i64_at(d[D_PIECES] + PIECE_BYTES * piece)
            ahead, wanted = np.int64(0), min(next_begin + piece - begin, next_stop - 1)
            if wanted >= 0:
                # The last line of what comes next: its first is mostly that of this piece.
                q = i64_at(d[D_PIECES] + PIECE_BYTES * wanted)
                ahead = q[U(0)] + q[U(5)] - 1 - p[U(0)]
                fetch(scales + scale_bytes * (q[U(1)] + q[U(5)] - 1))
            multiply(
                d, codes + p[U(0)], x + item * p[U(2)], x_step, p[U(3)], sums + 4 * p[U(4)],
                sums_step, p[U(5)], scales + scale_bytes * p[U(1)], unit, ahead, n_rows, room,
            )  # fmt: skip

    @njit
    def add_head(d, place, low, high, panel_start, hidden, hidden_step, n_rows, sums, sums_step):
        first = low - d[D_FIRST]
        codes = d[D_CODES] + place * d[D_CODE_BYTES] + first
        add_piece(
            d[D_BITS], codes, d[D_STRIDE], d[D_N_INPUTS], hidden, hidden_step,
            sums + 4 * (low - panel_start), sums_step, high - low, np.int64(0),
            np.int64(NO_SCALES), np.float32(1), high - low, n_rows,
        )  # fmt: skip

    @njit
    def lower_bound(index, n, value):
        """How many of the n increasing values are less."""
        low, high = np.int64(0), n
        while low < high:
            middle = (low + high) // 2
            if index[U(middle)] < value:
                low = middle + 1
            else:
                high = middle
        return low

    @njit
    def add_stored_rows(
        d, place, low, high, panel_start, found, found_step, n_rows, sums, sums_step
    ):
        """found: address of the first row's products with all stored rows, float32."""
        index = i64_at(d[D_INDEX] + place * d[D_INDEX_BYTES])
        begin = lower_bound(index, d[D_COUNT], low - d[D_FIRST])
        end = lower_bound(index, d[D_COUNT], high - d[D_FIRST])
        for r in range(n_rows):
            source, target = f32_at(found + r * found_step), f32_at(sums + r * sums_step)
            for k in range(begin, end):
                output = index[U(k)] + d[D_FIRST] - panel_start
                target[U(output)] += source[U(k)]

    @njit
    def add_terms(terms, panel, following, width, x, x_step, first, end, sums, sums_step, room):
        """Add the deltas of rows ``[first, end)`` to the panel's sums, float32.

        following  panel whose codes are to come into the cache meanwhile
        width      outputs of a panel
        x          address of row 0's first input; rows are `x_step` bytes apart
        sums       address of the first row's sums; rows are `sums_step` bytes apart
        room       address of room for `ROWS` rows of ``T_PADDED`` inputs
        """
        t = i64_at(terms)
        segments, panel_start = i64_at(t[T_SEGMENTS]), panel * width
        for segment in range(t[T_N_SEGMENTS]):
            slot = segments[U(3 * segment)]
            start = max(first, segments[U(3 * segment + 1)])
            n_rows = min(end, segments[U(3 * segment + 2)]) - start
            if n_rows <= 0 or slot < 0 or slot >= t[T_N_LISTS]:
                continue
            own, to = x + start * x_step, sums + (start - first) * sums_step
            entries = i64_at(t[T_LISTS] + 8 * slot * t[T_LIST_ITEMS])
            for entry in range(entries[U(0)]):
                at = U(1 + ENTRY * entry)
                d, place = i64_at(t[T_DESCRIPTORS] + 8 * N_FIELDS * entries[at]), entries[at + U(1)]
                low = max(panel_start, d[D_FIRST])
                high = min(panel_start + width, d[D_FIRST] + d[D_M])
                if low >= high:
                    continue
                hidden = t[T_HIDDEN] + start * t[T_HIDDEN_STEP] + entries[at + U(2)]
                if d[D_KIND] == BLOCKS:
                    add_blocks(d, place, panel, following, own, x_step, n_rows, to, sums_step, room)
                elif d[D_KIND] == HEAD:
                    add_head(
                        d, place, low, high, panel_start, hidden, t[T_HIDDEN_STEP], n_rows, to,
                        sums_step,
                    )  # fmt: skip
                else:
                    add_stored_rows(
                        d, place, low, high, panel_start, hidden, t[T_HIDDEN_STEP], n_rows, to,
                        sums_step,
                    )  # fmt: skip

    @njit
    def shrink_head(d, down, place, x, x_step, n_rows, hidden, hidden_step, room, spare):
        """``hidden[r, k] = gains[k] * sum_j a[k, j] x[r, j]``, zeros up to its width."""
        rank, found = d[D_N_INPUTS], f32_at(spare)
        codes = down[D_CODES] + place * down[D_CODE_BYTES]
        scales, scale_bytes = down[D_SCALES] + place * down[D_SCALE_BYTES], down[D_SCALE_KIND] + 1
        unit = f32_at(down[D_UNITS] + place * down[D_UNIT_BYTES])[U(0)]
        gains, n = f32_at(d[D_GAINS] + place * d[D_GAIN_BYTES]), down[D_N_INPUTS]
        for k in range(0, d[D_WIDTH], 48):
            count = min(np.int64(48), rank - k)
            for i in range(U(n_rows * ROOM_COLUMNS)):
                found[i] = np.float32(0)
            if count > 0:
                multiply(
                    down, codes + k, x, x_step, n, spare, np.int64(4 * ROOM_COLUMNS), count,
                    scales + scale_bytes * k, unit, np.int64(0), n_rows, room,
                )  # fmt: skip
            for r in range(n_rows):
                row, target = U(r * ROOM_COLUMNS), hidden + r * hidden_step + item * k
                for i in range(U(min(np.int64(48), d[D_WIDTH] - k))):
                    value = np.float32(0)
                    if np.int64(i) < count:
                        value = found[row + i] * gains[U(k) + i]
                    if item == PAIR_BYTES:
                        u16_at(target)[i] = to_bf16(value)
                    else:
                        f32_at(target)[i] = value

    @njit
    def multiply_stored_rows(d, place, x, x_step, n_rows, found, found_step, room):
        """``found[r, k] = sum_j row(k)[j] x[r, j]``, float32."""
        codes, scale_bytes = d[D_CODES] + place * d[D_CODE_BYTES], d[D_SCALE_KIND] + 1
        scales = d[D_SCALES] + place * d[D_SCALE_BYTES]
        unit, n = f32_at(d[D_UNITS] + place * d[D_UNIT_BYTES])[U(0)], d[D_N_INPUTS]
        for r in range(n_rows):
            row = f32_at(found + r * found_step)
            for i in range(U(d[D_COUNT])):
                row[i] = np.float32(0)
        for k in range(0, d[D_COUNT], 48):
            multiply(
                d, codes + k, x, x_step, n, found + 4 * k, found_step,
                min(np.int64(48), d[D_COUNT] - k), scales + scale_bytes * k, unit, np.int64(48),
                n_rows, room,
            )  # fmt: skip

    @njit
    def shrink(terms, task, x, x_step, room, spare):
        """All heads and stored rows of some rows of one slot."""
        t = i64_at(terms)
        rows = i64_at(t[T_TASKS] + 24 * task)
        slot, start, end = rows[U(0)], rows[U(1)], rows[U(2)]
        if 0 <= slot < t[T_N_LISTS]:
            entries = i64_at(t[T_LISTS] + 8 * slot * t[T_LIST_ITEMS])
            for entry in range(entries[U(0)]):
                at = U(1 + ENTRY * entry)
                d, place = i64_at(t[T_DESCRIPTORS] + 8 * N_FIELDS * entries[at]), entries[at + U(1)]
                if d[D_KIND] == BLOCKS:
                    continue
                down = i64_at(t[T_DESCRIPTORS] + 8 * N_FIELDS * d[D_DOWN])
                for row in range(start, end, ROWS):
                    hidden = t[T_HIDDEN] + row * t[T_HIDDEN_STEP] + entries[at + U(2)]
                    own, n_rows = x + row * x_step, min(np.int64(ROWS), end - row)
                    if d[D_KIND] == HEAD:
                        shrink_head(
                            d, down, place, own, x_step, n_rows, hidden, t[T_HIDDEN_STEP], room,
                            spare,
                        )  # fmt: skip
                    else:
                        multiply_stored_rows(
                            d, place, own, x_step, n_rows, hidden, t[T_HIDDEN_STEP], room
                        )
        add_and_publish(terms + 8 * T_DONE)

    return shrink, add_terms


@njit(inline="always")
def wait_for_heads(terms):
    """Until every task of `shrink` has ended: whoever took one computes it at this moment."""
    t = i64_at(terms)
    while read_published(terms + 8 * T_DONE) < t[T_N_TASKS]:
        pass


shrink_pairs, add_terms_to_pairs = _make(PAIR_BYTES)
shrink_floats, add_terms_to_floats = _make(FLOAT_BYTES)
