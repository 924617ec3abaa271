"""The arithmetic of merging: pure functions of task vectors.

Sources: task arithmetic, Ilharco et al., ICLR 2023 (arXiv 2212.04089); TIES, Yadav et al., NeurIPS
2023 (arXiv 2306.01708); DARE, Yu et al., ICML 2024 (arXiv 2311.03099).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_LOW_BITS = 15  # of the 31 that order float32 magnitudes; one histogram each for high and low


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float], *, mean: bool) -> Tensor:
    """Task arithmetic: ``sum_t w_t delta_t``, divided by ``sum_t w_t`` if `mean`.

    deltas  float32 tensors of one shape; returns the same
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    divisor = sum(weights) if mean else 1.0
    return total if divisor in (0.0, 1.0) else total.div_(divisor)


def elect_and_merge(deltas: Sequence[Tensor], weights: Sequence[float], *, mean: bool) -> Tensor:
    """TIES after trimming: elect each element's sign by mass, merge those that agree with it.

    ``gamma = sgn(sum_t w_t delta_t)``; over ``A = {t: sgn(w_t delta_t) = gamma}`` the mean
    ``sum_A w_t delta_t / sum_A w_t`` (the paper's disjoint mean for equal weights), or the sum.
    Where the mass cancels exactly there is no sign, and the result is 0.

    deltas  trimmed, float32, of one shape; returns the same
    """
    elected = weighted_sum(deltas, weights, mean=False).sign_()
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        scaled = delta * weight
        agrees = (scaled.sign() == elected) & (elected != 0)
        total += torch.where(agrees, scaled, 0.0)
        mass += agrees * weight
    if not mean:
        return total
    return torch.where(mass != 0, total / torch.where(mass != 0, mass, 1.0), 0.0)


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Keep the elements of magnitude `threshold` or more, the others become 0."""
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def kth_magnitude(pieces: Callable[[], Iterable[Tensor]], k: int) -> float:
    """Return the k-th largest magnitude, exactly, of a vector too large to hold.

    pieces  gives the vector as finite float32 tensors, each time it is called; called twice
    k       within 1 .. number of elements

    Magnitudes of floats are ordered as their bits are: one pass finds the high bits of the
    answer in a histogram, the next the low bits among those that share them.
    """
    high = _histogram(pieces, lambda bits: bits >> _LOW_BITS, 1 << (31 - _LOW_BITS))
    prefix, above = _locate(high, k)
    low_mask = (1 << _LOW_BITS) - 1
    low = _histogram(
        pieces, lambda bits: bits[bits >> _LOW_BITS == prefix] & low_mask, 1 << _LOW_BITS
    )
    rest, _ = _locate(low, k - above)
    bits = torch.tensor([prefix << _LOW_BITS | rest], dtype=torch.int32)
    return float(bits.view(torch.float32))


def dare_mask(key: str, start: int, count: int, density: float) -> Tensor:
    """Return elements ``[start, start + count)`` of a Bernoulli(density) mask named by `key`.

    bool ``[count]``; the same wherever the vector is cut. Only numpy's raw stream is used, which
    is the same on every machine and in every version.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest(), "little")
    bits = np.random.PCG64(seed)
    bits.advance(start)
    limit = np.uint64(min(int(density * 2.0**64), 2**64 - 1))
    return torch.from_numpy(np.atleast_1d(bits.random_raw(count)) <= limit)


def _histogram(
    pieces: Callable[[], Iterable[Tensor]], bucket: Callable[[Tensor], Tensor], size: int
) -> Tensor:
    counts = torch.zeros(size, dtype=torch.int64)
    for piece in pieces():
        bits = piece.reshape(-1).view(torch.int32) & 0x7FFFFFFF
        counts += torch.bincount(bucket(bits), minlength=size)
    return counts


def _locate(counts: Tensor, k: int) -> tuple[int, int]:
    """Bucket of the k-th largest element, and how many elements lie in the buckets above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, above
