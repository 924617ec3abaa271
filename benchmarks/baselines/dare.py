"""DARE: drop delta values at random and rescale the rest (Yu et al., ICML 2024, 2311.03099)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.baselines.base import Encoded, Matrix, too_small
from compressor.codecs import Params
from compressor.codecs.quantize import from_half, to_half, unit_for

_UNIT_BYTES = 4


class Dare:
    """Every value is kept with the same probability and divided by it; 16 bits a value.

    The mask comes from the seed and costs no bytes: the accounting that favours DARE most. Stored
    positions would cost `index_bytes` more.
    """

    draws = True
    fixed_ratio = None
    keeps_vectors = True

    def plan(self, matrices: Sequence[Matrix], budget_bytes: float) -> list[Params | None]:
        """One density for all matrices."""
        n_values = sum(math.prod(matrix.shape) for matrix in matrices)
        density = (budget_bytes - _UNIT_BYTES * len(matrices)) / (2 * n_values)
        if density <= 0:
            raise too_small("dare", budget_bytes, _UNIT_BYTES * len(matrices))
        return [{"density": min(density, 1.0)} for _ in matrices]

    def encode(self, name: str, delta: Tensor, params: Params, seed: int) -> Encoded:
        """Unbiased: the mean over seeds is `delta` (but for the rounding to float16)."""
        density: float = params["density"]
        key = hashlib.sha256(f"dare\0{seed}\0{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        kept = torch.rand(delta.shape, generator=generator) < density
        values = delta[kept] / density
        unit = unit_for(values)
        stored = to_half(values, unit)
        dense = torch.zeros_like(delta)
        dense[kept] = from_half(stored, unit)
        return Encoded(dense, stored.nbytes + _UNIT_BYTES)


def index_bytes(n_values: int, density: float) -> float:
    """Least bytes that the positions of the kept values take when they are stored: the entropy."""
    if density in (0.0, 1.0):
        return 0.0
    other = 1 - density
    return -n_values * (density * math.log2(density) + other * math.log2(other)) / 8
