"""Whether there are traces: OpenTelemetry's variables say so, as for any program.

Without `OTEL_EXPORTER_OTLP_ENDPOINT` nothing of OpenTelemetry's SDK is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from server.errors import ConfigError

if TYPE_CHECKING:
    from server.process.otel import OtelTracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER = "OTEL_TRACES_EXPORTER"
OFF = "OTEL_SDK_DISABLED"
PROTOCOL = "http/protobuf"

log = logging.getLogger(__name__)


@contextmanager
def traces(environment: Mapping[str, str]) -> Iterator[OtelTracer | None]:
    """What takes spans, closed afterwards; None where nobody wants any. Raises ConfigError."""
    endpoint = _first(environment, ENDPOINTS)
    is_off = environment.get(OFF, "").lower() == "true" or environment.get(EXPORTER) == "none"
    if not endpoint or is_off:
        yield None
        return
    _check(environment)
    try:
        from server.process.otel import OtelTracer
    except ImportError as error:
        raise ConfigError(
            f"{ENDPOINTS[1]} asks for traces, and OpenTelemetry is not installed ({error.name}); "
            "install impart-serve[otel], or take the variable away"
        ) from error
    tracer = OtelTracer(environment)
    log.info("the server sends traces over OTLP")
    try:
        yield tracer
    finally:
        tracer.close()


def _check(environment: Mapping[str, str]) -> None:
    """Refuse what would be ignored."""
    protocol = _first(environment, PROTOCOLS)
    if protocol not in ("", PROTOCOL):
        raise ConfigError(
            f"the protocol of traces is {protocol}, and the server sends {PROTOCOL} only; set "
            f"{PROTOCOLS[1]} to that, with the collector's port for HTTP (4318)"
        )
    exporter = environment.get(EXPORTER, "")
    if exporter not in ("", "otlp"):
        raise ConfigError(
            f"{EXPORTER} is {exporter}, and the server knows otlp and none; set it to one of them"
        )


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")
