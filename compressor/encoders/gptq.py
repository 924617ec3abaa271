"""GPTQ on the support of block-sparse factors: what rounding one value loses, others make up for.

With inputs ``x`` of second moment ``H = E[x x^T]``, a row ``w`` rounded to ``q`` costs
``(w - q)^T H (w - q)``. Columns are rounded one after the other, and the error of each is spread
over those still to come by the Cholesky factor of ``H^-1`` (Frantar et al., arXiv 2210.17323).
A masked row has zeros that stay zero, so ``H`` is first restricted to the row's own support;
ImPart's Algorithm 2 (arXiv 2504.13237) instead compensates in columns that the mask throws away.

Everything is float64 and batched over the problems that have a support of their own: the
components for V, the blocks of rows for U.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.codecs.impart_qt_sampling import CLASS_BITS, Kept
from compressor.codecs.quantize_groups import code_levels, nearest_codes

DAMPING = 0.01  # of the mean of H's diagonal, added to it
WINDOW = 256  # values of a component of V that compensate for each other; work grows as its square

_BATCH = 1 << 24  # doubles of all Cholesky factors held at once


def gptq_left(
    values: Tensor, index: Tensor, block_rows: int, kept: Kept, steps: Tensor, hessian: Tensor
) -> Tensor:
    """Quantise U: all rows of a block share their components, hence one factor of H.

    values   float32 ``[m, S]``, columns by class
    index    int64 ``[blocks, S]``, components of each block
    steps    float64 ``[r]``, the quantisation step of each component
    hessian  float64 ``[r, r]``, second moment of what U is applied to
    returns  codes uint8 ``[m, S]``
    """
    m, n_kept = values.shape
    n_blocks = index.shape[0]
    padded = torch.zeros(n_blocks * block_rows, n_kept, dtype=torch.float64)
    padded[:m] = values
    blocks = padded.view(n_blocks, block_rows, n_kept)
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    bits = _column_bits(kept)
    together = max(1, _BATCH // (n_kept * (n_kept + block_rows)))
    for start in range(0, n_blocks, together):
        part = slice(start, start + together)
        chosen = index[part]
        local = hessian[chosen.unsqueeze(2), chosen.unsqueeze(1)]
        codes[part] = _solve(blocks[part], local, steps[chosen].unsqueeze(1), bits)
    return codes.view(-1, n_kept)[:m]


def gptq_right(
    values: Tensor, index: Tensor, block_rows: int, kept: Kept, steps: Tensor, hessian: Tensor
) -> Tensor:
    """Quantise V: a component has values in the rows (inputs) of the blocks that keep it.

    values   float32 ``[n, S]``, columns by class
    index    int64 ``[blocks, S]``
    hessian  float64 ``[n, n]``, second moment of the layer's input
    returns  codes uint8 ``[n, S]``

    Of each component at most `WINDOW` inputs compensate for each other; the most active first.
    """
    codes = torch.empty(values.shape, dtype=torch.uint8)
    by_row = index.repeat_interleave(block_rows, dim=0)[: values.shape[0]]
    start = 0
    for bits, count in zip(CLASS_BITS, kept, strict=True):
        runs = list(_runs(by_row[:, start : start + count], start, hessian))
        start += count
        width = max((len(run.rows) for run in runs), default=1)
        together = max(1, _BATCH // (width * width))
        for first in range(0, len(runs), together):
            _round_runs(runs[first : first + together], values, steps, bits, hessian, codes)
    return codes


@dataclass(frozen=True, slots=True)
class _Run:
    """Where some of a component's values lie: ``values[rows, columns]``."""

    component: int
    rows: Tensor
    columns: Tensor


def _runs(by_row: Tensor, first_column: int, hessian: Tensor) -> Iterator[_Run]:
    """Cut each component's support into windows; inside one, the most active input first."""
    for component in torch.unique(by_row).tolist():
        support, columns = (by_row == component).nonzero(as_tuple=True)
        for start in range(0, len(support), WINDOW):
            rows = support[start : start + WINDOW]
            order = hessian.diagonal()[rows].argsort(descending=True, stable=True)
            columns_here = columns[start : start + WINDOW][order] + first_column
            yield _Run(component, rows[order], columns_here)


def _round_runs(
    runs: list[_Run], values: Tensor, steps: Tensor, bits: int, hessian: Tensor, codes: Tensor
) -> None:
    """Solve the runs together, padded to the longest with inputs that nothing depends on."""
    width = max(len(run.rows) for run in runs)
    padded = torch.zeros(len(runs), 1, width, dtype=torch.float64)
    local = torch.eye(width, dtype=torch.float64).repeat(len(runs), 1, 1)
    for i, run in enumerate(runs):
        length = len(run.rows)
        padded[i, 0, :length] = values[run.rows, run.columns]
        local[i, :length, :length] = hessian[run.rows.unsqueeze(1), run.rows]
        local[i].diagonal()[length:] = local[i].diagonal()[:length].mean()
    step = steps[[run.component for run in runs]].view(-1, 1, 1).expand_as(padded)
    found = _solve(padded, local, step, [bits] * width)
    for i, run in enumerate(runs):
        codes[run.rows, run.columns] = found[i, 0, : len(run.rows)]


def _solve(rows: Tensor, hessian: Tensor, steps: Tensor, bits: Sequence[int]) -> Tensor:
    """Round ``rows [P, R, S]`` column by column under ``hessian [P, S, S]``; uint8 codes.

    steps  ``[P, 1 or R, S]``
    bits   of each column
    """
    left = rows.double().clone()
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    spread = _inverse_factor(hessian)
    for j, width in enumerate(bits):
        step = steps[:, :, j]
        codes[:, :, j] = nearest_codes(left[:, :, j], step, width)
        rounded = code_levels(codes[:, :, j], width).double() * step
        error = (left[:, :, j] - rounded) / spread[:, j, j].unsqueeze(1)
        left[:, :, j + 1 :] -= error.unsqueeze(2) * spread[:, j, j + 1 :].unsqueeze(1)
    return codes


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse, ``[P, S, S]``."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.mean(dim=1, keepdim=True)
    damping = torch.where(damping > 0, damping, torch.ones_like(damping))
    damped = hessian + torch.diag_embed(damping.expand_as(diagonal))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _column_bits(kept: Kept) -> list[int]:
    return [bits for bits, count in zip(CLASS_BITS, kept, strict=True) for _ in range(count)]
