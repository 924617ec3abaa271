"""What is counted by model: vLLM's names and buckets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.metrics.bounded import BoundedSeries
from server.metrics.buckets import ITL_BUCKETS, REQUEST_BUCKETS, TOKEN_BUCKETS, TTFT_BUCKETS
from server.metrics.gauges import ENGINE, LABELS, SequenceCounts


class EngineTimes(Protocol):
    """What is read of a request that left the engine; times are of `time.monotonic`, None if not
    reached.
    """

    @property
    def queued_at(self) -> float: ...
    @property
    def started_at(self) -> float | None: ...
    @property
    def first_token_at(self) -> float | None: ...
    @property
    def n_preemptions(self) -> int: ...


class ModelMetrics:
    """The families; `series` has those of each model."""

    def __init__(self, registry: CollectorRegistry, max_models: int) -> None:
        self._registry = registry
        self.series = BoundedSeries(self._series_of, max_models)
        self._define_tokens()
        self._define_times()

    def _series_of(self, label: str) -> ModelSeries:
        return ModelSeries(self, label)

    def _define_tokens(self) -> None:
        counter, histogram = self._counter, self._histogram
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens processed")
        self.cached_tokens = counter("vllm:prompt_tokens_cached", "Prompt tokens from the cache")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated")
        self.success = counter(
            "vllm:request_success", "Sequences by how they ended", (*LABELS, "finished_reason")
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

    def _define_times(self) -> None:
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

    def _counter(self, name: str, text: str, labels: Sequence[str] = LABELS) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, LABELS, buckets=buckets, registry=self._registry)


class ModelSeries:
    """The series of one label, looked up once."""

    def __init__(self, metrics: ModelMetrics, label: str) -> None:
        labels = (label, ENGINE)
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
        self._queue_time = metrics.queue_time.labels(*labels)
        self._prefill_time = metrics.prefill_time.labels(*labels)
        self._decode_time = metrics.decode_time.labels(*labels)
        self._inference_time = metrics.inference_time.labels(*labels)
        self._preemptions = metrics.request_preemptions.labels(*labels)
        self._success = metrics.success
        self._labels = labels

    def ended(self, reason: str) -> None:
        """One sequence ended, as its caller sees it."""
        self._success.labels(*self._labels, reason).inc()

    def left(self, request: EngineTimes) -> None:
        """A request left the engine, for whatever reason."""
        now = time.monotonic()
        self._preemptions.observe(request.n_preemptions)
        self._queue_time.observe((request.started_at or now) - request.queued_at)
        if request.started_at is None:
            return
        self._inference_time.observe(now - request.started_at)
        if request.first_token_at is not None:
            self._prefill_time.observe(request.first_token_at - request.started_at)
            self._decode_time.observe(now - request.first_token_at)
