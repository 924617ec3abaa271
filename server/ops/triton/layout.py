"""How quantised diagonal blocks lie in device memory, and which rows belong to which slot.

Codes of ``b`` bits are packed along the *outputs* of a block in planes: a block has ``mb`` outputs
and every input column keeps ``P = ceil(mb / F)`` bytes, ``F = 8 / b``; output ``i`` lies in byte
``i % P``, bits ``[(i // P) b, (i // P + 1) b)``. 3 bit is a 2-bit plane followed by a 1-bit plane
(the high bit). A program that loads P' neighbouring bytes of many input columns therefore holds F
tiles of neighbouring outputs, unpacked by one shift and one mask, without moving a value.

    codes   uint8 [C, s, nb, sum P]    16 bit: float16 [C, s, nb, sum mb]
    scales  float16 [C, s, sum mb]     one per output; 0 in the padding; unused at 16 bit
    units   float32 [C, G]             per matrix; value = (code - (2^b - 1) / 2) * scale * unit

C slots, s blocks, nb inputs of the longest block, G matrices that read the same x side by side
(q, k, v). Rows and columns are cut as in `compressor.codecs.partition`: the first ``size % s``
blocks are one longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from server.ops.rows import BASE_SLOT, Segment

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of each plane, low bits first
TILE_FIELDS = 8  # numbers that describe one tile, see `tile_table`


def plane_bytes(mb: int, plane_bits: int) -> int:
    """Bytes per input column that `mb` outputs take in a plane."""
    return -(-mb * plane_bits // 8)


def column_bytes(mb: int, bits: int) -> int:
    """Bytes per input column of one matrix (elements of float16 at 16 bit)."""
    return mb if bits == 16 else sum(plane_bytes(mb, b) for b in PLANES[bits])


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """``codes`` uint8 ``[..., mb]`` -> ``[..., P]``; bits past the last output are 0."""
    parts, shift = [], 0
    mb = codes.shape[-1]
    for plane in PLANES[bits]:
        width, fields = plane_bytes(mb, plane), 8 // plane
        values = (codes >> shift) & ((1 << plane) - 1)
        padded = torch.nn.functional.pad(values, (0, width * fields - mb))
        lanes = padded.view(*codes.shape[:-1], fields, width)
        packed = torch.zeros_like(lanes[..., 0, :])
        for field in range(fields):
            packed |= lanes[..., field, :] << (field * plane)
        parts.append(packed)
        shift += plane
    return torch.cat(parts, dim=-1)


def unpack_planes(packed: Tensor, bits: int, mb: int) -> Tensor:
    """Inverse of `pack_planes`: uint8 ``[..., P]`` -> uint8 ``[..., mb]``."""
    codes = torch.zeros((*packed.shape[:-1], mb), dtype=torch.uint8, device=packed.device)
    shift = start = 0
    for plane in PLANES[bits]:
        width, fields = plane_bytes(mb, plane), 8 // plane
        part = packed[..., start : start + width]
        lanes = [(part >> (field * plane)) & ((1 << plane) - 1) for field in range(fields)]
        codes |= torch.cat(lanes, dim=-1)[..., :mb] << shift
        start += width
        shift += plane
    return codes


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Shape of the packed blocks of one matrix, or of several that read the same input.

    n        inputs
    n_blocks diagonal blocks, s
    bits     2, 3, 4, 8 or 16
    sizes    outputs m of each matrix; in y they lie side by side
    """

    n: int
    n_blocks: int
    bits: int
    sizes: tuple[int, ...]

    @property
    def block_inputs(self) -> int:
        """Inputs of the longest block, nb."""
        return -(-self.n // self.n_blocks)

    @property
    def block_outputs(self) -> tuple[int, ...]:
        """Outputs of the longest block of each matrix, mb."""
        return tuple(-(-m // self.n_blocks) for m in self.sizes)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes (float16 elements at 16 bit) per input column of each matrix, P."""
        return tuple(column_bytes(mb, self.bits) for mb in self.block_outputs)

    def bytes_per_slot(self) -> int:
        """What a decode step reads of one slot: codes and scales."""
        element = 2 if self.bits == 16 else 1
        codes = self.n_blocks * self.block_inputs * sum(self.widths) * element
        return codes + (0 if self.bits == 16 else 2 * self.n_blocks * sum(self.block_outputs))


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """Slot arrays of one layout; see the module for codes, scales and units.

    present  int32 [C], 0 where the slot holds nothing for these matrices (never read then)
    """

    layout: BlockLayout
    codes: Tensor
    scales: Tensor
    units: Tensor
    present: Tensor


def new_blocks(layout: BlockLayout, n_slots: int, device: torch.device) -> PackedBlocks:
    """Empty slot arrays: nothing present, contents undefined."""
    dtype = torch.float16 if layout.bits == 16 else torch.uint8
    s, nb = layout.n_blocks, layout.block_inputs
    shape = (n_slots, s, nb, sum(layout.widths))
    scales = (n_slots, s, sum(layout.block_outputs))
    return PackedBlocks(
        layout,
        torch.empty(shape, dtype=dtype, device=device),
        torch.empty(scales, dtype=torch.float16, device=device),
        torch.empty((n_slots, len(layout.sizes)), dtype=torch.float32, device=device),
        torch.zeros(n_slots, dtype=torch.int32, device=device),
    )


def word_bytes(layout: BlockLayout) -> int:
    """Bytes a kernel loads as one number: 2 where every plane allows it, else 1.

    16-bit words reach the tensor cores' operand layout by transposing loads; bytes do not.
    """
    if layout.bits == 16:
        return 2
    planes = [plane_bytes(mb, b) for mb in layout.block_outputs for b in PLANES[layout.bits]]
    return 1 if gathers(layout) or any(width % 2 for width in planes) else 2


def gathers(layout: BlockLayout) -> bool:
    """Whether 3-bit planes do not line up, so that outputs are fetched one by one.

    Otherwise the high plane's byte p serves the low plane's bytes p and P1 + p.
    """
    return layout.bits == 3 and any(
        plane_bytes(mb, 2) != 2 * plane_bytes(mb, 1) for mb in layout.block_outputs
    )


def tile_table(layout: BlockLayout, tile: int) -> Tensor:
    """Cut the outputs of a block into tiles a program owns: int32 ``[n_tiles, 8]`` on the host.

    A tile is `tile` words (see `word_bytes`) of every input column; lengths are in words.
    Columns: 0 where the matrix begins in a column, 1 the tile's first word within the plane that
    is tiled, 2 length of the low plane, 3 of the high plane (3 bit; else 0), 4 place of the
    matrix's scales, 5 column of the matrix in y, 6 outputs m, 7 number of the matrix.
    """
    rows = []
    word = 1 if layout.bits == 16 else word_bytes(layout)  # widths are elements at 16 bit
    starts = accumulate((0, *layout.widths[:-1]))
    scale_starts = accumulate((0, *layout.block_outputs[:-1]))
    outputs = accumulate((0, *layout.sizes[:-1]))
    places = zip(starts, scale_starts, outputs, layout.sizes, layout.block_outputs, strict=True)
    for number, (start, scale_start, output, m, mb) in enumerate(places):
        planes = [mb] if layout.bits == 16 else [plane_bytes(mb, b) for b in PLANES[layout.bits]]
        low, high = planes[0] // word, sum(planes[1:]) // word
        tiled = mb if gathers(layout) else high or low
        rows += [
            (start // word, first, low, high, scale_start, output, m, number)
            for first in range(0, tiled, tile)
        ]
    return torch.tensor(rows, dtype=torch.int32)


def alignment(layout: BlockLayout, tile: int) -> int:
    """Words that every start and length in the tile table is a multiple of (at most 16)."""
    table = tile_table(layout, tile)[:, :4]
    return math.gcd(16, *table.unique().tolist())


@dataclass(frozen=True, slots=True)
class SegmentArrays:
    """Which rows belong to which slot, in device memory: data, not launch parameters.

    slots, starts, ends  int32 [S]: rows ``[start, end)`` belong to `slot`; -1: nothing to add.
                         No entry has more than `tile_rows` rows: longer ones are cut.
    count                int32 [1], entries in use; later ones are never read
    """

    slots: Tensor
    starts: Tensor
    ends: Tensor
    count: Tensor
    tile_rows: int


def cut_segments(segments: Sequence[Segment], tile_rows: int) -> list[Segment]:
    """Drop the base's rows and cut long segments: pieces read the same weights from the cache."""
    return [
        Segment(s.slot, start, min(s.end, start + tile_rows))
        for s in segments
        if s.slot != BASE_SLOT
        for start in range(s.start, s.end, tile_rows)
    ]


def segment_arrays(
    segments: Sequence[Segment], tile_rows: int, device: torch.device
) -> SegmentArrays:
    """Segments of one batch as arrays; one host-to-device copy."""
    pieces = cut_segments(segments, tile_rows)
    fields = [[p.slot for p in pieces], [p.start for p in pieces], [p.end for p in pieces]]
    flat = torch.tensor([*fields[0], *fields[1], *fields[2], len(pieces)], dtype=torch.int32)
    flat = flat.to(device)
    slots, starts, ends, count = flat.split([len(pieces)] * 3 + [1])
    return SegmentArrays(slots, starts, ends, count, tile_rows)


def rows_of(segments: SegmentArrays) -> list[Segment]:
    """Back to Python, for the references."""
    n = int(segments.count)
    arrays = (segments.slots[:n], segments.starts[:n], segments.ends[:n])
    return [
        Segment(slot, start, end)
        for slot, start, end in zip(*(a.tolist() for a in arrays), strict=True)
    ]
