"""Singular value decomposition of a streamed matrix, through its Gram matrix in float64.

With ``A [m, n]``, m >= n, ``A^T A = V diag(s^2) V^T`` is accumulated over row strips, so only
an ``[n, n]`` matrix and one strip are ever in memory. Squaring costs half the digits: singular
values below about ``1e-8 s_1`` are noise and are reported as zero. Those above are as good as
the float32 input warrants.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.codecs.sources import Transposed, finite_block
from compressor.codecs.term import MatrixSource

_STRIP = 1 << 22  # elements read at once
_NOISE = 1e-7  # singular values below this times the largest are zero


class Spectrum(NamedTuple):
    """Singular values and right vectors of a tall matrix ``[m, n]``.

    sigma  float64 ``[r]``, descending, noise set to zero
    right  float64 ``[n, r]``, orthonormal columns
    """

    sigma: Tensor
    right: Tensor


def tall(source: MatrixSource) -> tuple[MatrixSource, bool]:
    """Return the source with m >= n, and whether it was transposed for that."""
    m, n = source.shape
    return (source, False) if m >= n else (Transposed(source), True)


def row_strips(m: int, n: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut m rows of n into strips of bounded size, each a multiple of `multiple` rows."""
    step = max(1, _STRIP // (n * multiple)) * multiple
    for start in range(0, m, step):
        yield start, min(start + step, m)


def spectrum(name: str, source: MatrixSource, rank: int | None = None) -> Spectrum:
    """Return the leading `rank` (default: all) singular values and right vectors.

    source  tall, see `tall`. Raises UnsupportedTensor naming `name` if it is not finite.
    """
    m, n = source.shape
    assert m >= n
    gram = torch.zeros(n, n, dtype=torch.float64)
    for start, end in row_strips(m, n):
        strip = finite_block(name, source, start, end, 0, n).double()
        gram.addmm_(strip.T, strip)
    values, vectors = torch.linalg.eigh(gram)  # ascending
    keep = n if rank is None else min(rank, n)
    sigma = values.flip(0)[:keep].clamp(min=0).sqrt()
    sigma[sigma <= _NOISE * sigma[0]] = 0.0
    return Spectrum(sigma, vectors.flip(1)[:, :keep].contiguous())


def root_inverse(sigma: Tensor) -> Tensor:
    """``1 / sqrt(sigma)``, zero where sigma is: what turns ``A V`` into ``U sqrt(sigma)``."""
    return torch.where(sigma > 0, sigma.clamp(min=1e-300).rsqrt(), torch.zeros_like(sigma))


def factors(name: str, source: MatrixSource, rank: int) -> tuple[Tensor, Tensor]:
    """Return the truncated decomposition as ``a [k, n]`` and ``b [k, m]``, ``dW ~ b^T a``.

    float32; the root of each singular value is in both. k = rank, at most min(m, n).
    """
    source_tall, flipped = tall(source)
    m, n = source_tall.shape
    sigma, right = spectrum(name, source_tall, rank)
    weights = (right * root_inverse(sigma)).float()
    left = torch.empty(len(sigma), m, dtype=torch.float32)
    for start, end in row_strips(m, n):
        left[:, start:end] = (source_tall.block(start, end, 0, n) @ weights).T
    right_scaled = (right * sigma.sqrt()).T.float().contiguous()
    return (left, right_scaled) if flipped else (right_scaled, left)
