"""Deltas of values that an adapter knows exactly: whole parameters, some rows, given factors."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.checkpoint.layout import Parameter
from compressor.codecs import DenseRows, LowRankTerm, TensorDelta, lowrank_from_factors
from compressor.errors import CheckpointError


def exact_delta(
    parameter: Parameter, ours: Tensor, theirs: Tensor, owner: str
) -> TensorDelta | None:
    """A value that is known whole: stored exactly, from its first row that differs; None if none
    does.

    ours, theirs  in the checkpoint's orientation; theirs may have more rows
    owner         whose value it is, for the message of CheckpointError if the shapes do not fit
    """
    if parameter.transposed:
        ours, theirs = ours.T, theirs.T
    grown = theirs.ndim == ours.ndim and theirs.shape[1:] == ours.shape[1:]
    if not grown or theirs.shape[0] < ours.shape[0]:
        raise CheckpointError(
            f"{owner}: {parameter.name} has shape {list(theirs.shape)}, the base {list(ours.shape)}"
        )
    start = first_difference(ours, theirs)
    if start == theirs.shape[0]:
        return None
    if theirs.ndim == 1:
        start = 0
    return TensorDelta(
        name=parameter.name,
        shape=tuple(theirs.shape),
        base_shape=parameter.shape,
        transposed=parameter.transposed,
        terms=(),
        exact=DenseRows(start, theirs[start:].contiguous()),
    )


def rows_delta(
    parameter: Parameter, ours: Tensor, theirs: Tensor, index: Tensor
) -> TensorDelta | None:
    """Some rows of a matrix, in whichever form takes fewer bytes: the span of rows from the first
    to the last as it is, or one component a row, which is its difference.
    """
    index = index[(ours[index] != theirs[index]).any(1)]
    if not len(index):
        return None
    (m, n), first, last = parameter.shape, int(index[0]), int(index[-1]) + 1
    exact: DenseRows | None = None
    terms: tuple[LowRankTerm, ...] = ()
    if (last - first) * n * ours.element_size() <= len(index) * (m + n) * 4:
        exact = DenseRows(first, theirs[first:last].contiguous())
    else:
        which = torch.zeros(len(index), m)
        which[torch.arange(len(index)), index] = 1
        terms = (lossless(theirs[index].float() - ours[index].float(), which),)
    return TensorDelta(parameter.name, (m, n), (m, n), parameter.transposed, terms, exact)


def is_same_delta(one: TensorDelta | None, two: TensorDelta | None) -> bool:
    """Whether two modules of a tied pair get the same value."""
    if one is None or two is None:
        return one is two
    if one.shape != two.shape or (one.exact is None) != (two.exact is None):
        return False
    if one.exact is not None and two.exact is not None:
        if one.exact.row_start != two.exact.row_start:
            return False
        if not torch.equal(one.exact.values, two.exact.values):
            return False
    parts = [[t for term in delta.terms for t in term.tensors().values()] for delta in (one, two)]
    return len(parts[0]) == len(parts[1]) and all(map(torch.equal, *parts))


def lossless(a: Tensor, b: Tensor) -> LowRankTerm:
    """16-bit factors if those are exact (a bfloat16 adapter's mostly are), else 32-bit ones."""
    small = lowrank_from_factors(a, b, 16)
    if torch.equal(small.a, a) and torch.equal(small.b, b):
        return small
    return lowrank_from_factors(a, b, 32)


def first_difference(ours: Tensor, theirs: Tensor) -> int:
    """Return the first row that differs; the number of ours if none does."""
    differs = ours.float() != theirs[: ours.shape[0]].float()
    rows = differs.reshape(differs.shape[0], -1).any(-1).nonzero()
    return int(rows[0]) if len(rows) else ours.shape[0]
