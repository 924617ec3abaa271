"""Made-up deltas are of every parameter, exact in bfloat16, and visible."""

from __future__ import annotations

import torch

from server.engine.check.synthetic import resident, synthetic_deltas
from tests.server.engine.check.models import served


def test_every_parameter_has_a_delta_that_shows() -> None:
    base = served("qwen3", attention_bias=True)
    deltas = synthetic_deltas(base.parameters.values())
    assert deltas.keys() == set(base.parameters.values())
    for parameter, delta in deltas.items():
        value = parameter.base
        change = delta.reconstruct(value) - value
        assert 0.02 * value.std() < change.abs().mean() < 3 * value.std(), parameter.name


def test_factors_are_the_same_numbers_in_bfloat16() -> None:
    for delta in synthetic_deltas(served("llama").parameters.values()).values():
        for term in delta.terms:
            for factor in (term.a, term.b):
                assert torch.equal(factor, factor.bfloat16().float())


def test_resident_delta_is_hidden_afterwards() -> None:
    base = served("llama")
    deltas = synthetic_deltas(base.parameters.values())
    with resident(deltas, 1):
        assert all(p.pools or p.vector_slots == {1} for p in deltas)
    assert not any(p.pools or p.vector_slots for p in deltas)
    assert not base.residency.eager
