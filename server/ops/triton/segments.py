"""Which rows belong to which slot, as data, and how outputs are cut into tiles.

The slot arrays themselves are `server.ops.packed.PackedBlocks`. Nothing here imports triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.ops.packed import PackedBlocks
from server.ops.row_mapping import BASE_SLOT, Segment, SlotSegments

DECODE_ROWS = 16  # that a program takes at once where every row is one sequence's new token


def word_bytes(blocks: PackedBlocks) -> int:
    """Outputs a kernel loads as one number: 2 where every matrix allows it, else 1.

    16-bit words reach the tensor cores' operand layout by transposing loads; bytes do not.
    """
    if blocks.bits == 16 or any(mb % 2 for mb in blocks.block_rows()):
        return 1
    return 2


def gathers(blocks: PackedBlocks) -> bool:
    """Whether 3-bit planes do not line up, so that inputs are fetched one by one.

    Otherwise row r of the high plane serves the low plane's rows r and R1 + r.
    """
    nb = -(-blocks.n // blocks.n_blocks)
    return blocks.bits == 3 and -(-nb // 4) != 2 * -(-nb // 8)


def tile_table(blocks: PackedBlocks, tile: int) -> Tensor:
    """Tiles of outputs that a program owns: int32 ``[n_tiles, 4]`` on the host.

    A tile is `tile` words (see `word_bytes`) of every byte row. Columns: 0 its first word, 1 the
    first word of its matrix, 2 outputs m of the matrix, 3 its number.
    """
    rows, start, word = [], 0, word_bytes(blocks)
    for number, (m, mb) in enumerate(zip(blocks.sizes, blocks.block_rows(), strict=True)):
        words = mb // word
        rows += [(start + first, start, m, number) for first in range(0, words, tile)]
        start += words
    return torch.tensor(rows, dtype=torch.int32)


def alignment(blocks: PackedBlocks) -> int:
    """Words that every matrix begins and ends at a multiple of, 16 at most: wide loads need it."""
    return math.gcd(16, *(mb // word_bytes(blocks) for mb in blocks.block_rows()))


def input_alignment(blocks: PackedBlocks) -> int:
    """Inputs that every block and every field begins and ends at a multiple of, 16 at most."""
    if blocks.n % blocks.n_blocks:
        return 1
    nb = blocks.n // blocks.n_blocks
    fields = {2: 4, 3: 8, 4: 2, 8: 1, 16: 1}[blocks.bits]
    return math.gcd(16, nb, -(-nb // fields))


@dataclass(frozen=True, slots=True)
class SegmentArrays:
    """Which rows belong to which slot, in device memory: data, not launch parameters.

    slots, starts, ends  integers [S], equally strided: rows ``[start, end)`` belong to `slot`; -1:
                         nothing to add
    count                int32 [1], entries in use; later ones are never read
    tile_rows            rows a program takes at once
    chunks               no entry has more than ``chunks * tile_rows`` rows
    """

    slots: Tensor
    starts: Tensor
    ends: Tensor
    count: Tensor
    tile_rows: int
    chunks: int = 1


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


def from_table(segments: SlotSegments, tile_rows: int) -> SegmentArrays:
    """The engine's table of segments, in place; nothing waits for the device."""
    slots, starts, ends = segments.table.unbind(1)
    count = segments.count
    if count is None:
        count = torch.full((1,), segments.n, dtype=torch.int32, device=segments.table.device)
    return SegmentArrays(slots, starts, ends, count, tile_rows, -(-segments.longest // tile_rows))


def where_of(
    segments: SegmentArrays,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """What kernels take as `where`: see `compat.piece_rows`."""
    arrays = (segments.slots, segments.starts, segments.ends, segments.count)
    return (*arrays, segments.slots.stride(0), segments.chunks)


def place_of(segment: Segment, present: Tensor) -> int:
    """What `compat.slot_of` does, for the references: place of the segment's slot, or -1."""
    known = 0 <= segment.slot < len(present)
    return int(present[segment.slot]) - 1 if known else -1


def rows_of(segments: SegmentArrays) -> list[Segment]:
    """Back to Python, for the references."""
    n = int(segments.count)
    arrays = (segments.slots[:n], segments.starts[:n], segments.ends[:n])
    return [
        Segment(slot, start, end)
        for slot, start, end in zip(*(a.tolist() for a in arrays), strict=True)
    ]
