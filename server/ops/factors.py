"""Delta terms made of factors, low-rank and ImPart, in plain torch: grouped over variants.

A kernel takes the terms of all matrices that read one x (q, k, v; gate, up) at once. Which rows
belong to which slot is in the `RowMapping`; which slot has which place in a matrix's arrays is in
`present` (for Python) and in `place_of` (as data, for a captured step).

Shapes: T rows, n inputs, m outputs, C places, r ranks; ImPart: R rows a block, S components kept in
each block, bu and bv blocks of outputs and inputs.
Numerics: products in the dtype of the arrays with the backend's accumulation (float32 inside a
GEMM), one rounding when the result is added to y. Oracle: the codec's own `apply` (float32).

Tensor parallelism: column-parallel (outputs split): b and U's row blocks go with their outputs, a
and V are replicated; row-parallel (inputs split): a and V's row blocks go with their inputs, b and
U are replicated and expand each rank's partial sum into the y that is all-reduced anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from server.ops.row_mapping import Places, RowMapping, SlotRun, add_rows_, pad_rows
from server.ops.static_row_mapping import StaticRowMapping


@dataclass(frozen=True, slots=True)
class LowRankFactors:
    """``dW = b^T a`` of one matrix ``[m, n]``: a [C, r, n], b [C, r, m] in the compute dtype.

    place_of  int32 [slots]: place + 1, 0 where the slot has nothing here
    """

    a: Tensor
    b: Tensor
    present: Places
    place_of: Tensor


@dataclass(frozen=True, slots=True)
class ImpartFactors:
    """``dW = Uhat diag(sigma) Vhat^T`` of one matrix ``[m, n]`` (arXiv 2504.13237, eq. 6).

    u_values [C, bu, R, S], v_values [C, bv, R, S], sigma [C, r] in the compute dtype;
    u_index [C, bu * S], v_index [C, bv * S] int32: component of each kept column;
    order    [C, bv * S] int32, first [C, r + 1] int32: component k's columns of V are
             ``order[first[k] : first[k + 1]]`` (see `rank_lists`)
    place_of int32 [slots]: place + 1, 0 where the slot has nothing here
    """

    u_values: Tensor
    u_index: Tensor
    v_values: Tensor
    v_index: Tensor
    order: Tensor
    first: Tensor
    sigma: Tensor
    present: Places
    place_of: Tensor


def rank_lists(v_index: Tensor, n_ranks: int) -> tuple[Tensor, Tensor]:
    """Which of the ``bv * S`` columns belong to each component: `order` and `first`, int32.

    v_index [bv * S] integer components, block after block.
    """
    order = torch.argsort(v_index, stable=True).int()
    counts = torch.bincount(v_index.long(), minlength=n_ranks)
    first = torch.zeros(n_ranks + 1, dtype=torch.int32, device=v_index.device)
    first[1:] = counts.cumsum(0)
    return order, first


def lowrank_add_(
    outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[LowRankFactors]
) -> None:
    """Add each matrix's low-rank terms to its own ``[T, m]`` of `outputs`; x ``[T, n]``."""
    for y, term in zip(outputs, terms, strict=True):
        for run in _runs(rows, term):
            slots = slice(run.place, run.place + run.n_slots)
            hidden = torch.bmm(pad_rows(x, run), term.a[slots].transpose(1, 2))
            add_rows_(y, torch.bmm(hidden, term.b[slots]).flatten(0, 1), run)


def impart_add_(
    outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[ImpartFactors]
) -> None:
    """Add each matrix's ImPart terms to its own ``[T, m]`` of `outputs`; x ``[T, n]``."""
    for y, term in zip(outputs, terms, strict=True):
        for run in _runs(rows, term):
            _impart_run_(y, x, run, term)


def _runs(rows: RowMapping, term: LowRankFactors | ImpartFactors) -> Iterable[SlotRun]:
    if isinstance(rows, StaticRowMapping):
        return rows.runs_at(term.place_of)
    return rows.runs(term.present)


def _impart_run_(y: Tensor, x: Tensor, run: SlotRun, term: ImpartFactors) -> None:
    k, w = run.n_slots, run.width
    slots = slice(run.place, run.place + k)
    bu, block_rows, kept = term.u_values.shape[1:]
    bv = term.v_values.shape[1]
    x_rows = F.pad(pad_rows(x, run), (0, bv * block_rows - x.shape[1]))
    x_rows = x_rows.view(k, w, bv, block_rows).transpose(1, 2).reshape(k * bv, w, block_rows)
    parts = torch.bmm(x_rows, term.v_values[slots].reshape(k * bv, block_rows, kept))
    parts = parts.view(k, bv, w, kept).transpose(1, 2).reshape(k, w, bv * kept)
    z = parts.new_zeros((k, w, term.sigma.shape[1]))
    z.scatter_add_(2, term.v_index[slots].long().unsqueeze(1).expand(k, w, -1), parts)
    z *= term.sigma[slots].unsqueeze(1)
    kept_z = z.gather(2, term.u_index[slots].long().unsqueeze(1).expand(k, w, -1))
    kept_z = kept_z.view(k, w, bu, kept).transpose(1, 2).reshape(k * bu, w, kept)
    u = term.u_values[slots].reshape(k * bu, block_rows, kept)
    out = torch.bmm(kept_z, u.transpose(1, 2))
    out = out.view(k, bu, w, block_rows).transpose(1, 2).reshape(k * w, bu * block_rows)
    add_rows_(y, out[:, : y.shape[1]], run)


def lowrank_rows(ids: Tensor, places: Tensor, term: LowRankFactors) -> Tensor:
    """Embedding look-up: ``dW[place][id]``, ids int64 [t], places int64 [t] or [1] -> [t, n].

    With a place per row it reads the whole of a for each: meant for decode steps.
    """
    left = term.b[places, :, ids]  # [t, r]
    if len(places) == 1:
        return left @ term.a[places].squeeze(0)  # `places[0]` as an index would wait for its value
    return torch.bmm(left.unsqueeze(1), term.a[places]).squeeze(1)


def impart_rows(ids: Tensor, places: Tensor, term: ImpartFactors, n_columns: int) -> Tensor:
    """The same of ImPart terms; n_columns: n. Reads the whole V of every row's place.

    A place that no slot has yet may be given, for rows whose result is not used: any index goes.
    """
    bu, block_rows, kept = term.u_values.shape[1:]
    t, top = len(ids), term.sigma.shape[1] - 1
    values = term.u_values[places, ids // block_rows, ids % block_rows]  # [t, S]
    index = term.u_index.view(-1, bu, kept)[places, ids // block_rows].long().clamp(0, top)
    z = values.new_zeros((t, term.sigma.shape[1])).scatter_(1, index, values)
    z *= term.sigma[places]
    chosen = z.gather(1, term.v_index[places].long().clamp(0, top).expand(t, -1))  # [t, bv * S]
    v = term.v_values[places]  # [t or 1, bv, R, S]
    out = v @ chosen.view(t, v.shape[1], kept, 1)
    return out.reshape(t, -1)[:, :n_columns]
