"""What is counted by tenant, from the HTTP edge to the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.app import create_app
from server.engine.schedule.admission import Admission
from server.engine.types import TenantUse
from server.errors import QueueFull, QuotaExceeded, RateLimited, ServeError
from server.metrics.series import Metrics
from server.tenants.principal import Principal
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine
from tests.server.api.tenancy import Tenancy, bearer, completion

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


class Edge(Tenancy):
    """Both tenants' answers, and what the metrics say of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metrics: Metrics = self.app.state.api.metrics
        self.metrics.watch(self.engine, 8)
        self.engine.use = {"acme": TenantUse(3, 2, 1000)}

    async def post(self, who: str, path: str, **body: Any) -> int:
        return (await self.call("POST", path, json=body, headers=bearer(who))).status_code

    async def complete(self, who: str, model: str, **fields: Any) -> int:
        return await self.post(who, "/v1/completions", **completion(model, **fields))

    @property
    def samples(self) -> dict[str, Samples]:
        return samples(self.metrics)


@pytest.fixture
def edge(tmp_path: Path) -> Edge:
    return Edge(tmp_path)


async def test_answers_are_counted_for_the_tenant_that_asked(edge: Edge) -> None:
    assert await edge.complete("acme", "alpha") == 200
    assert await edge.complete("acme", "beta") == 404
    assert await edge.complete("globex", "beta", n=2) == 200
    assert await edge.complete("admin", "beta") == 401  # nobody's
    await edge.call("GET", "/v1/models", headers=bearer("acme"))
    await edge.call_admin("GET", "/metrics", headers=bearer("admin"))
    found = edge.samples
    acme, globex = ("acme", ""), ("globex", "")
    want = {("acme", "200"): 1, ("acme", "404"): 1, ("globex", "200"): 1}
    assert found["requests_total"] == want
    assert found["prompt_tokens_total"] == {acme: 2, globex: 4}
    assert found["generation_tokens_total"] == {acme: 3, globex: 6}
    assert found["time_to_first_token_seconds_count"] == {acme: 1, globex: 2}
    assert set(found["sequences"].values()) == {0}
    assert found["kv_blocks"] == {acme: 3, globex: 0}
    assert found["resident_variants"] == {acme: 2, globex: 0}
    assert found["resident_bytes"] == {acme: 1000, globex: 0}


async def test_server_without_keys_shows_one_tenant() -> None:
    engine, metrics = FakeEngine(), Metrics()
    transport = httpx.ASGITransport(create_app(engine, make_settings(), metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post("/v1/completions", json=completion(BASE))
    found = samples(metrics)
    assert found["requests_total"] == {("default", "200"): 1}
    assert {tenant for family in found.values() for tenant, _ in family} == {"default"}
    lines = [line for line in metrics.render().decode().splitlines() if "tenant=" in line]
    assert len(lines) <= 40, "the page is to stay small"


async def test_text_work_is_done_for_the_tenant_that_asked(edge: Edge) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    await edge.complete("acme", "alpha")
    await edge.post("globex", "/v1/chat/completions", model="beta", messages=messages)
    await edge.post("acme", "/tokenize", model="alpha", prompt="x")
    await edge.post("globex", "/tokenize", model="beta", messages=messages)
    assert edge.engine.text_tenants == ["acme", "globex", "acme", "globex"]


@pytest.mark.parametrize(
    ("error", "reason"), [(RateLimited, "rate"), (QuotaExceeded, "quota"), (QueueFull, "queue")]
)
async def test_refusals_are_counted_by_their_reason(
    edge: Edge, error: type[ServeError], reason: str
) -> None:
    edge.engine.open_error = error("no")
    assert await edge.complete("acme", "alpha") == error.status
    assert edge.samples["rejections_total"] == {("acme", reason): 1}


async def test_full_queue_before_the_body_is_read_is_counted(edge: Edge) -> None:
    edge.engine.admission = Admission(max_waiting=2, max_running=0)
    with edge.engine.admission.admit(2, Principal("acme", weight=2)):
        assert await edge.complete("acme", "alpha") == 503
    assert edge.samples["rejections_total"] == {("acme", "queue"): 1}


def test_tenants_beyond_the_bound_share_one_label() -> None:
    metrics, engine = Metrics(max_tenants=2), FakeEngine()
    engine.use = {f"t{i}": TenantUse(n_kv_blocks=10) for i in range(5)}
    metrics.watch(engine, 8)
    for i in range(4):
        timer = metrics.sequence("m", f"t{i}", 5, time.monotonic())
        timer.tokens(1, 2)
    found = samples(metrics)
    assert found["kv_blocks"] == {("t0", ""): 10, ("t1", ""): 10, ("other", ""): 30}
    assert found["sequences"]["other", "running"] == 2
    assert found["cached_tokens_total"] == {("t0", ""): 2, ("t1", ""): 2, ("other", ""): 4}
