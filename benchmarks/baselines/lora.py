"""A LoRA extracted from a full fine-tune: what can be served today without this project."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.baselines.base import Encoded, Matrix, too_small
from compressor.codecs import Params
from compressor.encoders.sources import TensorSource
from compressor.encoders.svd import factors


class ExtractedLora:
    """Truncated SVD of every linear layer in float16, as ``mergekit-extract-lora`` does it.

    Embeddings, lm_head, norms, biases and added rows stay the base's, for LoRA servers take
    none of them. One rank for all layers; what the budget leaves over raises the rank of the
    first ones by one (PEFT's ``rank_pattern``).
    """

    draws = False
    fixed_ratio = None
    keeps_vectors = False

    def plan(self, matrices: Sequence[Matrix], budget_bytes: float) -> list[Params | None]:
        """Ranks r and r + 1."""
        costs = [0 if matrix.is_vocabulary else 2 * sum(matrix.shape) for matrix in matrices]
        rank = int(budget_bytes // sum(costs))
        if rank < 1:
            raise too_small("lora", budget_bytes, sum(costs))
        rest = budget_bytes - rank * sum(costs)
        plans: list[Params | None] = []
        for matrix, cost in zip(matrices, costs, strict=True):
            more = cost <= rest
            rest -= cost * more
            wanted = min(rank + more, *matrix.shape)
            plans.append(None if matrix.is_vocabulary else {"rank": wanted})
        return plans

    def encode(self, name: str, delta: Tensor, params: Params, seed: int) -> Encoded:
        """The seed is not used: nothing here is random."""
        del seed
        a, b = factors(name, TensorSource(delta), params["rank"])
        a, b = a.half(), b.half()
        return Encoded(b.float().T @ a.float(), a.nbytes + b.nbytes)
