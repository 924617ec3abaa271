"""What operators ask of variants, with the real loader: the engine thread's side."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from server.engine.life_types import Tier
from server.engine.orders import Order
from server.engine.residents import SERVER, Pin
from server.errors import Conflict, ServeError
from tests.server.conftest import ALL_CODECS, Served
from tests.server.engine.test_core import assert_true_text
from tests.server.engine.test_core_variants import intercept_reads, resident
from tests.server.helpers import CoreHarness, Recorded

PROMPT = "The quick brown fox"
A, B, C = list(ALL_CODECS)[:3]
Make = Callable[..., CoreHarness]
Outcome = list[ServeError | None]


@pytest.fixture
def many(served: Callable[..., Served]) -> Served:
    return served("llama", ALL_CODECS)


def bring(engine: CoreHarness, name: str, tier: Tier = "device") -> tuple[Order, Outcome]:
    told: Outcome = []
    order = Order(engine.catalog.open(name), tier, told.append)
    engine.core.orders.bring(order)
    return order, told


def unload(engine: CoreHarness, name: str, *, force: bool = False) -> Outcome:
    told: Outcome = []
    key = engine.catalog.open(name).key
    engine.core.orders.unload(key, name, force=force, done=told.append)
    return told


def streaming(engine: CoreHarness, name: str) -> Recorded:
    stream = engine.submit(name, PROMPT, ignore_eos=True, max_tokens=60)
    engine.until(lambda: stream.request.n_output > 0)
    return stream


def assert_true_beginning(many: Served, *recorded: Recorded) -> None:
    for one in recorded:
        want = many.truth(one.request.variant.name, one.request.prompt_ids)
        n = min(len(want), len(one.output_ids))
        assert (n > 0, one.error) == (True, None)
        assert one.output_ids[:n] == want[:n]


@pytest.mark.parametrize("static", [False, True])
def test_load_beside_a_stream_evicts_what_is_idle_and_is_done_once(
    many: Served, harness: Make, static: bool
) -> None:
    engine = harness(many, max_resident_variants=2, kernels="torch", static=static)
    engine.run(engine.submit(A, PROMPT, max_tokens=1))
    stream = streaming(engine, B)
    names = intercept_reads(engine)
    orders = [bring(engine, C), bring(engine, C)]
    engine.until(lambda: all(told == [None] for _, told in orders))
    assert not stream.done, "a load waits for no stream"
    assert (resident(engine), names) == ({B, C}, [C])
    _, again = bring(engine, C)
    engine.core.turn()
    assert again == [None]
    engine.run(stream)
    assert_true_beginning(many, stream)
    engine.assert_idle()


def test_load_that_fails_is_told_and_one_that_nobody_waits_for_is_not_begun(
    many: Served, harness: Make
) -> None:
    engine = harness(many, kernels="torch")

    def fail(name: str) -> None:
        raise OSError(5, "input/output error")

    names = intercept_reads(engine, fail)
    _, told = bring(engine, A)
    dropped, silent = bring(engine, B)
    engine.core.orders.drop(dropped)
    engine.until(lambda: told != [])
    assert told[0] is not None
    assert A in told[0].message
    assert (names, silent) == ([A], [])


def test_prefetch_brings_into_host_memory_only(many: Served, harness: Make) -> None:
    engine = harness(many, host_delta_budget_bytes=1 << 30, kernels="torch")
    _, told = bring(engine, A, "host")
    engine.until(lambda: told == [None])
    assert resident(engine) == set()
    names = intercept_reads(engine)
    asked = engine.submit(A, PROMPT)
    engine.run(asked)
    assert names == []
    assert_true_text(many, asked)


def test_prefetch_without_room_is_told(many: Served, harness: Make) -> None:
    engine = harness(many, host_delta_budget_bytes=100, kernels="torch")
    _, told = bring(engine, A, "host")
    engine.until(lambda: told != [])
    assert told[0] is not None
    assert "host memory has no room" in told[0].message
    assert engine.core.loader.errors == {}


def test_unload_of_what_is_pinned_or_in_use_is_refused_and_force_waits_for_the_stream(
    many: Served, harness: Make
) -> None:
    engine = harness(many, host_delta_budget_bytes=1 << 30, kernels="torch")
    stream = streaming(engine, A)
    (refusal,) = unload(engine, A)
    assert isinstance(refusal, Conflict)
    assert "1 requests use" in refusal.message
    forced = unload(engine, A, force=True)
    late = engine.submit(A, PROMPT)
    engine.core.turn()
    assert (forced, late.output_ids) == ([], []), "nobody gets it any more"
    names = intercept_reads(engine)
    engine.run(stream, late)
    assert forced == [None]
    assert names == [A], "who asks later has it loaded anew, from disk"
    assert_true_beginning(many, stream, late)
    engine.core.residents.pin([Pin(engine.catalog.open(A), (SERVER,))])
    (refusal,) = unload(engine, A, force=True)
    assert isinstance(refusal, Conflict)
    assert "pinned" in refusal.message
    engine.core.residents.pin([])
    for _ in range(2):
        done = unload(engine, A)
        engine.core.turn()
        assert done == [None]
    assert resident(engine) == set()
    assert engine.core.loader.host.keys() == []
    engine.assert_idle()


def test_variant_that_nobody_used_for_its_time_goes_unless_it_is_pinned(
    many: Served, harness: Make
) -> None:
    engine = harness(many, host_delta_budget_bytes=1 << 30, kernels="torch")
    engine.run(*(engine.submit(name, PROMPT, max_tokens=1) for name in (A, B, C)))
    keys = {name: engine.catalog.open(name).key for name in (A, B)}
    engine.core.residents.pin([Pin(engine.catalog.open(A), (SERVER,))])
    stream = streaming(engine, B)
    engine.core.orders.expire_after(dict.fromkeys(keys.values(), 1e-9))
    engine.core.turn()
    assert not stream.done
    assert resident(engine) == {A, B, C}, "it is in use"
    engine.run(stream)
    engine.until(lambda: resident(engine) == {A, C})
    assert engine.core.loader.host.bytes_of(keys[B]) == 0
    assert_true_beginning(many, stream)


def test_variant_that_the_folder_has_no_more_goes_when_nobody_holds_it(
    many: Served, harness: Make
) -> None:
    engine = harness(many, host_delta_budget_bytes=1 << 30, kernels="torch")
    engine.run(engine.submit(A, PROMPT, max_tokens=1))
    stream = streaming(engine, B)
    engine.core.orders.keep({engine.catalog.open(C).key})
    engine.core.turn()
    assert resident(engine) == {B}
    assert engine.core.loader.host.keys() == []
    engine.run(stream)
    engine.until(lambda: resident(engine) == set())
    assert_true_beginning(many, stream)
    engine.assert_idle()
