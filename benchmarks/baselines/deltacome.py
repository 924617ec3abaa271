"""Delta-CoMe: singular vectors in mixed precision (Ping et al., NeurIPS 2024, 2406.08903)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from benchmarks.baselines.base import Encoded, Matrix, too_small
from compressor.codecs import Params, Shape, lowrank_from_factors
from compressor.codecs.lowrank import lowrank_size
from compressor.encoders.sources import TensorSource
from compressor.encoders.svd import factors

_UNIT_BYTES = 4
_NEVER = 1 << 30
_BISECTIONS = 40


class DeltaCome:
    """8, 3 and 2 bits for singular vectors 1-2, 3-34 and the rest, rounded to nearest.

    The paper fixes the ratio at 16 and rounds with GPTQ in groups of 128; here the number of
    vectors meets the budget, and each vector has one float16 scale of least squared error, which
    costs fewer bytes.
    """

    draws = False
    fixed_ratio = None
    keeps_vectors = True
    groups: ClassVar[tuple[tuple[int, int], ...]] = ((2, 8), (32, 3), (_NEVER, 2))

    def plan(self, matrices: Sequence[Matrix], budget_bytes: float) -> list[Params | None]:
        """Bytes in proportion to the matrices' sizes; what is left over goes to the first ones."""
        shapes = [matrix.shape for matrix in matrices]
        least = sum(deltacome_size(shape, 1) for shape in shapes)
        if least > budget_bytes:
            raise too_small("delta-come", budget_bytes, least)
        low, high = 0.0, 2.0  # bytes an element; two fit the whole decomposition
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            total = sum(deltacome_size(shape, _rank(shape, middle)) for shape in shapes)
            low, high = (middle, high) if total <= budget_bytes else (low, middle)
        ranks = [_rank(shape, low) for shape in shapes]
        rest = budget_bytes - sum(map(deltacome_size, shapes, ranks))
        for index, (shape, rank) in enumerate(zip(shapes, ranks, strict=True)):
            more = deltacome_size(shape, rank + 1) - deltacome_size(shape, rank)
            if rank < min(shape) and more <= rest:
                ranks[index] += 1
                rest -= more
        return [{"rank": rank} for rank in ranks]

    def encode(self, name: str, delta: Tensor, params: Params, seed: int) -> Encoded:
        """The seed is not used: nothing here is random."""
        del seed
        a, b = factors(name, TensorSource(delta), params["rank"])
        dense, n_bytes = delta.new_zeros(delta.shape), 0
        for start, end, bits in _cut(params["rank"]):
            term = lowrank_from_factors(a[start:end], b[start:end], bits)
            dense += term.to_dense()
            n_bytes += sum(part.nbytes for part in term.tensors().values()) + 2 * _UNIT_BYTES
        return Encoded(dense, n_bytes)


def deltacome_size(shape: Shape, rank: int) -> int:
    """Bytes of codes, of a float16 scale per vector, and of a unit per group and side."""
    return sum(
        lowrank_size(shape, end - start, bits) + 2 * _UNIT_BYTES for start, end, bits in _cut(rank)
    )


def _rank(shape: Shape, bytes_per_element: float) -> int:
    """Return the largest rank within a matrix' share, at least 1."""
    share = bytes_per_element * math.prod(shape)
    ranks = range(1, min(shape) + 1)
    return max(1, bisect.bisect_right(ranks, share, key=lambda rank: deltacome_size(shape, rank)))


def _cut(rank: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first, end, bits) of every group that is not empty."""
    start = 0
    for count, bits in DeltaCome.groups:
        end = min(start + count, rank)
        if end > start:
            yield start, end, bits
        start = end
