"""Importance-aware sparsity: how often each singular component is kept, and the draw itself.

Source: Yang et al., ImPart, ACL 2025 (arXiv 2504.13237), Algorithm 1; the draw per block is
systematic sampling (Madow, 1949) with offsets stratified over the blocks.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FIXED_POINT = 40  # fraction bits of inclusion probabilities: sums of 2^13 of them are exact
_ONE = 1 << FIXED_POINT
_SLACK = 1e-12  # alpha is solved this much low, so that rounding never drops one too many


class Allocation(NamedTuple):
    """Inclusion probabilities of the leading components.

    alpha      the sparsity of U and V given to Algorithm 1
    inclusion  int64 ``[rank]``, in units of ``2^-40``, within 1 .. 2^40; sums to S exactly
    """

    alpha: float
    inclusion: Ints

    @property
    def probabilities(self) -> Floats:
        """The same as float64; exact."""
        return self.inclusion.astype(np.float64) / _ONE


def kept_before_shift(n_components: int, beta: float) -> int:
    """``floor(n' (1 - beta))``, at least 1: what the pre-pruning leaves."""
    return max(1, math.floor(n_components * (1 - beta) + 1e-9))


def allocate_sparsity(sigma: Floats, alpha_uv: float, beta: float, c: float) -> Floats:
    """Algorithm 1: the drop probability ``p_k`` of every component.

    sigma     ``[n']`` singular values, descending
    alpha_uv  sparsity wanted of U and of V, over all n' components
    beta      share of the components pruned beforehand
    c         how strongly importance counts
    returns   ``[n']`` float64 within 0 .. 1, where 1 means removed

    ``p_k = (1 - (sigma_k / sigma_1)^C) gamma`` with ``gamma = (alpha - beta) / (1 - beta)`` has
    a mean below gamma, so components are then removed from the tail until the mean over the
    first ``r = floor(n' (1 - beta))`` reaches it (the boundary shift).
    """
    r = kept_before_shift(len(sigma), beta)
    gamma = (alpha_uv - beta) / (1 - beta)
    p = np.ones(len(sigma), dtype=np.float64)
    importance = sigma[:r] ** c
    relative = importance / importance[0] if importance[0] > 0 else np.ones(r)
    p[:r] = (1 - relative) * gamma
    total = math.fsum(p[:r])
    last = r - 1
    while total / r < gamma and last >= 0:
        total += 1 - p[last]
        p[last] = 1.0
        last -= 1
    return p


def solve_allocation(sigma: Floats, kept: int, beta: float, c: float) -> Allocation:
    """Find the allocation whose inclusion probabilities sum to `kept` exactly.

    With ``gamma = 1 - S / r`` Algorithm 1 ends with a sum within one component of S; the
    remainder is spread by ``q <- min(1, x q)``. kept is within 1 .. r.
    """
    r = kept_before_shift(len(sigma), beta)
    assert 1 <= kept <= r
    alpha = beta + (1 - beta) * (1 - kept / r - _SLACK)
    q = 1 - allocate_sparsity(sigma, alpha, beta, c)
    q = q[: int(np.flatnonzero(q)[-1]) + 1]
    return Allocation(alpha, to_fixed_point(scale_to_sum(q, kept), kept, FIXED_POINT))


def scale_to_sum(q: Floats, kept: int) -> Floats:
    """``min(1, x q)`` with x such that the sum is `kept`; q descending, at least `kept` long."""
    if len(q) == kept:
        return np.ones(kept)
    full = 0  # how many are capped at 1
    while True:
        factor = (kept - full) / math.fsum(q[full:])
        scaled = np.minimum(q * factor, 1.0)
        scaled[:full] = 1.0
        capped = max(full, int(np.count_nonzero(q[full:] * factor >= 1)) + full)
        if capped == full or capped >= kept:
            return scaled
        full = capped


def to_fixed_point(q: Floats, kept: int, fraction_bits: int) -> Ints:
    """Round to units of ``2^-fraction_bits`` that sum to `kept` exactly, each within (0, 1]."""
    one = 1 << fraction_bits
    fixed = np.clip(np.floor(q * one).astype(np.int64), 1, one)
    short = kept * one - int(fixed.sum())
    for k in range(len(fixed)):
        if short == 0:
            break
        value = min(max(int(fixed[k]) + short, 1), one)
        short -= value - int(fixed[k])
        fixed[k] = value
    assert short == 0
    return fixed


def sample_blocks(inclusion: Ints, n_blocks: int, key: str) -> Ints:
    """Draw the components of every block by systematic sampling.

    inclusion  int64 ``[rank]`` in units of ``2^-40``, summing to a whole number S
    key        names the draw; the same key gives the same draw on any machine
    returns    int64 ``[n_blocks, S]``, each row strictly increasing; component k is in a given
               row with probability ``inclusion[k] / 2^40``

    Row b's offset is uniform, but the offsets of all rows together cover the unit interval
    evenly (one in each of ``n_blocks`` strata, randomly ordered), so that over the rows every
    component is kept about as often as it should be.
    """
    kept = int(inclusion.sum()) // _ONE
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest(), "little")
    # Only raw output is used: numpy fixes that stream, not the methods of Generator.
    bits = np.random.PCG64(seed)
    strata = _shuffled(n_blocks, bits)
    jitter = [int(raw) >> (64 - FIXED_POINT) for raw in np.atleast_1d(bits.random_raw(n_blocks))]
    offsets = np.array(
        [(stratum * _ONE + part) // n_blocks for stratum, part in zip(strata, jitter, strict=True)],
        dtype=np.int64,
    )
    points = offsets[:, None] + np.arange(kept, dtype=np.int64) * _ONE
    drawn = np.searchsorted(np.cumsum(inclusion), points.ravel(), side="right")
    return drawn.astype(np.int64).reshape(n_blocks, kept)


def _shuffled(n: int, bits: np.random.PCG64) -> list[int]:
    """Fisher and Yates; the bias of the modulo is below ``n / 2^64``."""
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        other = int(bits.random_raw()) % (last + 1)
        order[last], order[other] = order[other], order[last]
    return order
