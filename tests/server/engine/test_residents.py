"""Residency by tenant, and pinned variants, with the real loader."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from server.engine.residents import Pin, holder_of
from server.errors import DeltaUnusable, Forbidden, NoSlot
from server.tenants.principal import Principal
from tests.server.conftest import ALL_CODECS, Served
from tests.server.engine.test_core import assert_true_text
from tests.server.engine.test_core_variants import intercept_reads, resident
from tests.server.helpers import CoreHarness, Recorded

PROMPT = "The quick brown fox"
OTHER = Principal("other")
Make = Callable[..., CoreHarness]
A, B, C = list(ALL_CODECS)[:3]


@pytest.fixture
def many(served: Callable[..., Served]) -> Served:
    return served("llama", ALL_CODECS)


@pytest.fixture
def engine(many: Served, harness: Make) -> CoreHarness:
    return harness(many, kernels="torch")


def ask(engine: CoreHarness, name: str, principal: Principal, **params: object) -> Recorded:
    return engine.submit(name, PROMPT, principal=principal, **params)


def sizes(engine: CoreHarness) -> dict[str, int]:
    """Device bytes of A, B and C, which nobody uses afterwards."""
    engine.run(*(ask(engine, name, OTHER, max_tokens=1) for name in (A, B, C)))
    names = {engine.catalog.open(name).key: name for name in (A, B, C)}
    found = {names[slot.key]: slot.n_bytes for slot in engine.core.slots.residents()}
    for slot in engine.core.slots.residents():
        engine.core.loader._clear(slot)
    return found


def test_tenant_over_its_bound_gives_up_its_own_least_recently_used(
    engine: CoreHarness, many: Served
) -> None:
    bytes_of = sizes(engine)
    bounded = Principal("bounded", resident_bytes=bytes_of[A] + bytes_of[B] + bytes_of[C] - 1)
    engine.run(ask(engine, "rows", OTHER, max_tokens=1))  # the least recently used of all
    for name in (A, B, A):
        engine.run(ask(engine, name, bounded, max_tokens=1))
    last = ask(engine, C, bounded)
    engine.run(last)
    assert resident(engine) == {"rows", A, C}
    assert engine.core.slots.held_bytes("bounded") <= bounded.resident_bytes
    assert_true_text(many, last)
    engine.assert_idle()


def test_variant_of_two_tenants_stays_for_the_other(engine: CoreHarness) -> None:
    bytes_of = sizes(engine)
    bounded = Principal("bounded", resident_bytes=max(bytes_of.values()))
    engine.run(ask(engine, A, OTHER, max_tokens=1), ask(engine, A, bounded, max_tokens=1))
    engine.run(ask(engine, B, bounded, max_tokens=1))
    assert resident(engine) == {A, B}
    engine.run(ask(engine, C, bounded, max_tokens=1))
    assert resident(engine) == {A, C}
    assert engine.core.slots.held_bytes("bounded") == bytes_of[C]


def test_tenant_whose_variants_are_in_use_waits_and_others_do_not(
    engine: CoreHarness, many: Served
) -> None:
    bytes_of = sizes(engine)
    names = intercept_reads(engine)
    bounded = Principal("bounded", resident_bytes=max(bytes_of.values()))
    runs = ask(engine, A, bounded, ignore_eos=True, max_tokens=200)
    engine.until(lambda: runs.request.n_output > 0)
    waits, late = (ask(engine, B, bounded) for _ in range(2))
    other = ask(engine, C, OTHER)
    engine.run(other)
    assert not runs.done
    assert not waits.events
    assert names == [A, C], "what cannot be held is not read"
    late.request.deadline = 0.0
    engine.run(late)
    assert isinstance(late.error, NoSlot)
    assert "its tenant's other variants" in late.error.message
    engine.run(waits)
    assert len(runs.output_ids) == 200
    assert resident(engine) == {B, C}
    assert_true_text(many, waits, other)
    engine.assert_idle()


def test_stream_of_a_tenants_variant_does_not_starve_its_other(
    engine: CoreHarness, many: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = Principal("bounded", resident_bytes=max(sizes(engine).values()))
    monkeypatch.setattr("server.engine.schedule.scheduler.MAX_OVERTAKEN_S", 0.0)
    stream = [ask(engine, A, bounded, ignore_eos=True) for _ in range(2)]
    engine.until(lambda: stream[0].request.n_output > 0)
    waits = ask(engine, B, bounded)

    def is_served() -> bool:
        if sum(not r.done for r in stream) < 3:  # there is always one more that wants A
            stream.append(ask(engine, A, bounded, ignore_eos=True))
        assert len(stream) < 60, "it starves"
        return waits.done

    engine.until(is_served)
    engine.run(*stream)
    assert_true_text(many, waits)
    engine.assert_idle()


def test_variant_larger_than_its_tenants_bound_is_refused_with_the_numbers(
    engine: CoreHarness,
) -> None:
    bounded, names = Principal("bounded", resident_bytes=1000), intercept_reads(engine)
    for _ in range(2):
        refused = ask(engine, A, bounded)
        engine.run(refused)
        assert isinstance(refused.error, Forbidden)
        assert "tenant bounded may hold 1000 bytes" in refused.error.message
    assert names == [A], "the second time its size is known"
    other = ask(engine, A, OTHER)
    engine.run(other)
    assert other.error is None
    engine.assert_idle()


def pin(engine: CoreHarness, *names: str, principal: Principal = OTHER) -> None:
    pins = [Pin(engine.catalog.open(name), (holder_of(principal),)) for name in names]
    engine.core.residents.pin(pins)


def test_pinned_variants_are_loaded_and_never_evicted(many: Served, harness: Make) -> None:
    engine = harness(many, max_resident_variants=2, kernels="torch")
    pin(engine, A)
    engine.until(lambda: resident(engine) == {A} and engine.core.loader.errors == {})
    for name in (B, C, B):
        engine.run(ask(engine, name, OTHER, max_tokens=1))
        assert resident(engine) == {A, name}
    pin(engine, B)
    engine.run(ask(engine, C, OTHER, max_tokens=1))
    assert resident(engine) == {B, C}


def test_variant_that_has_no_room_beside_the_pinned_is_refused(many: Served, harness: Make) -> None:
    engine = harness(many, max_resident_variants=1, kernels="torch")
    pin(engine, A)
    engine.until(lambda: resident(engine) == {A})
    names = intercept_reads(engine)
    for _ in range(2):
        refused, served = ask(engine, B, OTHER), ask(engine, A, OTHER)
        engine.run(refused, served)
        assert isinstance(refused.error, DeltaUnusable)
        assert "1 of 1 slots" in refused.error.message
        assert served.error is None
    assert names == [B]
    engine.assert_idle()


def test_pin_over_the_bound_of_its_tenant_is_told_with_the_numbers(
    engine: CoreHarness, caplog: pytest.LogCaptureFixture
) -> None:
    pin(engine, A, B, principal=Principal("bounded", resident_bytes=1000))
    with caplog.at_level(logging.ERROR):
        engine.until(lambda: not engine.core.residents._unloaded)
    assert [A in caplog.messages[0], B in caplog.messages[1]] == [True, True]
    assert all("bounded may hold 1000 bytes" in line for line in caplog.messages)
    assert resident(engine) == set()


def test_pins_of_what_others_have_loaded_over_the_bound_are_told_with_the_numbers(
    engine: CoreHarness, caplog: pytest.LogCaptureFixture
) -> None:
    engine.run(*(ask(engine, name, OTHER, max_tokens=1) for name in (A, B)))
    n_bytes = sum(slot.n_bytes for slot in engine.core.slots.residents())
    with caplog.at_level(logging.ERROR):
        pin(engine, A, B, principal=Principal("bounded", resident_bytes=n_bytes - 1))
        engine.core.turn()
    (line,) = caplog.messages
    assert f"take {n_bytes} bytes" in line
    assert f"hold {n_bytes - 1}:" in line
    assert resident(engine) == {A, B}
