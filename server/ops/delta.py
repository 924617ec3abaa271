"""Grouped delta application in plain torch: every variant of the batch in one call.

Each function adds ``x @ dW[slot]^T`` to the rows of one run (see `rows.py`). Slot arrays hold
values already dequantised to the compute dtype, slot-major, so that a run reads a contiguous slice.

Shapes: T rows, n inputs, m outputs, C slots in the array, s blocks, S kept components, r ranks.
Numerics: products in the dtype of the arrays with the backend's accumulation (float32 inside a
GEMM); one rounding when the result is added to y. Nothing is raised: shapes are checked on load.
The oracle of each is the codec's own `apply` (float32) in `compressor.codecs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from server.ops.rows import SlotRun, add_rows_, pad_rows

# Up to so many slots, adding slot by slot is cheaper than gathering the rows that are not padding.
MAX_SLOT_LOOP = 4


class BlockOutput(NamedTuple):
    """Where the outputs of one matrix go, of several stacked in one array of blocks.

    y        [T, m], added to in place; may be a column slice of a wider tensor
    start, end  output columns ``[start, end)`` of every block belong to this matrix
    row_map  [m] int64, padded place of each output; None if the number of blocks divides m
    """

    y: Tensor
    start: int
    end: int
    row_map: Tensor | None


def blockdiag_add_(
    outputs: Sequence[BlockOutput],
    x: Tensor,
    run: SlotRun,
    weights: Tensor,
    col_map: Tensor | None,
) -> None:
    """Block-diagonal terms of one matrix, or of several that read the same x in one product.

    x [T, n]; weights [C, s, nb, mb], the blocks transposed (small batched GEMMs run faster so; mb:
    the matrices' longest blocks side by side, nb: the longest block; both zero-padded)
    col_map  [s * nb] int64, column of x at each padded place, n for padding; None if s divides n
    """
    k, w = run.n_slots, run.width
    s, nb, mb = weights.shape[1:]
    rows = pad_rows(x, run)
    if col_map is not None:
        rows = torch.nn.functional.pad(rows, (0, 1)).index_select(2, col_map)
    rows = rows.view(k, w, s, nb).transpose(1, 2).reshape(k * s, w, nb)
    blocks = weights[run.slot : run.slot + k].view(k * s, nb, mb)
    product = torch.bmm(rows, blocks).view(k, s, w, mb).transpose(1, 2)
    for y, start, end, row_map in outputs:
        part = product[..., start:end]  # [k, w, s, rows of this matrix's block]
        if row_map is None and (run.scatter is None or k <= MAX_SLOT_LOOP):
            _add_blocks_(y, part, run)
            continue
        out = part.reshape(k * w, s * (end - start))
        add_rows_(y, out if row_map is None else out.index_select(1, row_map), run)


def _add_blocks_(y: Tensor, part: Tensor, run: SlotRun) -> None:
    """Add ``part [k, w, s, mb]`` to the run's rows of ``y [T, s * mb]``, padding left out."""
    if run.scatter is None:
        y[run.start : run.end].view(part.shape).add_(part)
        return
    start = run.start
    for i, count in enumerate(run.counts):
        y[start : start + count].view(count, *part.shape[2:]).add_(part[i, :count])
        start += count


def lowrank_add_(y: Tensor, x: Tensor, run: SlotRun, a: Tensor, b: Tensor) -> None:
    """Low-rank terms ``dW = b^T a``: y [T, m]; x [T, n]; a [C, r, n]; b [C, r, m]."""
    slots = slice(run.slot, run.slot + run.n_slots)
    hidden = torch.bmm(pad_rows(x, run), a[slots].transpose(1, 2))
    add_rows_(y, torch.bmm(hidden, b[slots]).flatten(0, 1), run)


def dense_add_(y: Tensor, x: Tensor, run: SlotRun, weights: Tensor) -> None:
    """Whole matrices: y [T, m]; x [T, n]; weights [C, m, n]."""
    slots = slice(run.slot, run.slot + run.n_slots)
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
    slots = slice(run.slot, run.slot + k)
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


def blockdiag_rows_add_(
    y: Tensor,
    ids: Tensor,
    slots: Tensor,
    weights: Tensor,
    place_of_row: Tensor,
    col_map: Tensor | None,
) -> None:
    """Embedding look-up: add ``dW[slot][id]`` to each row of ``y [T, n]``.

    ids [T], slots [T] int64; weights [C, s, nb, mb]; place_of_row [m] padded place of each row
    """
    _, s, nb, mb = weights.shape
    place = place_of_row[ids]
    block = place // mb
    values = weights[slots, block, :, place % mb]  # [T, nb]
    padded = values.new_zeros((len(ids), s, nb))
    padded[torch.arange(len(ids), device=ids.device), block] = values
    flat = padded.view(len(ids), s * nb)
    if col_map is None:
        y += flat
    else:
        grown = torch.nn.functional.pad(y, (0, 1))
        grown.index_add_(1, col_map, flat.to(y.dtype))
        y.copy_(grown[:, :-1])


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
