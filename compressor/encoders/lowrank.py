"""Encoder of `lowrank`: truncated singular value decomposition."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from compressor.codecs.lowrank import LOWRANK_BITS, lowrank_from_factors, lowrank_size
from compressor.codecs.term import MatrixSource, Params, Shape, Term
from compressor.encoders.single import SingleMatrixCodec
from compressor.encoders.svd import factors
from compressor.errors import InputError


@dataclass(frozen=True, slots=True)
class LowRankCodec(SingleMatrixCodec):
    """Options of the codec: `bits` a value, 2, 3, 4, 8, 16 or 32."""

    name: ClassVar[str] = "lowrank"
    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in LOWRANK_BITS:
            raise InputError(f"lowrank: bits must be one of {list(LOWRANK_BITS)}, got {self.bits}")

    def options(self) -> Params:
        """Resolved options, JSON-able."""
        return asdict(self)

    def fit(self, shape: Shape, budget_bytes: float) -> Params:
        """Return the rank whose size is nearest `budget_bytes`, at least 1."""
        ideal = round(budget_bytes / (lowrank_size(shape, 8, self.bits) / 8))
        return {"bits": self.bits, "rank": min(max(ideal, 1), min(shape))}

    def size_bytes(self, shape: Shape, params: Params) -> int:
        """Exact payload bytes."""
        return lowrank_size(shape, params["rank"], params["bits"])

    def encode(
        self, name: str, source: MatrixSource, params: Params, seed: int
    ) -> tuple[Term, ...]:
        """Return one term. seed is not used: nothing here is random."""
        del seed
        a, b = factors(name, source, params["rank"])
        return (lowrank_from_factors(a, b, params["bits"]),)
