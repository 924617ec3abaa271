"""Block-diagonal deltas straight from packed codes: ``y[rows of slot] += x @ dW[slot]^T``.

One program owns a tile of outputs of one block for up to `tile_rows` rows of one slot, reads that
block's slice of x and its own bytes of every input column once, and adds to y itself: no atomics,
no scratch, one launch for all variants and all matrices that read the same x. The number of
variants is data in device memory, so a captured graph serves any mix.

Numerics: codes become ``16 + code`` in x's dtype by one mask and one or (exact; 8 bit: the centred
level, exact); products accumulate in float32; ``(16 + mid) * sum(x)`` is taken off at the end,
then scale and unit are applied in float32 and y is rounded once. 16-bit values are rounded to x's
dtype.

Bytes per step: `BlockLayout.bytes_per_slot` for every distinct slot, x and y once per segment.

Tensor parallelism: a column-parallel linear (q, k, v, gate, up) shards whole diagonal blocks when
its rank's outputs are blocks of their own, and so needs only its blocks' slices of x; a
row-parallel one (o, down) likewise keeps the blocks of its slice of x, whose outputs join the
existing all-reduce. Either way a rank holds ``s / tp`` blocks: bytes divide evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.triton.compat import (
    UPCAST,
    launch,
    mac,
    n_programs,
    next_power_of_two,
    slot_of,
)
from server.ops.triton.layout import (
    PLANES,
    PackedBlocks,
    SegmentArrays,
    alignment,
    gathers,
    plane_bytes,
    rows_of,
    tile_table,
    unpack_planes,
    word_bytes,
)
from server.ops.triton.unpack import unpack_assembly

DECODE_ROWS = 16
PREFILL_ROWS = 64
MIN_TILE = 16  # of a tensor-core operand


@dataclass(frozen=True, slots=True)
class BlockKernel:
    """Launch parameters for one layout: made once, when its slot arrays are.

    tiles    int32 [n_tiles, 8] on the device, see `tile_table`
    words    words of every input column a program owns
    inputs   input columns it takes per step
    align    words that all places are a multiple of
    """

    tiles: Tensor
    words: int
    inputs: int
    align: int
    per_processor: int
    warps: int
    stages: int


def plan_kernel(blocks: PackedBlocks, *, prefill: bool = False) -> BlockKernel:
    """Tile sizes by rule: 128 outputs a program, fewer where blocks are smaller; no autotuning."""
    layout = blocks.layout
    word = 1 if layout.bits == 16 else word_bytes(layout)
    if gathers(layout) or layout.bits == 16:
        widest, most = max(layout.block_outputs), 64
    else:
        plane = PLANES[layout.bits][-1]  # at 3 bit the high plane is tiled
        widest, most = (
            max(plane_bytes(mb, plane) for mb in layout.block_outputs) // word,
            16 if layout.bits == 3 else 32,
        )
    words = min(most, max(MIN_TILE, next_power_of_two(widest)))
    inputs = min(
        32 if prefill or layout.bits == 3 else 64,
        max(MIN_TILE, next_power_of_two(layout.block_inputs)),
    )
    return BlockKernel(
        tiles=tile_table(layout, words).to(blocks.codes.device),
        words=words,
        inputs=inputs,
        align=alignment(layout, words),
        per_processor=2 if prefill else 4,
        warps=8 if prefill and layout.bits < 4 else 4,
        stages=3 if prefill else 4,
    )


def blockdiag_add_(
    y: Tensor, x: Tensor, segments: SegmentArrays, blocks: PackedBlocks, kernel: BlockKernel
) -> None:
    """Add every present slot's delta to its rows.

    y [T, sum m], x [T, n] of one dtype, rows contiguous; y may have wider rows than it needs.
    Rows of no segment are untouched. Shapes are checked where the arrays are made.
    """
    layout = blocks.layout
    word = word_bytes(layout)
    codes = blocks.codes.view(torch.int16) if word == 2 and layout.bits != 16 else blocks.codes
    launch(
        _blockdiag_kernel,
        (n_programs(x.device, kernel.per_processor),),
        *(y, x, codes, blocks.scales, blocks.units, blocks.present, kernel.tiles),
        *(segments.slots, segments.starts, segments.ends, segments.count),
        *(len(kernel.tiles), layout.n, layout.n_blocks, y.stride(0), x.stride(0)),
        *(codes.stride(0), codes.stride(1), codes.stride(2)),
        *(blocks.scales.stride(0), blocks.scales.stride(1), blocks.units.stride(0)),
        BITS=layout.bits,
        WORD=word,
        GATHER=gathers(layout),
        ALIGN=kernel.align,
        TILE_T=segments.tile_rows,
        TILE_P=kernel.words,
        TILE_K=kernel.inputs,
        ASM=unpack_assembly(layout.bits, word, x.dtype),
        UPCAST=UPCAST,
        num_warps=kernel.warps,
        num_stages=kernel.stages,
    )


def blockdiag_add_reference_(
    y: Tensor,
    x: Tensor,
    segments: SegmentArrays,
    blocks: PackedBlocks,
    compute: torch.dtype = torch.float32,
) -> None:
    """The same in torch, block by block, in `compute`."""
    layout = blocks.layout
    for segment in rows_of(segments):
        if segment.slot < 0 or not int(blocks.present[segment.slot]):
            continue
        part = slice(segment.start, segment.end)
        byte = place = column = 0
        for g, (m, mb, width) in enumerate(
            zip(layout.sizes, layout.block_outputs, layout.widths, strict=True)
        ):
            codes = blocks.codes[segment.slot, :, :, byte : byte + width]
            unit = blocks.units[segment.slot, g]
            scale = blocks.scales[segment.slot, :, place : place + mb].to(compute) * unit
            if layout.bits == 16:
                values = codes.to(compute) * unit
            else:
                mid = ((1 << layout.bits) - 1) / 2
                values = unpack_planes(codes, layout.bits, mb).to(compute) - mid
                values *= scale.unsqueeze(1)
            out = _blocks_apply(x[part].to(compute), values, m)
            target = y[part, column : column + m]
            target.copy_((target.to(compute) + out).to(y.dtype))
            byte, place, column = byte + width, place + mb, column + m


def _blocks_apply(x: Tensor, values: Tensor, m: int) -> Tensor:
    """``x [t, n]``, ``values [s, nb, mb]`` -> ``[t, m]``."""
    s = len(values)
    rows, cols = divmod(m, s), divmod(x.shape[1], s)
    parts, col = [], 0
    for block in range(s):
        height, width = rows[0] + (block < rows[1]), cols[0] + (block < cols[1])
        parts.append(x[:, col : col + width] @ values[block, :width, :height])
        col += width
    return torch.cat(parts, dim=1)


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
def _multiply(
    accs, x, low, odd, high,
    BITS: tl.constexpr, WORD: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Each field of the words is a tile of weights of its own: one product per field.

    Field f of byte h of word w is output ``f * plane + WORD * w + h``; accumulator ``h * F + f``.
    """
    out = ()
    FIELDS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    for u in tl.static_range(WORD * FIELDS):
        source = odd if BITS == 3 and u % 2 else low
        if ASM is not None:
            if BITS == 3:
                w = tl.inline_asm_elementwise(ASM[u], "=r,r,r", [source, high], x.dtype, True, 2)
            else:
                w = tl.inline_asm_elementwise(ASM[u], "=r,r", [source], x.dtype, True, 2)
        elif BITS == 3:
            code = _bits(source, u // 8 * 8 + u % 8 // 2 * 2, 2) | (_bits(high, u, 1) << 2)
            w = _as_values(code, BITS, x.dtype)
        else:
            w = _as_values(_bits(low, u * BITS, BITS), BITS, x.dtype)
        out = out + (mac(accs[u], x, w, UPCAST),)  # type: ignore[assignment]
    return out


@triton.jit
def _add_to_y(
    y_rows, scale_row, acc, x_sum, unit, out, rows, row_mask,
    BITS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Add one tile: outputs `out` [P] of a block with `rows` outputs; y_rows [T, 1] pointers."""
    inside = out < rows
    if OFFSET != 0:
        acc = acc - OFFSET * x_sum[:, None]
    if BITS == 16:
        delta = acc * unit
    else:
        delta = (
            acc * (tl.load(scale_row + out, mask=inside, other=0.0).to(tl.float32) * unit)[None, :]
        )
    mask = row_mask[:, None] & inside[None, :]
    old = tl.load(y_rows + out[None, :], mask=mask, other=0.0)
    tl.store(y_rows + out[None, :], (old.to(tl.float32) + delta).to(old.dtype), mask=mask)


@triton.jit
def _blockdiag_kernel(
    y, x, codes, scales, units, present, tiles, seg_slot, seg_start, seg_end, seg_count,
    n_tiles, n, s, y_stride, x_stride,
    code_slot, code_block, code_column, scale_slot, scale_block, unit_slot,
    BITS: tl.constexpr, WORD: tl.constexpr, GATHER: tl.constexpr, ALIGN: tl.constexpr,
    TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_K: tl.constexpr,
    ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    n_items = tl.load(seg_count) * s * n_tiles
    for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        block = (item // n_tiles) % s
        segment = item // (n_tiles * s)
        slot = slot_of(seg_slot, present, segment)
        if slot >= 0:
            wide = slot.to(tl.int64)
            _blockdiag_tile(
                y,
                x,
                codes + wide * code_slot + block.to(tl.int64) * code_block,
                scales + wide * scale_slot + block * scale_block,
                units + wide * unit_slot,
                tiles + item % n_tiles * 8,
                tl.load(seg_start + segment),
                tl.load(seg_end + segment),
                block,
                n,
                s,
                y_stride,
                x_stride,
                code_column,
                BITS,
                WORD,
                GATHER,
                ALIGN,
                TILE_T,
                TILE_P,
                TILE_K,
                ASM,
                UPCAST,
            )


@triton.jit
def _blockdiag_tile(
    y, x, codes, scales, units, tile, start, end, block, n, s, y_stride, x_stride, code_column,
    BITS: tl.constexpr, WORD: tl.constexpr, GATHER: tl.constexpr, ALIGN: tl.constexpr,
    TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_K: tl.constexpr,
    ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first = tl.multiple_of(tl.load(tile + 1), ALIGN)
    low_words = tl.multiple_of(tl.load(tile + 2), ALIGN)
    high_words = tl.multiple_of(tl.load(tile + 3), ALIGN)
    m = tl.load(tile + 6)
    rows = m // s + (block < m % s).to(tl.int32)
    columns = n // s + (block < n % s).to(tl.int32)
    x += block * (n // s) + tl.minimum(block, n % s)
    token = start + tl.arange(0, TILE_T)
    row_mask = token < end
    x_rows = x + token[:, None].to(tl.int64) * x_stride
    place = first + tl.arange(0, TILE_P)  # word of the tiled plane; with GATHER the output itself
    plane = high_words if BITS == 3 else low_words  # what is tiled
    inside = place < (rows if GATHER else plane)
    low_place = place % low_words if GATHER else place
    high_place = low_words + (place % high_words if GATHER else place)
    low_shift = ((place // low_words) * 2).to(tl.int16)
    column0 = codes + tl.multiple_of(tl.load(tile), ALIGN)

    N_ACC: tl.constexpr = 1 if BITS == 16 or GATHER else WORD * (8 if BITS == 3 else 8 // BITS)
    accs = ()
    for _ in tl.static_range(N_ACC):
        accs = accs + (tl.zeros((TILE_T, TILE_P), tl.float32),)  # type: ignore[assignment]
    x_sum = tl.zeros((TILE_T,), tl.float32)
    for j in range(0, columns, TILE_K):
        k = j + tl.arange(0, TILE_K)
        xs = tl.load(
            x_rows + k[None, :], mask=row_mask[:, None] & (k < columns)[None, :], other=0.0
        )
        x_sum += tl.sum(xs.to(tl.float32), axis=1)
        column = column0 + k[:, None] * code_column
        mask = (k < columns)[:, None] & inside[None, :]
        low = tl.load(column + low_place[None, :], mask=mask, other=0)
        odd = low
        high = low
        if BITS == 3:
            high = tl.load(column + high_place[None, :], mask=mask, other=0)
        if BITS == 16:
            acc = mac(accs[0], xs, low.to(xs.dtype), UPCAST)  # type: ignore[misc]
            accs = (acc,)  # type: ignore[assignment]
        elif GATHER:
            high_shift = (place // high_words).to(tl.int16)
            code = (low.to(tl.int16) >> low_shift[None, :]) & 3
            code |= ((high.to(tl.int16) >> high_shift[None, :]) & 1) << 2
            w = _as_values(code, BITS, xs.dtype)
            acc = mac(accs[0], xs, w, UPCAST)  # type: ignore[misc]
            accs = (acc,)  # type: ignore[assignment]
        else:
            if BITS == 3:
                odd = tl.load(column + (high_words + place)[None, :], mask=mask, other=0)
            accs = _multiply(accs, xs, low, odd, high, BITS, WORD, ASM, UPCAST)

    # What `_as_values` added to the centred level; padding of x is 0 and adds nothing.
    SMALL: tl.constexpr = x.dtype.element_ty != tl.float32 and BITS < 8
    OFFSET: tl.constexpr = 16 + ((1 << BITS) - 1) * 0.5 if SMALL else 0
    unit = tl.load(units + tl.load(tile + 7))
    scales += tl.load(tile + 4)
    y += tl.load(tile + 5) + block * (m // s) + tl.minimum(block, m % s)
    y_rows = y + token[:, None].to(tl.int64) * y_stride
    FIELDS: tl.constexpr = N_ACC if N_ACC == 1 else N_ACC // WORD
    for u in tl.static_range(N_ACC):
        # The outputs of this field; a word past the plane is no output.
        if N_ACC == 1:
            out = tl.where(inside, place, rows)
        else:
            out = u % FIELDS * plane * WORD + place * WORD + u // FIELDS
            out = tl.where(inside, out, rows)
        _add_to_y(y_rows, scales, accs[u], x_sum, unit, out, rows, row_mask, BITS, OFFSET)
