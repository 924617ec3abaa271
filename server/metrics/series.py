"""All Prometheus metrics: vLLM's names and buckets where vLLM has one, `impart_*` beside them.

Three sources: the HTTP layer times what callers see (`sequence`, `http_request`), the engine
reports what only it knows (`Metrics` is the engine's observer: `on_step`, `on_finished`, ...),
and gauges are read from a `StatsProvider` when Prometheus asks.

Label values come from registered names only, and no more than `max_models` of them get series of
their own; the rest share ``other`` (`server.metrics.bounded`). So do tenants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from server.metrics.bounded import OTHER
from server.metrics.buckets import LOAD_BUCKETS, STEP_BUCKETS
from server.metrics.gauges import ENGINE, EngineCollector, SequenceCounts, StatsProvider
from server.metrics.ledger import LedgerCollector, WatchedLedger
from server.metrics.models import EngineTimes, ModelMetrics, ModelSeries
from server.metrics.tenants import MAX_TENANTS, TenantMetrics
from server.metrics.timer import SequenceTimer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _Caller(Protocol):
    @property
    def tenant(self) -> str: ...


class FinishedRequest(EngineTimes, Protocol):
    """What `on_finished` reads of a request."""

    @property
    def variant(self) -> _Named: ...
    @property
    def principal(self) -> _Caller: ...


class Metrics:
    """Thread-safe. Create one per server and give it to the engine as its observer."""

    def __init__(self, max_models: int = 100, max_tenants: int = MAX_TENANTS) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._models = ModelMetrics(self.registry, max_models)
        self.tenants = TenantMetrics(self.registry, max_tenants)
        self._define_http_metrics()
        self._define_engine_metrics()

    def _define_http_metrics(self) -> None:
        self._rejections = self._counter(
            "vllm:admission_rejections", "Requests refused by limits", ("model_name", "reason")
        )
        self._http_requests = self._counter(
            "impart_http_requests", "HTTP requests", ("path", "method", "status")
        )
        self.http_in_flight = Gauge(
            "impart_http_requests_in_flight", "Requests being answered", registry=self.registry
        )
        self.limits_unreachable = self._counter(
            "impart_limits_unreachable", "Times that what a tenant has used could not be read", ()
        )
        self.unsent_bytes = Gauge(
            "impart_unsent_response_bytes",
            "Bytes of answers that wait for their clients to take them",
            registry=self.registry,
        )

    def _define_engine_metrics(self) -> None:
        self._step_tokens = Histogram(
            "vllm:iteration_tokens_total",
            "Tokens per engine step",
            ("engine",),
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        by_name = ("model_name",)
        self._adapter_load_seconds = Histogram(
            "vllm:lora_adapter_load_seconds",
            "From the first request for a variant to its deltas in device memory, of all variants",
            buckets=LOAD_BUCKETS,
            registry=self.registry,
        )
        self._load_seconds = Histogram(
            "impart_variant_load_seconds",
            "From the first request for a variant to its deltas in device memory",
            by_name,
            buckets=LOAD_BUCKETS,
            registry=self.registry,
        )
        self._tier_seconds = Histogram(
            "impart_delta_load_seconds",
            "Reading and decoding a variant (host), and copying it into its slot (device)",
            ("tier",),
            buckets=LOAD_BUCKETS,
            registry=self.registry,
        )
        self._load_failures = self._counter(
            "impart_variant_load_failures", "Loads that failed", by_name
        )
        self._promotions = self._counter(
            "impart_reconstruct_promotions",
            "Times a hot variant's weights were reconstructed",
            by_name,
        )
        self._demotions = self._counter(
            "impart_reconstruct_demotions", "Times reconstructed weights were dropped", by_name
        )
        self._reconstruct_failures = self._counter(
            "impart_reconstruct_failures",
            "Reconstructions that failed; the deltas went on",
            by_name,
        )

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    # -- called by the HTTP layer ------------------------------------------------------------------

    def model(self, name: str) -> ModelSeries:
        """Return the series of a registered model; ``other`` once there are too many."""
        return self._models.series.of(name)

    def sequence(self, name: str, tenant: str, n_prompt: int, arrived: float) -> SequenceTimer:
        """Start timing one sequence; `arrived` is when the request came (`time.monotonic`)."""
        return SequenceTimer(self.model(name), self.tenants.series.of(tenant), n_prompt, arrived)

    def rejected(self) -> None:
        """A request met a full queue, before its model was known."""
        self._rejections.labels(OTHER, "max_num_queued_reqs").inc()

    def http_request(self, path: str, method: str, status: int) -> None:
        """One answer was sent; `path` is a route's template."""
        self._http_requests.labels(path, method, str(status)).inc()

    # -- called by the engine (its observer) -------------------------------------------------------

    def on_step(self, n_prompt_tokens: int, n_generated_tokens: int) -> None:
        """One engine step ran."""
        self._step_tokens.labels(ENGINE).observe(n_prompt_tokens + n_generated_tokens)

    def on_finished(self, request: FinishedRequest) -> None:
        """A request left the engine, for whatever reason."""
        self.model(request.variant.name).left(request)
        self.tenants.series.of(request.principal.tenant).left(request)

    def on_loaded(self, name: str, seconds: float) -> None:
        """A variant's deltas are in device memory."""
        self._load_seconds.labels(self._label(name)).observe(seconds)
        self._adapter_load_seconds.observe(seconds)

    def on_tier_loaded(self, tier: str, seconds: float) -> None:
        """A variant was read and decoded ("host"), or copied into its slot ("device")."""
        self._tier_seconds.labels(tier).observe(seconds)

    def on_load_failed(self, name: str) -> None:
        """A variant could not be loaded."""
        self._load_failures.labels(self._label(name)).inc()

    def on_promoted(self, name: str) -> None:
        """A hot variant's reconstructed weights are in use."""
        self._promotions.labels(self._label(name)).inc()

    def on_demoted(self, name: str) -> None:
        """A hot variant's reconstructed weights were dropped."""
        self._demotions.labels(self._label(name)).inc()

    def on_reconstruct_failed(self, name: str) -> None:
        """A variant's weights could not be reconstructed; its deltas are applied as before."""
        self._reconstruct_failures.labels(self._label(name)).inc()

    def _label(self, name: str) -> str:
        return self._models.series.label(name)

    # -- scraping ----------------------------------------------------------------------------------

    def watch(self, provider: StatsProvider, max_resident: int) -> None:
        """Read the gauges of `provider` at every scrape; max_resident is the number of slots."""
        self.registry.register(EngineCollector(provider, max_resident, self._in_flight))
        self.tenants.watch(provider.tenant_use)

    def watch_ledger(self, ledger: WatchedLedger) -> None:
        """Read how its writing goes at every scrape."""
        self.registry.register(LedgerCollector(ledger))

    def _in_flight(self) -> dict[str, SequenceCounts]:
        return {name: series.in_flight for name, series in self._models.series.items()}

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
