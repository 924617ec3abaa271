"""What is kept of loads is bounded and shrinks; events have the names of a key."""

from __future__ import annotations

import asyncio

from server.deltas.loads import Happening
from server.engine.history import MAX_LOADS_KEPT, VariantHistory


def test_loads_are_kept_newest_first_up_to_a_bound_and_forgotten_with_their_key() -> None:
    timed: list[tuple[str, float]] = []
    history = VariantHistory(lambda key: [])
    history.timed = lambda tier, seconds: timed.append((tier, seconds))
    for i in range(MAX_LOADS_KEPT):
        history(Happening("host", "k", float(i)))
        history(Happening("device", "k", 0.5))
        history(Happening("ready", "k", 9.0))
    history(Happening("failed", "k", reason="it broke"))
    loads = history.loads("k")
    assert len(loads) == MAX_LOADS_KEPT
    assert [load.error for load in loads[:2]] == ["it broke", None]
    assert (loads[1].tier, loads[2].tier, loads[2].seconds) == ("device", "host", 19.0)
    assert timed[:2] == [("host", 0.0), ("device", 0.5)]
    history.keep(())
    assert (len(history), history.loads("k")) == (0, ())


async def test_events_name_every_variant_of_a_digest() -> None:
    history = VariantHistory(lambda key: [("a", "d1"), ("b", "d1")])
    events = history.feed.read(lambda name: True, 9.0)
    assert await anext(events) is None
    await asyncio.to_thread(history, Happening("ready", "k", 2.0))
    await asyncio.to_thread(history, Happening("device", "k", 1.0))
    history.feed.close()
    told = [(e.kind, e.name, e.digest, e.seconds) async for e in events if e is not None]
    assert told == [("ready", "a", "d1", 2.0), ("ready", "b", "d1", 2.0)]
