from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.codecs import ImpartTerm
from compressor.codecs.impart_sampling import (
    FIXED_POINT,
    allocate_sparsity,
    sample_blocks,
    solve_allocation,
)
from compressor.encoders.codec import make_encoder
from compressor.encoders.sources import TensorSource
from compressor.errors import Corrupt, NonFinite, WrongShape
from tests.compressor.codec_oracles import SHAPES, check_term, encode, payload, random_matrix

ONE = 1 << FIXED_POINT


def literal_algorithm_1(sigma: list[float], alpha: float, beta: float, c: float) -> list[float]:
    """Algorithm 1 as printed, one element at a time; p = 1 for what was pruned or dropped."""
    n = len(sigma)
    r = max(1, math.floor(n * (1 - beta) + 1e-9))
    gamma = (alpha - beta) / (1 - beta)
    s = [value**c for value in sigma[:r]]
    p = [(1 - value / max(s)) * gamma for value in s]
    i = r - 1
    while sum(p) / r < gamma:
        p[i] = 1.0
        i -= 1
    return p + [1.0] * (n - r)


SPECTRA = st.integers(1, 60).flatmap(
    lambda n: st.lists(st.floats(1e-3, 10), min_size=n, max_size=n).map(
        lambda values: sorted(values, reverse=True)
    )
)


@settings(max_examples=200)
@given(SPECTRA, st.floats(0, 0.9), st.floats(0.01, 0.99), st.sampled_from([0.5, 1.0, 2.0]))
def test_allocate_sparsity_any_spectrum_equals_the_literal_loop(sigma, beta, gamma, c) -> None:
    alpha = beta + gamma * (1 - beta)
    got = allocate_sparsity(np.array(sigma), alpha, beta, c)
    expected = literal_algorithm_1(sigma, alpha, beta, c)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_allocate_sparsity_boundary_shift_drops_from_the_tail_until_the_mean_is_met() -> None:
    sigma = np.array([4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.1, 0.1, 0.1, 0.1])
    p = allocate_sparsity(sigma, alpha_uv=0.8, beta=0.5, c=1.0)
    gamma = 0.6
    before = [(1 - s / 4) * gamma for s in sigma[:5]]
    assert sum(before) / 5 < gamma  # so something has to go
    # .0 .3 .45 .525 .5625: dropping the last leaves .455, the last two .55, the last three .66
    np.testing.assert_allclose(p, [*before[:2], 1, 1, 1, 1, 1, 1, 1, 1])


def test_allocate_sparsity_zero_spectrum_is_treated_as_flat() -> None:
    p = allocate_sparsity(np.zeros(8), 0.5, 0.0, 1.0)
    assert p.tolist() == [0.0] * 4 + [1.0] * 4


@settings(max_examples=150)
@given(SPECTRA, st.sampled_from([0.0, 0.3, 0.6, 0.8]), st.floats(0, 1), st.sampled_from([0.5, 1]))
def test_solve_allocation_sums_to_the_budget_exactly(sigma, beta, share, c) -> None:
    r = max(1, math.floor(len(sigma) * (1 - beta) + 1e-9))
    kept = max(1, round(share * r))
    alpha, inclusion = solve_allocation(np.array(sigma), kept, beta, c)
    assert int(inclusion.sum()) == kept * ONE
    assert inclusion.min() >= 1
    assert inclusion.max() <= ONE
    q = 1 - np.array(literal_algorithm_1(sigma, alpha, beta, c))
    # Algorithm 1 ends within one component of the budget; what is left is a common factor.
    assert kept - 1 - 1e-6 < q.sum() < kept + 1e-6
    assert len(inclusion) == np.count_nonzero(q > 0)
    scaled = inclusion / ONE
    free = scaled < 1 - 1e-9
    if free.any():
        factors = scaled[free] / q[: len(scaled)][free]
        np.testing.assert_allclose(factors, factors[0], rtol=1e-6)
        assert (q[: len(scaled)][~free] * factors[0] >= 1 - 1e-6).all()


@settings(max_examples=60)
@given(SPECTRA, st.integers(1, 20), st.floats(0, 1), st.integers(0, 5))
def test_sample_blocks_draws_each_block_distinct_and_in_order(sigma, n_blocks, share, seed) -> None:
    kept = max(1, round(share * len(sigma)))
    _, inclusion = solve_allocation(np.array(sigma), kept, 0.0, 1.0)
    drawn = sample_blocks(inclusion, n_blocks, f"key {seed}")
    assert drawn.shape == (n_blocks, kept)
    assert (np.diff(drawn, axis=1) > 0).all()
    assert drawn.min() >= 0
    assert drawn.max() < len(inclusion)
    assert np.array_equal(drawn, sample_blocks(inclusion, n_blocks, f"key {seed}"))


def test_sample_blocks_stratified_counts_match_the_probabilities() -> None:
    sigma = np.array([9, 5, 3, 2, 1.5, 1.2, 1.1, 1, 0.9, 0.8])
    allocation = solve_allocation(sigma, 3, 0.0, 1.0)
    n_blocks = 500
    counts = np.bincount(sample_blocks(allocation.inclusion, n_blocks, "k").ravel(), minlength=10)
    expected = allocation.probabilities * n_blocks
    # One offset in each stratum: a component, being an interval, is off by at most one an end.
    assert np.abs(counts[: len(expected)] - expected).max() <= 2


def test_sample_blocks_single_block_over_many_keys_matches_the_probabilities() -> None:
    allocation = solve_allocation(np.array([5.0, 3, 2, 1, 1, 1]), 2, 0.0, 1.0)
    n_draws = 4000
    draws = [sample_blocks(allocation.inclusion, 1, f"k{i}").ravel() for i in range(n_draws)]
    counts = np.bincount(np.concatenate(draws), minlength=len(allocation.inclusion))
    q = allocation.probabilities
    z = (counts - n_draws * q) / np.sqrt(n_draws * np.maximum(q * (1 - q), 1e-9) + 1e-9)
    assert np.abs(z).max() < 4.5


def test_sample_blocks_known_key_gives_known_draw_on_any_machine() -> None:
    inclusion = np.array([ONE, ONE // 2, ONE // 2, ONE // 4, ONE // 4, ONE // 4, ONE // 4])
    drawn = sample_blocks(inclusion, 4, "impart\x000\x00layer\x00u")
    assert drawn.tolist() == [[0, 1, 4], [0, 1, 3], [0, 2, 6], [0, 2, 5]]


def test_impart_mean_over_all_draws_is_the_matrix() -> None:
    """Exactly unbiased: enumerate both sides' offsets instead of drawing them."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 5)))[0] for n in (7, 6))
    sigma = np.array([3.0, 1.5, 1.0, 0.6, 0.3])
    allocation = solve_allocation(sigma, 2, 0.0, 1.0)
    q = allocation.probabilities
    rank = len(q)
    edges = np.unique(np.concatenate([np.cumsum(allocation.inclusion) % ONE, [0, ONE]]))
    mean = np.zeros((7, 6))
    for (a0, a1), (b0, b1) in product(pairwise(edges), repeat=2):
        chosen = []
        for low in (a0, b0):
            points = low + np.arange(2) * ONE
            chosen.append(np.searchsorted(np.cumsum(allocation.inclusion), points, side="right"))
        uhat, vhat = np.zeros((7, rank)), np.zeros((6, rank))
        uhat[:, chosen[0]] = u[:, chosen[0]] / q[chosen[0]]
        vhat[:, chosen[1]] = v[:, chosen[1]] / q[chosen[1]]
        mean += (uhat * sigma[:rank]) @ vhat.T * ((a1 - a0) / ONE) * ((b1 - b0) / ONE)
    np.testing.assert_allclose(mean, (u[:, :rank] * sigma[:rank]) @ v[:, :rank].T, atol=1e-9)


def test_impart_mean_over_seeds_approaches_the_kept_components() -> None:
    u, v = (torch.linalg.qr(random_matrix((n, 4), n, 1.0))[0] for n in (6, 5))
    matrix = (u * torch.tensor([1.0, 0.8, 0.6, 0.5])) @ v.T
    codec = make_encoder("impart", beta=0.0, C=0.5, block_rows=2)
    params = {"kept": 3, "beta": 0.0, "C": 0.5, "block_rows": 2}
    draws = torch.stack(
        [encode(codec, matrix, params, seed)[0].to_dense().double() for seed in range(1500)]
    )
    (term,) = encode(codec, matrix, params, 0)
    kept = (u[:, : term.rank] * torch.tensor([1.0, 0.8, 0.6, 0.5])[: term.rank]) @ v[
        :, : term.rank
    ].T
    standard_error = draws.std(0) / len(draws) ** 0.5
    z = (draws.mean(0) - kept.double()).abs() / standard_error.clamp(min=1e-4)
    assert float(z.max()) < 4.5


@settings(max_examples=40, deadline=None)
@given(
    SHAPES,
    st.integers(1, 50),
    st.sampled_from([0.0, 0.6, 0.8]),
    st.sampled_from([0.5, 1.0]),
    st.floats(0, 3000),
    st.integers(0, 9),
)
def test_impart_any_plan_agrees_with_element_loop_and_size(
    shape, block_rows, beta, c, budget, seed
) -> None:
    codec = make_encoder("impart", beta=beta, C=c, block_rows=block_rows)
    params = codec.fit(shape, budget)
    terms = encode(codec, random_matrix(shape, seed), params, seed)
    assert payload(terms) == codec.size_bytes(shape, params)
    check_term(terms[0])


@pytest.mark.parametrize("shape", [(70, 30), (30, 70), (33, 33)])
def test_impart_everything_kept_is_the_matrix(shape) -> None:
    matrix = random_matrix(shape)
    codec = make_encoder("impart", beta=0.0, block_rows=16)
    params = codec.fit(shape, 1e9)
    assert params["kept"] == min(shape)
    (term,) = encode(codec, matrix, params)
    torch.testing.assert_close(term.to_dense(), matrix, rtol=0, atol=3e-6)


def test_impart_values_are_singular_vectors_over_inclusion_probability() -> None:
    matrix = random_matrix((24, 10))
    params = {"kept": 3, "beta": 0.2, "C": 1.0, "block_rows": 8}
    (term,) = encode(make_encoder("impart"), matrix, params)
    assert isinstance(term, ImpartTerm)
    u, s, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    alpha, inclusion = solve_allocation(s.numpy(), 3, 0.2, 1.0)
    assert term.params()["alpha"] == pytest.approx(alpha)
    assert (term.params()["beta"], term.params()["C"], term.params()["seed"]) == (0.2, 1.0, 0)
    for i in range(24):
        for t in range(3):
            k = int(term.u_index[i // 8, t])
            expected = abs(float(u[i, k])) * float(s[k]) ** 0.5 / (inclusion[k] / ONE)
            got = abs(float(term.u_values[i, t])) * term.unit_u
            assert got == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_impart_values_are_of_order_one_for_half_precision_serving() -> None:
    for scale in (1e-12, 1e-4, 1e6):
        (term,) = encode(
            make_encoder("impart"),
            random_matrix((40, 30), scale=scale),
            {"kept": 4, "beta": 0.0, "C": 1.0, "block_rows": 8},
        )
        assert 1 <= float(term.u_values.abs().max()) <= 2
        assert 1 <= float(term.v_values.abs().max()) <= 2
        torch.testing.assert_close(term.sigma, torch.full((term.rank,), term.unit_u * term.unit_v))


def decaying_matrix(shape: tuple[int, int]) -> Tensor:
    """Singular values 1/k: a flat spectrum would leave nothing to chance (Algorithm 1 then
    keeps a few components always)."""
    k = min(shape)
    u, v = (torch.linalg.qr(random_matrix((size, k), size, 1.0))[0] for size in shape)
    return (u / torch.arange(1, k + 1)) @ v.T


def test_impart_same_seed_gives_identical_bytes_and_another_seed_does_not() -> None:
    codec = make_encoder("impart", block_rows=4)
    params = codec.fit((60, 50), 1400)
    matrix = decaying_matrix((60, 50))
    runs = [encode(codec, matrix, params, seed)[0] for seed in (7, 7, 8)]
    raw = [b"".join(t.numpy().tobytes() for t in run.tensors().values()) for run in runs]
    assert raw[0] == raw[1]
    assert raw[0] != raw[2]


def test_impart_another_tensor_name_or_side_gives_another_draw() -> None:
    codec = make_encoder("impart", block_rows=2)
    params = codec.fit((60, 60), 1400)
    source = TensorSource(decaying_matrix((60, 60)))
    one, two = (codec.encode(name, source, params, 0)[0].tensors() for name in ("a", "b"))
    assert not torch.equal(one["u_index"], two["u_index"])
    assert not torch.equal(one["u_index"], one["v_index"])


def test_impart_zero_and_low_rank_matrices_stay_finite() -> None:
    params = {"kept": 5, "beta": 0.0, "C": 1.0, "block_rows": 4}
    codec = make_encoder("impart")
    (zero,) = encode(codec, torch.zeros(12, 9), params)
    assert not zero.to_dense().any()
    check_term(zero)
    (one,) = encode(codec, torch.outer(torch.ones(12), torch.ones(9)), params)
    check_term(one)


def _parts() -> tuple[dict, dict]:
    params = {"kept": 3, "beta": 0.0, "C": 1.0, "block_rows": 4}
    (term,) = encode(make_encoder("impart"), random_matrix((10, 8)), params)
    return term.params(), {name: part.clone() for name, part in term.tensors().items()}


@pytest.mark.parametrize("side", ["u", "v"])
def test_impart_from_parts_index_out_of_range_raises_wrong_shape(side: str) -> None:
    params, parts = _parts()
    for bad in (-1, params["rank"], 32767):
        index = parts[f"{side}_index"].clone()
        index[1, -1] = bad
        with pytest.raises(WrongShape):
            ImpartTerm.from_parts((10, 8), params, parts | {f"{side}_index": index})


def test_impart_from_parts_repeated_or_unsorted_index_raises_corrupt() -> None:
    params, parts = _parts()
    for bad in ([0, 0, 1], [1, 0, 2]):
        index = parts["u_index"].clone()
        index[0] = torch.tensor(bad, dtype=torch.int16)
        with pytest.raises(Corrupt):
            ImpartTerm.from_parts((10, 8), params, parts | {"u_index": index})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_impart_from_parts_non_finite_raises(bad: float) -> None:
    params, parts = _parts()
    for name in ("u_values", "v_values"):
        values = parts[name].clone()
        values[3, 1] = bad
        with pytest.raises(NonFinite):
            ImpartTerm.from_parts((10, 8), params, parts | {name: values})
    with pytest.raises(NonFinite):
        ImpartTerm.from_parts((10, 8), params | {"unit_u": bad}, parts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 9},
        {"rank": 2},
        {"rank": 0},
        {"kept": 2},
        {"kept": 0},
        {"block_rows": 0},
        {"block_rows": 3},
        {"block_rows": 1 << 40},
    ],
)
def test_impart_from_parts_contradicting_parameter_raises_wrong_shape(wrong) -> None:
    params, parts = _parts()
    with pytest.raises(WrongShape):
        ImpartTerm.from_parts((10, 8), params | wrong, parts)
