"""Delta-CoMe: singular vectors in mixed precision (Ping et al., NeurIPS 2024, 2406.08903)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from benchmarks.baselines.base import Encoded, Matrix, too_small
from compressor.codecs import Params, Shape, lowrank_from_factors
from compressor.codecs.lowrank import lowrank_size
from compressor.codecs.sources import TensorSource
from compressor.codecs.svd import factors
from compressor.plan import share_out

_UNIT_BYTES = 4
_NEVER = 1 << 30


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
        """Ranks in proportion to the matrices' sizes."""
        sites = [(matrix.shape,) for matrix in matrices]
        allotments = share_out(self, sites, budget_bytes)
        total = sum(allotment.n_bytes for allotment in allotments)
        if total > budget_bytes * 1.02:
            raise too_small("delta-come", budget_bytes, total)
        return [allotment.params for allotment in allotments]

    def plan_siblings(self, shapes: Sequence[Shape], budget_bytes: float) -> Params:
        """Return the rank of one matrix whose size is nearest the budget, at least 1."""
        (shape,) = shapes
        rank = 1
        while rank < min(shape) and deltacome_size(shape, rank) < budget_bytes:
            rank += 1
        over = deltacome_size(shape, rank) - budget_bytes
        if rank > 1 and over > budget_bytes - deltacome_size(shape, rank - 1):
            rank -= 1
        return {"rank": rank}

    def size_bytes(self, shape: Shape, params: Params) -> int:
        """Payload bytes."""
        return deltacome_size(shape, params["rank"])

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


def _cut(rank: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first, end, bits) of every group that is not empty."""
    start = 0
    for count, bits in DeltaCome.groups:
        end = min(start + count, rank)
        if end > start:
            yield start, end, bits
        start = end
