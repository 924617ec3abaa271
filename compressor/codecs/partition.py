"""Balanced partitions: cutting a length into nearly equal runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


def partition(size: int, parts: int) -> list[int]:
    """Return the ``parts + 1`` starts of a balanced cut of ``range(size)``.

    Sizes differ by at most one and the first ``size % parts`` runs are the longer ones, as in
    ``numpy.array_split``.
    """
    assert 1 <= parts <= size
    short, longer = divmod(size, parts)
    return [part * short + min(part, longer) for part in range(parts + 1)]


@dataclass(frozen=True, slots=True)
class Band:
    """Consecutive diagonal blocks of one size, ``[rows, cols]`` each.

    first      number of the first block
    count      how many blocks
    row, col   where the first block begins in the matrix
    code       where its values begin in the stored sequence
    """

    first: int
    count: int
    rows: int
    cols: int
    row: int
    col: int
    code: int


def bands(shape: tuple[int, int], n_blocks: int) -> list[Band]:
    """Group the diagonal blocks by size; at most three bands, because both cuts are balanced."""
    (m_short, m_longer), (n_short, n_longer) = (divmod(size, n_blocks) for size in shape)
    cuts = sorted({0, m_longer, n_longer, n_blocks})
    found, row, col, code = [], 0, 0, 0
    for first, end in pairwise(cuts):
        rows = m_short + (first < m_longer)
        cols = n_short + (first < n_longer)
        count = end - first
        found.append(Band(first, count, rows, cols, row, col, code))
        row += count * rows
        col += count * cols
        code += count * rows * cols
    return found


def kept_values(shape: tuple[int, int], n_blocks: int) -> int:
    """How many values the diagonal blocks hold."""
    return sum(band.count * band.rows * band.cols for band in bands(shape, n_blocks))
