"""Block-diagonal deltas alone, beside whatever product they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from server.ops.blockdiag import BlockDiagOp
from server.ops.cpu.codegen.add_piece import BITS
from server.ops.cpu.linear import LinearKernel
from server.ops.cpu.term_table import TermTable
from server.ops.cpu.widened import WidenedKernel
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import SlotSegments

TermKernel = LinearKernel | WidenedKernel


class NumbaBlockDiag:
    """`server.ops.blockdiag.BlockDiagOp` for one set of packed blocks: a table for each matrix, in
    which the list of number p has the blocks at place p.
    """

    def __init__(
        self,
        kernels: Mapping[torch.dtype, TermKernel],
        blocks: PackedBlocks,
        otherwise: BlockDiagOp,
    ) -> None:
        """otherwise: for x of a dtype that has no kernel."""
        self._kernels, self._otherwise = kernels, otherwise
        self._matrices = list(_matrices_of(blocks))
        self._tables: dict[torch.dtype, list[TermTable]] = {}

    @staticmethod
    def takes(blocks: PackedBlocks) -> bool:
        """Whether there is a product of such codes."""
        return blocks.bits in BITS

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, segments: SlotSegments) -> None:
        """See `BlockDiagOp`. x and the outputs: float32 or all bfloat16, rows contiguous."""
        kernel = self._kernels.get(x.dtype)
        if kernel is None:
            self._otherwise.add_(outputs, x, segments)
            return
        if x.dtype not in self._tables:
            self._tables[x.dtype] = [_table_of(kernel, matrix) for matrix in self._matrices]
        for y, table in zip(outputs, self._tables[x.dtype], strict=True):
            if y is not None and segments.n:
                kernel.add_(y, x, table.call_at(segments, None))


def _matrices_of(blocks: PackedBlocks) -> Iterator[PackedBlocks]:
    column = 0
    for place, (m, rows) in enumerate(zip(blocks.sizes, blocks.block_rows(), strict=True)):
        own = slice(column, column + rows)
        yield replace(
            blocks,
            codes=blocks.codes[..., own],
            scales=blocks.scales[..., own],
            units=blocks.units[:, place : place + 1],
            sizes=(m,),
        )
        column += rows


def _table_of(kernel: TermKernel, blocks: PackedBlocks) -> TermTable:
    table = kernel.new_table(blocks.sizes[0])
    table.put(0, blocks, 0)
    table.show_every_place(0, len(blocks.codes))
    return table
