"""Requests that end early, fail or are refused: nothing of them is left, nobody else notices."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from functools import partial

import pytest

from server.engine.request import Event
from server.errors import (
    DeadlineExceeded,
    Draining,
    EngineDead,
    GenerationFailed,
    QueueFull,
)
from tests.server.conftest import PAIR, Served
from tests.server.helpers import CoreHarness, Recorded

PROMPT = "The quick brown fox jumps over the lazy dog and opens a new account"
Make = Callable[..., CoreHarness]


@pytest.fixture(params=["every step read", "one ahead"])
def harness(request: pytest.FixtureRequest, harness: Make) -> Make:
    """Both ways of stepping; see `server.engine.step.lookahead`."""
    if request.param == "every step read":
        return harness
    return partial(harness, static=True, kernels="torch")


@pytest.fixture
def pair(served: Callable[..., Served]) -> Served:
    return served("llama", PAIR)


def assert_true_text(served: Served, *requests: Recorded) -> None:
    """Each request has exactly the oracle's tokens."""
    for one in requests:
        assert one.error is None
        name, prompt = one.request.variant.name, one.request.prompt_ids
        n = one.request.params.max_tokens
        assert one.output_ids == served.truth(name, prompt)[:n]


# -- abort ---------------------------------------------------------------------------------------


def test_abort_while_waiting_gives_everything_back(pair: Served, harness: Make) -> None:
    engine = harness(pair, max_num_seqs=1)
    first = engine.submit("blockdiag", PROMPT)
    second = engine.submit("blockdiag", PROMPT)
    engine.until(lambda: first.request.n_output > 0)
    assert second.request.n_output == 0
    engine.core.abort(second.request)
    engine.run(first)
    engine.assert_idle()
    assert second.events == []
    assert_true_text(pair, first)


def test_abort_in_mid_prefill_gives_everything_back(pair: Served, harness: Make) -> None:
    engine = harness(pair, max_batch_tokens=8)
    request = engine.submit("impart", PROMPT)
    engine.until(lambda: request.request.n_computed > 0)
    assert 0 < request.request.n_computed < len(request.request.prompt_ids)
    engine.core.abort(request.request)
    engine.core.turn()
    engine.assert_idle()


def test_abort_while_decoding_gives_everything_back(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    names = ("impart", "blockdiag")
    # Both are loaded first: else one could end before the other begins.
    engine.run(*(engine.submit(name, PROMPT, max_tokens=1) for name in names))
    gone, stays = (engine.submit(name, PROMPT) for name in names)
    engine.until(lambda: gone.request.n_output >= 3 and stays.request.n_output >= 1)
    engine.core.abort(gone.request)
    engine.core.abort(gone.request)  # a second time, as a cancelled client may
    engine.run(stays)
    engine.assert_idle()
    assert not gone.done
    assert_true_text(pair, stays)


def test_abort_of_a_preempted_request_gives_everything_back(pair: Served, harness: Make) -> None:
    block_bytes = harness(pair).core._runner.base.store.bytes_per_token() * 8
    engine = harness(pair, kv_block_tokens=8, kv_cache_bytes=block_bytes * 7)
    sent = [engine.submit("blockdiag", "The quick brown fox", ignore_eos=True) for _ in range(2)]
    engine.until(lambda: engine.core.stats().n_preemptions > 0)
    preempted = next(r for r in sent if r.request.n_preemptions)
    engine.core.abort(preempted.request)
    engine.run(*(r for r in sent if r is not preempted))
    engine.assert_idle()


# -- values that are not finite ---------------------------------------------------------------


def test_row_not_finite_fails_alone_and_leaves_no_trace(poisoned: Served, harness: Make) -> None:
    engine = harness(poisoned, kv_block_tokens=8, kv_cache_bytes=1 << 18)
    names = ["base", "blockdiag", "impart"]
    neighbours = [engine.submit(name, PROMPT) for name in names]
    bad = [engine.submit("poison", PROMPT), engine.submit("poison", "x")]
    engine.run(*neighbours, *bad)
    assert [type(r.error) for r in bad] == [GenerationFailed] * 2
    assert "finite" in bad[0].error.message
    assert_true_text(poisoned, *neighbours)
    engine.assert_idle()
    again = [engine.submit(name, PROMPT) for name in names * 2]  # on the recycled KV blocks
    engine.run(*again)
    assert_true_text(poisoned, *again)


@pytest.mark.parametrize("end", ["abort", "deadline", "preempt"])
def test_prefill_not_finite_ended_early_leaves_no_trace(
    poisoned: Served, harness: Make, end: str
) -> None:
    """Its logits were never looked at, so nothing says that its KV blocks are bad."""
    engine = harness(poisoned, max_batch_tokens=8, kv_block_tokens=8)
    bad = engine.submit("poison", PROMPT)
    engine.until(lambda: bad.request.n_computed > 0)
    if end == "abort":
        engine.core.abort(bad.request)
    elif end == "deadline":
        bad.request.deadline = 0.0
    else:
        engine.core.scheduler._preempt(bad.request, [])
        engine.core.abort(bad.request)
    engine.core.turn()
    engine.assert_idle()
    after = [engine.submit(name, "x") for name in ("base", "blockdiag")]
    engine.run(*after)
    assert_true_text(poisoned, *after)


# -- exceptions --------------------------------------------------------------------------------


class BrokenDetokenizer:
    stopped_by = None

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        raise RuntimeError("the detokenizer broke")


def test_exception_in_one_detokenizer_fails_that_request_only(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    bad, good = engine.submit("blockdiag", PROMPT), engine.submit("blockdiag", PROMPT)
    bad.output._text.detokenizer = BrokenDetokenizer()  # type: ignore[assignment]
    engine.run(bad, good)
    assert isinstance(bad.error, GenerationFailed)
    assert "broke" not in bad.error.message  # an internal text is nothing for clients
    assert_true_text(pair, good)
    engine.assert_idle()


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": ((10**6, 1.0),)},  # raises in this row's penalties
        {"temperature": 1.0, "min_p": 2.0},  # raises in its group's filters
    ],
)
def test_exception_in_one_rows_sampling_fails_that_request_only(
    pair: Served, harness: Make, params: dict[str, object]
) -> None:
    engine = harness(pair)
    good = engine.submit("blockdiag", PROMPT)
    bad = engine.submit("blockdiag", PROMPT, **params)
    engine.run(bad, good)
    assert isinstance(bad.error, GenerationFailed)
    assert_true_text(pair, good)
    engine.assert_idle()


def fail_forward(engine: CoreHarness, times: int) -> None:
    """Make the next `times` forward passes raise."""
    inner, left = engine.core._runner.forward, [times]

    def forward(batch: object) -> object:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("evil forward")
        return inner(batch)  # type: ignore[arg-type]

    engine.core._runner.forward = forward  # type: ignore[method-assign, assignment]


def test_exception_in_a_forward_fails_that_steps_requests_only(pair: Served, harness: Make) -> None:
    engine = harness(pair, max_num_seqs=2)
    fail_forward(engine, 1)
    sent = [engine.submit("base", PROMPT) for _ in range(4)]
    engine.run(*sent)
    assert [type(r.error) for r in sent] == [GenerationFailed] * 2 + [type(None)] * 2
    assert_true_text(pair, *sent[2:])
    engine.assert_idle()
    assert not engine.core.dead


def test_exceptions_in_three_steps_running_kill_the_engine_and_everyone_is_told(
    pair: Served, harness: Make
) -> None:
    engine = harness(pair, max_num_seqs=1)
    fail_forward(engine, 3)
    sent = [engine.submit("base", PROMPT) for _ in range(5)]
    engine.core._run()  # the thread's own function; it returns because the engine dies
    assert [type(r.error) for r in sent] == [GenerationFailed] * 2 + [EngineDead] * 3
    assert all(len(r.events) == 1 for r in sent)
    assert engine.core.dead
    assert not engine.core.is_alive(60.0)
    with pytest.raises(EngineDead):
        engine.submit("base", PROMPT)


def test_exceptions_with_a_good_step_between_do_not_kill(pair: Served, harness: Make) -> None:
    engine = harness(pair, max_num_seqs=1)
    for _ in range(2):
        fail_forward(engine, 2)
        sent = [engine.submit("base", "x", max_tokens=1) for _ in range(3)]
        engine.run(*sent)
        assert sent[2].error is None
    assert not engine.core.dead


def test_heartbeat_beats_in_every_layer_of_a_step(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    seen = []

    def look(*_: object) -> None:
        seen.append(engine.core.heartbeat)
        engine.core.heartbeat = 0.0

    layers = list(engine.core._runner.base.store.layers)
    for layer in layers:
        layer.register_forward_pre_hook(look)
    engine.run(engine.submit("base", "x", max_tokens=1))
    assert len(seen) == len(layers) == 2
    assert all(seen)


# -- limits ------------------------------------------------------------------------------------


def test_submit_queue_full_is_refused_with_the_wait_of_those_that_ended(
    pair: Served, harness: Make
) -> None:
    engine = harness(pair, max_num_seqs=1, max_queued_requests=2)
    first = engine.submit("base", "x", max_tokens=1)
    first.request.queued_at -= 12.5
    engine.run(first)
    sent = [engine.submit("base", PROMPT) for _ in range(3)]
    with pytest.raises(QueueFull) as caught:
        engine.submit("base", PROMPT)
    assert caught.value.retry_after_s is not None
    assert 13 <= caught.value.retry_after_s <= 96
    engine.run(*sent)
    assert_true_text(pair, *sent)
    engine.run(engine.submit("base", PROMPT))
    engine.assert_idle()


def test_deadline_waiting_and_running_both_fail_and_free_everything(
    pair: Served, harness: Make
) -> None:
    engine = harness(pair, max_num_seqs=1)
    running = engine.submit("base", PROMPT, ignore_eos=True, max_tokens=200)
    waiting = engine.submit("base", PROMPT, deadline=time.monotonic() - 1)
    engine.run(waiting)
    assert isinstance(waiting.error, DeadlineExceeded)
    assert not running.done
    running.request.deadline = time.monotonic() - 1
    engine.run(running)
    assert isinstance(running.error, DeadlineExceeded)
    assert len(running.output_ids) > 0
    engine.assert_idle()


def test_drain_refuses_new_requests_and_finishes_running_ones(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    sent = [engine.submit(name, PROMPT) for name in ("base", "blockdiag")]
    engine.core.turn()
    engine.core.admission.drain()
    with pytest.raises(Draining):
        engine.submit("base", PROMPT)
    engine.run(*sent)
    assert_true_text(pair, *sent)


def test_stop_ends_what_is_left_with_draining(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    heard: queue.Queue[Event] = queue.Queue()
    sent = engine.submit("base", PROMPT, ignore_eos=True, max_tokens=400)
    sent.request.deliver = heard.put
    engine.core.start()
    heard.get(timeout=30)  # it runs
    engine.core.stop()
    events = [heard.get_nowait() for _ in range(heard.qsize())]
    assert isinstance(events[-1], Draining)
    engine.assert_idle()
    assert not engine.core.is_alive(60.0)


def test_requests_one_at_a_time_follow_each_other_without_a_pause(
    pair: Served, harness: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.core.LOAD_WAIT_S", 100.0)  # a pause would time out
    engine = harness(pair, max_num_seqs=1)
    sent = [engine.submit("base", "x", max_tokens=2) for _ in range(3)]
    engine.run(*sent)
    assert_true_text(pair, *sent)
