"""Long prompts beside running streams: what each step carries, who overtakes whom."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from server.engine.schedule.pacing import MIN_CHUNK_TOKENS, StepCost, StepLoad
from server.engine.schedule.scheduled import Scheduled, load_of
from tests.server.conftest import PAIR, Served
from tests.server.engine.test_core import assert_true_text
from tests.server.helpers import CoreHarness

Make = Callable[..., CoreHarness]


class FixedCost(StepCost):
    """100 ms a step and 1 ms a prompt token, whatever was measured."""

    def learn(self, load: StepLoad, seconds: float) -> None:
        pass

    def seconds(self, load: StepLoad) -> float:
        return 0.1 + 0.001 * load.n_prefill

    def prefill_costs(self) -> tuple[float, float]:
        return 0.001, 0.0


@pytest.fixture
def pair(served: Callable[..., Served]) -> Served:
    return served("llama", PAIR)


def watched(engine: CoreHarness) -> list[list[Scheduled]]:
    """Every step's chunks from now on; the cost of a step is FixedCost's."""
    engine.core.scheduler._pacer.cost = FixedCost()
    steps: list[list[Scheduled]] = []
    inner = engine.core.scheduler.schedule

    def schedule() -> list[Scheduled]:
        steps.append(inner())
        loads.append(load_of(steps[-1]))
        return steps[-1]

    loads: list[StepLoad] = []
    engine.run(*(engine.submit(name, "x", max_tokens=1) for name in PAIR))  # loaded
    engine.core.scheduler.schedule = schedule  # type: ignore[method-assign]
    engine.loads = loads  # type: ignore[attr-defined]
    return steps


def prompt(n: int, seed: int) -> list[int]:
    return [3 + (seed * 31 + i * i) % 90 for i in range(n)]


@pytest.mark.parametrize(("max_slowdown", "most"), [(1.5, 50), (1.2, 32), (0, 124)])
def test_long_prompt_beside_streams_takes_what_the_slowdown_allows(
    pair: Served, harness: Make, max_slowdown: float, most: int
) -> None:
    engine = harness(pair, max_prefill_slowdown=max_slowdown, max_batch_tokens=128)
    watched(engine)
    names = ("base", "impart") * 2
    streams = [engine.submit(n, "x", ignore_eos=True, max_tokens=100) for n in names]
    engine.until(lambda: all(s.request.n_output > 0 for s in streams))
    del engine.loads[:]  # type: ignore[attr-defined]
    long = engine.submit("blockdiag", prompt(200, 1))
    engine.until(lambda: long.request.n_output > 0)
    chunks = [load.n_prefill for load in engine.loads]  # type: ignore[attr-defined]
    assert sum(chunks) == 200
    assert max(chunks) == most
    assert all(c == most for c in chunks[:-1])
    assert all(load.n_decode == 4 for load in engine.loads)  # type: ignore[attr-defined]
    engine.run(long, *streams)
    assert_true_text(pair, long)


def test_prompt_in_prefill_tells_how_far_it_is_and_its_chunks_how_long_it_waited(
    pair: Served, harness: Make
) -> None:
    engine = harness(pair, max_batch_tokens=64, max_num_seqs=1)
    watched(engine)
    first, second = (engine.submit("base", prompt(200, seed), max_tokens=3) for seed in (1, 2))
    engine.core.turn()
    assert (first.request.n_prompt_computed, second.request.n_prompt_computed) == (64, 0)
    engine.run(first, second)
    assert first.request.n_prompt_computed == 200
    for one in (first, second):
        assert one.request.started_at is not None
        waited_s = one.request.started_at - one.request.queued_at
        assert {chunk.queue_s for chunk in one.chunks} == {waited_s}
    assert second.chunks[0].queue_s > first.chunks[0].queue_s


def test_long_prompt_alone_takes_whole_steps(pair: Served, harness: Make) -> None:
    engine = harness(pair, max_batch_tokens=128)
    watched(engine)
    long = engine.submit("base", prompt(200, 2))
    engine.run(long)
    assert [load.n_prefill for load in engine.loads][:2] == [128, 72]  # type: ignore[attr-defined]
    assert_true_text(pair, long)


def test_short_prompts_overtake_later_long_ones_and_the_first_still_advances(
    pair: Served, harness: Make
) -> None:
    engine = harness(pair, max_batch_tokens=64, max_prefill_slowdown=1.4)
    steps = watched(engine)
    stream = engine.submit("base", "x", ignore_eos=True, max_tokens=100)
    engine.until(lambda: stream.request.n_output > 0)
    long = [engine.submit(n, prompt(200, i)) for i, n in enumerate(("blockdiag", "base"))]
    engine.core.turn()
    short = engine.submit("impart", prompt(12, 5))
    engine.until(lambda: short.request.n_output > 0)
    assert [r.request.n_output for r in long] == [0, 0]
    assert long[1].request.n_computed == 0  # one long prompt at a time
    del steps[:]
    engine.until(lambda: long[0].request.n_output > 0)
    for step in steps:
        own = [s.n_tokens for s in step if s.request is long[0].request]
        assert own
        assert own[0] >= MIN_CHUNK_TOKENS or own[0] == 200 - long[0].request.n_computed
    engine.run(*long, short)
    assert_true_text(pair, *long, short)


def test_stream_of_short_prompts_does_not_starve_a_long_one(pair: Served, harness: Make) -> None:
    engine = harness(pair, max_batch_tokens=64, max_prefill_slowdown=1.2, max_num_seqs=8)
    watched(engine)
    shorts = [engine.submit("base", prompt(30, i), max_tokens=2) for i in range(6)]
    long = engine.submit("impart", prompt(200, 9))

    def done() -> bool:
        waiting = sum(not s.done for s in shorts)
        shorts.extend(
            engine.submit("base", prompt(30, len(shorts) + i), max_tokens=2)
            for i in range(8 - waiting)
        )
        assert len(shorts) < 100, "it starves"
        return long.done

    engine.until(done)
    engine.run(*shorts)
    assert_true_text(pair, long)


def test_long_prompt_whose_beginning_is_known_does_not_wait_for_another(
    pair: Served, harness: Make
) -> None:
    engine = harness(pair, max_batch_tokens=64)
    watched(engine)
    engine.run(engine.submit("base", prompt(200, 3), max_tokens=1))
    other = engine.submit("impart", prompt(230, 4))
    engine.core.turn()
    known = engine.submit("base", prompt(200, 3))
    engine.until(lambda: known.request.n_output > 0)
    assert other.request.n_output == 0
    engine.run(other, known)
    assert_true_text(pair, other, known)
