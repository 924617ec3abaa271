"""Singular value decomposition of a streamed matrix, whole or of its leading part only.

Whole: with ``A [m, n]``, m >= n, ``A^T A = V diag(s^2) V^T`` is accumulated over row strips in
float64, so only an ``[n, n]`` matrix and one strip are ever in memory. Squaring costs half the
digits: singular values below about ``1e-8 s_1`` are noise and are reported as zero. Those above are
as good as the float32 input warrants.

Leading part: randomised subspace iteration (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1)
on ``A^T A``, each step one pass over row strips with a thin ``[n, k + oversampling]`` matrix; its
work is linear in the matrix' size where the whole decomposition's is cubic.

Everything runs on the device that the source's blocks are on; what is returned is on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.codecs.term import MatrixSource
from compressor.encoders.sources import Transposed, finite_block

_STRIP = 1 << 22  # elements read at once
_NOISE = 1e-7  # singular values below this times the largest are zero
_OVERSAMPLING = 16  # further directions than asked for that the randomised iteration keeps
_POWER_PASSES = 3  # products with A^T A before the range is taken
_THIN = 0.25  # share of n up to which few directions are cheaper than all of them


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
    for _, strip in _strips(name, source):
        wide = strip.double()
        gram = gram.to(wide.device).addmm_(wide.T, wide)
    values, vectors = torch.linalg.eigh(gram)  # ascending
    keep = n if rank is None else min(rank, n)
    sigma = _root(values.flip(0)[:keep])
    return Spectrum(sigma.cpu(), vectors.flip(1)[:, :keep].contiguous().cpu())


def root_inverse(sigma: Tensor) -> Tensor:
    """``1 / sqrt(sigma)``, zero where sigma is: what turns ``A V`` into ``U sqrt(sigma)``."""
    return torch.where(sigma > 0, sigma.clamp(min=1e-300).rsqrt(), torch.zeros_like(sigma))


def is_thin(shape: tuple[int, int], rank: int) -> bool:
    """Whether `factors` takes the randomised way: `rank` is a small part of the matrix."""
    return rank + _OVERSAMPLING <= _THIN * min(shape)


def factors(name: str, source: MatrixSource, rank: int) -> tuple[Tensor, Tensor]:
    """Return the truncated decomposition as ``a [k, n]`` and ``b [k, m]``, ``dW ~ b^T a``.

    float32; the root of each singular value is in both. k = rank, at most min(m, n). Randomised
    where `is_thin`, with a fixed seed: what it misses of the best rank-k approximation's energy
    is below 1 % even for flat spectra (tests/compressor/encoders/test_svd.py).
    """
    source_tall, flipped = tall(source)
    thin = is_thin(source.shape, rank)
    left, right = (_leading if thin else _whole)(name, source_tall, rank)
    return (left, right) if flipped else (right, left)


def _whole(name: str, source: MatrixSource, rank: int) -> tuple[Tensor, Tensor]:
    """``left [k, m]`` and ``right [k, n]`` from the whole spectrum of a tall matrix."""
    sigma, right = spectrum(name, source, rank)
    weights = (right * root_inverse(sigma)).float()
    left = torch.empty(len(sigma), source.shape[0], dtype=torch.float32)
    for start, strip in _strips(name, source):
        left[:, start : start + len(strip)] = (strip @ weights.to(strip.device)).T
    return left, (right * sigma.sqrt()).T.float().contiguous()


def _leading(name: str, source: MatrixSource, rank: int) -> tuple[Tensor, Tensor]:
    """`_whole` by randomised subspace iteration."""
    m, n = source.shape
    size = rank + _OVERSAMPLING
    basis = torch.randn(n, size, generator=torch.Generator().manual_seed(0))
    for _ in range(_POWER_PASSES):
        image = torch.zeros(n, size, dtype=torch.float64)
        for _, strip in _strips(name, source):
            basis = basis.to(strip.device)
            image = image.to(strip.device).add_(strip.T @ (strip @ basis))
        basis = torch.linalg.qr(image).Q.float()
    projected = torch.empty(m, size, dtype=torch.float32)
    for start, strip in _strips(name, source):
        projected[start : start + len(strip)] = strip @ basis
    basis = basis.cpu()
    # The basis is orthonormal, so A's leading part is that of A Q, whose Gram matrix is small.
    values, turn = torch.linalg.eigh(_gram(projected))
    sigma, turn = _root(values.flip(0)[:rank]), turn.flip(1)[:, :rank]
    left = projected @ (turn * root_inverse(sigma)).float()
    right = (basis.double() @ (turn * sigma.sqrt())).float()
    return left.T.contiguous(), right.T.contiguous()


def _strips(name: str, source: MatrixSource) -> Iterator[tuple[int, Tensor]]:
    """Yield each strip's first row and its values, checked to be finite."""
    m, n = source.shape
    for start, end in row_strips(m, n):
        yield start, finite_block(name, source, start, end, 0, n)


def _gram(tall_matrix: Tensor) -> Tensor:
    m, n = tall_matrix.shape
    gram = torch.zeros(n, n, dtype=torch.float64)
    for start, end in row_strips(m, n):
        part = tall_matrix[start:end].double()
        gram.addmm_(part.T, part)
    return gram


def _root(values: Tensor) -> Tensor:
    """Singular values from descending eigenvalues of a Gram matrix, noise set to zero."""
    sigma = values.clamp(min=0).sqrt()
    sigma[sigma <= _NOISE * sigma[0]] = 0.0
    return sigma
