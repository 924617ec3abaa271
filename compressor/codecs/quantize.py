"""Row-wise scalar quantisation by least squares, and the number formats on disk.

Levels are symmetric without a zero: ``value = (code - (2^b - 1) / 2) * scale`` with ``code`` in
``0 .. 2^b - 1`` (2 bit: +-0.5, +-1.5). One scale per row, chosen to minimise the squared error.

On disk, scales and 16-bit values are float16 in units of one power of two per tensor, so that
deltas of 1e-5 keep float16's full precision instead of falling among its subnormals. Scales may
also be one byte each, a sixteenth of an octave a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUANT_BITS = (2, 3, 4, 8)  # widths stored as codes and scales
SCALE_STEPS = 16  # of a one-byte scale, per octave

_CHUNK = 1 << 17  # elements worked on at once: stays in the cache
_TINY = 2.0**-100  # a row below this is treated as zero: its scale has no float32 reciprocal
# Range of (largest level * scale) / absmax searched, by bits, and steps. Wide enough for rows
# from uniform to heavy-tailed; the finer the levels, the nearer to 1 the optimum lies.
_GRID = {
    2: (0.15, 1.0, 24),
    3: (0.25, 1.0, 24),
    4: (0.35, 1.0, 20),
    8: (0.7, 1.0, 12),
}


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise each row with its own scale.

    x       ``[R, C]`` float32, finite
    bits    2, 3, 4 or 8
    returns codes uint8 ``[R, C]`` and scales float32 ``[R]`` (>= 0; 0 for an all-zero row)

    For given codes the best scale is ``<x, l> / <l, l>`` (`l` the levels) and leaves the error
    ``<x, x> - <x, l>^2 / <l, l>``; the grid over scales therefore maximises ``<x, l>^2 / <l, l>``,
    and one more assignment with the refined scale can only lower the error.
    """
    assert bits in QUANT_BITS
    rows, cols = x.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scales = torch.empty(rows, dtype=torch.float32)
    step = max(1, _CHUNK // max(1, cols))
    for start in range(0, rows, step):
        part = x[start : start + step]
        scale = _best_scale(part.abs(), bits)
        codes[start : start + step], scales[start : start + step] = _assign(part, scale, bits)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the float32 values of ``codes [..., C]`` with ``scales [...]`` per row."""
    return (codes.float() - ((1 << bits) - 1) / 2) * scales.unsqueeze(-1)


def _best_scale(magnitude: Tensor, bits: int) -> Tensor:
    """Scale per row from the grid and one closed-form step. ``magnitude [R, C]`` >= 0."""
    top = (1 << (bits - 1)) - 1  # index of the largest level, which is top + 0.5
    absmax = magnitude.amax(dim=1)
    zero = absmax < _TINY
    unit = torch.where(zero, torch.ones_like(absmax), absmax / (top + 0.5))
    low, high, n_steps = _GRID[bits]
    best_gain = torch.full_like(absmax, -1.0)
    best = unit.clone()
    levels = torch.empty_like(magnitude)
    for step in range(n_steps):
        fraction = low + (high - low) * step / (n_steps - 1)
        torch.mul(magnitude, (1.0 / (unit * fraction)).unsqueeze(1), out=levels)
        levels.floor_().clamp_(max=top).add_(0.5)
        dot = torch.einsum("rc,rc->r", magnitude, levels)
        norm = torch.einsum("rc,rc->r", levels, levels)
        gain = dot * (dot / norm)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, dot / norm, best)
    return torch.where(zero, torch.zeros_like(best), best)


def _assign(x: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Nearest levels for ``scale``, then the best scale for them."""
    half = 1 << (bits - 1)
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    levels = torch.floor(x * inverse.unsqueeze(1)).clamp_(-half, half - 1)
    codes = (levels + half).to(torch.uint8)
    levels.add_(0.5)
    refined = torch.einsum("rc,rc->r", x, levels) / torch.einsum("rc,rc->r", levels, levels)
    return codes, torch.where(scale > 0, refined, scale)


def unit_for(*tensors: Tensor, headroom_bits: int = 15) -> float:
    """The power of two in whose units the largest number is ``2^(headroom_bits - 1)`` or more.

    At most 15: then it lies in ``[2^14, 2^15)``, half of float16's range, where rounding cannot
    overflow. 1.0 if all are zero.
    """
    largest = max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)
    if largest == 0.0:
        return 1.0
    return 2.0 ** max(math.frexp(largest)[1] - headroom_bits, -126)


def to_half(x: Tensor, unit: float) -> Tensor:
    """Return ``x / unit`` as float16."""
    return (x.float() / unit).to(torch.float16)


def from_half(stored: Tensor, unit: float) -> Tensor:
    """Return ``stored * unit`` as float32."""
    return stored.float() * unit


def to_octaves(scales: Tensor, unit: float) -> Tensor:
    """Return scales ``[m]`` >= 0 as one byte each: uint8 ``[m]``, 0 for zero.

    Code ``c > 0`` is ``unit * 2^((c - 255) / 16)``, at most 2.2 % off; what is more than 15 octaves
    below `unit` (a power of two, and the least that is not below the largest scale) counts as zero.
    """
    wide = scales.double() / unit
    codes = (wide.clamp(min=1e-30).log2() * SCALE_STEPS).round_() + 255
    return codes.clamp_(0, 255).to(torch.uint8)


def from_octaves(stored: Tensor, unit: float) -> Tensor:
    """Return float32, the inverse of `to_octaves`, of any shape and on any device.

    Computed, not looked up: a table would have to be copied to the device.
    """
    values = (((stored.double() - 255) / SCALE_STEPS).exp2() * unit).float()
    return values.masked_fill_(stored == 0, 0.0)


def octave_unit(scales: Tensor) -> float:
    """The unit for `to_octaves`; 1.0 if all scales are zero."""
    largest = float(scales.max()) if scales.numel() else 0.0
    if largest == 0.0:
        return 1.0
    mantissa, exponent = math.frexp(largest)
    return math.ldexp(1.0, max(exponent - (mantissa == 0.5), -126))
