"""How the writing of the ledger goes, read when Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector


class WrittenCounts(Protocol):
    """Rows since the start, but for those that wait now."""

    @property
    def n_written(self) -> int: ...
    @property
    def n_failures(self) -> int: ...
    @property
    def n_dropped(self) -> int: ...
    @property
    def n_pending(self) -> int: ...


class WatchedLedger(Protocol):
    """What the counts are read from."""

    def stats(self) -> WrittenCounts: ...


class LedgerCollector(Collector):
    """Three counters and a gauge."""

    def __init__(self, ledger: WatchedLedger) -> None:
        self._ledger = ledger

    def describe(self) -> list[Metric]:
        return []  # so that registering reads nothing

    def collect(self) -> Iterator[Metric]:
        stats = self._ledger.stats()
        yield CounterMetricFamily("impart_ledger_rows", "Rows written", stats.n_written)
        yield CounterMetricFamily(
            "impart_ledger_write_failures", "Batches that could not be written", stats.n_failures
        )
        yield CounterMetricFamily(
            "impart_ledger_rows_dropped", "Rows that are lost", stats.n_dropped
        )
        yield GaugeMetricFamily("impart_ledger_pending_rows", "Rows that wait", stats.n_pending)
