from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.auto.allocate import (
    GAUSSIAN_ERROR,
    ROW_SHARE,
    HeadCosts,
    NoiseAllotter,
    block_counts,
    byte_shares,
    possible_ranks,
)
from compressor.codecs.rows import rows_size
from compressor.encoders.blockdiag import BlockDiagCodec
from compressor.encoders.codec import make_encoder
from tests.compressor.codec_oracles import encode, payload, random_matrix

CODEC = BlockDiagCodec(bits=2)


def costs(*energy: float) -> HeadCosts:
    return HeadCosts((0, 1, 2, 4)[: len(energy)], energy)


def cost_of(settings: dict, table: HeadCosts) -> float:
    energy = table.energy[table.ranks.index(settings.get("head_rank", 0))]
    return energy * (settings["n_blocks"] * (1 + GAUSSIAN_ERROR[2]) - 1)


@given(
    st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    st.integers(150, 3000),
)
@settings(max_examples=30, deadline=None)
def test_allotter_three_matrices_is_nearly_the_best_of_all_choices(
    weights: list[float], left: list[float], budget: int
) -> None:
    shapes = [(24, 48), (48, 48), (48, 24)]
    tables = {
        str(i): costs(w, w * rest, w * rest**1.5)
        for i, (w, rest) in enumerate(zip(weights, left, strict=True))
    }
    found = NoiseAllotter(CODEC, tables)(
        [("0",), ("1",), ("2",)], [(shape,) for shape in shapes], budget
    )
    total = sum(a.n_bytes for a in found)
    menus = []
    for i, shape in enumerate(shapes):
        options = [
            CODEC.settings(rank, s) for s in block_counts((shape,)) for rank in tables[str(i)].ranks
        ]
        menus.append([(CODEC.size_bytes(shape, o), cost_of(o, tables[str(i)])) for o in options])
    least = sum(min(size for size, _ in menu) for menu in menus)
    if budget < least:
        assert total == least
        return
    assert total <= budget
    mine = sum(cost_of(a.settings[0], tables[str(i)]) for i, a in enumerate(found))
    # A Lagrangian misses only what lies inside the convex hull: as good as with a step less.
    step = max(size for menu in menus for size, _ in menu if size <= budget / 2)
    best = min(
        sum(cost for _, cost in choice)
        for choice in itertools.product(*menus)
        if sum(size for size, _ in choice) <= max(least, budget - step)
    )
    assert mine <= best * (1 + 1e-9)


def test_allotter_matters_more_gets_more_and_a_steep_matrix_gets_the_head() -> None:
    shape = (192, 192)
    tables = {
        "flat": costs(1.0, 0.99, 0.98),
        "dear": costs(30.0, 29.8, 29.5),
        "steep": costs(1.0, 0.2, 0.1),
    }
    found = NoiseAllotter(CODEC, tables)([(name,) for name in tables], [(shape,)] * 3, 2500)
    flat, dear, steep = (a.settings[0] for a in found)
    assert dear["n_blocks"] < flat["n_blocks"]
    assert steep["head_rank"] >= 1
    assert "head_rank" not in flat


def test_allotter_siblings_get_equal_blocks_and_ranks_of_their_own() -> None:
    site = ((96, 96), (48, 96))
    tables = {"q": costs(1.0, 0.1, 0.05), "k": costs(1.0, 0.999, 0.998)}
    (found,) = NoiseAllotter(CODEC, tables)([("q", "k")], [site], 700)
    q, k = found.settings
    assert q["n_blocks"] == k["n_blocks"]
    assert q.get("head_rank", 0) > k.get("head_rank", 0)
    assert found.n_bytes == CODEC.size_bytes(site[0], q) + CODEC.size_bytes(site[1], k)


@pytest.mark.parametrize(("cost", "is_left_out"), [(0.5, True), (500.0, False)])
def test_allotter_matrix_that_costs_little_to_leave_out_gets_a_head_and_rows(
    cost: float, is_left_out: bool
) -> None:
    shape = (960, 96)
    tables = {
        "vocabulary": replace(costs(1.0, 0.5, 0.4), left_out=(9 * cost, 2 * cost, cost)),
        "other": costs(1.0, 0.5, 0.4),
    }
    names, sites, budget = [("vocabulary",), ("other",)], [(shape,)] * 2, 9000
    found = NoiseAllotter(CODEC, tables, leaves_out=True)(names, sites, budget)
    vocabulary, other = (a.settings[0] for a in found)
    assert "n_blocks" in other
    assert ("n_blocks" not in vocabulary) == is_left_out
    total = sum(a.n_bytes for a in found)
    assert 0.8 * budget < total <= budget
    if is_left_out:
        spent = rows_size(shape, vocabulary["n_rows"], vocabulary["row_bits"])
        assert spent == pytest.approx(ROW_SHARE * budget, abs=60)
    allotted = NoiseAllotter(CODEC, tables)(names, sites, budget)
    assert all("n_blocks" in a.settings[0] for a in allotted)


@pytest.mark.parametrize("bytes_per_element", [0.2, 0.0625, 0.03, 0.01])
def test_allotter_many_matrices_meets_the_budget(bytes_per_element: float) -> None:
    shapes = [(4096, 512)] + 12 * [(512, 512), (128, 512), (1408, 512), (512, 1408)]
    names = [(str(i),) for i in range(len(shapes))]
    tables = {
        name: HeadCosts(
            possible_ranks(shape), tuple(m / (1 + r) ** 0.5 for r in possible_ranks(shape))
        )
        for (name,), shape, m in zip(names, shapes, itertools.cycle((1, 3, 9)), strict=False)
    }
    budget = bytes_per_element * sum(m * n for m, n in shapes)
    found = NoiseAllotter(CODEC, tables)(names, [(shape,) for shape in shapes], budget)
    total = sum(a.n_bytes for a in found)
    assert 0.99 * budget < total <= budget


def test_allotter_impossible_budgets_give_the_extremes() -> None:
    tables = {"a": costs(1.0, 0.5)}
    allot = NoiseAllotter(CODEC, tables)
    (least,) = allot([("a",)], [((64, 64),)], 1)
    (most,) = allot([("a",)], [((64, 64),)], 1e9)
    assert least.settings[0] == make_encoder("blockdiag", bits=2).settings(0, 64)
    assert most.settings[0]["n_blocks"] == 1


def test_byte_shares_are_those_of_the_terms_that_are_written() -> None:
    made = [
        ((60, 40), CODEC.settings(3, 0, n_rows=5)),
        ((60, 40), CODEC.settings(2, 4)),
        ((30, 20), CODEC.settings(0, 2)),
    ]
    n_bytes: Counter[str] = Counter()
    for shape, params in made:
        for term in encode(CODEC, random_matrix(shape), params):
            n_bytes[term.codec] += payload((term,))
    found = byte_shares(made)
    assert found.heads == pytest.approx(n_bytes["lowrank"] / n_bytes.total())
    assert found.rows == pytest.approx(n_bytes["rows"] / n_bytes.total())
    assert byte_shares([((9, 9), {"rank": 2, "bits": 4})]) == (0.0, 0.0)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=3))
def test_block_counts_any_site_reach_from_one_to_the_most(shapes: list[tuple[int, int]]) -> None:
    found = block_counts(tuple(shapes))
    assert found == sorted(set(found))
    assert found[0] == 1
    assert found[-1] <= min(map(min, shapes))
    assert len(found) >= min(6, min(map(min, shapes)))
