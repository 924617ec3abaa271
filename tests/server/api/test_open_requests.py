"""Who comes in at the HTTP edge and who is refused, and how what is open ends when draining."""

from __future__ import annotations

import asyncio
import json

import pytest

from server.api.context import Api
from server.errors import Draining
from tests.server.api.call import Call, body, held, until


async def test_drain_refuses_new_requests_and_lets_running_ones_finish():
    async with held() as (engine, app):
        api: Api = app.state.api
        call = Call(app, "/v1/completions", body(True, max_tokens=5))
        await call.next()
        engine.drain()
        late = Call(app, "/v1/completions", body(False))
        await late.finish()
        engine.hold.set()
        await call.finish()

        assert late.status == 503
        assert dict(late.messages[0]["headers"])[b"retry-after"]
        assert call.events()[-1] == "DONE"
        assert await api.open_requests.wait_idle(0.1)


@pytest.mark.parametrize("stream", [True, False])
async def test_drain_timeout_ends_a_request_with_an_error(stream):
    async with held() as (engine, app):
        api: Api = app.state.api
        call = Call(app, "/v1/completions", body(stream, n=2))
        await until(lambda: engine.n_active == 2)
        if stream:
            await call.next()
        engine.drain()
        assert not await api.open_requests.wait_idle(0.01)
        api.open_requests.fail_all(Draining("The server is shutting down."))
        await call.finish()

        assert engine.n_active == 0
        assert call.status == (200 if stream else 503)
        last = call.events()[-1] if stream else json.loads(call.text)
        assert last["error"]["code"] == "service_unavailable"


async def test_drain_timeout_ends_a_request_that_is_still_tokenising():
    async with held() as (engine, app):
        never = asyncio.Event()
        engine.encode = lambda *_, **__: never.wait()
        call = Call(app, "/v1/completions", body(True))
        await until(lambda: len(app.state.api.open_requests) == 1)
        await asyncio.sleep(0.01)
        app.state.api.open_requests.fail_all(Draining("The server is shutting down."))
        await call.finish()

        assert call.status == 503


async def test_full_server_names_the_wait_that_others_had():
    async with held() as (engine, app):
        engine.waited_s = 7.2
        earlier = Call(app, "/v1/completions", body(False, max_tokens=1))
        await earlier.finish()
        calls = [Call(app, "/v1/completions", body(True, n=4)) for _ in range(4)]
        await until(lambda: engine.n_active == 16)
        late = Call(app, "/v1/completions", body(False))
        await late.finish()

        assert late.status == 503
        assert dict(late.messages[0]["headers"])[b"retry-after"] in (b"9", b"10")
        for call in calls:
            call.gone.set()
            await call.finish()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_request_that_nobody_can_take_is_refused_before_its_body_is_read(path):
    async with held() as (engine, app):
        engine.drain()
        call = Call(app, path, {})
        await call.finish()

        assert call.status == 503
        assert dict(call.messages[0]["headers"])[b"retry-after"] in (b"6", b"7")
        assert not call.read
        text = app.state.api.metrics.render().decode()
        assert f'impart_http_requests_total{{method="POST",path="{path}",status="503"}} 1' in text


async def test_full_server_refuses_before_tokenising_and_counts_it():
    async with held() as (engine, app):
        calls = [Call(app, "/v1/completions", body(True, n=4)) for _ in range(4)]
        await until(lambda: engine.n_active == 16)
        encoded = engine.n_encoded
        late = Call(app, "/v1/completions", body(False))
        await late.finish()

        assert late.status == 503
        assert dict(late.messages[0]["headers"])[b"retry-after"]
        assert engine.n_encoded == encoded
        text = app.state.api.metrics.render().decode()
        refused = 'reason="max_num_queued_reqs"} 1.0'
        assert f'vllm:admission_rejections_total{{model_name="other",{refused}' in text
        for call in calls:
            call.gone.set()
            await call.finish()
        again = Call(app, "/v1/completions", body(False, max_tokens=1))
        await again.finish()
        assert again.status == 200


async def test_request_of_more_sequences_than_permits_is_the_callers_mistake():
    async with held() as (_, app):
        call = Call(app, "/v1/completions", body(False, n=16, prompt=["a", "b"]))
        await call.finish()
        assert call.status == 400


async def test_request_of_more_sequences_than_free_places_is_refused():
    async with held() as (engine, app):
        calls = [Call(app, "/v1/completions", body(True, n=5)) for _ in range(3)]
        await until(lambda: engine.n_active == 15)
        late = Call(app, "/v1/completions", body(False, n=2))
        await late.finish()
        one = Call(app, "/v1/completions", body(True))
        await until(lambda: engine.n_active == 16)

        assert late.status == 503
        text = app.state.api.metrics.render().decode()
        assert 'reason="max_num_queued_reqs"} 1.0' in text
        for call in (*calls, one):
            call.gone.set()
            await call.finish()
