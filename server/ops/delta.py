"""Grouped delta application in plain torch: every variant of the batch in one call.

Each function adds ``x @ dW[slot]^T`` to the rows of the slots that are present (see `rows.py`).

Shapes: T rows, n inputs, m outputs, C slots in the array, s blocks, S kept components, r ranks.
Numerics: low-rank, ImPart and dense terms multiply in the dtype of their arrays with the backend's
accumulation (float32 inside a GEMM) and round once when the result is added to y; block-diagonal
terms are float32 from the packed codes to that one rounding. Nothing is raised: shapes are checked
on load. The oracle of each is the codec's own `apply` (float32) in `compressor.codecs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from server.ops.packed import PackedBlocks, scale_values, unpack_columns
from server.ops.rows import SlotRun, SlotSegments, add_rows_, pad_rows


class BlockDiagOp(Protocol):
    """Block-diagonal deltas of one matrix, or of several that read the same x."""

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, segments: SlotSegments) -> None:
        """Add each matrix's deltas to its own ``[T, m]`` of `outputs`; x ``[T, n]``.

        The outputs may be column slices of one wider tensor; None leaves a matrix out.
        """
        ...


class TorchBlockDiag:
    """The reference: dequantises the blocks of every segment anew."""

    def __init__(self, blocks: PackedBlocks) -> None:
        self._blocks = blocks

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, segments: SlotSegments) -> None:
        """See `BlockDiagOp`."""
        blocks, s = self._blocks, self._blocks.n_blocks
        places = padded_places(blocks.n, s, x.device)
        for slot, start, end in segments.entries():
            if segments.count is not None and (slot := blocks.place(slot)) < 0:
                continue
            values = blocks.values(slot)  # [s, nb, sum of mb]
            rows = x.new_zeros((end - start, values.shape[0] * values.shape[1])).float()
            rows[:, places] = x[start:end].float()
            rows = rows.view(end - start, s, -1).transpose(0, 1)
            product = torch.bmm(rows, values)  # [s, rows, sum of mb]
            column = 0
            for y, m, mb in zip(outputs, blocks.sizes, blocks.block_rows(), strict=True):
                if y is not None:
                    part = product[:, :, column : column + mb].transpose(0, 1).flatten(1)
                    added = part[:, padded_places(m, s, x.device)]
                    y[start:end] = (y[start:end].float() + added).to(y.dtype)
                column += mb


def padded_places(size: int, n_blocks: int, device: torch.device) -> Tensor:
    """[size] int64: place of each row when every block of a balanced partition is padded."""
    block, short = -(-size // n_blocks), size // n_blocks
    longer = size % n_blocks
    sizes = torch.tensor([short + 1] * longer + [short] * (n_blocks - longer))
    starts = torch.arange(n_blocks) * block - (sizes.cumsum(0) - sizes)
    return (torch.arange(size) + torch.repeat_interleave(starts, sizes)).to(device)


def lowrank_add_(y: Tensor, x: Tensor, run: SlotRun, a: Tensor, b: Tensor) -> None:
    """Low-rank terms ``dW = b^T a``: y [T, m]; x [T, n]; a [C, r, n]; b [C, r, m]."""
    slots = slice(run.place, run.place + run.n_slots)
    hidden = torch.bmm(pad_rows(x, run), a[slots].transpose(1, 2))
    add_rows_(y, torch.bmm(hidden, b[slots]).flatten(0, 1), run)


def dense_add_(y: Tensor, x: Tensor, run: SlotRun, weights: Tensor) -> None:
    """Whole matrices: y [T, m]; x [T, n]; weights [C, m, n]."""
    slots = slice(run.place, run.place + run.n_slots)
    out = torch.bmm(pad_rows(x, run), weights[slots].transpose(1, 2))
    add_rows_(y, out.flatten(0, 1), run)


def impart_add_(
    y: Tensor,
    x: Tensor,
    run: SlotRun,
    u_values: Tensor,
    u_index: Tensor,
    v_values: Tensor,
    v_index: Tensor,
    sigma: Tensor,
) -> None:
    """Block-systematic ImPart terms ``dW = Uhat diag(sigma) Vhat^T`` (arXiv 2504.13237, eq. 6).

    y [T, m]; x [T, n]; u_values [C, bu, R, S]; u_index [C, bu * S] int64 into ranks;
    v_values [C, bv, R, S]; v_index [C, bv * S]; sigma [C, r]
    """
    k, w = run.n_slots, run.width
    slots = slice(run.place, run.place + k)
    bu, block_rows, kept = u_values.shape[1:]
    bv = v_values.shape[1]
    rows = torch.nn.functional.pad(pad_rows(x, run), (0, bv * block_rows - x.shape[1]))
    rows = rows.view(k, w, bv, block_rows).transpose(1, 2).reshape(k * bv, w, block_rows)
    parts = torch.bmm(rows, v_values[slots].reshape(k * bv, block_rows, kept))
    parts = parts.view(k, bv, w, kept).transpose(1, 2).reshape(k, w, bv * kept)
    z = parts.new_zeros((k, w, sigma.shape[1]))
    z.scatter_add_(2, v_index[slots].unsqueeze(1).expand(k, w, -1), parts)
    z *= sigma[slots].unsqueeze(1)
    kept_z = z.gather(2, u_index[slots].unsqueeze(1).expand(k, w, -1))
    kept_z = kept_z.view(k, w, bu, kept).transpose(1, 2).reshape(k * bu, w, kept)
    out = torch.bmm(kept_z, u_values[slots].reshape(k * bu, block_rows, kept).transpose(1, 2))
    out = out.view(k, bu, w, block_rows).transpose(1, 2).reshape(k * w, bu * block_rows)
    add_rows_(y, out[:, : y.shape[1]], run)


def blockdiag_rows_add_(y: Tensor, ids: Tensor, slots: Tensor, blocks: PackedBlocks) -> None:
    """Embedding look-up: add ``dW[slot][id]`` to each row of ``y [T, n]``.

    ids [T], slots [T] int64; blocks of one matrix [m, n]
    """
    (m,), n, s = blocks.sizes, blocks.n, blocks.n_blocks
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
    y.copy_(y.float() + added)


def _block_of(ids: Tensor, size: int, n_blocks: int) -> tuple[Tensor, Tensor]:
    """Block of each row of a balanced partition, and the row's place in it."""
    short, longer = divmod(size, n_blocks)
    border = longer * (short + 1)
    first = ids // (short + 1)
    block = torch.where(ids < border, first, longer + (ids - border) // short)
    return block, ids - (block * short + block.clamp(max=longer))


def impart_rows(
    ids: Tensor,
    u_values: Tensor,
    u_index: Tensor,
    v_values: Tensor,
    v_index: Tensor,
    sigma: Tensor,
    n_columns: int,
) -> Tensor:
    """Embedding look-up in one slot's ImPart term: ids [t] -> [t, n].

    Arrays as in `impart_add_` without the slot axis.
    """
    bu, block_rows, kept = u_values.shape
    bv = v_values.shape[0]
    values = u_values.view(bu * block_rows, kept)[ids]
    index = u_index.view(bu, kept)[ids // block_rows]
    z = values.new_zeros((len(ids), sigma.shape[0])).scatter_(1, index, values) * sigma
    kept_z = z[:, v_index].view(len(ids), bv, kept).transpose(0, 1)
    out = torch.bmm(kept_z, v_values.transpose(1, 2))  # [bv, t, R]
    return out.transpose(0, 1).reshape(len(ids), bv * block_rows)[:, :n_columns]
