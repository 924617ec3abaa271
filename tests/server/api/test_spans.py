"""What a span says of a request, as a tracer gets it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from server.api.spans import RequestSpan
from server.errors import GenerationFailed, QueueFull
from server.tenants.directory import Directory
from tests.server.api.call import Call, body, until
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine


class Recorder:
    """A server whose spans are kept."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.spans: list[RequestSpan] = []
        self.app = create_app(self.engine, make_settings(), tracer=self)

    def record(self, span: RequestSpan) -> None:
        self.spans.append(span)

    async def post(self, path: str, **fields: Any) -> RequestSpan:
        """The span of one request."""
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post(path, json=fields)
        (span,) = self.spans
        return span


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


async def test_span_of_a_generation_has_its_phases_in_order_and_its_counts(
    recorder: Recorder,
) -> None:
    span = await recorder.post(
        "/v1/completions", model="alpha", prompt="Hello", n=2, max_tokens=3, temperature=0.5
    )
    assert span.name == "llm_request"
    assert [phase.name for phase in span.phases] == ["prepare", "queue", "prefill", "decode"]
    times = [span.began_s, *(p.ended_s for p in span.phases)]
    assert times == sorted(times)
    assert [phase.began_s for phase in span.phases] == times[:-1]
    assert times[-1] == span.ended_s
    want = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "alpha",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.prompt_tokens": 5,
        "gen_ai.usage.completion_tokens": 6,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "impart.tenant": "default",
        "impart.delta.digest": "a" * 64,
        "http.response.status_code": 200,
    }
    assert want.items() <= span.attributes.items()
    assert span.error == "" == span.attributes.get("error.type", "")


async def test_span_of_another_route_has_no_model(recorder: Recorder) -> None:
    span = await recorder.post("/tokenize", model=BASE, prompt="Hello")
    assert (span.name, span.phases, span.first_token_s) == ("POST /tokenize", (), None)
    assert not [name for name in span.attributes if name.startswith("gen_ai.usage")]


@pytest.mark.parametrize(
    ("fields", "error", "status", "is_ours"),
    [
        ({"model": "nobody's"}, None, 404, False),
        ({"model": BASE}, QueueFull("full"), 503, True),
        ({"model": BASE}, GenerationFailed("it broke"), 500, True),
    ],
)
async def test_span_of_a_failed_request_tells_the_kind_of_error_and_repeats_nothing(
    recorder: Recorder, fields: dict[str, Any], error: Any, status: int, is_ours: bool
) -> None:
    recorder.engine.open_error = error
    span = await recorder.post("/v1/completions", prompt="secret", **fields)
    kind = "ModelNotFound" if error is None else type(error).__name__
    assert span.attributes["error.type"] == kind
    assert span.attributes["http.response.status_code"] == status
    assert span.error == (kind if is_ours else "")
    assert "secret" not in str(span)
    assert "nobody's" not in str(span)


async def test_span_of_a_request_whose_client_left_ends_in_its_phase(recorder: Recorder) -> None:
    recorder.engine.hold = asyncio.Event()
    call = Call(recorder.app, "/v1/completions", body(stream=False))
    await until(lambda: recorder.engine.n_active == 1)
    call.gone.set()
    await call.finish()
    (span,) = recorder.spans
    assert span.attributes["http.response.status_code"] == 499
    assert [phase.name for phase in span.phases] == ["prepare", "queue"]
    assert span.attributes["gen_ai.response.finish_reasons"] == ["abort"]


async def test_request_without_a_key_has_no_span(recorder: Recorder) -> None:
    directory = Directory(api_key="right-key-0123456789")
    app = create_app(recorder.engine, make_settings(), directory=directory, tracer=recorder)
    call = Call(app, "/v1/completions", body(stream=False))
    await call.finish()
    assert (call.status, recorder.spans) == (401, [])


async def test_probes_have_no_spans(recorder: Recorder) -> None:
    transport = httpx.ASGITransport(recorder.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/health", "/metrics", "/v1/models"):
            await client.get(path)
    assert recorder.spans == []
