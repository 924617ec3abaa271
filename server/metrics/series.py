"""All Prometheus metrics: vLLM's names and buckets where vLLM has one, `impart_*` beside them.

Three sources: the HTTP layer times what callers see (`sequence`, `http_request`), the engine
reports what only it knows (`Metrics` is the engine's observer: `on_step`, `on_finished`, ...),
and gauges are read from a `StatsProvider` when Prometheus asks.

Label values come from registered names only, and no more than `max_models` of them get series of
their own; the rest share ``other``, so that a thousand variants do not make a million series.
"""

from __future__ import annotations

import threading
import time
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

from server.metrics.gauges import ENGINE, LABELS, EngineCollector, SequenceCounts, StatsProvider

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"

Buckets = tuple[float, ...]
# fmt: off
TTFT_BUCKETS: Buckets = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)
ITL_BUCKETS: Buckets = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)
REQUEST_BUCKETS: Buckets = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)
# fmt: on
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LOAD_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class FinishedRequest(Protocol):
    """What `on_finished` reads of a request; times are of `time.monotonic`, None if not reached."""

    @property
    def variant(self) -> _Named: ...
    @property
    def queued_at(self) -> float: ...
    @property
    def started_at(self) -> float | None: ...
    @property
    def first_token_at(self) -> float | None: ...
    @property
    def n_preemptions(self) -> int: ...


class ModelSeries:
    """The series of one model name, looked up once."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        labels = (name, ENGINE)
        self.in_flight = SequenceCounts()
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.cached_tokens = metrics.cached_tokens.labels(*labels)
        self.generation_tokens = metrics.generation_tokens.labels(*labels)
        self.ttft = metrics.ttft.labels(*labels)
        self.itl = metrics.itl.labels(*labels)
        self.tpot = metrics.tpot.labels(*labels)
        self.e2e = metrics.e2e.labels(*labels)
        self.request_prompt = metrics.request_prompt.labels(*labels)
        self.request_generation = metrics.request_generation.labels(*labels)
        self.params_max_tokens = metrics.params_max_tokens.labels(*labels)
        self.params_n = metrics.params_n.labels(*labels)
        self.queue_time = metrics.queue_time.labels(*labels)
        self.prefill_time = metrics.prefill_time.labels(*labels)
        self.decode_time = metrics.decode_time.labels(*labels)
        self.inference_time = metrics.inference_time.labels(*labels)
        self.request_preemptions = metrics.request_preemptions.labels(*labels)
        self._success = metrics.success
        self._labels = labels

    def finished(self, reason: str) -> None:
        self._success.labels(*self._labels, reason).inc()


class SequenceTimer:
    """Times one generated sequence as its caller sees it. `finish` counts once."""

    def __init__(self, series: ModelSeries, n_prompt: int, arrived: float) -> None:
        self._series = series
        self._n_prompt = n_prompt
        self._arrived = arrived
        self._first = 0.0
        self._last = 0.0
        self._n_tokens = 0
        self._done = False
        series.in_flight.waiting += 1

    def tokens(self, n_tokens: int, n_cached: int = 0) -> None:
        """One event with `n_tokens` new tokens arrived."""
        now = time.monotonic()
        if self._first == 0.0:
            self._first = now
            self._series.in_flight.start()
            self._series.ttft.observe(now - self._arrived)
            self._series.prompt_tokens.inc(self._n_prompt)
            self._series.cached_tokens.inc(n_cached)
        else:
            self._series.itl.observe(now - self._last)
        self._last = now
        self._n_tokens += n_tokens
        self._series.generation_tokens.inc(n_tokens)

    def finish(self, reason: str) -> None:
        """The sequence ended: stop, length, abort or error."""
        if self._done:
            return
        self._done = True
        self._series.in_flight.end(started=self._first != 0.0)
        self._series.finished(reason)
        if reason not in ("stop", "length"):
            return
        self._series.e2e.observe(time.monotonic() - self._arrived)
        self._series.request_prompt.observe(self._n_prompt)
        self._series.request_generation.observe(self._n_tokens)
        if self._n_tokens > 1:
            self._series.tpot.observe((self._last - self._first) / (self._n_tokens - 1))


class Metrics:
    """Thread-safe. Create one per server and give it to the engine as its observer."""

    def __init__(self, max_models: int = 100) -> None:
        self.registry = CollectorRegistry()
        self._max_models = max_models
        self._series: dict[str, ModelSeries] = {}
        self._lock = threading.Lock()
        ProcessCollector(registry=self.registry)
        self._define_token_metrics()
        self._define_time_metrics()
        self._define_own_metrics()

    def _define_token_metrics(self) -> None:
        counter, histogram = self._counter, self._histogram
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens processed")
        self.cached_tokens = counter("vllm:prompt_tokens_cached", "Prompt tokens from the cache")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated")
        self.success = counter(
            "vllm:request_success", "Sequences by how they ended", (*LABELS, "finished_reason")
        )
        self.rejections = counter(
            "vllm:admission_rejections", "Requests refused by limits", ("model_name", "reason")
        )
        self.request_prompt = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per request", TOKEN_BUCKETS
        )
        self.request_generation = histogram(
            "vllm:request_generation_tokens", "Generated tokens per request", TOKEN_BUCKETS
        )
        self.params_max_tokens = histogram(
            "vllm:request_params_max_tokens", "max_tokens per request", TOKEN_BUCKETS
        )
        self.params_n = histogram("vllm:request_params_n", "n per request", (1, 2, 4, 8, 16))
        self.request_preemptions = histogram(
            "vllm:request_num_preemptions", "Preemptions per request", (0, 1, 2, 4, 8)
        )
        self.step_tokens = Histogram(
            "vllm:iteration_tokens_total",
            "Tokens per engine step",
            ("engine",),
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )

    def _define_time_metrics(self) -> None:
        histogram = self._histogram
        self.ttft = histogram(
            "vllm:time_to_first_token_seconds", "To the first token", TTFT_BUCKETS
        )
        self.itl = histogram("vllm:inter_token_latency_seconds", "Between tokens", ITL_BUCKETS)
        self.tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean per output token", ITL_BUCKETS
        )
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Whole request", REQUEST_BUCKETS)
        self.queue_time = histogram("vllm:request_queue_time_seconds", "Waiting", REQUEST_BUCKETS)
        self.prefill_time = histogram(
            "vllm:request_prefill_time_seconds",
            "From the start to the first token",
            REQUEST_BUCKETS,
        )
        self.decode_time = histogram(
            "vllm:request_decode_time_seconds", "From first token to the end", REQUEST_BUCKETS
        )
        self.inference_time = histogram(
            "vllm:request_inference_time_seconds", "From the start to the end", REQUEST_BUCKETS
        )

    def _define_own_metrics(self) -> None:
        self.http_requests = self._counter(
            "impart_http_requests", "HTTP requests", ("path", "method", "status")
        )
        self.http_in_flight = Gauge(
            "impart_http_requests_in_flight", "Requests being answered", registry=self.registry
        )
        self.unsent_bytes = Gauge(
            "impart_unsent_response_bytes",
            "Bytes of answers that wait for their clients to take them",
            registry=self.registry,
        )
        self.load_seconds = Histogram(
            "impart_variant_load_seconds",
            "From the first request for a variant to its deltas in device memory",
            ("model_name",),
            buckets=LOAD_BUCKETS,
            registry=self.registry,
        )
        self.load_failures = self._counter(
            "impart_variant_load_failures", "Loads that failed", ("model_name",)
        )
        by_name = ("model_name",)
        self.promotions = self._counter(
            "impart_reconstruct_promotions",
            "Times a hot variant's weights were reconstructed",
            by_name,
        )
        self.demotions = self._counter(
            "impart_reconstruct_demotions", "Times reconstructed weights were dropped", by_name
        )
        self.reconstruct_failures = self._counter(
            "impart_reconstruct_failures",
            "Reconstructions that failed; the deltas went on",
            by_name,
        )

    def _counter(self, name: str, text: str, labels: Sequence[str] = LABELS) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, LABELS, buckets=buckets, registry=self.registry)

    # -- called by the HTTP layer ------------------------------------------------------------------

    def model(self, name: str) -> ModelSeries:
        """Return the series of a registered model; ``other`` once there are too many."""
        with self._lock:
            series = self._series.get(name)
            if series is None:
                label = name if len(self._series) < self._max_models else OTHER
                series = self._series.get(label) or ModelSeries(self, label)
                self._series[label] = series
            return series

    def sequence(self, name: str, n_prompt: int, arrived: float) -> SequenceTimer:
        """Start timing one sequence; `arrived` is when the request came (`time.monotonic`)."""
        return SequenceTimer(self.model(name), n_prompt, arrived)

    def rejected(self) -> None:
        """A request met a full queue, before its model was known."""
        self.rejections.labels(OTHER, "max_num_queued_reqs").inc()

    def http_request(self, path: str, method: str, status: int) -> None:
        """One answer was sent; `path` is a route's template."""
        self.http_requests.labels(path, method, str(status)).inc()

    # -- called by the engine (its observer) -------------------------------------------------------

    def on_step(self, n_prompt_tokens: int, n_generated_tokens: int) -> None:
        """One engine step ran."""
        self.step_tokens.labels(ENGINE).observe(n_prompt_tokens + n_generated_tokens)

    def on_finished(self, request: FinishedRequest) -> None:
        """A request left the engine, for whatever reason."""
        series = self.model(request.variant.name)
        now = time.monotonic()
        series.request_preemptions.observe(request.n_preemptions)
        series.queue_time.observe((request.started_at or now) - request.queued_at)
        if request.started_at is None:
            return
        series.inference_time.observe(now - request.started_at)
        if request.first_token_at is not None:
            series.prefill_time.observe(request.first_token_at - request.started_at)
            series.decode_time.observe(now - request.first_token_at)

    def on_loaded(self, name: str, seconds: float) -> None:
        """A variant's deltas are in device memory."""
        self.load_seconds.labels(self._label(name)).observe(seconds)

    def on_load_failed(self, name: str) -> None:
        """A variant could not be loaded."""
        self.load_failures.labels(self._label(name)).inc()

    def on_promoted(self, name: str) -> None:
        """A hot variant's reconstructed weights are in use."""
        self.promotions.labels(self._label(name)).inc()

    def on_demoted(self, name: str) -> None:
        """A hot variant's reconstructed weights were dropped."""
        self.demotions.labels(self._label(name)).inc()

    def on_reconstruct_failed(self, name: str) -> None:
        """A variant's weights could not be reconstructed; its deltas are applied as before."""
        self.reconstruct_failures.labels(self._label(name)).inc()

    def _label(self, name: str) -> str:
        self.model(name)
        return name if name in self._series else OTHER

    # -- scraping ----------------------------------------------------------------------------------

    def watch(self, provider: StatsProvider, max_variants: int) -> None:
        """Read the gauges of `provider` at every scrape; max_variants is the most per step."""
        self.registry.register(EngineCollector(provider, max_variants, self._in_flight))

    def _in_flight(self) -> dict[str, SequenceCounts]:
        with self._lock:
            return {name: series.in_flight for name, series in self._series.items()}

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
