"""Block-diagonal deltas added to a panel of the base's product while its sums are in the cache.

A panel's outputs lie in a few blocks: pieces, found once for all calls. For every run of rows of
one slot, a piece's codes become bfloat16 pairs by one table look-up (exact: a code less its centre
has at most 5 significant bits) and multiply the rows' own inputs (`piece_product`). A row's sums do
not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from compressor.codecs.columns import PLANES
from server.ops.cpu.codegen.intrinsics import f32_at, fetch, i64_at, u16_at, u32_at
from server.ops.cpu.codegen.piece_product import add_piece_four, add_piece_three, add_piece_two
from server.ops.packed import PackedBlocks

U = np.uint64
BITS = (2, 3, 4)  # that codes may have here
PADDED_ROWS = 8  # whose inputs are copied at a time, where they must be

# Places in the argument array of one set of blocks.
(_CODES, _SCALES, _UNITS, _SLOT_BYTES, _MB, _BITS, _N_MATRICES, _SCALE_BYTES) = range(8)
(_SLOT_SCALES, _NB, _PIECES, _ENDS, _PLACE_OF, _N_SLOTS, _PADDED) = range(8, 15)


class Piece(NamedTuple):
    """Neighbouring outputs of one block that lie in one panel. Offsets are a slot's own."""

    code: int  # byte of the first code
    scale: int  # first scale
    x: int  # first input
    n: int  # inputs
    lane: int  # of the panel
    n_outputs: int
    matrix: int


class Pieces:
    """The pieces of every panel of a product, for all layers alike."""

    def __init__(self, panels: Sequence[Sequence[Piece]]) -> None:
        self.table = np.array([piece for panel in panels for piece in panel], np.int64)
        self.ends = np.cumsum([0, *map(len, panels)], dtype=np.int64)


class PanelBlocks:
    """One set of packed blocks as `add_blocks` reads it, laid out once. They have a slot map."""

    def __init__(self, blocks: PackedBlocks, pieces: Pieces) -> None:
        _, s, byte_rows, mb = blocks.codes.shape
        place_of = blocks.place_of
        assert place_of is not None
        nb = -(-blocks.n // s)
        fields = max(8 // bits for bits in PLANES[blocks.bits])
        # Fields of a byte row past a block's last input must meet zeros: unless there are none, its
        # inputs are copied.
        self.padded = 0 if blocks.n % s == 0 and nb % (2 * fields) == 0 else nb + 16  # values a row
        self._kept_alive: list[object] = [blocks, pieces]
        self._arguments = np.array(
            [
                blocks.codes.data_ptr(),
                blocks.scales.data_ptr(),
                blocks.units.data_ptr(),
                s * byte_rows * mb,
                mb,
                blocks.bits,
                len(blocks.sizes),
                blocks.scales.element_size(),
                blocks.scales.stride(0),
                nb,
                pieces.table.ctypes.data,
                pieces.ends.ctypes.data,
                place_of.data_ptr(),
                len(place_of),
                self.padded,
            ],
            np.int64,
        )
        self.address: int = self._arguments.ctypes.data


def find_pieces(blocks: PackedBlocks, first: int, n_panels: int, width: int) -> Pieces:
    """The pieces of every panel of `width` outputs, the blocks' first being output `first`."""
    found: list[list[Piece]] = [[] for _ in range(n_panels)]
    _, s, byte_rows, mb = blocks.codes.shape
    wide, wider = divmod(blocks.n, s)
    column = 0
    for matrix, m in enumerate(blocks.sizes):
        short, longer = divmod(m, s)
        for block in range(s):
            start = first + block * short + min(block, longer)
            end = start + short + (block < longer)
            output = start
            while output < end:
                panel, lane = divmod(output, width)
                count = min(end - output, width - lane)
                place = column + output - start
                code, scale = block * byte_rows * mb + place, block * mb + place
                x, n = block * wide + min(block, wider), wide + (block < wider)
                found[panel].append(Piece(code, scale, x, n, lane, count, matrix))
                output += count
        first += m
        column += -(-m // s)
    return Pieces(found)


@njit(inline="always")
def _run_end(slots, row, end):
    """End of the run of rows of one slot that begins at `row`."""
    slot = slots[U(row)]
    row += 1
    while row < end and slots[U(row)] == slot:
        row += 1
    return row


@njit(inline="always")
def add_blocks(blocks, panel, following, slots, x, x_step, first, end, sums, sums_step, padded):
    """Add the deltas of rows ``[first, end)`` to the panel's sums, float32.

    blocks  address of a set's argument array
    following  panel whose codes are to come into the cache meanwhile
    slots   address of every row's slot, int64
    x       address of row 0's first input, bfloat16; rows are `x_step` bytes apart
    sums    address of the first row's sums; rows are `sums_step` bytes apart
    padded  address of room for the inputs of `PADDED_ROWS` rows of a block
    """
    a = i64_at(blocks)
    slot_of, place_of, ends = i64_at(slots), u32_at(a[_PLACE_OF]), i64_at(a[_ENDS])
    begin, stop = ends[U(panel)], ends[U(panel + 1)]
    next_begin, next_stop = ends[U(following)], ends[U(following + 1)]
    row = first
    while row < end:
        slot, run_end = slot_of[U(row)], _run_end(slot_of, row, end)
        place = np.int64(-1)
        if 0 <= slot < a[_N_SLOTS]:
            place = np.int64(place_of[U(slot)]) - 1
        if place >= 0:
            own, to = x + row * x_step, sums + (row - first) * sums_step
            n_rows = run_end - row
            for piece in range(begin, stop):
                wanted = min(next_begin + piece - begin, next_stop - 1)
                _add_piece(blocks, piece, wanted, place, own, x_step, n_rows, to, sums_step, padded)
        row = run_end


@njit(inline="always")
def _add_piece(blocks, piece, wanted, place, x, x_step, n_rows, sums, sums_step, padded):
    a = i64_at(blocks)
    p = i64_at(a[_PIECES] + 56 * piece)
    codes = a[_CODES] + place * a[_SLOT_BYTES] + p[U(0)]
    scales = a[_SCALES] + a[_SCALE_BYTES] * (place * a[_SLOT_SCALES] + p[U(1)])
    ahead = np.int64(0)
    if wanted >= 0:
        # The last line of what comes next: its first is mostly that of this piece.
        q = i64_at(a[_PIECES] + 56 * wanted)
        ahead = q[U(0)] + q[U(5)] - 1 - p[U(0)]
        fetch(scales + a[_SCALE_BYTES] * (q[U(1)] + q[U(5)] - 1 - p[U(1)]))
    own, to, count = x + 2 * p[U(2)], sums + 4 * p[U(4)], p[U(5)]
    unit = f32_at(a[_UNITS])[U(place * a[_N_MATRICES] + p[U(6)])]
    if a[_PADDED] == 0:
        _multiply(blocks, codes, own, x_step, to, sums_step, count, scales, unit, ahead, n_rows)
        return
    for t in range(0, n_rows, PADDED_ROWS):
        n, step = min(np.int64(PADDED_ROWS), n_rows - t), 2 * a[_PADDED]
        _pad(own + t * x_step, x_step, p[U(3)], n, padded, a[_PADDED])
        part = to + t * sums_step
        _multiply(blocks, codes, padded, step, part, sums_step, count, scales, unit, ahead, n)


@njit
def _multiply(blocks, codes, x, x_step, sums, sums_step, count, scales, unit, ahead, n_rows):
    a = i64_at(blocks)
    mb, nb, bits, halves = a[_MB], a[_NB], a[_BITS], a[_SCALE_BYTES] - 1
    if bits == 4:
        add_piece_four(
            codes, mb, nb, x, x_step, sums, sums_step, count, scales, halves, unit, ahead, n_rows
        )
    elif bits == 2:
        add_piece_two(
            codes, mb, nb, x, x_step, sums, sums_step, count, scales, halves, unit, ahead, n_rows
        )
    else:
        add_piece_three(
            codes, mb, nb, x, x_step, sums, sums_step, count, scales, halves, unit, ahead, n_rows
        )


@njit(inline="always")
def _pad(x, x_step, n, n_rows, padded, stride):
    """Copy a block's inputs of some rows, zeros behind them: fields past the last meet those."""
    for t in range(n_rows):
        source, target = u16_at(x + t * x_step), u16_at(padded + 2 * t * stride)
        for i in range(U(n)):
            target[i] = source[i]
        for i in range(U(n), U(stride)):
            target[i] = np.uint16(0)
