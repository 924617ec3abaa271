"""Streams under stress: clients that leave, readers that stall, errors half way, draining.

Driven through the bare ASGI callable with hand-made `receive` and `send`.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from server.api import sse
from server.api.app import create_app
from server.errors import (
    DeadlineExceeded,
    DeltaBroken,
    DeltaUnusable,
    Draining,
    EngineDead,
    GenerationFailed,
    QueueFull,
)
from tests.server.api.call import Call, body, held, until
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fields", [{}, {"n": 3, "prompt": ["a", "b"]}])
async def test_disconnect_aborts_every_generation(stream, fields):
    async with held() as (engine, app):
        call = Call(app, "/v1/completions", body(stream, **fields))
        n = 6 if fields else 1
        await until(lambda: engine.n_active == n)
        if stream:
            await call.next()
        call.gone.set()
        await call.finish()

        assert engine.n_active == 0
        assert len(engine.aborted) == n
        assert len(app.state.api.open_requests) == 0
        if not stream:
            assert call.messages == []


async def test_disconnect_while_tokenising_starts_nothing():
    async with held() as (engine, app):
        started, never = asyncio.Event(), asyncio.Event()

        async def slow(*_: Any, **__: Any) -> list[int]:
            started.set()
            await never.wait()
            return [1]

        engine.encode = slow
        call = Call(app, "/v1/completions", body(False))
        await started.wait()
        call.gone.set()
        await call.finish()

        assert call.messages == []
        assert engine.prompts == []
        assert len(app.state.api.open_requests) == 0


async def test_disconnect_counts_as_abort_in_the_metrics():
    async with held() as (_, app):
        call = Call(app, "/v1/completions", body(True))
        await call.next()
        call.gone.set()
        await call.finish()

        text = app.state.api.metrics.render().decode()
        name = 'vllm:request_success_total{engine="0",finished_reason="abort"'
        assert f'{name},model_name="{BASE}"}} 1.0' in text
        counts = app.state.api.metrics.model(BASE).in_flight
        assert (counts.waiting, counts.running) == (0, 0)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull("Full.", retry_after_s=8), 503, "server_is_overloaded"),
        (Draining("Ending."), 503, "service_unavailable"),
        (DeltaBroken("Broken."), 424, "model_unusable"),
        (DeltaUnusable("No memory."), 503, "service_unavailable"),
        (DeadlineExceeded("Too late."), 504, "timeout"),
        (GenerationFailed("Failed."), 500, "server_error"),
        (EngineDead("Dead."), 503, "service_unavailable"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_error_before_the_first_token_has_its_status(error, status, code, stream):
    async with held() as (engine, app):
        engine.fail_at, engine.error = 0, error
        call = Call(app, "/v1/completions", body(stream, n=2))
        await call.finish()

        assert call.status == status
        found = json.loads(call.text)["error"]
        assert (found["code"], found["message"]) == (code, error.message)
        headers = dict(call.messages[0]["headers"])
        assert (b"retry-after" in headers) == (status == 503)
        if error.retry_after_s:
            assert 8 <= int(headers[b"retry-after"]) <= 10
        assert engine.n_active == 0


async def test_error_half_way_is_the_last_event_of_a_stream():
    async with held() as (engine, app):
        engine.fail_at = 2
        call = Call(app, "/v1/completions", body(True))
        await call.finish()

        events = call.events()
        assert call.status == 200
        assert "".join(e["choices"][0]["text"] for e in events[:-1]) == "01"
        assert events[-1]["error"]["type"] == "server_error"
        assert call.messages[-1]["more_body"] is False


async def test_error_of_one_choice_ends_the_others():
    async with held() as (engine, app):
        call = Call(app, "/v1/completions", body(False, n=3))
        await until(lambda: engine.n_active == 3)
        engine.fail_at = 4  # past the token at which all of them wait
        engine.hold.set()
        await call.finish()

        assert call.status == 500
        assert engine.n_active == 0


async def test_unforeseen_error_half_way_is_a_constant_last_event(caplog):
    async with held() as (engine, app):
        engine.fail_at, engine.error = 1, RuntimeError("secret")
        call = Call(app, "/v1/completions", body(True))
        await call.finish()

        assert call.events()[-1]["error"]["message"].startswith("Internal server error.")
        assert "secret" not in call.text
        assert "secret" in caplog.text


@pytest.mark.parametrize("method", ["open", "encode"])
async def test_deadline_counts_from_arrival_not_from_the_prompt(method):
    engine = FakeEngine()
    app = create_app(engine, make_settings(request_timeout_s=60.0))
    inner = getattr(engine, method)

    async def slow(*arguments: Any, **more: Any) -> Any:
        await asyncio.sleep(0.05)
        return await inner(*arguments, **more)

    setattr(engine, method, slow)
    before = time.monotonic()
    call = Call(app, "/v1/completions", body(False, max_tokens=1))
    await asyncio.sleep(0)  # the edge has the request; opening it has begun
    after = time.monotonic()
    await call.finish()

    assert call.status == 200
    (deadline,) = engine.deadlines
    assert before + 60 <= deadline <= after + 60


@pytest.mark.parametrize("method", ["open", "encode"])
async def test_deadline_passes_while_the_prompt_is_made(method):
    engine = FakeEngine()
    app = create_app(engine, make_settings(request_timeout_s=0.01))

    async def stuck(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    setattr(engine, method, stuck)
    call = Call(app, "/v1/completions", body(True))
    await call.finish()

    assert call.status == 504
    assert json.loads(call.text)["error"]["code"] == "timeout"
    assert engine.prompts == []
    engine.admission.admit(320)  # all permits are free again


async def test_refused_choice_ends_those_that_have_begun():
    engine = FakeEngine()
    app = create_app(engine, make_settings())
    call = Call(app, "/v1/completions", body(False, prompt=[[1], [300]]))
    await call.finish()
    await until(lambda: engine.n_active == 0)

    assert call.status == 400
    assert json.loads(call.text)["error"]["param"] == "prompt"
    assert engine.admission.n_open == 0


async def test_slow_reader_gets_all_that_waits_in_one_write():
    engine = FakeEngine()
    app = create_app(engine, make_settings())
    call = Call(app, "/v1/completions", body(True, max_tokens=400))
    await call.next()
    call.accept.clear()
    await until(lambda: engine.n_active == 0)  # the engine does not wait for the reader
    assert call.text.count("data: ") < 5
    call.accept.set()
    await call.finish()
    assert len(call.messages) < 8
    events = call.events()
    assert events[-1] == "DONE"
    texts = [event["choices"][0]["text"] for event in events[:-1]]
    assert len(texts) == 400
    assert "".join(texts) == "".join(call_text(400))


def call_text(n: int) -> list[str]:
    """What the fake engine's base writes."""
    return ["0" if i % 5 == 0 else str(i % 10) for i in range(n)]


async def test_tokens_of_one_step_are_one_write():
    """Both choices get a token in each step; the last write ends the response."""
    engine = FakeEngine()
    app = create_app(engine, make_settings())
    options = {"include_usage": True}
    call = Call(app, "/v1/completions", body(True, max_tokens=6, n=2, stream_options=options))
    await call.finish()
    start, *writes = call.messages
    assert start["type"] == "http.response.start"
    assert [write["body"].count(b"data: ") for write in writes] == [2] * 5 + [4]
    assert [write["more_body"] for write in writes] == [True] * 5 + [False]


async def test_stalled_reader_is_cut_off(monkeypatch):
    monkeypatch.setattr(sse.EventStream.__init__, "__defaults__", (0.05,))
    async with held() as (engine, app):
        call = Call(app, "/v1/completions", body(True))
        await call.next()
        call.accept.clear()
        await call.finish()
        await until(lambda: engine.n_active == 0)

        assert len(engine.aborted) == 1


async def test_reader_that_takes_something_within_the_limit_is_not_cut_off(monkeypatch):
    """The limit is on one write, not on the whole stream, nor on the engine's silence."""
    monkeypatch.setattr(sse.EventStream.__init__, "__defaults__", (0.2,))
    async with held() as (engine, app):
        call = Call(app, "/v1/completions", body(True, max_tokens=6))
        for _ in range(3):
            await asyncio.sleep(0.1)
            call.accept.clear()
            await asyncio.sleep(0.05)
            call.accept.set()
        engine.hold.set()
        await call.finish()

        assert call.events()[-1] == "DONE"


async def test_silent_stream_gets_comments_and_then_an_error_event(monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)
    async with held() as (engine, app):
        engine.hold_after = 0
        call = Call(app, "/v1/completions", body(True))
        await call.next()
        await until(lambda: sse.COMMENT.decode() in call.text)
        engine.fail_at = 1
        engine.hold.set()
        await call.finish()

        assert call.status == 200
        assert "error" in call.events()[-1]


async def test_body_that_never_ends_is_answered_with_408():
    from server.api.middleware import RequestCap

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        pytest.fail("the application ran")

    scope = {"type": "http", "path": "/", "http_version": "1.0", "headers": []}
    await RequestCap(app, 100, timeout_s=0.01)(scope, never, send)
    assert sent[0]["status"] == 408


async def test_choices_of_a_stream_are_told_apart_and_complete():
    engine = FakeEngine()
    call = Call(
        create_app(engine, make_settings()),
        "/v1/chat/completions",
        {
            "model": "alpha",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 7,
            "n": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    )
    await call.finish()
    events = call.events()

    assert events.pop() == "DONE"
    assert events.pop()["usage"]["completion_tokens"] == 28
    texts = dict.fromkeys(range(4), "")
    roles, ends = [], []
    for event in events:
        assert event["usage"] is None
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles += [choice["index"]] if "role" in choice["delta"] else []
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert set(texts.values()) == {"A1234A6"}
    assert sorted(roles) == sorted(ends) == [0, 1, 2, 3]


async def test_nan_logprob_fails_the_request_not_the_json():
    engine = FakeEngine()
    app = create_app(engine, make_settings())
    original = engine._logprobs
    engine._logprobs = lambda token, params: tuple(
        t._replace(logprob=float("nan")) for t in original(token, params)
    )
    for stream in (True, False):
        call = Call(app, "/v1/completions", body(stream, logprobs=1, max_tokens=2))
        await call.finish()
        assert call.status == 500
        assert "NaN" not in call.text
