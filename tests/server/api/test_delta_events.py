"""Events of variants as a reader gets them."""

from __future__ import annotations

import json
from typing import Any

from server.engine import events
from tests.server.api.call import Call, until
from tests.server.api.tenancy import KEYS, Tenancy


class Reading(Call):
    """A GET; `seen` are the events, `DONE` the end."""

    def __init__(self, app: Any, who: str) -> None:
        super().__init__(app, "/v1/deltas/events", {}, key=KEYS[who], method="GET")

    def seen(self) -> list[Any]:
        frames = [f[6:] for f in self.text.split("\n\n") if f.startswith("data: ")]
        return [f if f == "[DONE]" else json.loads(f) for f in frames]


async def test_tenant_reads_its_own_events_and_the_end_at_drain(tmp_path):
    tenancy = Tenancy(tmp_path)
    variants = tenancy.engine.variants
    acme, admin = Reading(tenancy.app, "acme"), Reading(tenancy.admin, "admin")
    await until(lambda: len(variants.feed) == 2)
    for kind, name in (("loading", "alpha"), ("loading", "beta"), ("ready", "alpha")):
        variants.tell(kind, name)
    tenancy.engine.drain()
    for reading in (acme, admin):
        await reading.finish()
        assert reading.status == 200
        assert reading.seen()[-1] == "[DONE]"
    told = [[(e["type"], e["id"]) for e in r.seen()[:-1]] for r in (acme, admin)]
    assert told[0] == [("loading", "alpha"), ("ready", "alpha")]
    assert told[1] == [("loading", "alpha"), ("loading", "beta"), ("ready", "alpha")]
    assert acme.seen()[0]["digest"] == "a" * 64
    assert len(variants.feed) == 0


async def test_reader_that_takes_nothing_misses_the_oldest_and_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "MAX_PENDING", 3)
    tenancy = Tenancy(tmp_path)
    slow = Reading(tenancy.app, "acme")
    slow.accept.clear()
    await until(lambda: len(tenancy.engine.variants.feed) == 1)
    for kind in ("loading", "ready", "evicted", "loading", "ready"):
        tenancy.engine.variants.tell(kind, "alpha")
        tenancy.engine.variants.tell(kind, "beta")
    slow.accept.set()
    tenancy.engine.drain()
    await slow.finish()
    first, *rest = slow.seen()
    assert (first["type"], first["n_missed"]) == ("missed", 2)
    assert [event["type"] for event in rest[:-1]] == ["evicted", "loading", "ready"]


async def test_silent_stream_is_kept_alive_and_a_reader_that_leaves_is_forgotten(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("server.api.sse.KEEP_ALIVE_S", 0.01)
    tenancy = Tenancy(tmp_path)
    reading = Reading(tenancy.app, "acme")
    await until(lambda: reading.text.count(": keep-alive") >= 3)
    reading.gone.set()
    await reading.finish()
    assert len(tenancy.engine.variants.feed) == 0


async def test_more_readers_than_the_server_takes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "MAX_READERS", 1)
    tenancy = Tenancy(tmp_path)
    first = Reading(tenancy.app, "acme")
    await until(lambda: len(tenancy.engine.variants.feed) == 1)
    second = Reading(tenancy.app, "acme")
    await second.finish()
    assert second.status == 503
    tenancy.engine.drain()
    await first.finish()
