"""Biases of attention scores that grow with the distance (ALiBi: Press et al., arXiv 2108.12409).

They become a few more dimensions of queries and keys, whose product they are: no kernel knows of
them. Every number is split into parts that the dtype holds, and the sums are float32's, as scores
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.model.scores import ScoresUsed

RADIX = 256  # of positions: parts below it are exact in bfloat16
N_ADDED = 8  # dimensions: kernels read them in eights
TOLERANCE = 0.01  # of the largest bias: half precision rounds them


@dataclass(frozen=True, slots=True)
class Alibi:
    """slopes: float64 ``[H]``, of each head: what a score gains with each position, before the
    attention's scale.
    """

    slopes: Tensor

    def joined(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``q [1, H, T, D]``, ``k [1, Hkv, T, D]``, positions ``[T]`` -> both with `N_ADDED` more:
        their product gains ``slope * (position of k - position of q)``.
        """
        slopes = self.slopes
        high = slopes.to(q.dtype)
        low = (slopes - high.double()).to(q.dtype)
        used = high.double() + low.double()
        back = _split(-used.unsqueeze(1) * positions.double(), q.dtype)  # [H, T] each
        parts = [high * RADIX, low * RADIX, high, low]
        rows = [part.unsqueeze(1).expand(-1, len(positions)) for part in parts]
        added_q = torch.stack([*rows, *back, torch.zeros_like(back[0])], dim=-1).unsqueeze(0)
        far, near = positions // RADIX, positions % RADIX
        one, none = torch.ones_like(near), torch.zeros_like(near)
        columns = torch.stack([far, far, near, near, one, one, one, none], dim=-1).to(k.dtype)
        added_k = columns.expand(1, k.shape[1], -1, -1)
        return torch.cat([q, added_q], dim=-1), torch.cat([k, added_k], dim=-1)


def _split(value: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Three numbers of the dtype whose sum it is, as nearly as they can be."""
    parts = []
    for _ in range(3):
        part = value.to(dtype)
        parts.append(part)
        value = value - part.double()
    return parts


def alibi_of(biases: Sequence[Tensor], heads: int, tokens: int, scale: float) -> Alibi | None:
    """What the sum of these biases ``[.., H, T or 1, T]`` of a first pass is; None without any.

    Raises ScoresUsed if it is anything else: what is zero for a few tokens may be a mask for many.
    """
    if not biases:
        return None
    total = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    for bias in biases:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise ScoresUsed("its attention adds something to its scores that is no number")
        if not bool(bias.any()):
            raise ScoresUsed("its attention adds something to its scores that may be a mask")
        total = total + bias.detach().double().cpu().reshape(-1, *bias.shape[-2:])
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    gained = torch.where(causal, total - total[:, :, :1], 0.0)
    slopes = gained[:, -1, -1] / (tokens - 1)
    wanted = torch.where(causal, slopes.view(-1, 1, 1) * torch.arange(tokens), 0.0)
    if not bool((gained - wanted).abs().max() <= TOLERANCE * gained.abs().max()):
        raise ScoresUsed("its attention adds a bias to its scores that does not grow evenly")
    return Alibi((slopes / scale).to(biases[0].device))
