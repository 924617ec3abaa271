"""Steps launched before the last one's tokens are read: the same texts, nothing left behind.

On a CPU over static buffers, with torch's kernels; what copies and events promise on a GPU is
`test_simulated_gpu`'s business. That ended, failed and refused requests leave nothing is tested for
both ways in `test_core`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from server.engine.step.lookahead import InFlight, Lookahead
from tests.server.conftest import PAIR, Served
from tests.server.helpers import CoreHarness, Recorded

PROMPT = "The quick brown fox jumps over the lazy dog"
Make = Callable[..., CoreHarness]
LOG = list[tuple[str, int]]


@pytest.fixture
def pair(served: Callable[..., Served]) -> Served:
    return served("llama", PAIR)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> LOG:
    """("launch" or "read", rows), in the order it happened."""
    seen: LOG = []
    launch, advance = Lookahead._launch, Lookahead.advance

    def launched(self: Lookahead, step: Any) -> InFlight:
        seen.append(("launch", len(step.rows)))
        return launch(self, step)

    def advanced(self: Lookahead, last: InFlight) -> Any:
        found = advance(self, last)
        seen.append(("read", len(last.step.rows)))
        return found

    monkeypatch.setattr(Lookahead, "_launch", launched)
    monkeypatch.setattr(Lookahead, "advance", advanced)
    return seen


def static(harness: Make, served: Served, **settings: Any) -> CoreHarness:
    return harness(served, static=True, kernels="torch", **settings)


def load_all(engine: CoreHarness, *names: str) -> None:
    """So that no variant arrives in the middle."""
    engine.run(*(engine.submit(name, "x", max_tokens=1) for name in names))


def test_next_step_is_under_way_before_the_last_ones_tokens_are_read(
    pair: Served, harness: Make, log: LOG
) -> None:
    engine = static(harness, pair)
    one = engine.submit("base", PROMPT, max_tokens=5, ignore_eos=True)
    engine.run(one)
    launch, read = ("launch", 1), ("read", 1)
    assert log == [launch, launch, read, launch, read, launch, read, read]
    assert one.output_ids == pair.truth("base", one.request.prompt_ids)[:5]


def test_length_is_known_ahead_and_costs_no_row(pair: Served, harness: Make, log: LOG) -> None:
    engine = static(harness, pair)
    sent = [engine.submit("base", PROMPT, max_tokens=n, ignore_eos=True) for n in (3, 6)]
    engine.run(*sent)
    assert [n for what, n in log if what == "launch"] == [2, 2, 1, 1, 1]
    engine.assert_idle()


def test_row_that_had_ended_is_dropped_and_its_kv_blocks_kept_until_then(
    pair: Served, harness: Make, log: LOG
) -> None:
    engine = static(harness, pair)
    plain = engine.submit("base", PROMPT, max_tokens=12, ignore_eos=True)
    engine.run(plain)
    stop = plain.output_ids[4]
    at = plain.output_ids.index(stop)
    log.clear()
    stays = engine.submit("base", PROMPT, max_tokens=12, ignore_eos=True)
    ends = engine.submit("base", PROMPT, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
    n_before = engine.core.scheduler.kv_blocks.n_free
    engine.until(lambda: ends.done)
    assert ends.request in engine.core._lookahead.in_flight.requests, "one row for nothing"
    assert ends.request.kv_blocks, "which still writes there"
    engine.core.turn()
    assert not ends.request.kv_blocks
    assert ends.output_ids == plain.output_ids[: at + 1]
    engine.run(stays)
    assert stays.output_ids == plain.output_ids
    engine.assert_idle()
    assert engine.core.scheduler.kv_blocks.n_free >= n_before


def test_request_that_comes_is_admitted_in_the_very_next_step(
    pair: Served, harness: Make, log: LOG
) -> None:
    engine = static(harness, pair)
    first = engine.submit("base", PROMPT, max_tokens=20, ignore_eos=True)
    engine.until(lambda: first.request.n_output >= 3)
    second = engine.submit("base", "x", max_tokens=2, ignore_eos=True)
    engine.core.turn()
    assert second.request.n_output == 1
    engine.run(first, second)
    assert first.output_ids == pair.truth("base", first.request.prompt_ids)[:20]


@pytest.mark.parametrize(
    "params",
    [{"logprobs": 1}, {"repetition_penalty": 1.2}, {"logit_bias": ((3, 1.0),)}, {"min_tokens": 9}],
)
def test_what_needs_the_tokens_so_far_is_not_launched_ahead(
    pair: Served, harness: Make, log: LOG, params: dict[str, Any]
) -> None:
    engine = static(harness, pair)
    one = engine.submit("base", PROMPT, max_tokens=6, ignore_eos=True, **params)
    engine.run(one)
    assert log == []
    assert len(one.output_ids) == 6


def test_switched_off_every_step_is_read_before_the_next(
    pair: Served, harness: Make, log: LOG
) -> None:
    engine = static(harness, pair, async_scheduling=False)
    one = engine.submit("base", PROMPT, max_tokens=5)
    engine.run(one)
    assert log == []
    assert one.output_ids == pair.truth("base", one.request.prompt_ids)[:5]


def test_launch_that_fails_ends_its_requests_and_serving_goes_on(
    pair: Served, harness: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = static(harness, pair)
    one = engine.submit("blockdiag", PROMPT, max_tokens=12, ignore_eos=True)
    engine.until(lambda: one.request.n_output >= 3)
    monkeypatch.setattr(Lookahead, "_follow", lambda self, last: 1 / 0)
    engine.run(one)
    assert one.error is not None
    monkeypatch.undo()
    again = engine.submit("blockdiag", PROMPT, max_tokens=6)
    engine.run(again)
    assert again.output_ids == pair.truth("blockdiag", again.request.prompt_ids)[:6]
    engine.assert_idle()


def test_launch_that_fails_leaves_the_step_before_its_tokens(
    pair: Served, harness: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = static(harness, pair)
    ends = engine.submit("base", PROMPT, max_tokens=6, ignore_eos=True)
    goes_on = engine.submit("base", PROMPT, max_tokens=12, ignore_eos=True)
    engine.until(lambda: ends.request.n_output == 5)
    monkeypatch.setattr(Lookahead, "_follow", lambda self, last: 1 / 0)
    engine.core.turn()
    assert ends.error is None
    assert ends.output_ids == pair.truth("base", ends.request.prompt_ids)[:6]
    assert goes_on.error is not None


def test_who_waits_without_hope_does_not_hold_steps_up(
    pair: Served, harness: Make, log: LOG
) -> None:
    engine = static(harness, pair, max_variants_per_step=1)
    load_all(engine, *PAIR)
    runs = engine.submit("blockdiag", PROMPT, max_tokens=12, ignore_eos=True)
    engine.until(lambda: runs.request.n_output >= 2)
    waits = engine.submit("impart", PROMPT, max_tokens=3, ignore_eos=True)
    engine.core.turn()  # finds that it cannot be admitted
    log.clear()
    for _ in range(4):
        engine.core.turn()
    assert waits.request.n_output == 0
    assert log == [("launch", 1), ("read", 1)] * 4
    engine.run(runs, waits)
    assert waits.output_ids == pair.truth("impart", waits.request.prompt_ids)[:3]


@pytest.mark.parametrize("ahead", [True, False])
def test_request_put_back_and_admitted_anew_reads_its_new_kv_blocks(
    pair: Served, harness: Make, ahead: bool
) -> None:
    """With prompt log probabilities, which take no known prefix; and in the row it had before."""

    def texts(n_kv_blocks: int) -> tuple[list[list[int]], int]:
        block_bytes = harness(pair).core._runner.base.store.bytes_per_token() * 4
        few = {
            "kv_block_tokens": 4,
            "kv_cache_bytes": block_bytes * n_kv_blocks,
            "prefix_cache": False,
        }
        engine = static(harness, pair, async_scheduling=ahead, max_num_seqs=4, **few)
        load_all(engine, "blockdiag")
        first = engine.submit("base", list(range(5, 11)), max_tokens=26, ignore_eos=True)
        engine.until(lambda: first.request.n_output >= 2)
        params = {"logprobs": 0, "prompt_logprobs": True, "max_tokens": 24, "ignore_eos": True}
        back = engine.submit("blockdiag", list(range(20, 29)), **params)
        engine.run(first)
        last = engine.submit("base", list(range(30, 35)), max_tokens=26, ignore_eos=True)
        engine.run(back, last)
        engine.assert_idle()
        found = [one.output_ids for one in (first, back, last)]
        return found, engine.core.stats().n_preemptions

    few, n_preemptions = texts(11)
    assert n_preemptions > 0
    assert few == texts(400)[0]


def workload(chosen: random.Random, n: int) -> list[dict[str, Any]]:
    """Requests of all kinds: greedy and drawn, plain and not, ending by length, stop and EOS."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.8, "presence_penalty": 0.4},
        {"temperature": 0.0, "min_tokens": 3},
    ]
    return [
        {
            "model": chosen.choice(["base", *PAIR]),
            "prompt": [chosen.randrange(5, 300) for _ in range(chosen.randrange(1, 12))],
            "max_tokens": chosen.randrange(1, 14),
            "seed": i,
            "ignore_eos": chosen.random() < 0.5,
            "stop_token_ids": tuple(chosen.sample(range(320), 12)),
            "gap": chosen.randrange(4),
            "aborts": chosen.random() < 0.15,
            **chosen.choice(kinds),
        }
        for i in range(n)
    ]


def served_texts(engine: CoreHarness, jobs: list[dict[str, Any]]) -> list[list[int] | None]:
    """Send them with some turns in between; aborted ones have no text to compare."""
    load_all(engine, *PAIR)
    sent: list[tuple[Recorded, bool]] = []
    for job in jobs:
        params = {k: v for k, v in job.items() if k not in ("gap", "aborts")}
        sent.append((engine.submit(**params), job["aborts"]))
        for _ in range(job["gap"]):
            engine.core.turn()
        for one, aborts in sent:
            if aborts and one.request.n_output >= 2:
                engine.core.abort(one.request)
    for one, aborts in sent:
        if aborts:
            engine.core.abort(one.request)
    engine.run(*(one for one, aborts in sent if not aborts))
    engine.assert_idle()
    assert all(one.error is None for one, _ in sent)
    return [None if aborts else one.output_ids for one, aborts in sent]


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_has_the_texts_of_an_engine_that_reads_every_step(
    pair: Served, harness: Make, log: LOG, seed: int
) -> None:
    jobs = workload(random.Random(seed), 24)
    limits: dict[str, Any] = {"max_num_seqs": 5, "kv_block_tokens": 4, "prefix_cache": False}
    if seed % 2:  # variants come and go
        limits |= {"max_resident_variants": 1, "max_variants_per_step": 1}
    ahead = served_texts(static(harness, pair, **limits), jobs)
    assert log
    assert ahead == served_texts(static(harness, pair, **limits, async_scheduling=False), jobs)


def test_few_kv_blocks_preempt_and_the_texts_stay(pair: Served, harness: Make, log: LOG) -> None:
    jobs = [job | {"aborts": False} for job in workload(random.Random(9), 16)]
    block_bytes = harness(pair).core._runner.base.store.bytes_per_token() * 4
    few = {"kv_block_tokens": 4, "kv_cache_bytes": block_bytes * 12, "prefix_cache": False}
    small = static(harness, pair, **few)
    texts = served_texts(small, jobs)
    assert small.core.stats().n_preemptions > 0
    assert texts == served_texts(static(harness, pair, async_scheduling=False), jobs)
