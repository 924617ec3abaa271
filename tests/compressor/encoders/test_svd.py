from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.encoders.sources import TensorSource
from compressor.encoders.svd import factors, is_thin, row_strips, spectrum
from compressor.errors import UnsupportedTensor

DECAYS = {
    "flat": torch.ones(120, dtype=torch.float64),
    "fine-tune": torch.arange(1, 121, dtype=torch.float64) ** -0.5,
    "steep": 0.9 ** torch.arange(120, dtype=torch.float64),
}


def with_spectrum(shape: tuple[int, int], sigma: Tensor, seed: int = 0) -> Tensor:
    """float64 matrix of random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(sigma), generator=generator, dtype=torch.float64)).Q
        for size in shape
    )
    return (u * sigma) @ v.T


def lost_energy(matrix: Tensor, a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix - b.double().T @ a.double()) ** 2)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (120, 120)])
@pytest.mark.parametrize("rank", [1, 10])
def test_factors_thin_rank_loses_under_one_percent_more_than_the_best(
    decay: str, shape: tuple[int, int], rank: int
) -> None:
    assert is_thin(shape, rank)
    sigma = DECAYS[decay]
    matrix = with_spectrum(shape, sigma) * 1e-4
    a, b = factors("w", TensorSource(matrix.float()), rank)
    assert a.shape == (rank, shape[1])
    assert b.shape == (rank, shape[0])
    best = float((sigma[rank:] ** 2).sum()) * 1e-8
    assert best * (1 - 1e-9) <= lost_energy(matrix, a, b) < 1.01 * best


@pytest.mark.parametrize("shape", [(300, 120), (120, 300)])
def test_factors_thin_rank_finds_the_leading_singular_values(shape: tuple[int, int]) -> None:
    sigma = DECAYS["steep"]
    a, b = factors("w", TensorSource(with_spectrum(shape, sigma).float()), 10)
    found = a.double().norm(dim=1) * b.double().norm(dim=1)
    torch.testing.assert_close(found, sigma[:10], rtol=1e-4, atol=0)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1), rtol=1e-4, atol=0)
    turned = (a / a.norm(dim=1, keepdim=True)).double()
    torch.testing.assert_close(turned @ turned.T, torch.eye(10).double(), rtol=0, atol=1e-4)


def test_factors_thin_of_lower_rank_than_asked_is_exact_with_zeros() -> None:
    matrix = with_spectrum((200, 150), torch.tensor([2.0, 1.0], dtype=torch.float64))
    a, b = factors("w", TensorSource(matrix.float()), 5)
    assert lost_energy(matrix, a, b) < 1e-9
    assert float(b[2:].abs().max()) < 1e-2
    assert bool(torch.isfinite(a).all() and torch.isfinite(b).all())


def test_factors_thin_zero_matrix_is_zero() -> None:
    a, b = factors("w", TensorSource(torch.zeros(200, 150)), 5)
    assert not a.any()
    assert not b.any()


def test_factors_thin_same_matrix_gives_identical_bytes() -> None:
    matrix = TensorSource(with_spectrum((200, 150), DECAYS["flat"]).float())
    one, two = factors("w", matrix, 4), factors("w", matrix, 4)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


class CountingSource:
    def __init__(self, matrix: Tensor) -> None:
        self._source = TensorSource(matrix)
        self.shape = self._source.shape
        self.largest = self.read = 0

    def block(self, *where: int) -> Tensor:
        part = self._source.block(*where)
        self.largest = max(self.largest, part.numel())
        self.read += part.numel()
        return part


def test_factors_thin_reads_strips_and_only_a_few_times() -> None:
    m, n = 20_000, 400
    assert len(list(row_strips(m, n))) > 1
    source = CountingSource(with_spectrum((m, n), DECAYS["steep"]).float())
    a, b = factors("w", source, 8)
    assert source.largest < m * n
    assert source.read == 4 * m * n
    assert a.shape == (8, n)
    assert b.shape == (8, m)


@pytest.mark.parametrize("rank", [2, 60])
def test_factors_not_finite_raises_naming_the_tensor(rank: int) -> None:
    matrix = torch.zeros(100, 90)
    matrix[3, 4] = torch.nan
    with pytest.raises(UnsupportedTensor, match=r"layer\.w"):
        factors("layer.w", TensorSource(matrix), rank)


def test_factors_wide_rank_is_the_truncated_decomposition() -> None:
    matrix = with_spectrum((150, 120), DECAYS["fine-tune"])
    assert not is_thin((150, 120), 60)
    a, b = factors("w", TensorSource(matrix.float()), 60)
    best = float((DECAYS["fine-tune"][60:] ** 2).sum())
    assert lost_energy(matrix, a, b) == pytest.approx(best, rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rank", [8, 100])
def test_factors_on_the_gpu_agree_with_the_cpu(rank: int) -> None:
    matrix = with_spectrum((300, 120), DECAYS["steep"]).float()
    on_cpu, on_gpu = TensorSource(matrix), TensorSource(matrix.cuda())
    a, b = factors("w", on_cpu, rank)
    c, d = factors("w", on_gpu, rank)
    assert c.device.type == d.device.type == "cpu"
    torch.testing.assert_close(b.T @ a, d.T @ c, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        spectrum("w", on_cpu).sigma, spectrum("w", on_gpu).sigma, rtol=1e-5, atol=1e-7
    )
