"""Spans over OTLP, by OpenTelemetry's SDK. Imported only where the operator wants traces.

The SDK reads its own variables: endpoint, headers, sampler, service name, batches. Spans are made
when a request has ended, with the times that it had; a thread of the SDK sends them, and drops them
where nobody takes them: serving never waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.api.health import package_version
from server.api.spans import RequestSpan

SERVICE = "impart-serve"
CLOSE_S = 3.0
NS = 1_000_000_000


class OtelTracer:
    """See `server.api.spans.Tracer`; `close` sends what is left."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._provider = TracerProvider(resource=_resource(environment))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(SERVICE, package_version())
        self._propagator = TraceContextTextMapPropagator()

    def record(self, span: RequestSpan) -> None:
        """Make the span and a child for each of its phases."""
        epoch_ns = time.time_ns() - int(time.monotonic() * NS)  # of the monotonic clock

        def at(moment_s: float) -> int:
            return epoch_ns + int(moment_s * NS)

        made = self._tracer.start_span(
            span.name,
            self._propagator.extract(span.trace_headers),
            SpanKind.SERVER,
            attributes=dict(span.attributes),
            start_time=at(span.began_s),
        )
        context = set_span_in_context(made)
        for phase in span.phases:
            child = self._tracer.start_span(phase.name, context, start_time=at(phase.began_s))
            child.end(at(phase.ended_s))
        if span.first_token_s is not None:
            made.add_event("first_token", timestamp=at(span.first_token_s))
        if span.error:
            made.set_status(Status(StatusCode.ERROR, span.error))
        made.end(at(span.ended_s))

    def close(self) -> None:
        """Send what is left, for `CLOSE_S` at most: a collector that is gone holds up no end."""
        closing = threading.Thread(target=self._provider.shutdown, name="otel-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _resource(environment: Mapping[str, str]) -> Resource:
    """What the spans are from; the operator's own name goes before ours."""
    named = environment.get("OTEL_RESOURCE_ATTRIBUTES", "") + ","
    is_named = "OTEL_SERVICE_NAME" in environment or f"{SERVICE_NAME}=" in named
    own = {} if is_named else {SERVICE_NAME: SERVICE}
    return Resource.create(own | {SERVICE_VERSION: package_version()})
