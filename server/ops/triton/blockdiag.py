"""Block-diagonal deltas straight from packed codes: ``y[rows of slot] += x @ dW[slot]^T``.

One program owns a tile of outputs of one block for up to `tile_rows` rows of one slot, reads that
block's slice of x and its own bytes of every byte row once, and adds to y itself: no atomics, no
scratch, one launch for all variants and all matrices that read the same x. The number of variants
is data in device memory, so a captured graph serves any mix.

Codes are packed along the inputs (`server.ops.packed`): field f of a byte row belongs to input
``f R + row``, so every field is a product of its own with another slice of x, into one accumulator.

Numerics: codes become ``16 + code`` in x's dtype by one mask and one or (exact; 8 bit: the centred
level, exact); products accumulate in float32; ``(16 + mid) * sum(x)`` is taken off at the end,
then scale and unit are applied in float32 and y is rounded once. 16-bit values are rounded to x's
dtype.

Bytes per step: codes and scales of every distinct slot (`delta_bytes`), x and y once per segment.

Tensor parallelism: blocks are independent. A column-parallel linear (q, k, v, gate, up) keeps the
blocks of its outputs and needs only their slices of x; a row-parallel one (o, down) keeps the
blocks of its slice of x, and their outputs join the existing all-reduce. A rank holds ``s / tp``
blocks either way: bytes divide evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.packed import PackedBlocks
from server.ops.triton.compat import (
    UPCAST,
    launch,
    mac,
    n_pieces,
    n_programs,
    next_power_of_two,
    piece_rows,
)
from server.ops.triton.segments import (
    SegmentArrays,
    alignment,
    gathers,
    input_alignment,
    tile_table,
    where_of,
    word_bytes,
)
from server.ops.triton.unpack import unpack_assembly

PREFILL_ROWS = 64
MIN_TILE = 16  # of a tensor-core operand
MAX_MATRICES = 3  # that read one x


@dataclass(frozen=True, slots=True)
class BlockKernel:
    """Launch parameters for one set of slot arrays: made once, when they are.

    tiles    int32 [n_tiles, 4] on the device, see `tile_table`
    words    words of every byte row a program owns
    rows     byte rows it takes per step
    align, input_align  see `alignment` and `input_alignment`
    """

    tiles: Tensor
    words: int
    rows: int
    align: int
    input_align: int
    per_processor: int
    warps: int
    stages: int


def block_kernel(blocks: PackedBlocks, *, prefill: bool = False) -> BlockKernel:
    """Tile sizes by rule: 64 outputs a program, fewer where blocks are smaller; no autotuning."""
    assert len(blocks.sizes) <= MAX_MATRICES
    word = word_bytes(blocks)
    words = next_power_of_two(-(-max(blocks.block_rows()) // word))
    words = min(64 // word, max(MIN_TILE, words))
    byte_rows = blocks.codes.shape[2] if blocks.bits != 3 else -(-blocks.n // blocks.n_blocks // 8)
    most = 32 if prefill or blocks.bits == 3 else 64
    return BlockKernel(
        tiles=tile_table(blocks, words).to(blocks.codes.device),
        words=words,
        rows=min(most, max(MIN_TILE, next_power_of_two(max(1, byte_rows)))),
        align=alignment(blocks),
        input_align=input_alignment(blocks),
        per_processor=2 if prefill else 4,
        warps=4,
        stages=3 if prefill else 4,
    )


def blockdiag_add_(
    outputs: Sequence[Tensor | None],
    x: Tensor,
    segments: SegmentArrays,
    blocks: PackedBlocks,
    kernel: BlockKernel,
    present: Tensor,
) -> None:
    """Add every present slot's delta to its rows.

    outputs  ``[T, m]`` of each matrix or None to leave it out, in x's dtype, last axis contiguous,
             one row stride (column slices of one tensor)
    x        [T, n]
    present  int32 [slots]: place + 1 of a slot in the arrays, 0 where it has nothing here
    """
    word = word_bytes(blocks)
    codes = blocks.codes.view(torch.int16) if word == 2 else blocks.codes
    given = [y for y in outputs if y is not None]
    targets = [given[0] if y is None else y for y in outputs]
    targets += [given[0]] * (MAX_MATRICES - len(targets))
    assert len({y.stride(0) for y in given}) == 1, "outputs must share one row stride"
    launch(
        _blockdiag_kernel,
        (n_programs(x.device, kernel.per_processor),),
        *targets, sum(1 << g for g, y in enumerate(outputs) if y is not None),
        x, codes, blocks.scales, blocks.units, present, len(present), kernel.tiles,
        where_of(segments), len(kernel.tiles),
        blocks.n, blocks.n_blocks, codes.shape[2], given[0].stride(0), x.stride(0),
        codes.stride(0), codes.stride(1), codes.stride(2),
        blocks.scales.stride(0), blocks.scales.stride(1), blocks.units.stride(0),
        BITS=blocks.bits,
        WORD=word,
        GATHER=gathers(blocks),
        ALIGN=kernel.align,
        INPUT_ALIGN=kernel.input_align,
        TILE_T=segments.tile_rows,
        TILE_P=kernel.words,
        TILE_K=kernel.rows,
        ASM=unpack_assembly(blocks.bits, word, x.dtype),
        UPCAST=UPCAST,
        num_warps=kernel.warps,
        num_stages=kernel.stages,
    )  # fmt: skip


@triton.jit
def _as_values(code, BITS: tl.constexpr, dtype: tl.constexpr):
    """int16 codes -> numbers of dtype `dtype`: 16 + code, or the centred level (8 bit, float32).

    ``0x4180`` is 16 in bfloat16 with steps of 1/8, ``0x4C00`` 16 in float16 with steps of 1/64.
    """
    if BITS == 8:
        return (code.to(tl.float32) - 127.5).to(dtype)
    elif dtype == tl.bfloat16:
        return ((code << 3) | 0x4180).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        return ((code << 6) | 0x4C00).to(tl.float16, bitcast=True)
    else:
        return code.to(tl.float32) - ((1 << BITS) - 1) * 0.5


@triton.jit
def _bits(word, SHIFT: tl.constexpr, BITS: tl.constexpr):
    return (word.to(tl.int16) >> SHIFT) & ((1 << BITS) - 1)


@triton.jit
def _field(
    low, high, x, FIELD: tl.constexpr, BYTE: tl.constexpr,
    BITS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One field of the words' byte number BYTE, as numbers of x's dtype.

    At 3 bit `low` is the low plane's row that holds this field, `high` the high plane's.
    """
    FIELDS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    if ASM is not None:
        if BITS == 3:
            return tl.inline_asm_elementwise(
                ASM[BYTE * FIELDS + FIELD], "=r,r,r", [low, high], x.dtype, True, 2
            )
        else:
            return tl.inline_asm_elementwise(
                ASM[BYTE * FIELDS + FIELD], "=r,r", [low], x.dtype, True, 2
            )
    elif BITS == 3:
        code = _bits(low, BYTE * 8 + FIELD // 2 * 2, 2) | (_bits(high, BYTE * 8 + FIELD, 1) << 2)
        return _as_values(code, BITS, x.dtype)
    else:
        return _as_values(_bits(low, BYTE * 8 + FIELD * BITS, BITS), BITS, x.dtype)


@triton.jit
def _blockdiag_kernel(
    y0, y1, y2, wanted, x, codes, scales, units, present, n_present, tiles, where, n_tiles,
    n, s, byte_rows, y_stride, x_stride,
    code_slot, code_block, code_row, scale_slot, scale_block, unit_slot,
    BITS: tl.constexpr, WORD: tl.constexpr, GATHER: tl.constexpr, ALIGN: tl.constexpr,
    INPUT_ALIGN: tl.constexpr, TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_K: tl.constexpr,
    ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    n_items = n_pieces(where) * s * n_tiles
    for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        tile = tiles + item % n_tiles * 4
        block = item // n_tiles % s
        matrix = tl.load(tile + 3)
        piece = item // (n_tiles * s)
        place, token, row_mask = piece_rows(where, present, n_present, piece, TILE_T)
        if (place >= 0) & (((wanted >> matrix) & 1) != 0):
            y = y0
            if matrix == 1:
                y = y1
            if matrix == 2:
                y = y2
            wide = place.to(tl.int64)
            _blockdiag_tile(
                y, x, codes + wide * code_slot + block.to(tl.int64) * code_block,
                scales + wide * scale_slot + block * scale_block,
                tl.load(units + wide * unit_slot + matrix), tile, token, row_mask,
                block, n, s, byte_rows, y_stride, x_stride, code_row,
                BITS, WORD, GATHER, ALIGN, INPUT_ALIGN, TILE_T, TILE_P, TILE_K, ASM, UPCAST,
            )  # fmt: skip


@triton.jit
def _blockdiag_tile(
    y, x, codes, scales, unit, tile, token, row_mask,
    block, n, s, byte_rows, y_stride, x_stride, code_row,
    BITS: tl.constexpr, WORD: tl.constexpr, GATHER: tl.constexpr, ALIGN: tl.constexpr,
    INPUT_ALIGN: tl.constexpr, TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_K: tl.constexpr,
    ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first = tl.multiple_of(tl.load(tile), ALIGN)
    matrix_first = tl.load(tile + 1)
    m = tl.load(tile + 2)
    rows = m // s + (block < m % s).to(tl.int32)
    columns = tl.multiple_of(n // s + (block < n % s).to(tl.int32), INPUT_ALIGN)
    x += tl.multiple_of(block * (n // s) + tl.minimum(block, n % s), INPUT_ALIGN)
    x_rows = x + token[:, None].to(tl.int64) * x_stride
    word = first + tl.arange(0, TILE_P)
    matrix_end = matrix_first + tl.cdiv(m, s) // WORD
    inside = word < tl.multiple_of(matrix_end, ALIGN)

    nb = tl.cdiv(n, s)
    FIELDS: tl.constexpr = 1 if BITS == 16 or GATHER else (8 if BITS == 3 else 8 // BITS)
    low_rows = tl.cdiv(nb, 4) if BITS == 3 else byte_rows
    high_rows = tl.cdiv(nb, 8)
    # Rows a step goes over: inputs themselves, byte rows of the high plane, or byte rows.
    walked = nb if GATHER else (high_rows if BITS == 3 else byte_rows)
    walked = tl.multiple_of(walked, INPUT_ALIGN)
    accs = ()
    for _ in tl.static_range(WORD):
        accs = accs + (tl.zeros((TILE_T, TILE_P), tl.float32),)  # type: ignore[assignment]
    # Whether `_as_values` adds to the centred level, which the sum of x then takes off again.
    SMALL: tl.constexpr = x.dtype.element_ty != tl.float32 and BITS < 8
    x_sum = tl.zeros((TILE_T,), tl.float32)
    for j in range(0, walked, TILE_K):
        row = j + tl.arange(0, TILE_K)
        mask = (row < walked)[:, None] & inside[None, :]
        low_row = row % low_rows if GATHER else row
        place = codes + low_row[:, None] * code_row + word[None, :]
        low = tl.load(place, mask=mask, other=0)
        odd = low
        high = low
        if BITS == 3:
            high_row = low_rows + (row % high_rows if GATHER else row)
            high = tl.load(codes + high_row[:, None] * code_row + word[None, :], mask=mask, other=0)
            if not GATHER:
                odd = tl.load(place + high_rows * code_row, mask=mask, other=0)
        for f in tl.static_range(FIELDS):
            column = tl.multiple_of(f * walked, INPUT_ALIGN) + row
            x_mask = row_mask[:, None] & ((row < walked) & (column < columns))[None, :]
            xs = tl.load(x_rows + column[None, :], mask=x_mask, other=0.0)
            if SMALL:
                x_sum += tl.sum(xs.to(tl.float32), axis=1)
            source = odd if BITS == 3 and f % 2 else low
            new = ()
            for h in tl.static_range(WORD):
                if BITS == 16:
                    w = source.to(xs.dtype)
                elif GATHER:
                    code = (source.to(tl.int16) >> (8 * h + row // low_rows * 2)[:, None]) & 3
                    code |= ((high.to(tl.int16) >> (8 * h + row // high_rows)[:, None]) & 1) << 2
                    w = _as_values(code.to(tl.int16), BITS, xs.dtype)
                else:
                    w = _field(source, high, xs, f, h, BITS, ASM)
                new = new + (mac(accs[h], xs, w, UPCAST),)  # type: ignore[assignment]
            accs = new

    # Padding of x is 0 and adds nothing.
    OFFSET: tl.constexpr = 16 + ((1 << BITS) - 1) * 0.5 if SMALL else 0
    y += block * (m // s) + tl.minimum(block, m % s)
    y_rows = y + token[:, None].to(tl.int64) * y_stride
    for h in tl.static_range(WORD):
        out = (word - matrix_first) * WORD + h
        used = inside & (out < rows)
        scale = tl.load(scales + word * WORD + h, mask=used, other=0).to(tl.float32)
        if scales.dtype.element_ty == tl.uint8:  # sixteenths of an octave, 0 for zero
            scale = tl.where(scale > 0, tl.exp2((scale - 255) / 16), 0.0)
        scale *= unit
        delta = (accs[h] - OFFSET * x_sum[:, None]) * scale[None, :]
        y_mask = row_mask[:, None] & used[None, :]
        old = tl.load(y_rows + out[None, :], mask=y_mask, other=0.0)
        tl.store(y_rows + out[None, :], (old.to(tl.float32) + delta).to(old.dtype), mask=y_mask)
