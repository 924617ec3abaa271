"""Block-diagonal deltas straight from packed codes.

A task is some blocks of up to `ROWS` rows of one segment, a tile of outputs at a time. Codes become
numbers in registers and are used for up to `ROW_GROUP` rows there: float32 (`tile_product`), or
pairs of bfloat16 where x is bfloat16 (`pair_product`). Scales apply once to the finished sums. Cost
per step and variant: its packed bytes, once per `ROW_GROUP` rows. Products are exact and everything
is float32 between the packed codes and one rounding into y.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from server.ops.cpu.codegen.intrinsics import (
    FAST,
    f32_at,
    from_f16,
    i64_at,
    load_row,
    next_task,
    u8_at,
    u16_at,
)
from server.ops.cpu.codegen.pair_product import (
    SUMMED,
    offset_of,
    pair_product,
    sum_of_halves,
    takes_pairs,
)
from server.ops.cpu.codegen.tile_product import SUMS, TILE, rows_at_once, tile_product
from server.ops.cpu.codegen.vectors import LANES, add_products_bf16, add_products_f32
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.panel_blocks import PanelBlocks
from server.ops.cpu.parallel import Parallel
from server.ops.packed import PackedBlocks, octaves
from server.ops.row_mapping import SlotSegments

ROWS = 64  # rows of x held in float32 at a time
U = np.uint64

# Places in the argument array.
(_X, _X_STRIDE, _IS_BF16, _SEGMENTS, _N_SEGMENTS, _CODES, _SCALES, _UNITS) = range(1, 9)
(_S, _N, _BYTE_ROWS, _MB, _BITS, _N_OUTPUTS, _OCTAVES, _SCALE_STRIDE) = range(9, 17)
(_N_CHUNKS, _NB, _TILES_PER_TASK, _OUTPUTS) = range(17, 21)
# Of each output: address, row stride, m // s, m % s, first column of its block rows in the stacked
# tile. Divided here because a division takes as long as a dozen codes.
_OUTPUT_FIELDS = 5
TASKS_PER_THREAD = 8  # at least, so that threads finish together


class BlockDiagKernel:
    """The compiled kernel, shared by all matrices."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.compiled = compile_kernel(_blockdiag)
        self.octaves = octaves()


class NumbaBlockDiag:
    """`server.ops.blockdiag.BlockDiagOp` for one set of packed blocks.

    The arguments that stay the same are laid out once: a call writes a handful of numbers.
    """

    def __init__(self, kernel: BlockDiagKernel, blocks: PackedBlocks) -> None:
        self._kernel = kernel  # keeps the table of scales alive
        self._parallel, self._compiled = kernel.parallel, kernel.compiled
        self.blocks = blocks
        self.in_panels: dict[int, PanelBlocks] = {}  # by the product's output they begin at
        _, s, byte_rows, mb = blocks.codes.shape
        n_outputs = len(blocks.sizes)
        self._arguments = np.zeros(_OUTPUTS + _OUTPUT_FIELDS * n_outputs, np.int64)
        self._arguments[_CODES:_OUTPUTS] = (
            blocks.codes.data_ptr(),
            blocks.scales.data_ptr(),
            blocks.units.data_ptr(),
            s,
            blocks.n,
            byte_rows,
            mb,
            blocks.bits,
            n_outputs,
            kernel.octaves.data_ptr() if blocks.scales.dtype is torch.uint8 else 0,
            blocks.scales.stride(0),
            0,
            -(-blocks.n // s),
            0,
        )
        column = 0
        for place, (m, rows) in enumerate(zip(blocks.sizes, blocks.block_rows(), strict=True)):
            first = _OUTPUTS + _OUTPUT_FIELDS * place
            self._arguments[first + 2 : first + 5] = (m // s, m % s, column)
            column += rows
        self._n_tiles = s * -(-mb // TILE)

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, segments: SlotSegments) -> None:
        """See `BlockDiagOp`. x and the outputs: float32 or all bfloat16, rows contiguous."""
        arguments = self._arguments
        n_chunks = -(-segments.longest // ROWS)
        arguments[_X] = x.data_ptr()
        arguments[_X_STRIDE] = x.stride(0)
        arguments[_IS_BF16] = x.dtype is torch.bfloat16
        arguments[_SEGMENTS] = segments.table.data_ptr()
        arguments[_N_SEGMENTS] = segments.n
        arguments[_N_CHUNKS] = n_chunks
        place = _OUTPUTS
        for y in outputs:
            arguments[place] = 0 if y is None else y.data_ptr()
            arguments[place + 1] = 0 if y is None else y.stride(0)
            place += _OUTPUT_FIELDS
        n_places = n_chunks * segments.n
        wanted = -(-TASKS_PER_THREAD * self._parallel.n_threads // n_places)
        per_task = -(-self._n_tiles // min(wanted, self._n_tiles))
        arguments[_TILES_PER_TASK] = per_task
        self._parallel.run(self._compiled, arguments, n_places * -(-self._n_tiles // per_task))


def _blockdiag(address):
    a = i64_at(address)
    s, n = a[_S], a[_N]
    n_segments, per_task = a[_N_SEGMENTS], a[_TILES_PER_TASK]
    segments = i64_at(a[_SEGMENTS])
    short, longer = n // s, n % s
    # Fields of a byte row past the last input meet zeros: a row is padded for 8 fields, and to
    # whole vectors.
    stride = ((n + s - 1) // s + 8 + SUMMED - 1) // SUMMED * SUMMED
    x_rows, x_pairs = np.zeros(ROWS * stride, np.float32), np.zeros(ROWS * stride, np.uint16)
    row_sums = np.empty(ROWS, np.float32)
    sums = np.empty(SUMS, np.float32)
    scales = np.empty(TILE + LANES, np.float32)
    parts = np.empty(4 * a[_N_OUTPUTS], np.int64)
    pairs = a[_IS_BF16] != 0 and takes_pairs(a[_BITS])
    block_tiles = (a[_MB] + TILE - 1) // TILE
    groups = (s * block_tiles + per_task - 1) // per_task
    n_tasks = a[_N_CHUNKS] * n_segments * groups
    while True:
        task = next_task(address)
        if task >= n_tasks:
            break
        place, group = task // groups, task % groups
        segment, chunk = place % n_segments, place // n_segments
        slot = segments[U(3 * segment)]
        start = segments[U(3 * segment + 1)] + chunk * ROWS
        rows = min(ROWS, segments[U(3 * segment + 2)] - start)
        if rows <= 0:
            continue
        end = min(s * block_tiles, (group + 1) * per_task)
        block, tile = group * per_task // block_tiles, group * per_task % block_tiles
        loaded = np.int64(-1)
        for _ in range(group * per_task, end):
            if block != loaded:
                if pairs:
                    _load_pairs(
                        address, block, short, longer, start, rows, x_pairs, stride, row_sums
                    )
                else:
                    _load_block(address, block, short, longer, start, rows, x_rows, stride)
                loaded = block
            _tile(
                address,
                slot,
                block,
                tile * TILE,
                start,
                rows,
                x_rows,
                x_pairs,
                row_sums,
                stride,
                sums,
                scales,
                parts,
            )
            tile += 1
            if tile == block_tiles:
                block, tile = block + 1, np.int64(0)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _load_block(address, block, short, longer, start, rows, x_rows, stride):
    """The block's inputs of all rows in float32, zeros behind them."""
    a = i64_at(address)
    is_bf16 = a[_IS_BF16] != 0
    cols = short + (1 if block < longer else 0)
    first_col = block * short + min(block, longer)
    for t in range(U(rows)):
        place = (start + np.int64(t)) * a[_X_STRIDE] + first_col
        load_row(x_rows, t * U(stride), a[_X] + place * (2 if is_bf16 else 4), U(cols), is_bf16)
        for i in range(U(cols), U(stride)):
            x_rows[t * U(stride) + i] = np.float32(0)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _load_pairs(address, block, short, longer, start, rows, x_pairs, stride, row_sums):
    """The block's inputs of all rows as they are, zeros behind them, and each row's sum."""
    a = i64_at(address)
    cols = U(short + (1 if block < longer else 0))
    first_col = block * short + min(block, longer)
    for t in range(U(rows)):
        source = u16_at(a[_X] + 2 * ((start + np.int64(t)) * a[_X_STRIDE] + first_col))
        for i in range(cols):
            x_pairs[t * U(stride) + i] = source[i]
        for i in range(cols, U(stride)):
            x_pairs[t * U(stride) + i] = np.uint16(0)
        row = x_pairs.ctypes.data + 2 * np.int64(t) * stride
        row_sums[t] = sum_of_halves(row, stride // SUMMED)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _tile(
    address,
    slot,
    block,
    first_output,
    start,
    rows,
    x_rows,
    x_pairs,
    row_sums,
    stride,
    sums,
    scales,
    parts,
):
    """One tile of outputs of one block, for all rows loaded."""
    a = i64_at(address)
    pairs = a[_IS_BF16] != 0 and takes_pairs(a[_BITS])
    mb, bits, is_bf16 = a[_MB], a[_BITS], a[_IS_BF16] != 0
    width = min(TILE, mb - first_output)
    place = (slot * a[_S] + block) * a[_BYTE_ROWS] * mb + first_output
    codes = a[_CODES] + place * (2 if bits == 16 else 1)
    n_parts = _list_parts(address, slot, block, first_output, U(width), parts, scales)
    factors = scales.ctypes.data
    t = 0
    while t < rows:
        n_rows = rows_at_once(rows - t)
        for r in range(U(n_rows)):
            begin = offset_of(bits) * row_sums[U(t) + r] if pairs else np.float32(0)
            for i in range(U(width)):
                sums[r * U(TILE) + i] = begin
        if pairs:
            pair_product(bits, codes, mb, x_pairs, t * stride, stride, a[_NB], sums, width, n_rows)
        else:
            tile_product(bits, codes, mb, x_rows, t * stride, stride, a[_NB], sums, width, n_rows)
        for part in range(n_parts):
            target, row_bytes = parts[U(4 * part)], parts[U(4 * part + 1)]
            first, count = parts[U(4 * part + 2)], parts[U(4 * part + 3)]
            for r in range(n_rows):
                to = target + (start + t + r) * row_bytes
                found = sums.ctypes.data + 4 * (r * TILE + first)
                if is_bf16:
                    add_products_bf16(to, found, factors + 4 * first, count)
                else:
                    add_products_f32(to, found, factors + 4 * first, count)
        t += n_rows


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _list_parts(address, slot, block, first_output, width, parts, scales):
    """Where a tile's columns go: parts (address in row 0, row bytes, first column, count).

    Also lays the tile's scales out in float32. Returns the number of parts.
    """
    a = i64_at(address)
    mb, n_outputs = a[_MB], a[_N_OUTPUTS]
    item_bytes = 2 if a[_IS_BF16] != 0 else 4
    first_scale = slot * a[_SCALE_STRIDE] + block * mb + first_output
    octave_of = f32_at(a[_OCTAVES])
    halves, bytes_ = u16_at(a[_SCALES] + 2 * first_scale), u8_at(a[_SCALES] + first_scale)
    units = f32_at(a[_UNITS] + 4 * slot * n_outputs)
    n_parts = 0
    for output in range(n_outputs):
        place = U(_OUTPUTS + _OUTPUT_FIELDS * output)
        short, longer, column = a[place + U(2)], a[place + U(3)], a[place + U(4)]
        height = short + (1 if block < longer else 0)
        low = max(first_output, column)
        high = min(first_output + np.int64(width), column + height)
        if low >= high or a[place] == 0:
            continue
        row = block * short + min(block, longer) + low - column
        parts[U(4 * n_parts)] = a[place] + item_bytes * row
        parts[U(4 * n_parts + 1)] = a[place + U(1)] * item_bytes
        parts[U(4 * n_parts + 2)] = low - first_output
        parts[U(4 * n_parts + 3)] = high - low
        n_parts += 1
        unit = units[U(output)]
        first = U(low - first_output)
        if a[_OCTAVES] != 0:
            for i in range(U(high - low)):
                scales[first + i] = octave_of[U(bytes_[first + i])] * unit
        else:
            for i in range(U(high - low)):
                scales[first + i] = from_f16(halves[first + i]) * unit
    return n_parts
