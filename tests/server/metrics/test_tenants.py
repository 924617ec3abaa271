"""What is counted by tenant, from the HTTP edge to the page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.app import create_app
from server.engine.types import TenantUse
from server.errors import QueueFull, QuotaExceeded, RateLimited, ServeError
from server.metrics.series import Metrics
from server.tenants.principal import Principal
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine

MAX_OPEN = 8

Samples = dict[tuple[str, str], float]


def samples(metrics: Metrics) -> dict[str, Samples]:
    """By name without `impart_tenant_`: tenant and the other label -> value."""
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name.startswith("impart_tenant_"):
                tenant, *rest = (sample.labels[k] for k in sorted(sample.labels, reverse=True))
                name = sample.name.removeprefix("impart_tenant_")
                found.setdefault(name, {})[tenant, "".join(rest)] = sample.value
    return found


class NamesTenant:
    """Stands for the authentication: the header `who` names the tenant."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope["headers"]:
            if name == b"who":
                scope["impart.principal"] = Principal(value.decode())
        await self._app(scope, receive, send)


@dataclass
class Edge:
    engine: FakeEngine
    metrics: Metrics
    client: httpx.AsyncClient

    async def complete(self, who: str, **fields: Any) -> int:
        headers = {"who": who} if who else {}
        body = {"model": BASE, "prompt": "Hi", "max_tokens": 3, **fields}
        return (await self.client.post("/v1/completions", json=body, headers=headers)).status_code


@asynccontextmanager
async def edge() -> AsyncIterator[Edge]:
    engine, metrics = FakeEngine(max_open=MAX_OPEN), Metrics()
    metrics.watch(engine, 8)
    app = NamesTenant(create_app(engine, make_settings(), metrics))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield Edge(engine, metrics, client)


async def test_answers_are_counted_for_the_tenant_that_asked() -> None:
    async with edge() as to:
        assert await to.complete("a") == 200
        assert await to.complete("a", model="nobody's") == 404
        assert await to.complete("b", n=2) == 200
        assert await to.complete("") == 200
        await to.client.get("/metrics", headers={"who": "a"})  # a scrape is no request of a tenant
        found = samples(to.metrics)
    want = {("a", "200"): 1, ("a", "404"): 1, ("b", "200"): 1, ("default", "200"): 1}
    assert found["requests_total"] == want
    assert found["prompt_tokens_total"] == {("a", ""): 2, ("b", ""): 4, ("default", ""): 2}
    assert found["generation_tokens_total"] == {("a", ""): 3, ("b", ""): 6, ("default", ""): 3}
    assert found["time_to_first_token_seconds_count"]["b", ""] == 2
    assert set(found["sequences"].values()) == {0}
    assert found["kv_blocks"] == {("a", ""): 0, ("b", ""): 0, ("default", ""): 3}


async def test_text_work_is_done_for_the_tenant_that_asked() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    chat = {"model": BASE, "messages": messages, "max_tokens": 1}
    async with edge() as to:
        await to.complete("a")
        await to.client.post("/v1/chat/completions", json=chat, headers={"who": "b"})
        await to.client.post("/tokenize", json={"model": BASE, "prompt": "x"}, headers={"who": "c"})
        await to.client.post(
            "/tokenize", json={"model": BASE, "messages": messages}, headers={"who": "d"}
        )
        assert to.engine.text_tenants == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("error", "reason"), [(RateLimited, "rate"), (QuotaExceeded, "quota"), (QueueFull, "queue")]
)
async def test_refusals_are_counted_by_their_reason(error: type[ServeError], reason: str) -> None:
    async with edge() as to:
        to.engine.open_error = error("no")
        assert await to.complete("a") == error.status
        found = samples(to.metrics)
    assert found["rejections_total"] == {("a", reason): 1}


async def test_full_queue_before_the_body_is_read_is_counted() -> None:
    async with edge() as to:
        with to.engine.admit(MAX_OPEN):
            assert await to.complete("a") == 503
        found = samples(to.metrics)
    assert found["rejections_total"] == {("a", "queue"): 1}


def test_tenants_beyond_the_bound_share_one_label() -> None:
    class Use(FakeEngine):
        def tenant_use(self) -> dict[str, TenantUse]:
            return {f"t{i}": TenantUse(n_kv_blocks=10) for i in range(5)}

    metrics = Metrics(max_tenants=2)
    metrics.watch(Use(), 8)
    for i in range(4):
        timer = metrics.sequence("m", f"t{i}", 5, time.monotonic())
        timer.tokens(1, 2)
    found = samples(metrics)
    assert found["kv_blocks"] == {("t0", ""): 10, ("t1", ""): 10, ("other", ""): 30}
    assert found["sequences"]["other", "running"] == 2
    assert found["cached_tokens_total"] == {("t0", ""): 2, ("t1", ""): 2, ("other", ""): 4}


def test_page_of_one_tenant_stays_small() -> None:
    metrics = Metrics()
    metrics.sequence("m", "default", 5, time.monotonic()).finish("stop")
    lines = [line for line in metrics.render().decode().splitlines() if "tenant=" in line]
    assert 0 < len(lines) <= 40
