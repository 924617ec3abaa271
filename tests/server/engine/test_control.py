"""The life of variants over HTTP, with the real engine: states, events, users, loads, pins."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from compressor.artifact.reader import read_digest
from server.api.app import create_app
from server.api.keeping import apply_documents
from server.engine.llm_engine import LLMEngine
from server.fleet.store import FleetStore
from server.metrics.series import Metrics
from tests.server.api.conftest import make_settings
from tests.server.conftest import PAIR, Served
from tests.server.engine.test_core_variants import intercept_reads
from tests.server.engine.test_llm_engine import running, until

pytestmark = pytest.mark.usefixtures("shared_text_workers")
HOST = {"host_delta_budget_bytes": 1 << 30, "kernels": "torch", "self_check": False}


@pytest.fixture
def pair(served: Callable[..., Served], tmp_path: Path) -> Served:
    made = served("llama", PAIR)
    return replace(made, deltas=Path(shutil.copytree(made.deltas, tmp_path / "deltas")))


class Client:
    """Asks the application of an engine."""

    def __init__(self, engine: LLMEngine, fleet: FleetStore | None = None) -> None:
        self.app = create_app(engine, make_settings(), Metrics(), fleet=fleet)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(self.app)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def post(self, path: str, status: int = 200) -> dict[str, Any]:
        answer = await self._http.post(f"/v1/deltas/{path}")
        assert answer.status_code == status, answer.text
        return answer.json()

    async def state(self, name: str) -> str:
        """As all of the listings have it."""
        delta = (await self._http.get(f"/v1/deltas/{name}")).json()
        listed = {d["id"]: d for d in (await self._http.get("/v1/deltas")).json()["data"]}
        model = (await self._http.get(f"/v1/models/{name}")).json()
        assert delta["state"] == listed[name]["state"] == model["state"]
        return delta["state"]

    async def complete(self, name: str, n_tokens: int) -> httpx.Response:
        body = {"model": name, "prompt": "Hi", "max_tokens": n_tokens, "ignore_eos": True}
        return await self._http.post("/v1/completions", json=body)


@asynccontextmanager
async def read_events(engine: LLMEngine) -> AsyncIterator[list[tuple[str, str]]]:
    """What is told meanwhile."""
    told: list[tuple[str, str]] = []

    async def read() -> None:
        async for event in engine.variants.events(lambda name: True, 9.0):
            if event is not None:
                told.append((event.kind, event.name))

    reading = asyncio.create_task(read())
    await until(lambda: len(engine._history.feed) == 1)
    yield told
    reading.cancel()


async def test_variant_goes_through_its_states_and_all_listings_and_events_agree(
    pair: Served,
) -> None:
    async with running(pair, **HOST) as engine, read_events(engine) as told:
        client = Client(engine)
        assert await client.state("impart") == "registered"
        await client.post("impart/prefetch")
        assert await client.state("impart") == "host"
        delta = await client.post("impart/load")
        assert await client.state("impart") == "ready"
        assert delta["tiers"]["host"] > 0 < delta["tiers"]["device"]
        assert delta["ratio"] > 1
        assert [load["tier"] for load in delta["loads"]] == ["device", "host"]
        assert (await client.post("impart/load"))["loads"] == delta["loads"], "nothing to do"
        gone = await client.post("impart/unload")
        assert (gone["state"], gone["tiers"]["host"], gone["tiers"]["device"]) == (
            "registered", 0, 0,
        )  # fmt: skip
        kinds = ["loading", "host", "loading", "ready", "evicted"]
        await until(lambda: len(told) == len(kinds))
        assert told == [(kind, "impart") for kind in kinds]


async def test_unload_and_pins_keep_to_running_requests(pair: Served) -> None:
    fleet = FleetStore(None)
    async with running(pair, **HOST) as engine:
        client = Client(engine, fleet)
        stream = asyncio.create_task(client.complete("impart", 300))
        await until(lambda: any(slot.refs for slot in engine.core.slots.residents()))
        await client.post("impart/unload", 409)
        assert (await client.post("impart/load"))["users"] == 1
        assert (await client.post("impart/unload?force=true"))["users"] == 0
        assert stream.done() or (await stream).status_code == 200
        assert (await stream).json()["usage"]["completion_tokens"] == 300
        assert (await client.post("blockdiag/pin"))["pinned_by_admin"] is True
        await until(lambda: engine.model("blockdiag").state == "ready")  # type: ignore[union-attr]
        await client.post("blockdiag/unload?force=true", 409)
    async with running(pair, **HOST) as engine:  # a restart, with what was kept
        client = Client(engine, fleet)
        await apply_documents(client.app.state.api)
        await until(lambda: engine.model("blockdiag").state == "ready")  # type: ignore[union-attr]
        assert (await client.post("blockdiag/unpin"))["pinned"] is False
        await client.post("blockdiag/unload")


async def test_prefetch_without_a_host_tier_is_a_conflict_that_names_the_setting(
    pair: Served,
) -> None:
    async with running(pair, kernels="torch", self_check=False) as engine:
        error = (await Client(engine).post("impart/prefetch", 409))["error"]
        assert "--host-delta-budget-bytes" in error["message"]


async def test_stages_of_what_is_coming_are_told_and_then_that_it_is_registered(
    pair: Served, tmp_path: Path
) -> None:
    settings = {**HOST, "state_dir": tmp_path / "state"}
    async with running(pair, **settings) as engine, read_events(engine) as told:
        managed = tmp_path / "state" / "deltas"
        managed.mkdir(parents=True, exist_ok=True)
        engine.names.announce("new", "fetching")
        engine.names.announce("new", "verifying")
        shutil.copytree(pair.deltas / "impart", managed / "new")
        engine.names.reread("new")
        shutil.rmtree(managed / "new")
        engine.names.announce("lost", "fetching")
        engine.names.announce("lost", "failed", "the source cannot be reached")
        engine.names.reread("new")
        kinds = [(kind, "new") for kind in ("fetching", "verifying", "registered")]
        kinds += [("fetching", "lost"), ("failed", "lost"), ("removed", "new")]
        await until(lambda: len(told) == len(kinds))
        assert told == kinds


async def test_rescan_tells_what_was_added_replaced_and_removed(pair: Served) -> None:
    async with running(pair, **HOST) as engine, read_events(engine) as told:
        client = Client(engine)
        shutil.copytree(pair.deltas / "impart", pair.deltas / "new")
        shutil.rmtree(pair.deltas / "impart")
        shutil.copytree(pair.deltas / "blockdiag", pair.deltas / "impart")
        shutil.rmtree(pair.deltas / "blockdiag")
        assert read_digest(pair.deltas / "new") != read_digest(pair.deltas / "impart")
        await client.post("rescan")
        await until(lambda: len(told) == 3)
        assert sorted(told) == [
            ("registered", "new"), ("removed", "blockdiag"), ("replaced", "impart"),
        ]  # fmt: skip


async def test_request_behind_long_loads_is_answered_with_503_and_the_seconds(
    pair: Served,
) -> None:
    may_read = threading.Event()

    def wait(name: str) -> None:
        assert may_read.wait(60)

    async with running(pair, kernels="torch", self_check=False) as engine:
        client = Client(engine)
        for _ in range(2):
            engine.core.loader.costs.was_read("another", 1, 1.0)  # a second for each byte
        intercept_reads(cast(Any, engine), wait)
        first = asyncio.create_task(client.complete("impart", 2))
        await until(lambda: engine.core.loader.loading() != [])
        refused = await client.complete("blockdiag", 2)
        may_read.set()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_is_overloaded"
        assert int(refused.headers["retry-after"]) > 1000
        assert (await first).status_code == 200
