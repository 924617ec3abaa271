"""Variants in host memory: bytes kept to, pins kept, and coming back to the device is a copy."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.deltas.costs import ReloadCosts
from server.deltas.host_tier import HostTier, held_bytes
from server.deltas.loads import LoadDecoded, LoadJob
from server.deltas.parameter import StagedParameter
from tests.server.conftest import ALL_CODECS, Served
from tests.server.engine.test_core import assert_true_text
from tests.server.engine.test_core_variants import intercept_reads, resident
from tests.server.helpers import CoreHarness

PROMPT = "The quick brown fox"
A, B, C = list(ALL_CODECS)[:3]
Make = Callable[..., CoreHarness]


def decoded(key: str, n_bytes: int, artifact: Any = None) -> LoadDecoded:
    vector = torch.empty(n_bytes, dtype=torch.uint8)
    staged = StagedParameter(cast(Any, SimpleNamespace()), vector=vector)
    job = LoadJob(key, key, "apply", lambda: cast(Any, None))
    return LoadDecoded(job, (staged,), n_bytes, 0.0, artifact)


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 60), st.booleans()), max_size=40),
    st.sets(st.sampled_from("abcdef"), max_size=2),
)
def test_tier_any_history_keeps_the_budget_the_pinned_and_the_last_that_fits(
    puts: list[tuple[str, int, bool]], pinned: set[str]
) -> None:
    tier = HostTier(100, ReloadCosts())
    tier.pinned = pinned
    for key, n_bytes, is_asked in puts:
        before = pinned.intersection(tier.keys())
        if is_asked:
            tier.get(key)
            continue
        is_kept = tier.put(decoded(key, n_bytes))
        assert is_kept == (tier.bytes_of(key) > 0)
        assert tier.used_bytes == sum(map(tier.bytes_of, tier.keys())) <= 100
        assert before <= set(tier.keys())
        held = sum(map(tier.bytes_of, before - {key}))
        assert is_kept or n_bytes > 100 - held


def test_tier_counts_what_a_tensor_keeps_alive_and_keeps_no_whole_weights() -> None:
    whole = torch.empty(1000, dtype=torch.uint8)
    parts = tuple(StagedParameter(cast(Any, None), vector=whole[i : i + 1]) for i in range(3))
    job = LoadJob("k", "k", "apply", lambda: cast(Any, None))
    assert held_bytes(LoadDecoded(job, parts, 3, 0.0)) == 1000
    tier = HostTier(1000, ReloadCosts())
    assert not tier.put(decoded("k", 10, artifact=object()))
    assert tier.keys() == []


@pytest.fixture
def many(served: Callable[..., Served]) -> Served:
    return served("llama", ALL_CODECS)


def test_variant_that_comes_back_from_host_memory_is_not_read_again(
    many: Served, harness: Make
) -> None:
    engine = harness(
        many, max_resident_variants=1, host_delta_budget_bytes=1 << 30, kernels="torch"
    )
    names = intercept_reads(engine)
    sent = [engine.submit(name, PROMPT) for name in (A, B)]
    engine.run(*sent)
    assert resident(engine) == {B}
    again = engine.submit(A, PROMPT)
    engine.run(again)
    assert names == [A, B]
    assert_true_text(many, *sent, again)
    engine.assert_idle()


def test_load_whose_askers_have_left_evicts_nobody_and_stays_in_host_memory(
    many: Served, harness: Make
) -> None:
    engine = harness(
        many, max_resident_variants=1, host_delta_budget_bytes=1 << 30, kernels="torch"
    )
    engine.run(engine.submit(A, PROMPT, max_tokens=1))
    left: list[Any] = []
    names = intercept_reads(engine, lambda name: left and engine.core.abort(left[0].request))
    left.append(engine.submit(B, PROMPT))
    engine.until(lambda: engine.core.loader.loading() != [])
    engine.until(lambda: engine.core.loader.loading() == [])
    assert resident(engine) == {A}
    assert names == [B]
    back = engine.submit(B, PROMPT)
    engine.run(back)
    assert names == [B], "what was decoded was kept"
    assert_true_text(many, back)
    engine.assert_idle()


def test_load_whose_asker_left_and_came_back_takes_its_slot(many: Served, harness: Make) -> None:
    engine = harness(many, max_resident_variants=1, kernels="torch")
    engine.run(engine.submit(A, PROMPT, max_tokens=1))
    sent: list[Any] = []

    def leave_and_return(name: str) -> None:
        engine.core.abort(sent[0].request)
        engine.core.between_steps(lambda: sent.append(engine.submit(B, PROMPT)))

    names = intercept_reads(engine, leave_and_return)
    sent.append(engine.submit(B, PROMPT))
    engine.until(lambda: len(sent) == 2)
    engine.run(sent[1])
    assert names == [B]
    assert resident(engine) == {B}
    assert_true_text(many, sent[1])
