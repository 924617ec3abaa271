"""Scalar quantisation with one step for any group of values, in the levels of `quantize`.

``value = (code - (2^b - 1) / 2) * step``; the groups are given by a number for each value, so
that they need not be rows: `impart-qt` has one for all kept entries of a singular vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The best step for a normal distribution, in standard deviations (Max, 1960), and what is tried
# around it: heavier tails want larger steps, the more so the more levels there are.
_NORMAL_STEP = {2: 0.9957, 3: 0.5860, 8: 0.0308}
_TRIED = {2: (0.6, 1.8, 16), 3: (0.6, 2.2, 16), 8: (0.4, 6.0, 48)}


def fit_steps(values: Tensor, groups: Tensor, n_groups: int, bits: int) -> Tensor:
    """Return the step of each group that leaves the least squared error.

    values   float32, any shape, finite
    groups   int64, same shape, within 0 .. n_groups - 1
    returns  float32 ``[n_groups]``, > 0 where the group has a value other than zero, else 0

    For given codes the best step is ``<x, l> / <l, l>`` (`l` the levels); the search over steps
    maximises ``<x, l>^2 / <l, l>``, what the error falls short of ``<x, x>``.
    """
    flat, index = values.flatten().double(), groups.flatten()
    counts = torch.bincount(index, minlength=n_groups)
    power = _sums(index, flat * flat, n_groups)
    rms = (power / counts.clamp(min=1)).sqrt()
    low, high, n_tried = _TRIED[bits]
    best, best_gain = torch.zeros_like(rms), torch.zeros_like(rms)
    for trial in range(n_tried):
        factor = _NORMAL_STEP[bits] * low * (high / low) ** (trial / (n_tried - 1))
        levels = _levels(flat, (rms * factor)[index], bits)
        dot = _sums(index, flat * levels, n_groups)
        norm = _sums(index, levels * levels, n_groups).clamp(min=1e-300)
        gain = dot * dot / norm
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, dot / norm, best)
    return best.float()


def nearest_codes(values: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Return uint8 codes of the nearest levels; `steps` broadcasts to `values`."""
    half = 1 << (bits - 1)
    return (_levels(values, steps, bits) + (half - 0.5)).to(torch.uint8)


def code_levels(codes: Tensor, bits: int) -> Tensor:
    """Return the levels of uint8 `codes`: ``code - (2^b - 1) / 2``, float32."""
    return codes.float() - ((1 << bits) - 1) / 2


def _levels(values: Tensor, steps: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    inverse = torch.where(steps > 0, 1.0 / steps, torch.zeros_like(steps))
    return torch.floor(values * inverse).clamp_(-half, half - 1).add_(0.5)


def _sums(index: Tensor, weights: Tensor, n_groups: int) -> Tensor:
    """Sums by group, in the order of the elements on any machine."""
    return torch.bincount(index, weights=weights, minlength=n_groups)
