"""Traces as a collector gets them, over OTLP/HTTP on a port of this machine."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from server.api.app import create_app
from server.errors import ConfigError, GenerationFailed
from server.process import tracing
from server.process.tracing import traces
from tests.server.api.conftest import make_settings
from tests.server.api.fake import FakeEngine

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "what nobody may read"


class Collector(HTTPServer):
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.paths: list[str] = []
        self.bodies: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def services_and_spans(self) -> tuple[set[str], list[Span]]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        groups = [group for request in requests for group in request.resource_spans]
        services = {
            attribute.value.string_value
            for group in groups
            for attribute in group.resource.attributes
            if attribute.key == "service.name"
        }
        return services, [s for group in groups for scope in group.scope_spans for s in scope.spans]


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)  # for the SDK
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def value_of(span: Span, key: str) -> object:
    (value,) = (a.value for a in span.attributes if a.key == key)
    return getattr(value, value.WhichOneof("value"))


async def test_spans_reach_the_collector_as_children_of_the_callers(collector: Collector) -> None:
    engine = FakeEngine()
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    request = {"model": "alpha", "prompt": SECRET, "max_tokens": 3}
    with traces({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}) as tracer:
        app = create_app(engine, make_settings(), tracer=tracer)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post("/v1/completions", json=request, headers=headers)
            engine.fail_at, engine.error = 1, GenerationFailed("it broke")
            await client.post("/v1/completions", json=request | {"stream": True})
    services, spans = collector.services_and_spans()
    assert set(collector.paths) == {"/v1/traces"}
    assert services == {"impart-serve"}
    first, failed = (span for span in spans if span.kind == Span.SPAN_KIND_SERVER)
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert failed.trace_id != first.trace_id
    assert failed.parent_span_id == b""
    children = [span for span in spans if span.parent_span_id == first.span_id]
    assert [child.name for child in children] == ["prepare", "queue", "prefill", "decode"]
    assert children[0].start_time_unix_nano == first.start_time_unix_nano
    assert children[-1].end_time_unix_nano == first.end_time_unix_nano
    (event,) = first.events
    assert event.name == "first_token"
    assert event.time_unix_nano == children[-1].start_time_unix_nano
    assert value_of(first, "gen_ai.usage.output_tokens") == 3
    assert value_of(first, "impart.tenant") == "default"
    assert value_of(failed, "error.type") == "failed"
    assert [first.status.code, failed.status.code] == [0, 2]  # unset, error
    assert not [body for body in collector.bodies if SECRET.encode() in body]


def test_traces_without_the_extra_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "server.process.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    wanted = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    with pytest.raises(ConfigError, match=r"install impart-serve\[otel\]"), traces(wanted):
        pass


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf only"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "http/protobuf only"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "knows otlp and none"),
    ],
)
def test_traces_that_would_go_elsewhere_are_refused(name: str, value: str, says: str) -> None:
    wanted = {tracing.ENDPOINTS[0]: "http://127.0.0.1:1", name: value}
    with pytest.raises(ConfigError, match=says), traces(wanted):
        pass


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nobody_who_wants_traces_has_none(given: dict[str, str]) -> None:
    with traces(given) as tracer:
        assert tracer is None


def test_without_the_variable_nothing_that_makes_or_sends_spans_is_imported() -> None:
    """FastAPI imports OpenTelemetry's interface wherever it is installed."""
    code = (
        "import sys, server.process.run\n"
        "from server.process.tracing import traces\n"
        "with traces({}): sys.exit('opentelemetry.sdk' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
