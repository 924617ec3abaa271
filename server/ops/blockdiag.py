"""Grouped delta application in plain torch: every variant of the batch in one call.

Each function adds ``x @ dW[slot]^T`` to the rows of the slots that are present (`row_mapping.py`).

Shapes: T rows, n inputs, m outputs, C slots in the array, s blocks.
Numerics: dense terms multiply in the dtype of their arrays with the backend's accumulation (float32
inside a GEMM) and round once when the result is added to y; block-diagonal terms are float32 from
the packed codes to that one rounding. Nothing is raised: shapes are checked on load. The oracle of
each is the codec's own `apply` (float32) in `compressor.codecs`. Terms made of factors are in
`server.ops.factors`.

Tensor parallelism: blocks of a block-diagonal term are independent, so a rank holds ``s / tp`` of
them: those of its outputs in a column-parallel linear (it needs only their slices of x), those of
its slice of x in a row-parallel one, where their outputs join the all-reduce of y. Whole matrices
split as the base's does: rows of outputs, or columns of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from compressor.codecs.columns import unpack_columns
from server.ops.packed import PackedBlocks, scale_values
from server.ops.row_mapping import SlotRun, SlotSegments, add_rows_, pad_rows


class BlockDiagOp(Protocol):
    """Block-diagonal deltas of one matrix, or of several that read the same x."""

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, segments: SlotSegments) -> None:
        """Add each matrix's deltas to its own ``[T, m]`` of `outputs`; x ``[T, n]``.

        The outputs may be column slices of one wider tensor; None leaves a matrix out.
        """
        ...


class TorchBlockDiag:
    """The reference: dequantises the blocks of every segment anew. In float64 where x is."""

    def __init__(self, blocks: PackedBlocks) -> None:
        self._blocks = blocks

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, segments: SlotSegments) -> None:
        """See `BlockDiagOp`."""
        blocks, s = self._blocks, self._blocks.n_blocks
        places = padded_places(blocks.n, s, x.device)
        compute = torch.promote_types(x.dtype, torch.float32)
        for slot, start, end in segments.entries():
            if segments.count is not None and (slot := blocks.place(slot)) < 0:
                continue
            values = blocks.values(slot).to(compute)  # [s, nb, sum of mb]
            rows = values.new_zeros((end - start, values.shape[0] * values.shape[1]))
            rows[:, places] = x[start:end].to(compute)
            rows = rows.view(end - start, s, -1).transpose(0, 1)
            product = torch.bmm(rows, values)  # [s, rows, sum of mb]
            column = 0
            for y, m, mb in zip(outputs, blocks.sizes, blocks.block_rows(), strict=True):
                if y is not None:
                    part = product[:, :, column : column + mb].transpose(0, 1).flatten(1)
                    added = part[:, padded_places(m, s, x.device)]
                    y[start:end] = (y[start:end].to(compute) + added).to(y.dtype)
                column += mb


def padded_places(size: int, n_blocks: int, device: torch.device) -> Tensor:
    """[size] int64: place of each row when every block of a balanced partition is padded."""
    block, short = -(-size // n_blocks), size // n_blocks
    longer = size % n_blocks
    sizes = torch.tensor([short + 1] * longer + [short] * (n_blocks - longer))
    starts = torch.arange(n_blocks) * block - (sizes.cumsum(0) - sizes)
    return (torch.arange(size) + torch.repeat_interleave(starts, sizes)).to(device)


def dense_add_(y: Tensor, x: Tensor, run: SlotRun, weights: Tensor) -> None:
    """Whole matrices: y [T, m]; x [T, n]; weights [C, m, n]."""
    slots = slice(run.place, run.place + run.n_slots)
    out = torch.bmm(pad_rows(x, run), weights[slots].transpose(1, 2))
    add_rows_(y, out.flatten(0, 1), run)


def blockdiag_rows_add_(y: Tensor, ids: Tensor, places: Tensor, blocks: PackedBlocks) -> None:
    """Embedding look-up: add ``dW[place][id]`` to each row of ``y [T, n]``, rounded once.

    ids     [T] int64
    places  [T] int64: in the blocks' arrays, -1 for rows that get nothing
    blocks  of one matrix [m, n]
    """
    (m,), n, s = blocks.sizes, blocks.n, blocks.n_blocks
    held, slots = places >= 0, places.clamp(min=0)
    block, within = _block_of(ids, m, s)
    nb = -(-n // s)
    packed = blocks.codes[slots, block, :, within].unsqueeze(-1)
    values = unpack_columns(packed, blocks.bits, nb).squeeze(-1).float()  # [T, nb]
    if blocks.bits != 16:
        values -= ((1 << blocks.bits) - 1) / 2
    scales = scale_values(blocks.scales[slots, block, within]) * blocks.units[slots, 0]
    values *= scales.unsqueeze(1)
    short, longer = divmod(n, s)
    cols = short + (block < longer).long()
    inside = torch.arange(nb, device=ids.device)
    valid = inside < cols.unsqueeze(1)
    columns = (block * short + block.clamp(max=longer)).unsqueeze(1) + inside
    added = torch.zeros(len(ids), n, device=ids.device)
    added.scatter_add_(1, columns.clamp(max=n - 1), torch.where(valid, values, 0.0))
    # In rows without, `added` may be anything, NaN too.
    y.copy_(torch.where(held.unsqueeze(1), y.float() + added, y.float()))


def _block_of(ids: Tensor, size: int, n_blocks: int) -> tuple[Tensor, Tensor]:
    """Block of each row of a balanced partition, and the row's place in it."""
    short, longer = divmod(size, n_blocks)
    border = longer * (short + 1)
    first = ids // (short + 1)
    block = torch.where(ids < border, first, longer + (ids - border) // short)
    return block, ids - (block * short + block.clamp(max=longer))
