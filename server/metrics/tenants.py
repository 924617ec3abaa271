"""What is counted by tenant, under `impart_tenant_*`: a few series each, for a bounded number.

Names come from the tenants file only. A server without keys has one, ``default``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.types import TenantUse
from server.metrics.bounded import BoundedSeries
from server.metrics.buckets import TENANT_BUCKETS
from server.metrics.gauges import SequenceCounts
from server.metrics.models import EngineTimes

MAX_TENANTS = 100  # with series of their own; the rest share ``other``


@dataclass(slots=True)
class TokenCounts:
    """Since the start. Plain numbers: a lock for each token would be felt."""

    prompt: int = 0
    cached: int = 0
    generation: int = 0


@dataclass(slots=True)
class TenantSeries:
    """The series of one label; but for the histograms changed on the event loop only."""

    ttft: Histogram
    queue_time: Histogram
    in_flight: SequenceCounts = field(default_factory=SequenceCounts)
    tokens: TokenCounts = field(default_factory=TokenCounts)

    def left(self, request: EngineTimes) -> None:
        """A request left the engine."""
        started_at = request.started_at or time.monotonic()
        self.queue_time.observe(started_at - request.queued_at)


class TenantMetrics:
    """The families; `series` has those of each tenant."""

    def __init__(self, registry: CollectorRegistry, max_tenants: int = MAX_TENANTS) -> None:
        self._registry = registry
        self.series = BoundedSeries(self._series_of, max_tenants)
        self._requests = Counter(
            "impart_tenant_requests",
            "Requests answered, by HTTP status",
            ("tenant", "status"),
            registry=registry,
        )
        self._rejections = Counter(
            "impart_tenant_rejections",
            "Requests refused: rate, quota, concurrency (the tenant's own limits), queue (full)",
            ("tenant", "reason"),
            registry=registry,
        )
        self._ttft = self._histogram(
            "impart_tenant_time_to_first_token_seconds", "From arrival to the first token"
        )
        self._queue_time = self._histogram(
            "impart_tenant_queue_time_seconds", "From the engine's queue to the start"
        )
        registry.register(_Counts(self.series))

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(
            name,
            text,
            ("tenant",),
            buckets=TENANT_BUCKETS,
            registry=self._registry,
        )

    def _series_of(self, label: str) -> TenantSeries:
        return TenantSeries(self._ttft.labels(label), self._queue_time.labels(label))

    def answered(self, tenant: str, status: int, refusal: str | None) -> None:
        """One request of a tenant was answered.

        refusal  why it was refused, None if it was not
        """
        label = self.series.label(tenant)
        self._requests.labels(label, str(status)).inc()
        if refusal is not None:
            self._rejections.labels(label, refusal).inc()

    def watch(self, read: Callable[[], Mapping[str, TenantUse]]) -> None:
        """Read at every scrape what the tenants hold in the engine."""
        self._registry.register(_Use(self.series, read))


class _Counts(Collector):
    """The plain numbers of the series."""

    def __init__(self, series: BoundedSeries[TenantSeries]) -> None:
        self._series = series

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        series = self._series.items()
        sequences = GaugeMetricFamily(
            "impart_tenant_sequences", "Sequences in flight", labels=["tenant", "phase"]
        )
        for tenant, of_tenant in series:
            sequences.add_metric([tenant, "running"], of_tenant.in_flight.running)
            sequences.add_metric([tenant, "waiting"], of_tenant.in_flight.waiting)
        yield sequences
        tokens = {tenant: of_tenant.tokens for tenant, of_tenant in series}
        yield _counter(
            "impart_tenant_prompt_tokens",
            "Prompt tokens processed",
            {tenant: counts.prompt for tenant, counts in tokens.items()},
        )
        yield _counter(
            "impart_tenant_cached_tokens",
            "Prompt tokens from the cache",
            {tenant: counts.cached for tenant, counts in tokens.items()},
        )
        yield _counter(
            "impart_tenant_generation_tokens",
            "Tokens generated",
            {tenant: counts.generation for tenant, counts in tokens.items()},
        )


def _counter(name: str, text: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["tenant"])
    for tenant, value in values.items():
        family.add_metric([tenant], value)
    return family


class _Use(Collector):
    """What tenants hold in the engine."""

    def __init__(
        self, series: BoundedSeries[TenantSeries], read: Callable[[], Mapping[str, TenantUse]]
    ) -> None:
        self._series = series
        self._read = read

    def describe(self) -> list[Metric]:
        return []  # so that registering does not read the engine

    def collect(self) -> Iterator[Metric]:
        uses: defaultdict[str, TenantUse] = defaultdict(TenantUse)
        for tenant, use in self._read().items():
            label = self._series.label(tenant)
            uses[label] += use
        held = [(tenant, uses[tenant]) for tenant, _ in self._series.items()]
        yield _gauge(
            "impart_tenant_kv_blocks",
            "KV blocks that running requests hold",
            {tenant: use.n_kv_blocks for tenant, use in held},
        )
        yield _gauge(
            "impart_tenant_resident_variants",
            "Resident variants that the tenant has used or pins",
            {tenant: use.n_resident_variants for tenant, use in held},
        )
        yield _gauge(
            "impart_tenant_resident_bytes",
            "Device memory of those variants, which count for each tenant that has used them",
            {tenant: use.resident_bytes for tenant, use in held},
        )


def _gauge(name: str, text: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["tenant"])
    for tenant, value in values.items():
        family.add_metric([tenant], value)
    return family
