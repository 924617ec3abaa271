"""Where the blocks of a block-diagonal term lie in the panels of a product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from server.ops.packed import PackedBlocks


class Piece(NamedTuple):
    """Neighbouring outputs of one block that lie in one panel. Offsets are a place's own."""

    code: int  # byte of the first code
    scale: int  # first scale
    x: int  # first input
    n: int  # inputs
    lane: int  # of the panel
    n_outputs: int


PIECE_BYTES = 8 * len(Piece._fields)


class Pieces:
    """The pieces of every panel of a product."""

    def __init__(self, panels: Sequence[Sequence[Piece]]) -> None:
        self.table = np.array([piece for panel in panels for piece in panel], np.int64)
        self.ends = np.cumsum([0, *map(len, panels)], dtype=np.int64)


class KnownPieces:
    """`find_pieces`, once for all layers of one shape."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._known: dict[tuple[Any, ...], Pieces] = {}

    def of(self, blocks: PackedBlocks, first: int, n_panels: int) -> Pieces:
        """The pieces of blocks whose outputs are those of the product from `first` on."""
        codes, scales = blocks.codes, blocks.scales
        strides = codes.stride(1), scales.stride(1)
        key = (codes.shape[1:], strides, blocks.sizes, blocks.n, first, n_panels)
        if key not in self._known:
            self._known[key] = find_pieces(blocks, first, n_panels, self._width)
        return self._known[key]


def find_pieces(blocks: PackedBlocks, first: int, n_panels: int, width: int) -> Pieces:
    """The pieces of every panel of `width` outputs, the one matrix' first being output `first`."""
    found: list[list[Piece]] = [[] for _ in range(n_panels)]
    (m,) = blocks.sizes
    s, code_step, scale_step = blocks.n_blocks, blocks.codes.stride(1), blocks.scales.stride(1)
    wide, wider = divmod(blocks.n, s)
    short, longer = divmod(m, s)
    for block in range(s):
        start = first + block * short + min(block, longer)
        end = start + short + (block < longer)
        output = start
        while output < end:
            panel, lane = divmod(output, width)
            count = min(end - output, width - lane)
            code, scale = (block * step + output - start for step in (code_step, scale_step))
            x, n = block * wide + min(block, wider), wide + (block < wider)
            found[panel].append(Piece(code, scale, x, n, lane, count))
            output += count
    return Pieces(found)
