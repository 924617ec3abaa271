"""Variants that come and go while others run: loads, slots, budget, fairness."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch

from compressor.artifact.reader import Artifact
from compressor.errors import Corrupt
from server.deltas.loads import LoadJob
from server.deltas.parameter import DeltaParameter, StagedParameter
from server.deltas.pools.base import TermPool
from server.deltas.room import Room
from server.deltas.upload import SlotUploader, Upload
from server.engine.variant import Variant
from server.errors import DeltaBroken, DeltaUnusable, NoSlot
from tests.server.conftest import ALL_CODECS, Served
from tests.server.engine.test_core import assert_true_text
from tests.server.helpers import CoreHarness

PROMPT = "The quick brown fox"
Make = Callable[..., CoreHarness]
FIVE = list(ALL_CODECS)


@pytest.fixture(params=[pytest.param("every step read", marks=pytest.mark.slow), "one ahead"])
def harness(request: pytest.FixtureRequest, harness: Make) -> Make:
    """Both ways of stepping, of which the one has more to go wrong; `test_core_canary` mixes
    variants that come and go in the other. See `server.engine.step.lookahead`.
    """
    if request.param == "every step read":
        return harness
    return partial(harness, static=True, kernels="torch")


@pytest.fixture
def many(served: Callable[..., Served]) -> Served:
    return served("llama", ALL_CODECS)


def intercept_reads(
    engine: CoreHarness, before: Callable[[str], None] = lambda name: None
) -> list[str]:
    """Call `before` with the variant's name on the loader's thread; return the names read."""
    inner, names = engine.core._job_for, []

    def job_for(variant: Variant) -> LoadJob:
        job = inner(variant)

        def read() -> Artifact:
            names.append(variant.name)
            before(variant.name)
            return job.read()

        return LoadJob(job.key, job.name, job.mode, read)

    engine.core._job_for = job_for
    return names


def resident(engine: CoreHarness) -> set[str]:
    names = {engine.catalog.key_of(d): d.name for d in engine.catalog.registry.all()}
    return {names[key] for key in engine.core.stats().resident}


# -- fairness ------------------------------------------------------------------------------------


def test_more_variants_than_fit_in_a_step_are_served_in_turn(many: Served, harness: Make) -> None:
    engine = harness(many, max_variants_per_step=2)
    engine.run(*(engine.submit(name, "x", max_tokens=1) for name in FIVE))  # all are there
    sent = [engine.submit(name, PROMPT) for name in ["base", *FIVE] * 2]
    mixed = []

    def all_done() -> bool:
        mixed.append(len({r.variant.key for r in engine.core.scheduler.running}))
        return all(r.done for r in sent)

    engine.until(all_done)
    assert max(mixed) == 2
    assert_true_text(many, *sent)
    engine.assert_idle()


@pytest.mark.parametrize(
    "limit", [{"max_variants_per_step": 1}, {"max_resident_variants": 1}, {"max_num_seqs": 1}]
)
def test_stream_of_one_variant_does_not_starve_another(
    many: Served, harness: Make, monkeypatch: pytest.MonkeyPatch, limit: dict[str, int]
) -> None:
    monkeypatch.setattr("server.engine.schedule.scheduler.MAX_OVERTAKEN_S", 0.0)
    engine = harness(many, **limit)
    stream = [engine.submit("blockdiag", PROMPT, ignore_eos=True) for _ in range(2)]
    engine.until(lambda: stream[0].request.n_output > 0)
    other = engine.submit("impart", PROMPT)

    def other_done() -> bool:
        # There is always one more request for the variant that runs already.
        if sum(not r.done for r in stream) < 3:
            stream.append(engine.submit("blockdiag", PROMPT, ignore_eos=True))
        assert len(stream) < 60, "it starves"
        return other.done

    engine.until(other_done)
    engine.run(*stream)
    assert_true_text(many, other)
    engine.assert_idle()


# -- loading beside running requests -----------------------------------------------------------


def test_cold_variant_loading_does_not_hold_up_others(many: Served, harness: Make) -> None:
    engine = harness(many)
    warm = engine.submit("impart", "x")
    engine.run(warm)
    may_read = threading.Event()
    intercept_reads(engine, lambda name: may_read.wait(60) and None)
    cold = engine.submit("blockdiag", PROMPT)
    others = [engine.submit(name, PROMPT) for name in ("base", "impart")]
    engine.run(*others)
    assert not cold.events
    may_read.set()
    engine.run(cold)
    assert_true_text(many, cold, *others)
    engine.assert_idle()


def test_loads_read_each_variant_once_however_many_requests_wait(
    many: Served, harness: Make
) -> None:
    """With one slot, a delta that has just arrived must not be evicted before it was used."""
    engine = harness(many, max_resident_variants=1)
    names = intercept_reads(engine)
    sent = [engine.submit(name, PROMPT) for name in FIVE for _ in range(2)]
    engine.run(*sent)
    assert sorted(names) == sorted(FIVE)
    assert_true_text(many, *sent)
    engine.assert_idle()


def test_loads_under_way_are_bounded(
    many: Served, harness: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.deltas.loader.MAX_LOADS", 2)
    engine = harness(many, max_resident_variants=1)
    holder = engine.submit(FIVE[0], PROMPT, ignore_eos=True, max_tokens=300)
    engine.until(lambda: holder.request.n_output > 0)
    names = intercept_reads(engine)
    sent = [engine.submit(name, PROMPT) for name in FIVE[1:]]
    engine.until(lambda: len(engine.core.loader._waiting_for_room) == 2)
    n_output = holder.request.n_output
    engine.until(lambda: holder.request.n_output > n_output + 10)
    assert names == FIVE[1:3]  # decoded and waiting for the slot; the others are not in memory
    engine.core.abort(holder.request)
    engine.run(*sent)
    assert_true_text(many, *sent)


def test_load_that_nobody_waits_for_any_more_is_not_begun(many: Served, harness: Make) -> None:
    engine = harness(many)
    may_read, reading = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        reading.set()
        assert may_read.wait(60)

    names = intercept_reads(engine, wait)
    first = engine.submit(FIVE[0], PROMPT)
    engine.until(reading.is_set)
    left, stayed = ([engine.submit(name, PROMPT) for _ in range(2)] for name in FIVE[1:3])
    engine.until(lambda: len(engine.core.loader._loading) == 3)
    for one in (*left, stayed[0], first):  # the first's is being read: that goes on
        engine.core.abort(one.request)
    engine.core.turn()
    may_read.set()
    engine.run(stayed[1])
    assert names == [FIVE[0], FIVE[2]]
    again = engine.submit(FIVE[1], PROMPT)
    engine.run(again)
    assert names == [FIVE[0], FIVE[2], FIVE[1]]
    assert_true_text(many, stayed[1], again)
    engine.assert_idle()


def test_room_made_beside_steps_leaves_every_stream_true(
    many: Served, harness: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps run while larger arrays are made, filled, and until they are opened."""
    make, made, go = Room.make, threading.Event(), threading.Event()

    def slow_make(self: Room, parameters: Iterable[StagedParameter]) -> None:
        make(self, parameters)
        made.set()
        go.wait(60)

    engine = harness(many)
    engine.run(engine.submit(FIVE[0], "x"))
    running = [
        engine.submit(name, PROMPT, ignore_eos=True, max_tokens=400) for name in ("base", FIVE[0])
    ]
    engine.until(lambda: all(one.request.n_output > 0 for one in running))
    monkeypatch.setattr(Room, "make", slow_make)
    cold = [engine.submit(name, PROMPT) for name in FIVE[1:3]]
    engine.until(made.is_set)
    n_before = running[0].request.n_output
    engine.until(lambda: running[0].request.n_output > n_before + 5)
    assert not any(one.request.n_output for one in cold)
    go.set()
    engine.run(*cold)
    assert_true_text(many, *cold)
    for one in running:
        want = many.truth(one.request.variant.name, one.request.prompt_ids)
        n = min(len(want), len(one.output_ids))
        assert one.output_ids[:n] == want[:n]
        engine.core.abort(one.request)
    engine.core.turn()
    engine.assert_idle()


def test_growing_the_arrays_never_overlaps_with_a_copy_into_them(
    many: Served, harness: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays are replaced then: a copy that had begun would be lost, and garbage served."""
    engine = harness(many)
    copy, make = SlotUploader.copy, Room.make
    storing, go, overlaps = threading.Event(), threading.Event(), []

    def slow_copy(self: SlotUploader, *args: object, **kwargs: object) -> Upload:
        storing.set()
        go.wait(60)
        upload = copy(self, *args, **kwargs)  # type: ignore[arg-type]
        storing.clear()
        return upload

    def watched_make(self: Room, parameters: Iterable[StagedParameter]) -> None:
        overlaps.append(storing.is_set())
        make(self, parameters)

    monkeypatch.setattr(SlotUploader, "copy", slow_copy)
    monkeypatch.setattr(Room, "make", watched_make)
    # The second is read while the first is being copied.
    intercept_reads(engine, lambda name: name != FIVE[0] and storing.wait(60) and None)
    sent = [engine.submit(name, PROMPT) for name in FIVE[:2]]
    engine.until(lambda: bool(engine.core.loader._waiting_for_room) or any(overlaps))
    go.set()
    engine.run(*sent)
    assert not any(overlaps)
    assert_true_text(many, *sent)


# -- room --------------------------------------------------------------------------------------


def test_delta_larger_than_the_budget_is_refused_with_the_numbers(
    many: Served, harness: Make
) -> None:
    engine = harness(many, delta_budget_bytes=1000)
    refused, base = engine.submit("blockdiag", PROMPT), engine.submit("base", PROMPT)
    engine.run(refused, base)
    assert isinstance(refused.error, DeltaBroken)
    assert "1000" in refused.error.message
    assert "--delta-budget" in refused.error.message
    assert_true_text(many, base)
    engine.assert_idle()


def test_slots_all_in_use_waits_and_is_then_served(many: Served, harness: Make) -> None:
    engine = harness(many, max_resident_variants=2)
    holders = [engine.submit(name, PROMPT, ignore_eos=True, max_tokens=400) for name in FIVE[:2]]
    engine.until(lambda: all(r.request.n_output > 0 for r in holders))
    waits = engine.submit(FIVE[2], PROMPT)
    engine.until(lambda: engine.core.loader.needs_room(waits.request.variant.key))
    assert resident(engine) == set(FIVE[:2])
    engine.run(waits, *holders)
    assert [len(holder.output_ids) for holder in holders] == [400, 400]
    assert_true_text(many, waits)
    engine.assert_idle()


def test_slots_in_use_until_the_deadline_says_no_slot(many: Served, harness: Make) -> None:
    engine = harness(many, max_resident_variants=1)
    holder = engine.submit(FIVE[0], PROMPT, ignore_eos=True, max_tokens=300)
    engine.until(lambda: holder.request.n_output > 0)
    waits = engine.submit(FIVE[1], PROMPT)
    engine.until(lambda: engine.core.loader.needs_room(waits.request.variant.key))
    waits.request.deadline = 0.0
    engine.run(waits)
    assert isinstance(waits.error, NoSlot)
    assert waits.error.retry_after_s
    engine.core.abort(holder.request)
    engine.core.turn()
    engine.assert_idle()


def test_eviction_takes_the_least_recently_used(many: Served, harness: Make) -> None:
    engine = harness(many, max_resident_variants=2)
    a, b, c = FIVE[:3]
    for name in (a, b, a):
        engine.run(engine.submit(name, "x", max_tokens=1))
    assert resident(engine) == {a, b}
    last = engine.submit(c, PROMPT)
    engine.run(last)
    assert resident(engine) == {a, c}
    assert_true_text(many, last)


# -- failed loads ------------------------------------------------------------------------------


def test_failed_load_fails_its_waiters_and_is_tried_again_for_the_next(
    many: Served, harness: Make
) -> None:
    engine = harness(many)
    errors: list[Exception] = [Corrupt("a flipped bit"), OSError(5, "I/O error", "/secret/path")]

    def fail(name: str) -> None:
        if name == "impart" and errors:
            raise errors.pop(0)

    names = intercept_reads(engine, fail)
    kinds = {"Corrupt: a flipped bit": DeltaBroken, "I/O error": DeltaUnusable}
    for words, kind in kinds.items():
        sent = [engine.submit("impart", PROMPT) for _ in range(2)]
        good = engine.submit("base", PROMPT)
        engine.run(*sent, good)
        for one in sent:
            assert isinstance(one.error, kind)
            assert words in one.error.message
            assert "/" not in one.error.message.replace("I/O", "")
        (shown,) = engine.core.loader.errors.values()
        assert shown in sent[0].error.message
        assert "impart" not in shown  # other names may have the same bytes
        assert_true_text(many, good)
        engine.assert_idle()
    served_at_last = engine.submit("impart", PROMPT)
    engine.run(served_at_last)
    assert names == ["impart"] * 3
    assert engine.core.loader.errors == {}
    assert_true_text(many, served_at_last)


@pytest.mark.parametrize("where", ["stage", "reserve", "transfers"])
def test_out_of_memory_in_a_load_fails_that_load_only(
    many: Served, harness: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine = harness(many)
    running = engine.submit("lowrank", PROMPT)
    engine.until(lambda: running.request.n_output > 0)
    inner, calls = getattr(DeltaParameter, where), [0]

    def out_of_memory(self: DeltaParameter, *args: object, **named: object) -> object:
        calls[0] += 1
        if calls[0] == 4:  # some parameters are done, others are not
            raise torch.OutOfMemoryError("no memory")
        return inner(self, *args, **named)

    monkeypatch.setattr(DeltaParameter, where, out_of_memory)
    failed = engine.submit("blockdiag", PROMPT)
    engine.run(failed, running)
    assert isinstance(failed.error, DeltaUnusable)
    assert "not enough memory" in failed.error.message
    assert failed.error.retry_after_s
    assert set(resident(engine)) == {"lowrank"}
    again = [engine.submit(name, PROMPT) for name in ("blockdiag", "lowrank", "base")]
    engine.run(*again)
    assert_true_text(many, running, *again)
    engine.assert_idle()


@pytest.mark.parametrize("where", ["grown_arrays", "adopt"])
@pytest.mark.parametrize("name", ["impart", "lowrank"])
def test_out_of_memory_in_the_arrays_of_a_new_geometry_fails_that_load_only(
    many: Served, harness: Make, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    engine = harness(many)  # they are made beside the steps, or when steps are to have them
    running = engine.submit("blockdiag", PROMPT, ignore_eos=True)
    engine.until(lambda: running.request.n_output > 0)
    inner, calls = getattr(TermPool, where), [0]

    def out_of_memory(self: TermPool, *args: object) -> object:
        calls[0] += self.capacity == 0
        if calls[0] == 4:
            raise torch.OutOfMemoryError("no memory")
        return inner(self, *args)

    monkeypatch.setattr(TermPool, where, out_of_memory)
    failed = engine.submit(name, PROMPT)
    engine.run(failed, running)
    assert isinstance(failed.error, DeltaUnusable)
    assert running.error is None
    monkeypatch.undo()
    again = engine.submit(name, PROMPT)
    engine.run(again)
    assert_true_text(many, again)
    engine.assert_idle()
