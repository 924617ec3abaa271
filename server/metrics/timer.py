"""Times generated sequences as their callers see them."""

from __future__ import annotations

import time

from server.metrics.models import ModelSeries
from server.metrics.tenants import TenantSeries


class SequenceTimer:
    """Times one sequence, for its model and its tenant. `finish` counts once."""

    def __init__(
        self, series: ModelSeries, tenant: TenantSeries, n_prompt: int, arrived: float
    ) -> None:
        self._series = series
        self._tenant = tenant
        self._n_prompt = n_prompt
        self._arrived = arrived
        self._first = 0.0
        self._last = 0.0
        self._n_tokens = 0
        self._done = False
        series.in_flight.waiting += 1
        tenant.in_flight.waiting += 1

    def tokens(self, n_tokens: int, n_cached: int = 0) -> None:
        """One event with `n_tokens` new tokens arrived."""
        now = time.monotonic()
        if self._first == 0.0:
            self._first = now
            self._started(n_cached)
        else:
            self._series.itl.observe(now - self._last)
        self._last = now
        self._n_tokens += n_tokens
        self._series.generation_tokens.inc(n_tokens)
        self._tenant.tokens.generation += n_tokens

    def _started(self, n_cached: int) -> None:
        series, tenant = self._series, self._tenant
        ttft_s = self._first - self._arrived
        series.in_flight.start()
        tenant.in_flight.start()
        series.ttft.observe(ttft_s)
        tenant.ttft.observe(ttft_s)
        series.prompt_tokens.inc(self._n_prompt)
        series.cached_tokens.inc(n_cached)
        tenant.tokens.prompt += self._n_prompt
        tenant.tokens.cached += n_cached

    def finish(self, reason: str) -> None:
        """The sequence ended: stop, length, abort or error."""
        if self._done:
            return
        self._done = True
        started = self._first != 0.0
        self._series.in_flight.end(started=started)
        self._tenant.in_flight.end(started=started)
        self._series.ended(reason)
        if reason not in ("stop", "length"):
            return
        self._series.e2e.observe(time.monotonic() - self._arrived)
        self._series.request_prompt.observe(self._n_prompt)
        self._series.request_generation.observe(self._n_tokens)
        if self._n_tokens > 1:
            self._series.tpot.observe((self._last - self._first) / (self._n_tokens - 1))
