"""Tenants in one engine: who gives way, in both ways of stepping; every text stays the true one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from server.tenants.principal import Principal
from tests.server.conftest import ALL_CODECS, PAIR, Served
from tests.server.engine.test_core import assert_true_text
from tests.server.helpers import CoreHarness

PROMPT = "The quick brown fox jumps over the lazy dog"
FLOOD, QUIET = Principal("flood"), Principal("quiet")
Make = Callable[..., CoreHarness]


@pytest.fixture(params=["every step read", "one ahead"])
def harness(request: pytest.FixtureRequest, harness: Make) -> Make:
    """See `server.engine.step.lookahead`: it must notice who may take a place."""
    if request.param == "every step read":
        return harness
    return partial(harness, static=True, kernels="torch")


@pytest.fixture
def pair(served: Callable[..., Served]) -> Served:
    return served("llama", PAIR)


def test_quiet_tenant_takes_a_place_and_whoever_gave_way_goes_on(
    pair: Served, harness: Make
) -> None:
    engine = harness(pair, max_num_seqs=2)
    engine.run(engine.submit("impart", PROMPT, max_tokens=1))  # loaded
    flood = [engine.submit("base", PROMPT, principal=FLOOD, ignore_eos=True) for _ in range(4)]
    engine.until(lambda: flood[1].request.n_output > 3)
    quiet = engine.submit("impart", PROMPT, principal=QUIET, max_tokens=4)
    for _ in range(3):
        engine.core.turn()
    assert quiet.request.n_output > 0
    assert not any(one.done for one in flood)
    engine.run(quiet, *flood)
    assert [one.request.n_preemptions for one in flood] == [0, 1, 0, 0]
    assert_true_text(pair, quiet, *flood)
    engine.assert_idle()


def test_kv_blocks_run_out_and_the_small_tenant_goes_on(pair: Served, harness: Make) -> None:
    block_bytes = harness(pair).core._runner.base.store.bytes_per_token() * 8
    engine = harness(pair, kv_block_tokens=8, kv_cache_bytes=block_bytes * 20)
    flood = [engine.submit("base", PROMPT, principal=FLOOD, ignore_eos=True) for _ in range(3)]
    engine.until(lambda: flood[2].request.n_output > 0)
    quiet = engine.submit("base", "x", principal=QUIET, ignore_eos=True)
    engine.run(quiet, *flood)
    assert sum(one.request.n_preemptions for one in flood) > 0
    assert quiet.request.n_preemptions == 0
    assert_true_text(pair, quiet, *flood)
    engine.assert_idle()


def test_slots_that_a_flood_holds_while_it_waits_go_to_another_tenants_variant(
    served: Callable[..., Served], harness: Make
) -> None:
    many = served("llama", ALL_CODECS)
    first, second, third, own, *_ = ALL_CODECS
    engine = harness(many, max_resident_variants=3, max_variants_per_step=2)
    for name in (first, second, third):
        engine.run(engine.submit(name, "x", max_tokens=1))  # loaded
    flood = [
        engine.submit(name, "x", principal=FLOOD, ignore_eos=True, max_tokens=400)
        for name in (first, first, second, second, third)
    ]
    engine.until(lambda: flood[3].request.n_output > 0 and flood[4].request.slot is not None)
    quiet = engine.submit(own, PROMPT, principal=QUIET)
    engine.run(quiet)
    assert not any(one.done for one in flood)
    assert [one.request.n_preemptions for one in flood] == [0, 0, 1, 1, 0]
    assert_true_text(many, quiet)
    for one in flood:
        engine.core.abort(one.request)
    engine.core.turn()
    engine.assert_idle()
