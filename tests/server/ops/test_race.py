"""The race against exact distributions, independence of its noise, and what small errors move."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from server.ops.race import exponentials, race, row_key, token_hashes

CPU = torch.device("cpu")
VOCAB = 49_152


def keys_of(pairs: list[tuple[int, int]]) -> Tensor:
    return torch.tensor([row_key(seed, position) for seed, position in pairs], dtype=torch.int32)


def noise(pairs: list[tuple[int, int]], n_ids: int) -> Tensor:
    return exponentials(keys_of(pairs), token_hashes(n_ids, CPU)).double()


def literal_noise(seed: int, position: int, token: int) -> float:
    """The same noise in Python's integers."""

    def mixed_32(word: int) -> int:
        word ^= word >> 15
        word = word * 0x2C1B3C6D % 2**32
        return word ^ word >> 12

    first, second = (word % 2**32 for word in row_key(seed, position))
    word = mixed_32((mixed_32(mixed_32(token + 1)) ^ first) * second % 2**32)
    return -math.log1p(-((word % 2**31) * 2.0**-31 * (1 - 2.0**-23) + 2.0**-33))


def chi_square(seen: Tensor, probabilities: Tensor) -> float:
    want = probabilities * seen.sum()
    return float(((seen - want) ** 2 / want).sum())


def test_exponentials_equal_a_literal_computation() -> None:
    pairs = [(0, 0), (0, 1), (-1, 7), (2**63 - 1, 4096), (-(2**63), 3)]
    found = noise(pairs, VOCAB)
    for (seed, position), row in zip(pairs, found, strict=True):
        for token in (0, 1, 2, 777, VOCAB - 1):
            want = literal_noise(seed, position, token)
            assert float(row[token]) == pytest.approx(want, rel=1e-5)


def test_noise_of_an_id_does_not_depend_on_how_many_ids_or_rows_there_are() -> None:
    pairs = [(5, 9), (6, 9), (5, 10)]
    wide = noise(pairs, 1000)
    assert torch.equal(noise(pairs[1:2], 300), wide[1:2, :300])


@pytest.mark.parametrize("which", ["seeds", "positions", "tokens"])
def test_noise_is_exponential_along_every_axis(which: str) -> None:
    """Neighbours are the hard case: seeds and positions that follow each other, one id."""
    n = 40_000
    if which == "tokens":
        sample = noise([(3, 17)], n)[0]
    else:
        pairs = [(i, 17) if which == "seeds" else (3, i) for i in range(n)]
        sample = noise(pairs, 3)[:, 2].contiguous()
    edges = -torch.log1p(-torch.linspace(0, 1, 41, dtype=torch.float64)[1:-1])
    seen = torch.bincount(torch.bucketize(sample, edges), minlength=40).double()
    assert chi_square(seen, torch.full((40,), 1 / 40)) < 89  # 99.999 % of 39 degrees of freedom
    assert float(sample.min()) < 10 / n  # small values are there: rare ids can win
    lagged = torch.corrcoef(torch.stack([sample[:-1], sample[1:]]))[0, 1]
    assert abs(float(lagged)) < 4.5 / math.sqrt(n)


def test_rows_and_ids_are_not_correlated() -> None:
    rows = noise([(seed, at) for seed in range(8) for at in range(8)], 20_000)
    across = torch.corrcoef(rows) - torch.eye(64)
    assert float(across.abs().max()) < 5.5 / math.sqrt(20_000)
    columns = torch.corrcoef(noise([(1, at) for at in range(20_000)], 64).T) - torch.eye(64)
    assert float(columns.abs().max()) < 5.5 / math.sqrt(20_000)


@pytest.mark.parametrize("axis", ["seed", "position"])
def test_race_over_many_rows_has_the_exact_distribution(axis: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = 2.5 * torch.randn(40, generator=generator)
    scores[::7] = float("-inf")
    n = 60_000
    keys = keys_of([(i, 5) if axis == "seed" else (11, i) for i in range(n)])
    drawn = race(scores.expand(n, -1), keys, token_hashes(40, CPU))
    probabilities = torch.softmax(scores.double(), -1)
    seen = torch.bincount(drawn, minlength=40).double()
    assert not seen[::7].any()
    likely = probabilities * n > 5
    assert int(likely.sum()) > 15
    # 99.999 % quantiles of up to 33 degrees of freedom are below 80.
    assert chi_square(seen[likely], probabilities[likely] / probabilities[likely].sum()) < 80


def test_race_of_two_positions_is_independent() -> None:
    """Pairs of draws under one seed against the product of their distributions."""
    scores = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0])
    n, hashes = 40_000, token_hashes(5, CPU)
    first = race(scores.expand(n, -1), keys_of([(s, 20) for s in range(n)]), hashes)
    second = race(scores.expand(n, -1), keys_of([(s, 21) for s in range(n)]), hashes)
    child = race(scores.expand(n, -1), keys_of([(s + 1, 20) for s in range(n)]), hashes)
    p = torch.softmax(scores.double(), -1)
    for other in (second, child):
        seen = torch.bincount(first * 5 + other, minlength=25).double()
        assert chi_square(seen, torch.outer(p, p).flatten()) < 66  # 99.999 % of 24


def test_race_draws_the_only_id_that_is_left() -> None:
    scores = torch.full((5000, 30), float("-inf"))
    scores[:, 13] = -3.0
    drawn = race(scores, keys_of([(1, i) for i in range(5000)]), token_hashes(30, CPU))
    assert set(drawn.tolist()) == {13}


def test_rare_ids_are_drawn_as_often_as_they_should_be() -> None:
    """49 000 ids that share four thousandths: the tail has its mass."""
    scores = torch.full((VOCAB,), math.log(4e-3 / (VOCAB - 1)))
    scores[0] = math.log(0.996)
    n, hashes, rare = 4_000, token_hashes(VOCAB, CPU), 0
    for start in range(0, n, 200):
        keys = keys_of([(2, i) for i in range(start, start + 200)])
        rare += int((race(scores.expand(200, -1), keys, hashes) != 0).sum())
    assert abs(rare - 16) < 4.5 * 4  # 16 expected, standard deviation 4


def test_rounding_flips_a_fraction_of_what_the_inverse_distribution_flips() -> None:
    """Logits in bfloat16 as two kernels may give them: half a unit of rounding apart."""
    generator = torch.Generator().manual_seed(4)
    n, n_ids = 1000, 2000
    logits = 3 * torch.randn(n, n_ids, generator=generator)
    moved = logits + 0.03 * torch.randn(n, n_ids, generator=generator)
    keys, hashes = keys_of([(8, i) for i in range(n)]), token_hashes(n_ids, CPU)
    numbers = torch.rand(n, 1, dtype=torch.float64, generator=generator)

    def inverse(scores: Tensor) -> Tensor:
        return torch.searchsorted(torch.softmax(scores.double(), -1).cumsum(-1), numbers)[:, 0]

    flips = int((race(logits, keys, hashes) != race(moved, keys, hashes)).sum())
    others = int((inverse(logits) != inverse(moved)).sum())
    assert others > 100, "the comparison says nothing"
    assert flips < others / 3
