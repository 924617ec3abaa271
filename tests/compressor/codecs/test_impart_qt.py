from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.codecs import ImpartQtTerm
from compressor.codecs.impart_qt_sampling import (
    class_sizes,
    codes_size,
    draw_blocks,
    largest_size,
    qt_size,
    smallest_size,
    solve_qt_allocation,
)
from compressor.codecs.impart_sampling import allocate_sparsity
from compressor.codecs.quantize_groups import code_levels, fit_steps, nearest_codes
from compressor.encoders.codec import make_encoder
from compressor.encoders.sources import TensorSource
from compressor.errors import Corrupt, NonFinite, WrongShape
from tests.compressor.codec_oracles import SHAPES, check_term, encode, payload, random_matrix

SPECTRA = st.integers(1, 80).flatmap(
    lambda n: st.lists(st.floats(1e-3, 10), min_size=n, max_size=n).map(
        lambda values: sorted(values, reverse=True)
    )
)
BETAS = st.sampled_from([0.0, 0.6, 0.8])


def decaying_matrix(shape: tuple[int, int], power: float = 0.5, scale: float = 1e-2) -> Tensor:
    """Singular values ``k^-power``."""
    k = min(shape)
    u, v = (torch.linalg.qr(random_matrix((size, k), size, 1.0))[0] for size in shape)
    return (u * torch.arange(1, k + 1).float() ** -power * scale) @ v.T


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, (1, 0, 0)), (2, (2, 0, 0)), (3, (2, 1, 0)), (34, (2, 32, 0)), (50, (2, 32, 16))],
)
def test_class_sizes_are_the_papers(rank: int, expected: tuple[int, int, int]) -> None:
    assert class_sizes(rank) == expected


@settings(max_examples=200, deadline=None)
@given(SPECTRA, st.integers(0, 300), st.floats(0, 1), BETAS, st.sampled_from([0.5, 1.0]))
def test_allocation_any_budget_fits_and_every_class_sums_to_what_it_keeps(
    sigma, more_rows, share, beta, c
) -> None:
    shape = (len(sigma) + more_rows, len(sigma))
    least, most = smallest_size(shape), largest_size(shape, beta)
    budget = round(least + share * (most - least))
    found = solve_qt_allocation(np.array(sigma), shape, budget, beta, c)
    rank = len(found.weights)
    assert qt_size(shape, found.kept, rank) <= budget
    start = 0
    for size, kept in zip(class_sizes(rank), found.kept, strict=True):
        part = found.weights[start : start + size]
        assert kept <= size
        assert int(part.sum()) == kept << 15
        assert (part >= 1).all()
        assert (part <= 1 << 15).all()
        assert (np.diff(part) <= 1).all()  # the more important, the likelier; to a rounding
        start += size


def test_allocation_of_a_models_matrix_leaves_no_component_s_worth_unused() -> None:
    """What is left of the budget goes to the rank, 4 bytes a component, in the last class."""
    shape = (576, 192)
    sigma = np.arange(1, 193) ** -0.5
    for ratio in (8, 12, 16, 32, 64):
        budget = shape[0] * shape[1] * 2 // ratio
        found = solve_qt_allocation(sigma, shape, budget, 0.0, 1.0)
        left = budget - qt_size(shape, found.kept, len(found.weights))
        assert 0 <= left < (4 if found.kept[2] else sum(shape) / 8)


def test_allocation_follows_algorithm_3_on_the_spectrum_given() -> None:
    shape = (512, 512)
    sigma = np.arange(1, 513) ** -0.3
    budget = 24_000
    found = solve_qt_allocation(sigma, shape, budget, 0.6, 1.0)
    q = 1 - allocate_sparsity(sigma, found.alpha, 0.6, 1.0)
    rank = np.count_nonzero(q)
    bits = 8 * 2 + 3 * q[2:34].sum() + 2 * q[34:].sum()
    assert 1024 * bits / 8 + 4 * rank == pytest.approx(budget, rel=0.01)
    assert found.kept[0] == 2
    assert abs(found.kept[1] - q[2:34].sum()) < 2
    assert abs(found.kept[2] - q[34:].sum()) < 2
    flatter = solve_qt_allocation(np.arange(1, 513) ** -0.1, shape, budget, 0.6, 1.0)
    assert flatter.kept[1] > found.kept[1]


@settings(max_examples=60, deadline=None)
@given(SPECTRA, st.integers(1, 12), st.floats(0, 1), st.integers(0, 5))
def test_draw_blocks_every_block_holds_each_class_count(sigma, n_blocks, share, seed) -> None:
    shape = (len(sigma), len(sigma))
    budget = round((1 - share) * smallest_size(shape) + share * largest_size(shape, 0.0))
    found = solve_qt_allocation(np.array(sigma), shape, budget, 0.0, 1.0)
    drawn = draw_blocks(found.weights, found.kept, n_blocks, f"key {seed}")
    assert (np.diff(drawn, axis=1) > 0).all()
    for low, high, kept in zip((0, 2, 34), (2, 34, 1 << 20), found.kept, strict=True):
        assert (((drawn >= low) & (drawn < high)).sum(axis=1) == kept).all()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_fit_steps_is_as_good_as_a_fine_search(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(3, 4000, generator=generator)
    values[1] = values[1].sign() * values[1].abs().exp().sub(1) * 1e-6  # heavy tails, tiny
    values[2] = torch.rand(4000, generator=generator) - 0.5
    groups = torch.arange(3).unsqueeze(1).expand_as(values)
    steps = fit_steps(values, groups, 3, bits)
    for row, step in zip(values, steps, strict=True):
        tried = [float(step) * 1.02**k for k in range(-60, 61)]
        errors = [_squared_error(row, torch.tensor(s), bits) for s in tried]
        assert errors[60] <= 1.1 * min(errors)


def _squared_error(row: Tensor, step: Tensor, bits: int) -> float:
    codes = nearest_codes(row, step, bits)
    return float((code_levels(codes, bits) * step - row).double().square().sum())


def test_fit_steps_empty_and_zero_groups_give_zero() -> None:
    steps = fit_steps(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0, 0, 2]), 4, 2)
    assert steps[[0, 1, 3]].tolist() == [0, 0, 0]
    assert float(steps[2]) > 0


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.integers(1, 50), BETAS, st.sampled_from([0.5, 1.0]), st.floats(0, 3000))
def test_impart_qt_any_plan_agrees_with_element_loop_and_size(
    shape, block_rows, beta, c, budget
) -> None:
    codec = make_encoder("impart-qt", beta=beta, C=c, block_rows=block_rows)
    params = codec.fit(shape, budget)
    terms = encode(codec, decaying_matrix(shape), params)
    assert payload(terms) == codec.size_bytes(shape, params)
    check_term(terms[0])


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (64, 64)])
def test_impart_qt_everything_kept_is_near_the_matrix(shape) -> None:
    """Steep spectra live in the 8-bit components; what is left is their rounding."""
    matrix = decaying_matrix(shape, power=4.0)
    codec = make_encoder("impart-qt", beta=0.0, block_rows=16)
    params = codec.fit(shape, 1e9)
    (term,) = encode(codec, matrix, params)
    assert term.kept == class_sizes(min(shape))
    error = (term.to_dense() - matrix).norm() / matrix.norm()
    assert float(error) < 0.01


def test_impart_qt_mean_over_seeds_approaches_the_quantised_components() -> None:
    """Drawing is unbiased: what the seeds average to is the dense product, but for rounding."""
    matrix = decaying_matrix((40, 36), power=1.0)
    codec = make_encoder("impart-qt", beta=0.0, block_rows=4)
    params = codec.fit(matrix.shape, 260)
    draws = torch.stack(
        [encode(codec, matrix, params, seed)[0].to_dense().double() for seed in range(60)]
    )
    (term,) = encode(codec, matrix, params)
    assert 0 < term.kept[1] < term.rank - 2  # something is left to chance
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = (u[:, : term.rank] * s[: term.rank]) @ v[: term.rank]
    off = (draws.mean(0) - kept).norm() / kept.norm()
    single = (draws - kept).norm(dim=(1, 2)).mean() / kept.norm()
    assert float(off) < 0.4 * float(single)


def test_impart_qt_served_values_are_exact_in_half_precision() -> None:
    (term,) = encode(make_encoder("impart-qt"), decaying_matrix((64, 48)), _plan((64, 48), 900))
    parts = term.factors()
    for values in (parts.u_values, parts.v_values):
        assert float(values.abs().max()) < 1
        assert torch.equal(values.bfloat16().float(), values)
        assert torch.equal(values.half().float(), values)


def test_impart_qt_same_seed_gives_identical_bytes_and_another_seed_or_name_does_not() -> None:
    codec, shape = make_encoder("impart-qt", block_rows=4, beta=0.0), (60, 50)
    source, params = TensorSource(decaying_matrix(shape)), codec.fit((60, 50), 500)
    runs = [
        codec.encode(name, source, params, seed)[0].tensors()["codes"]
        for name, seed in (("a", 7), ("a", 7), ("a", 8), ("b", 7))
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[3])


def test_impart_qt_zero_and_low_rank_matrices_stay_finite() -> None:
    codec = make_encoder("impart-qt", block_rows=4)
    params = codec.fit((12, 9), 60)
    (zero,) = encode(codec, torch.zeros(12, 9), params)
    assert not zero.to_dense().any()
    check_term(zero)
    (one,) = encode(codec, torch.outer(torch.ones(12), torch.ones(9)), params)
    check_term(one)
    torch.testing.assert_close(one.to_dense(), torch.ones(12, 9), rtol=0.02, atol=0)


# --- hostile parts --------------------------------------------------------------------------------

SHAPE = (70, 65)


def _plan(shape: tuple[int, int], budget: float) -> dict:
    return make_encoder("impart-qt", beta=0.0).fit(shape, budget)


def _parts() -> tuple[dict, dict]:
    codec = make_encoder("impart-qt", beta=0.0, block_rows=16)
    (term,) = encode(codec, decaying_matrix(SHAPE), codec.fit(SHAPE, 1500))
    assert min(term.kept) > 0
    return term.params(), {name: part.clone() for name, part in term.tensors().items()}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rank": bad} for bad in (0, 34, 66, 1 << 15)),
        *({"kept8": bad} for bad in (0, 1, 3)),
        *({"kept3": bad} for bad in (0, 33)),
        *({"kept2": bad} for bad in (0, 40, 1 << 30)),
        *({"block_rows": bad} for bad in (0, 1 << 40)),
        *({"draw": bad} for bad in (-1, 1 << 53)),
    ],
)
def test_impart_qt_from_parts_contradicting_parameter_is_refused(wrong: dict) -> None:
    params, parts = _parts()
    with pytest.raises((WrongShape, Corrupt)):
        ImpartQtTerm.from_parts(SHAPE, params | wrong, parts)


@pytest.mark.parametrize("key", ["kept8", "kept3", "kept2", "rank", "block_rows", "draw", "unit"])
@pytest.mark.parametrize("bad", [None, "1", True, []])
def test_impart_qt_from_parts_parameter_of_another_type_is_corrupt(key: str, bad: object) -> None:
    params, parts = _parts()
    with pytest.raises(Corrupt):
        ImpartQtTerm.from_parts(SHAPE, params | {key: bad}, parts)


@pytest.mark.parametrize("unit", [0.0, -1.0, math.nan, math.inf, 1e200])
def test_impart_qt_from_parts_unusable_unit_raises_non_finite(unit: float) -> None:
    params, parts = _parts()
    with pytest.raises(NonFinite):
        ImpartQtTerm.from_parts(SHAPE, params | {"unit": unit}, parts)


def test_impart_qt_from_parts_weights_that_do_not_sum_raise_corrupt() -> None:
    params, parts = _parts()
    parts["weights"][5] -= 1
    with pytest.raises(Corrupt, match="sum"):
        ImpartQtTerm.from_parts(SHAPE, params, parts)


def test_impart_qt_from_parts_negative_weight_raises_wrong_shape() -> None:
    params, parts = _parts()
    parts["weights"][3] = -2
    with pytest.raises(WrongShape):
        ImpartQtTerm.from_parts(SHAPE, params, parts)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_impart_qt_from_parts_non_finite_sigma_raises(bad: float) -> None:
    params, parts = _parts()
    parts["sigma"][3] = bad
    with pytest.raises(NonFinite):
        ImpartQtTerm.from_parts(SHAPE, params, parts)


def test_impart_qt_from_parts_codes_of_another_length_or_dtype_raise_wrong_shape() -> None:
    params, parts = _parts()
    needed = codes_size(SHAPE, (params["kept8"], params["kept3"], params["kept2"]))
    for bad in (parts["codes"][: needed - 1], parts["codes"].short(), parts["codes"].view(1, -1)):
        with pytest.raises(WrongShape):
            ImpartQtTerm.from_parts(SHAPE, params, parts | {"codes": bad})


def test_impart_qt_from_parts_bytes_behind_the_codes_raise_corrupt() -> None:
    params, parts = _parts()
    behind = torch.cat([parts["codes"], torch.tensor([0, 1], dtype=torch.uint8)])
    with pytest.raises(Corrupt):
        ImpartQtTerm.from_parts(SHAPE, params, parts | {"codes": behind})


def test_impart_qt_from_parts_missing_part_raises_corrupt() -> None:
    params, parts = _parts()
    del parts["sigma"]
    with pytest.raises(Corrupt):
        ImpartQtTerm.from_parts(SHAPE, params, parts)
