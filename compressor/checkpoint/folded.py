"""Scales that a quantiser has moved from weights into what comes before them (AWQ, SmoothQuant).

Before it rounds, AWQ multiplies the inputs of a layer's weights by scales of its own and divides
the norm before them, or the outputs of the layer before: the model computes the same with other
weights. A difference between two models of the original weights fits the base once it is scaled as
these were. No record says by what, but the base does: each of its matrices is the original's with
rows and columns scaled, and rounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_SAMPLE = 1024  # rows that columns' scales are taken from, and the reverse
_ROUNDS = 4
_LEAST_LIKENESS = 0.9  # rank correlation of scales with what they were divided out of


@dataclass(frozen=True, slots=True)
class Scales:
    """What the base's values are multiplied by beside the original's.

    rows     float32 ``[m]``, or of a vector's elements
    columns  float32 ``[n]``; None of a vector
    offset   that a vector's values are used with: 1 of a norm that multiplies by ``1 + weight``
    """

    rows: Tensor
    columns: Tensor | None = None
    offset: float = 0.0

    def of_block(
        self, block: Tensor, row_start: int, row_end: int, col_start: int, col_end: int
    ) -> Tensor:
        """Scale a part of a difference ``[out, in]``."""
        assert self.columns is not None
        rows = self.rows[row_start:row_end].unsqueeze(1)
        return block * rows * self.columns[col_start:col_end]

    def of_vector(self, value: Tensor) -> Tensor:
        """Scale a value of the fine-tune's, in its own dtype."""
        scaled = (value.float() + self.offset) * self.rows - self.offset
        return scaled.to(value.dtype)


def matrix_scales(original: Tensor, base: Tensor) -> Scales:
    """Fit ``base ~ rows[:, None] * original * columns`` by least squares: float32 ``[m, n]`` each.

    Errors of rounding average out over a row or column, but a column that is small among its group
    may be rounded away: see `explained`. Of a factor of all only the product counts.
    """
    m, n = original.shape
    some_rows = torch.arange(0, m, max(1, m // _SAMPLE))
    some_columns = torch.arange(0, n, max(1, n // _SAMPLE))
    rows, columns = torch.ones(m), torch.ones(n)
    for _ in range(_ROUNDS):
        part = original[some_rows] * rows[some_rows].unsqueeze(1)
        columns = _fitted(part, base[some_rows], dim=0)
        part = original[:, some_columns] * columns[some_columns]
        rows = _fitted(part, base[:, some_columns], dim=1)
    return Scales(rows, columns)


def _fitted(part: Tensor, wanted: Tensor, dim: int) -> Tensor:
    square = part.square().sum(dim)
    found = (part * wanted).sum(dim) / square
    return torch.where(square > 0, found, 1.0)


def vector_scales(original: Tensor, base: Tensor, columns: Iterable[Tensor]) -> Scales | None:
    """Say by what a norm was divided, if the columns of a layer were multiplied by the same.

    columns  of the matrices that are as wide

    None if no matrix tells of such scales: the values differ for another reason.
    """
    others = [column for column in columns if len(column) == len(original)]
    tried: list[tuple[float, Scales]] = []
    for offset in (0.0, 1.0):
        before, now = original.float() + offset, base.float() + offset
        ratio = torch.where((before != 0) & (now != 0), now / before, 1.0)
        if bool((ratio > 0).all()):
            likeness = max((_likeness(1 / ratio, other) for other in others), default=0.0)
            tried.append((likeness, Scales(ratio, None, offset)))
    likeness, best = max(tried, key=lambda pair: pair[0], default=(0.0, None))
    return best if likeness > _LEAST_LIKENESS else None


def explained(scales: Scales, found: Iterable[Tensor]) -> Scales:
    """Take what a matrix's columns were multiplied by from where it was divided out, if that is
    among what was `found`: it was not rounded there.
    """
    assert scales.columns is not None
    columns = scales.columns
    known = [(_likeness(one, columns), one) for one in found if len(one) == len(columns)]
    likeness, best = max(known, key=lambda pair: pair[0], default=(0.0, columns))
    if likeness <= _LEAST_LIKENESS:
        return scales
    return replace(scales, columns=best * (columns / best).median())


def _likeness(one: Tensor, two: Tensor) -> float:
    """Rank correlation; 0 if one of the two is the same everywhere."""
    if bool((one == one[0]).all()) or bool((two == two[0]).all()):
        return 0.0
    first, second = (x.argsort().argsort().double() for x in (one, two))
    first, second = first - first.mean(), second - second.mean()
    return float(torch.cosine_similarity(first, second, dim=0))
