"""Block-diagonal deltas straight from packed codes.

A task is one tile of outputs of one block for up to `ROWS` rows of one segment: unpack the tile's
codes to float32 in cache, multiply, scale, add to y. Cost per step and variant: its packed bytes,
once per `ROWS` rows. Everything is float32 between the packed codes and one rounding into y.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.intrinsics import (
    FAST,
    f32_at,
    from_bf16,
    from_f16,
    i64_at,
    load_row,
    next_task,
    to_bf16,
    u8_at,
    u16_at,
)
from server.ops.cpu.parallel import Parallel
from server.ops.packed import PackedBlocks
from server.ops.rows import SlotSegments

ROWS = 64  # rows of x held in float32 at a time
TILE = 64  # outputs of one task
U = np.uint64

# Places in the argument array.
(_X, _X_STRIDE, _IS_BF16, _SEGMENTS, _N_SEGMENTS, _CODES, _SCALES, _UNITS) = range(1, 9)
(_S, _N, _BYTE_ROWS, _MB, _BITS, _N_OUTPUTS, _N_CHUNKS, _OUTPUTS) = range(9, 17)
_OUTPUT_FIELDS = 4  # address, row stride, m, first column of its block rows in the stacked tile


class BlockDiagKernel:
    """The compiled kernel, shared by all matrices."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.compiled = compile_kernel(_blockdiag)


class NumbaBlockDiag:
    """`server.ops.delta.BlockDiagOp` for one set of packed blocks.

    The arguments that stay the same are laid out once: a call writes a handful of numbers.
    """

    def __init__(self, kernel: BlockDiagKernel, blocks: PackedBlocks) -> None:
        self._kernel = kernel
        self._blocks = blocks  # keeps the memory alive
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
            0,
        )
        column = 0
        for place, (m, rows) in enumerate(zip(blocks.sizes, blocks.block_rows(), strict=True)):
            first = _OUTPUTS + _OUTPUT_FIELDS * place
            self._arguments[first + 2 : first + 4] = (m, column)
            column += rows
        self._tasks_per_segment = s * -(-mb // TILE)

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
        n_tasks = n_chunks * segments.n * self._tasks_per_segment
        self._kernel.parallel.run(self._kernel.compiled, arguments, n_tasks)


def _blockdiag(address):
    a = i64_at(address)
    s, n, byte_rows, mb, bits = a[_S], a[_N], a[_BYTE_ROWS], a[_MB], a[_BITS]
    n_segments, n_chunks = a[_N_SEGMENTS], a[_N_CHUNKS]
    segments = i64_at(a[_SEGMENTS])
    is_bf16 = a[_IS_BF16] != 0
    x_bytes = 2 if is_bf16 else 4
    code_bytes = 2 if bits == 16 else 1
    nb = (n + s - 1) // s
    x_rows = np.empty(ROWS * nb, np.float32)
    # Vector loops run to the next multiple of 16 outputs: they read past a tile's last row.
    weights = np.zeros(nb * TILE + 16, np.float32)
    sums = np.empty(4 * TILE, np.float32)
    scales = np.empty(TILE, np.float32)
    parts = np.empty(4 * a[_N_OUTPUTS], np.int64)
    n_tiles = (mb + TILE - 1) // TILE
    n_tasks = n_chunks * n_segments * s * n_tiles
    while True:
        task = next_task(address)
        if task >= n_tasks:
            break
        first_output = (task % n_tiles) * TILE
        block = task // n_tiles % s
        place = task // (n_tiles * s)
        segment, chunk = place % n_segments, place // n_segments
        slot = segments[U(3 * segment)]
        start = segments[U(3 * segment + 1)] + chunk * ROWS
        rows = min(ROWS, segments[U(3 * segment + 2)] - start)
        if rows <= 0:
            continue
        cols = n // s + (1 if block < n % s else 0)
        first_col = block * (n // s) + min(block, n % s)
        for t in range(U(rows)):
            source = a[_X] + ((start + t) * a[_X_STRIDE] + first_col) * x_bytes
            load_row(x_rows, t * U(cols), source, U(cols), is_bf16)
        width = U(min(TILE, mb - first_output))
        codes = a[_CODES] + ((slot * s + block) * byte_rows * mb + first_output) * code_bytes
        _unpack(weights, codes, bits, U(nb), U(mb), width)
        n_parts = _plan_parts(address, slot, block, first_output, width, parts, scales)
        t = 0
        while t < rows:
            n_rows = 4 if t + 4 <= rows else 1
            _multiply(sums, x_rows, weights, U(t), n_rows, U(cols), width)
            for part in range(n_parts):
                place, stride = parts[U(4 * part)], parts[U(4 * part + 1)]
                first, count = parts[U(4 * part + 2)], U(parts[U(4 * part + 3)])
                for r in range(n_rows):
                    target = place + (start + t + r) * stride
                    _add_row(target, sums, U(r * TILE + first), scales, U(first), count, is_bf16)
            t += n_rows


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _plan_parts(address, slot, block, first_output, width, parts, scales):
    """Where a tile's columns go: parts (address in row 0, row bytes, first column, count).

    Also lays the tile's scales out in float32. Returns the number of parts.
    """
    a = i64_at(address)
    s, mb, n_outputs = a[_S], a[_MB], a[_N_OUTPUTS]
    item_bytes = 2 if a[_IS_BF16] != 0 else 4
    stored = u16_at(a[_SCALES] + 2 * ((slot * s + block) * mb + first_output))
    units = f32_at(a[_UNITS] + 4 * slot * n_outputs)
    n_parts = 0
    for output in range(n_outputs):
        place = U(_OUTPUTS + _OUTPUT_FIELDS * output)
        m, column = a[place + U(2)], a[place + U(3)]
        height = m // s + (1 if block < m % s else 0)
        low = max(first_output, column)
        high = min(first_output + np.int64(width), column + height)
        if low >= high or a[place] == 0:
            continue
        row = block * (m // s) + min(block, m % s) + low - column
        parts[U(4 * n_parts)] = a[place] + item_bytes * row
        parts[U(4 * n_parts + 1)] = a[place + U(1)] * item_bytes
        parts[U(4 * n_parts + 2)] = low - first_output
        parts[U(4 * n_parts + 3)] = high - low
        n_parts += 1
        unit = units[U(output)]
        first = U(low - first_output)
        for i in range(U(high - low)):
            scales[first + i] = from_f16(stored[first + i]) * unit
    return n_parts


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _add_row(target, sums, first, scales, first_scale, count, is_bf16):
    """Add ``sums * scales`` to `count` values of y at `target`, rounding once."""
    if is_bf16:
        half = u16_at(target)
        for i in range(count):
            added = sums[first + i] * scales[first_scale + i]
            half[i] = to_bf16(from_bf16(half[i]) + added)
    else:
        full = f32_at(target)
        for i in range(count):
            full[i] += sums[first + i] * scales[first_scale + i]


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _unpack(weights, codes, bits, nb, mb, width):
    """``weights [nb, width]`` float32 = centred codes of one tile; rows lie `mb` bytes apart."""
    if bits == 4:
        rows = (nb + U(1)) // U(2)
        _spread(weights, U(0), codes, rows, mb, width, 0, 15, np.float32(7.5))
        _spread(weights, rows, codes, nb - rows, mb, width, 4, 15, np.float32(7.5))
    elif bits == 2:
        rows = (nb + U(3)) // U(4)
        for field in range(4):
            first = min(U(field) * rows, nb)
            count = min(rows, nb - first)
            _spread(weights, first, codes, count, mb, width, 2 * field, 3, np.float32(1.5))
    elif bits == 3:
        _unpack_three(weights, u8_at(codes), nb, mb, width)
    elif bits == 8:
        _spread(weights, U(0), codes, nb, mb, width, 0, 255, np.float32(127.5))
    else:
        half = u16_at(codes)
        for j in range(nb):
            for p in range(width):
                weights[j * width + p] = from_f16(half[j * mb + p])


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _spread(weights, first, codes, rows, mb, width, shift, mask, centre):
    """One field of the first `rows` byte rows -> rows ``first ..`` of the tile."""
    source = u8_at(codes)
    target = first * width
    if width == mb:  # the tile is the whole block: one long run
        for p in range(rows * width):
            code = np.int32((np.int32(source[p]) >> shift) & mask)
            weights[target + p] = np.float32(code) - centre
    else:
        for j in range(rows):
            for p in range(width):
                code = np.int32((np.int32(source[j * mb + p]) >> shift) & mask)
                weights[target + j * width + p] = np.float32(code) - centre


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _unpack_three(weights, source, nb, mb, width):
    """Low two bits in the first plane, the high bit in the second."""
    low_rows, high_rows = (nb + U(3)) // U(4), (nb + U(7)) // U(8)
    for j in range(nb):
        low, low_shift = (j % low_rows) * mb, np.int32(2 * (j // low_rows))
        high, high_shift = (low_rows + j % high_rows) * mb, np.int32(j // high_rows)
        for p in range(width):
            code = np.int32((np.int32(source[low + p]) >> low_shift) & 3)
            code += np.int32(((np.int32(source[high + p]) >> high_shift) & 1) << 2)
            weights[j * width + p] = np.float32(code) - np.float32(3.5)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _multiply(sums, x, w, t, n_rows, cols, width):
    """``sums [n_rows, TILE] = x[t : t + n_rows] @ w``; x [., cols], w [., width]; 4 rows or 1.

    Four inputs at a time, and four rows where there are: each load of w serves 16 products.
    """
    padded = (width + U(15)) & ~U(15)
    s1, s2, s3 = U(TILE), U(2 * TILE), U(3 * TILE)
    for p in range(U(4 * TILE)):
        sums[p] = np.float32(0)
    j = U(0)
    if n_rows == 4:
        while j + U(4) <= cols:
            i = t * cols + j
            a0, a1, a2, a3 = x[i], x[i + U(1)], x[i + U(2)], x[i + U(3)]
            i += cols
            b0, b1, b2, b3 = x[i], x[i + U(1)], x[i + U(2)], x[i + U(3)]
            i += cols
            c0, c1, c2, c3 = x[i], x[i + U(1)], x[i + U(2)], x[i + U(3)]
            i += cols
            d0, d1, d2, d3 = x[i], x[i + U(1)], x[i + U(2)], x[i + U(3)]
            k = j * width
            for p in range(padded):
                w0, w1 = w[k + p], w[k + width + p]
                w2, w3 = w[k + U(2) * width + p], w[k + U(3) * width + p]
                sums[p] += a0 * w0 + a1 * w1 + a2 * w2 + a3 * w3
                sums[s1 + p] += b0 * w0 + b1 * w1 + b2 * w2 + b3 * w3
                sums[s2 + p] += c0 * w0 + c1 * w1 + c2 * w2 + c3 * w3
                sums[s3 + p] += d0 * w0 + d1 * w1 + d2 * w2 + d3 * w3
            j += U(4)
        while j < cols:
            i = t * cols + j
            a0, b0 = x[i], x[i + cols]
            c0, d0 = x[i + U(2) * cols], x[i + U(3) * cols]
            k = j * width
            for p in range(padded):
                w0 = w[k + p]
                sums[p] += a0 * w0
                sums[s1 + p] += b0 * w0
                sums[s2 + p] += c0 * w0
                sums[s3 + p] += d0 * w0
            j += U(1)
        return
    while j + U(4) <= cols:
        i = t * cols + j
        a0, a1, a2, a3 = x[i], x[i + U(1)], x[i + U(2)], x[i + U(3)]
        k = j * width
        for p in range(padded):
            sums[p] += (
                a0 * w[k + p]
                + a1 * w[k + width + p]
                + a2 * w[k + U(2) * width + p]
                + a3 * w[k + U(3) * width + p]
            )
        j += U(4)
    while j < cols:
        a0 = x[t * cols + j]
        for p in range(padded):
            sums[p] += a0 * w[j * width + p]
        j += U(1)
