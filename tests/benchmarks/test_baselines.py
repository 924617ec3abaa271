"""Baselines against element loops written from the papers, and their bytes against arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.baselines import (
    BASELINES,
    BitDelta,
    Dare,
    DeltaCome,
    ExtractedLora,
    Matrix,
    RoundToNearest,
)
from benchmarks.baselines.dare import index_bytes
from benchmarks.baselines.deltacome import deltacome_size
from compressor.errors import BudgetError

SHAPES = [(24, 40), (40, 24), (7, 13)]
UNIT = 4  # bytes of the power of two that float16 numbers are multiples of


def delta_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Like a real difference: small, with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    left, right = torch.randn(m, 3, generator=generator), torch.randn(3, n, generator=generator)
    return (left @ right + torch.randn(m, n, generator=generator)) * 1e-4


def matrices() -> list[Matrix]:
    found = [Matrix(f"layers.{i}.weight", shape, False) for i, shape in enumerate(SHAPES)]
    return [Matrix("embed.weight", (50, 24), True), *found]


# --- DARE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_dare_keeps_scaled_values_or_nothing(shape: tuple[int, int]) -> None:
    delta = delta_of(shape)
    dense, n_bytes = Dare().encode("w", delta, {"density": 0.25}, seed=1)
    kept = 0
    for i in range(shape[0]):
        for j in range(shape[1]):
            if dense[i, j] != 0:
                kept += 1
                assert float(dense[i, j]) == pytest.approx(4 * float(delta[i, j]), rel=1e-3)
    assert n_bytes == 2 * kept + UNIT
    spread = math.sqrt(delta.numel() * 0.25 * 0.75)
    assert abs(kept - delta.numel() / 4) < 5 * spread


def test_dare_mean_over_seeds_is_the_delta() -> None:
    delta = delta_of((12, 16))
    draws = [Dare().encode("w", delta, {"density": 0.5}, seed).dense for seed in range(400)]
    # One draw's deviation is |delta|, for q = 1/2; the mean's is twenty times smaller.
    z = (torch.stack(draws).mean(0) - delta) / (delta.abs() / 20)
    assert float(z.abs().max()) < 5
    assert float(z.std()) == pytest.approx(1, abs=0.25)


def test_dare_draw_depends_on_seed_and_name_only() -> None:
    delta = delta_of((12, 16))
    first, again, other_seed, other_name = (
        Dare().encode(name, delta, {"density": 0.5}, seed).dense
        for name, seed in (("w", 1), ("w", 1), ("w", 2), ("v", 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, other_name)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5])
def test_index_bytes_is_the_entropy_of_the_mask(density: float) -> None:
    n = 10_000
    kept = round(n * density)
    masks = math.lgamma(n + 1) - math.lgamma(kept + 1) - math.lgamma(n - kept + 1)
    assert index_bytes(n, density) == pytest.approx(masks / math.log(2) / 8, rel=0.02)
    assert index_bytes(n, 1.0) == 0


# --- Delta-CoMe ---------------------------------------------------------------------------------


def rounded_vector(values: np.ndarray, bits: int) -> float:
    """Least squared error of the vector on symmetric levels, over a fine grid of scales."""
    half = 1 << (bits - 1)
    best = math.inf
    for scale in np.linspace(0.02, 1.2, 400) * np.abs(values).max() / (half - 0.5):
        levels = np.clip(np.floor(values / scale), -half, half - 1) + 0.5
        scale = float(values @ levels) / float(levels @ levels)
        best = min(best, float(((values - levels * scale) ** 2).sum()))
    return best


@pytest.mark.parametrize("shape", [(80, 60), (60, 80)])
def test_deltacome_rounds_each_vector_as_well_as_its_bits_allow(shape: tuple[int, int]) -> None:
    """The sum of separately rounded vectors: bits 8, 3 and 2 for vectors 1-2, 3-34 and on."""
    generator = torch.Generator().manual_seed(5)
    delta = torch.randn(shape, generator=generator) * 1e-4
    rank = 40
    dense, n_bytes = DeltaCome().encode("w", delta, {"rank": rank}, seed=0)
    u, s, vt = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    expected_bytes = 0
    for start, end, bits in ((0, 2, 8), (2, 34, 3), (34, rank, 2)):
        count = end - start
        expected_bytes += sum(math.ceil(count * side * bits / 8) + 2 * count for side in shape)
        expected_bytes += 2 * UNIT
        for k in range(start, end):
            # What survives of component k: cosine of the rounded u_k times that of v_k.
            survived = float(u[:, k] @ dense.double().numpy() @ vt[k]) / s[k]
            cosines = math.sqrt(
                (1 - rounded_vector(u[:, k], bits)) * (1 - rounded_vector(vt[k], bits))
            )
            assert survived == pytest.approx(cosines**2, abs=0.03 if bits == 8 else 0.1)
    assert n_bytes == expected_bytes == deltacome_size(shape, rank)


def test_deltacome_with_few_bytes_drops_the_last_groups() -> None:
    delta = delta_of((40, 24))
    dense, n_bytes = DeltaCome().encode("w", delta, {"rank": 2}, seed=0)
    assert n_bytes == 2 * (40 + 24) + 2 * 2 * 2 + 2 * UNIT
    best = sum((s * u[:, None] @ v[None]) for u, s, v in list(svd(delta))[:2])
    assert float((dense - best).norm() / best.norm()) < 0.01


def svd(delta: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    return [(u[:, k], s[k], vt[k]) for k in range(len(s))]


# --- BitDelta and integers ----------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bitdelta_equals_sign_times_mean_magnitude(shape: tuple[int, int], per_row: bool) -> None:
    delta = delta_of(shape)
    delta[0, 0] = 0.0
    dense, n_bytes = BitDelta(per_row=per_row).encode("w", delta, {}, seed=0)
    values = delta.double().tolist()
    everything = [abs(v) for row in values for v in row]
    for i, row in enumerate(values):
        among = [abs(v) for v in row] if per_row else everything
        scale = sum(among) / len(among)
        for j, value in enumerate(row):
            expected = scale if value > 0 else -scale
            assert float(dense[i, j]) == pytest.approx(expected, rel=1e-3)
    n_scales = shape[0] if per_row else 1
    assert n_bytes == math.ceil(delta.numel() / 8) + 2 * n_scales + UNIT


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_rtn_is_the_nearest_multiple_of_the_row_s_step(shape: tuple[int, int], bits: int) -> None:
    delta = delta_of(shape)
    delta[1] = 0.0
    dense, n_bytes = RoundToNearest(bits).encode("w", delta, {}, seed=0)
    top = 2 ** (bits - 1) - 1
    for i, row in enumerate(delta.double().tolist()):
        step = max(abs(v) for v in row) / top
        for j, value in enumerate(row):
            assert abs(float(dense[i, j]) - value) <= step * (0.5 + top * 2**-10)
            if step:
                multiple = float(dense[i, j]) / step
                assert abs(multiple - round(multiple)) < top * 2**-10
    assert n_bytes == math.ceil(delta.numel() * bits / 8) + 2 * shape[0] + UNIT


# --- LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    delta = delta_of(shape)
    dense, n_bytes = ExtractedLora().encode("w", delta, {"rank": 3}, seed=0)
    expected = np.zeros(shape)
    for u, s, v in svd(delta)[:3]:
        for i in range(shape[0]):
            for j in range(shape[1]):
                expected[i, j] += float(s * u[i] * v[j])
    np.testing.assert_allclose(dense.numpy(), expected, atol=2e-3 * np.abs(expected).max())
    assert n_bytes == 2 * 3 * sum(shape)


def test_lora_leaves_embeddings_alone_and_spends_the_rest_on_the_first_layers() -> None:
    first, second, third = (2 * sum(shape) for shape in SHAPES)
    plans = ExtractedLora().plan(matrices(), 3 * (first + second + third) + first + third)
    assert plans == [None, {"rank": 4}, {"rank": 3}, {"rank": 4}]


# --- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_plan_meets_the_budget(name: str) -> None:
    baseline = BASELINES[name]
    found = [Matrix(f"{i}", (96, 128), False) for i in range(6)]
    budget = 6 * 96 * 128 * 2 / (baseline.fixed_ratio or 8.0)
    plans = baseline.plan(found, budget)
    total = sum(
        baseline.encode(matrix.name, delta_of(matrix.shape, i), plan, seed=0).n_bytes
        for i, (matrix, plan) in enumerate(zip(found, plans, strict=True))
        if plan is not None
    )
    assert total == pytest.approx(budget, rel=0.16 if name == "bitdelta-row" else 0.05)


@pytest.mark.parametrize("name", ["dare", "delta-come", "lora"])
def test_plan_below_the_smallest_setting_is_refused(name: str) -> None:
    with pytest.raises(BudgetError, match=f"{name} at its smallest setting"):
        BASELINES[name].plan(matrices(), -5.0 if name == "dare" else 20.0)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_encode_of_an_all_zero_matrix_restores_zero(name: str) -> None:
    dense, _ = BASELINES[name].encode("w", torch.zeros(8, 12), {"density": 0.5, "rank": 2}, 0)
    assert torch.equal(dense.abs(), torch.zeros(8, 12))
