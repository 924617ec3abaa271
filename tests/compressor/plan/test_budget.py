"""Sharing a budget out: totals, proportions and limits, with real codecs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.encoders.codec import make_encoder
from compressor.errors import BudgetError
from compressor.plan.budget import Site, check_ratio, share_out

LLAMA = [(4096, 512)] + 12 * [
    (512, 512),
    (128, 512),
    (128, 512),
    (512, 512),
    (1408, 512),
    (512, 1408),
]
OPTIONS = [
    ("blockdiag", {"bits": 4}),
    ("blockdiag", {"bits": 2}),
    ("blockdiag", {"bits": 3, "head_fraction": 0.3}),
    ("lowrank", {"bits": 16}),
]


def alone(shapes: list[tuple[int, int]]) -> list[Site]:
    return [(shape,) for shape in shapes]


def test_share_out_siblings_get_equal_blocks_that_divide_all() -> None:
    encoder = make_encoder("blockdiag", bits=4)
    site = ((576, 576), (192, 576), (192, 576))
    allotments = share_out(encoder, [site] * 30, 30 * 960 * 576 * 2 / 32)
    for allotment in allotments:
        assert 192 % allotment.settings[0]["n_blocks"] == 0
        assert len({params["n_blocks"] for params in allotment.settings}) == 1
        sizes = map(encoder.size_bytes, site, allotment.settings)
        assert allotment.n_bytes == sum(sizes)
    total = sum(a.n_bytes for a in allotments)
    assert total == pytest.approx(30 * 960 * 576 * 2 / 32, rel=5e-3)


def test_share_out_siblings_have_no_more_blocks_than_the_smallest_has_rows() -> None:
    (allotment,) = share_out(make_encoder("blockdiag", bits=4), [((64, 64), (8, 64))], 1)
    assert [p["n_blocks"] for p in allotment.settings] == [8, 8]


@pytest.mark.parametrize(("codec", "options"), OPTIONS)
@pytest.mark.parametrize("bytes_per_element", [0.2, 0.0625, 0.03])
def test_share_out_many_matrices_meets_the_budget(
    codec: str, options: dict[str, float], bytes_per_element: float
) -> None:
    encoder = make_encoder(codec, **options)
    budget = bytes_per_element * sum(m * n for m, n in LLAMA)
    allotments = share_out(encoder, alone(LLAMA), budget)
    assert sum(a.n_bytes for a in allotments) == pytest.approx(budget, rel=2e-3)
    for shape, a in zip(LLAMA, allotments, strict=True):
        assert a.n_bytes == encoder.size_bytes(shape, a.settings[0])
        share = bytes_per_element * shape[0] * shape[1]
        assert 0.5 < a.n_bytes / share < 2  # nobody starves and nobody feasts


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(8, 300), st.integers(8, 300)), min_size=6, max_size=20),
    bytes_per_element=st.floats(0.2, 0.45),
)
def test_share_out_odd_shapes_comes_near(
    shapes: list[tuple[int, int]], bytes_per_element: float
) -> None:
    encoder = make_encoder("lowrank", bits=4)
    smallest = sum(a.n_bytes for a in share_out(encoder, alone(shapes), 0))
    budget = max(bytes_per_element * sum(m * n for m, n in shapes), smallest)
    total = sum(a.n_bytes for a in share_out(encoder, alone(shapes), budget))
    step = max(encoder.size_bytes(s, {"bits": 4, "rank": 1}) for s in shapes)
    assert abs(total - budget) <= step


def test_share_out_impossible_budgets_give_the_extremes() -> None:
    encoder = make_encoder("blockdiag", bits=4)
    shapes = [(64, 64), (128, 64)]
    least = share_out(encoder, alone(shapes), 1)
    most = share_out(encoder, alone(shapes), 1e9)
    assert [a.settings[0]["n_blocks"] for a in least] == [64, 64]
    assert [a.settings[0]["n_blocks"] for a in most] == [1, 1]


def test_share_out_nothing_to_encode_is_empty() -> None:
    assert share_out(make_encoder("lowrank"), [], 1000) == []


def test_check_ratio_beyond_tolerance_names_the_possible_ratio() -> None:
    check_ratio(32, 32.9, "no reason")
    with pytest.raises(BudgetError, match=r"ratio 32 cannot .*: fixed costs; .* is 20\.1$"):
        check_ratio(32, 20.19, "fixed costs")
    with pytest.raises(BudgetError, match=r"is 3\.95$"):
        check_ratio(2, 3.944, "bits")
