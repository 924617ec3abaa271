"""The arithmetic of merging against element loops that follow the papers line by line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.merge.rules import dare_mask, elect_and_merge, kth_magnitude, trim, weighted_sum

# Few values, so that ties, zeros and exact cancellation occur.
values = st.sampled_from([-2.0, -1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 3.0])
weights = st.sampled_from([0.5, 1.0, 2.0, -1.0])


@st.composite
def task_vectors(draw: st.DrawFn) -> tuple[list[list[float]], list[float]]:
    n_models, size = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    vectors = [draw(st.lists(values, min_size=size, max_size=size)) for _ in range(n_models)]
    return vectors, [draw(weights) for _ in range(n_models)]


def ties_element_by_element(
    vectors: list[list[float]], weights: list[float], density: float
) -> list[float]:
    """Algorithm 1 of TIES-Merging, one element at a time, with weights."""
    size = len(vectors[0])
    trimmed = []
    for vector in vectors:
        keep = max(1, round(density * size))
        smallest_kept = sorted((abs(x) for x in vector), reverse=True)[keep - 1]
        trimmed.append([x if abs(x) >= smallest_kept else 0.0 for x in vector])
    merged = []
    for p in range(size):
        column = [w * t[p] for w, t in zip(weights, trimmed, strict=True)]
        mass = math.fsum(column)
        if mass == 0:
            merged.append(0.0)
            continue
        sign = math.copysign(1, mass)
        agreeing = [(x, w) for x, w in zip(column, weights, strict=True) if x * sign > 0]
        total = sum(w for _, w in agreeing)
        merged.append(math.fsum(x for x, _ in agreeing) / total if total else 0.0)
    return merged


@settings(max_examples=300, deadline=None)
@given(task_vectors(), st.sampled_from([0.1, 0.2, 0.5, 0.8, 1.0]))
def test_ties_any_vectors_equal_the_element_loop(
    case: tuple[list[list[float]], list[float]], density: float
) -> None:
    vectors, chosen = case
    deltas = [torch.tensor(vector) for vector in vectors]
    keep = max(1, round(density * len(vectors[0])))
    trimmed = [trim(d, kth_magnitude(lambda d=d: [d], keep)) for d in deltas]
    found = elect_and_merge(trimmed, chosen, mean=True)
    expected = ties_element_by_element(vectors, chosen, density)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_ties_example_of_conflicting_signs_by_hand() -> None:
    deltas = [torch.tensor([3.0, -1.0, 2.0, 0.0]), torch.tensor([-1.0, -2.0, -2.0, 5.0])]
    expected = torch.tensor([3.0, -1.5, 0.0, 5.0])
    assert torch.equal(elect_and_merge(deltas, [1, 1], mean=True), expected)
    summed = torch.tensor([3.0, -3.0, 0.0, 5.0])
    assert torch.equal(elect_and_merge(deltas, [1, 1], mean=False), summed)


@given(task_vectors(), st.booleans())
def test_weighted_sum_equals_the_loop(
    case: tuple[list[list[float]], list[float]], mean: bool
) -> None:
    vectors, chosen = case
    deltas = [torch.tensor(vector) for vector in vectors]
    divisor = sum(chosen) if mean and sum(chosen) else 1.0
    expected = [
        sum(w * v[p] for w, v in zip(chosen, vectors, strict=True)) / divisor
        for p in range(len(vectors[0]))
    ]
    found = weighted_sum(deltas, chosen, mean=mean)
    torch.testing.assert_close(found, torch.tensor(expected))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.data())
def test_kth_magnitude_any_floats_equals_sorting(numbers: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(numbers)))
    cut = data.draw(st.integers(0, len(numbers)))
    vector = torch.tensor(numbers)
    pieces: list[Tensor] = [part for part in (vector[:cut], vector[cut:]) if len(part)]
    expected = float(vector.abs().sort(descending=True).values[k - 1])
    assert kth_magnitude(lambda: pieces, k) == expected


def test_dare_mask_is_bernoulli_and_does_not_depend_on_how_it_is_cut() -> None:
    whole = dare_mask("key", 0, 200_000, 0.3)
    assert abs(float(whole.float().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 200_000)
    parts = [dare_mask("key", start, 50_000, 0.3) for start in range(0, 200_000, 50_000)]
    assert torch.equal(torch.cat(parts), whole)
    other = dare_mask("other", 0, 200_000, 0.3)
    both = float((whole & other).float().mean())
    assert both == pytest.approx(0.09, abs=0.004)


def test_dare_mask_is_the_documented_stream() -> None:
    """Fixed for ever: the sha256 of the key seeds PCG64; an element is kept below density 2^64."""
    import hashlib

    seed = int.from_bytes(hashlib.sha256(b"k").digest(), "little")
    raw = np.random.PCG64(seed).random_raw(1000)
    expected = [int(x) <= int(0.25 * 2**64) for x in raw]
    assert dare_mask("k", 0, 1000, 0.25).tolist() == expected
