"""Embedding look-up of block-diagonal deltas: one row of one block for each token."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from server.ops.cpu.codegen.intrinsics import (
    f32_at,
    from_bf16,
    from_f16,
    i64_at,
    next_task,
    to_bf16,
    u8_at,
    u16_at,
)
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.parallel import Parallel
from server.ops.packed import PackedBlocks, octaves

U = np.uint64
ROWS = 8  # of one task

(_Y, _Y_ROW, _IS_BF16, _N_ROWS, _IDS, _PLACES, _CODES, _SCALES, _UNITS) = range(1, 10)
(_S, _BYTE_ROWS, _MB, _BITS, _N, _M, _OCTAVES, _SCALE_STRIDE, _N_ARGUMENTS) = range(10, 19)


class EmbeddingKernel:
    """The compiled kernel."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._compiled = compile_kernel(_add_rows)
        self._octaves = octaves()

    def add_(self, y: Tensor, ids: Tensor, places: Tensor, blocks: PackedBlocks) -> None:
        """See `server.ops.blockdiag.blockdiag_rows_add_`; ids and places contiguous."""
        _, s, byte_rows, mb = blocks.codes.shape
        a = np.zeros(_N_ARGUMENTS, np.int64)
        a[_Y : _UNITS + 1] = (
            y.data_ptr(),
            y.stride(0),
            y.dtype is torch.bfloat16,
            len(y),
            ids.data_ptr(),
            places.data_ptr(),
            blocks.codes.data_ptr(),
            blocks.scales.data_ptr(),
            blocks.units.data_ptr(),
        )
        a[_S : _SCALE_STRIDE + 1] = (
            s,
            byte_rows,
            mb,
            blocks.bits,
            blocks.n,
            blocks.sizes[0],
            self._octaves.data_ptr() if blocks.scales.dtype is torch.uint8 else 0,
            blocks.scales.stride(0),
        )
        self._parallel.run(self._compiled, a, -(-len(y) // ROWS))


def _add_rows(address):
    a = i64_at(address)
    s = a[_S]
    ids, places = i64_at(a[_IDS]), i64_at(a[_PLACES])
    units, table = f32_at(a[_UNITS]), f32_at(a[_OCTAVES])
    short, longer = a[_M] // s, a[_M] % s
    wide, wider = a[_N] // s, a[_N] % s
    values = np.empty(wide + 1, np.float32)
    while True:
        first = next_task(address) * ROWS
        if first >= a[_N_ROWS]:
            break
        for row in range(first, min(first + ROWS, a[_N_ROWS])):
            place, token = places[U(row)], ids[U(row)]
            if place < 0:
                continue
            block = token // (short + 1)
            if block >= longer:
                block = longer + (token - longer * (short + 1)) // short
            within = token - (block * short + min(block, longer))
            n = wide + (1 if block < wider else 0)
            at_scale = place * a[_SCALE_STRIDE] + block * a[_MB] + within
            if a[_OCTAVES] != 0:
                scale = table[U(u8_at(a[_SCALES])[U(at_scale)])]
            else:
                scale = from_f16(u16_at(a[_SCALES])[U(at_scale)])
            scale *= units[U(place)]
            codes = (place * s + block) * a[_BYTE_ROWS] * a[_MB] + within
            _decode(address, codes, n, values)
            column = a[_Y_ROW] * row + block * wide + min(block, wider)
            _add(a[_Y], column, a[_IS_BF16] != 0, values, n, scale)


@njit
def _decode(address, codes, n, values):
    """The n values of a row from its first code on, scale 1."""
    a = i64_at(address)
    bits, mb = a[_BITS], a[_MB]
    longest = (a[_N] + a[_S] - 1) // a[_S]
    if bits == 16:
        halves = u16_at(a[_CODES])
        for j in range(n):
            values[j] = from_f16(halves[U(codes + j * mb)])
        return
    stored = u8_at(a[_CODES])
    low_bits = 2 if bits == 3 else bits
    low_rows = (longest * low_bits + 7) // 8
    high_rows = (longest + 7) // 8
    centre = np.float32(((1 << bits) - 1) / 2)
    mask = (1 << low_bits) - 1
    for j in range(n):
        byte = np.int64(stored[U(codes + j % low_rows * mb)])
        code = (byte >> (low_bits * (j // low_rows))) & mask
        if bits == 3:
            byte = np.int64(stored[U(codes + (low_rows + j % high_rows) * mb)])
            code += ((byte >> (j // high_rows)) & 1) << 2
        values[j] = np.float32(code) - centre


@njit
def _add(y, column, is_bf16, values, n, scale):
    if is_bf16:
        half = u16_at(y)
        for j in range(n):
            at = U(column + j)
            half[at] = to_bf16(from_bf16(half[at]) + values[j] * scale)
    else:
        full = f32_at(y)
        for j in range(n):
            full[U(column + j)] += values[j] * scale
