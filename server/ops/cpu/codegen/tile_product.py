"""The inner product of packed codes with a few rows of x, in vector registers.

numba's loop vectoriser would go through memory between unpacking and multiplying; here the vector
code is written out as LLVM vectors (16 outputs a register), which LLVM fits to any CPU. One
pass loads 16 code bytes, takes their fields apart, and multiplies each by up to 8 rows of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from server.ops.cpu.codegen.intrinsics import u8_at
from server.ops.cpu.codegen.vectors import (
    F32,
    I16,
    I32,
    LANES,
    VECTOR,
    at,
    multiply_add,
    splat,
    widen_halves,
)

ROW_GROUP = 8  # rows that share one unpacking
TILE = 128  # outputs of one tile: the row stride of the sums
# Sums of a tile, and as much again for 16 columns that overlap it.
SUMS = ROW_GROUP * (TILE + LANES)
CHAINS = 2  # sums of one output that do not wait for each other
U = np.uint64
I8 = ir.IntType(8)


@njit(inline="always")
def rows_at_once(rows):
    """How many of the rows that are left go together: 8, 4 or 1."""
    if rows >= ROW_GROUP:
        return ROW_GROUP
    return 4 if rows >= 4 else 1


def make_plane(product: Callable[[int], Any], item: int) -> Any:
    """All columns of one plane, 16 at a time; `item` is the bytes of a code.

    product: makes an intrinsic for a number of rows, see `_vector_product`. What is left over at
    the end is computed together with the columns before it and taken from there; the codes of a
    tile of fewer than 16 columns are copied, with zeros beside them.
    """
    any_rows = _any_rows(product)

    @njit
    def columns(codes, mb, code_rows, x, stride, sums, width, n_rows):
        place, first = sums.ctypes.data, 0
        while first + LANES <= width:
            any_rows(
                codes + item * first, mb, code_rows, x, stride, place + 4 * first, TILE, n_rows
            )
            first += LANES
        left = width - first
        if left <= 0:
            return
        spare = U(ROW_GROUP * TILE)
        for i in range(U(LANES * n_rows)):
            sums[spare + i] = np.float32(0)
        start, step, skipped = codes + item * (width - LANES), mb, U(LANES - left)
        room = np.zeros(code_rows * LANES * item if width < LANES else 0, np.uint8)
        if width < LANES:
            _copy_columns(codes, mb * item, code_rows, width * item, room, LANES * item)
            start, step, skipped = room.ctypes.data, np.int64(LANES), U(0)
        any_rows(start, step, code_rows, x, stride, place + 4 * ROW_GROUP * TILE, LANES, n_rows)
        for r in range(U(n_rows)):
            found = spare + r * U(LANES) + skipped
            for i in range(U(left)):
                sums[r * U(TILE) + U(first) + i] += sums[found + i]

    return columns


@njit
def _copy_columns(codes, row_bytes, code_rows, n_bytes, room, room_bytes):
    for j in range(code_rows):
        source = u8_at(codes + j * row_bytes)
        for i in range(U(n_bytes)):
            room[U(j * room_bytes) + i] = source[i]


def _any_rows(make: Callable[[int], Any]) -> Any:
    eight, four, one = (make(n) for n in (ROW_GROUP, 4, 1))

    @njit
    def product(codes, mb, code_rows, x, stride, sums, tile, n_rows):
        if n_rows == ROW_GROUP:
            eight(codes, mb, code_rows, x, stride, sums, tile)
        elif n_rows == 4:
            four(codes, mb, code_rows, x, stride, sums, tile)
        else:
            one(codes, mb, code_rows, x, stride, sums, tile)

    return product


def _plane(bits: int, centre: float) -> Any:
    return make_plane(lambda rows: _vector_product(bits, rows, centre), 2 if bits == 16 else 1)


def _vector_product(bits: int, rows: int, centre: float) -> Any:
    """An intrinsic for 16 columns and `rows` rows of x.

    Arguments, all int64: address of codes, their row stride in elements, code rows, address of x,
    x's row stride in elements, address of the sums, their row stride in elements.
    """

    @intrinsic
    def product(typingctx, codes, mb, code_rows, x, stride, sums, tile):
        i64 = types.int64
        signature = types.void(i64, i64, i64, i64, i64, i64, i64)
        return signature, _codegen(bits, rows, centre)

    return product


def _codegen(bits: int, rows: int, centre: float) -> Callable[..., Any]:

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, mb, code_rows, x, stride, sums, tile = args
        sums_at = [
            builder.bitcast(
                builder.gep(
                    builder.inttoptr(sums, F32.as_pointer()), [builder.mul(tile, tile.type(r))]
                ),
                VECTOR.as_pointer(),
            )
            for r in range(rows)
        ]
        zeros = ir.Constant(VECTOR, [0.0] * LANES)
        # Fields take turns, so that one row's products do not wait for each other.
        totals = [
            [cgutils.alloca_once_value(builder, zeros) for _ in range(CHAINS)] for _ in range(rows)
        ]
        with cgutils.for_range(builder, code_rows) as loop:
            for field, weights in enumerate(
                _fields(context, builder, codes, mb, loop.index, bits, centre)
            ):
                input_index = builder.add(loop.index, builder.mul(code_rows, code_rows.type(field)))
                for r, chains in enumerate(totals):
                    total = chains[field % CHAINS]
                    index = builder.add(builder.mul(stride, stride.type(r)), input_index)
                    value = builder.load(
                        builder.gep(builder.inttoptr(x, F32.as_pointer()), [index])
                    )
                    factor = splat(builder, value, LANES)
                    added = multiply_add(context, builder, weights, factor, builder.load(total))
                    builder.store(added, total)
        for chains, place in zip(totals, sums_at, strict=True):
            total = builder.load(place, align=4)
            for chain in chains:
                total = builder.fadd(total, builder.load(chain))
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    return codegen


def _fields(
    context: Any, builder: Any, codes: Any, mb: Any, row: Any, bits: int, centre: float
) -> list[Any]:
    """The fields of one code row as float vectors, less `centre`."""
    offset = builder.mul(row, mb)
    wide = ir.VectorType(I32, LANES)
    if bits == 16:
        loaded = builder.load(at(builder, codes, I16, offset, LANES), align=2)
        return [widen_halves(context, builder, loaded)]
    loaded = builder.load(at(builder, codes, I8, offset, LANES), align=1)
    raw = builder.zext(loaded, wide)
    mask = ir.Constant(wide, [(1 << bits) - 1] * LANES)
    found = []
    for shift in range(0, 8, bits):
        moved = builder.lshr(raw, ir.Constant(wide, [shift] * LANES)) if shift else raw
        last = shift + bits == 8
        code = builder.sitofp(moved if last else builder.and_(moved, mask), VECTOR)
        found.append(builder.fsub(code, ir.Constant(VECTOR, [centre] * LANES)) if centre else code)
    return found


_plane_1, _plane_2 = _plane(1, 0.5), _plane(2, 1.5)
_plane_4, _plane_8, _values_16 = _plane(4, 7.5), _plane(8, 127.5), _plane(16, 0.0)


@njit(inline="always")
def tile_product(bits, codes, mb, x, offset, stride, nb, sums, width, n_rows):
    """``sums[r, i] = sum_j (code[j, i] - centre) * x[r, j]`` for one tile of packed codes.

    bits and address of the tile's first code; elements from one code row to the next; x float32,
    the first row's offset in it and its row stride, padded with zeros past the inputs to the next
    multiple of 8; inputs nb; sums float32 [SUMS], begun with zeros [8, TILE]; width of the tile;
    rows, one of `rows_at_once`.
    """
    rows = x.ctypes.data + 4 * offset
    if bits == 4:
        _plane_4(codes, mb, (nb + 1) // 2, rows, stride, sums, width, n_rows)
    elif bits == 2:
        _plane_2(codes, mb, (nb + 3) // 4, rows, stride, sums, width, n_rows)
    elif bits == 3:  # centre 3.5 = 1.5 + 4 * 0.5
        low_rows = (nb + 3) // 4
        _plane_1(codes + low_rows * mb, mb, (nb + 7) // 8, rows, stride, sums, width, n_rows)
        for r in range(U(n_rows)):
            for i in range(U(width)):
                sums[r * U(TILE) + i] *= np.float32(4)
        _plane_2(codes, mb, low_rows, rows, stride, sums, width, n_rows)
    elif bits == 8:
        _plane_8(codes, mb, nb, rows, stride, sums, width, n_rows)
    else:
        _values_16(codes, mb, nb, rows, stride, sums, width, n_rows)
