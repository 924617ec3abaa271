"""What fits, by a running engine's own numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from server.errors import ModelNotFound
from tests.server.conftest import PAIR, Served
from tests.server.engine.test_llm_engine import ask, running

pytestmark = pytest.mark.usefixtures("shared_text_workers")


async def test_capacity_is_measured_once_loaded_and_refuses_what_has_no_room(
    served: Callable[..., Served],
) -> None:
    pair = served("llama", PAIR)
    async with running(pair) as engine:
        before = await engine.variants.capacity(list(PAIR))
        assert before["fits"] is True
        assert [need["is_measured"] for need in before["asked"]] == [False, False]
        assert [need["cold_load_s"] for need in before["asked"]] == [None, None]
        await ask(engine, "impart")
        after = await engine.variants.capacity(["base:impart", "blockdiag"])
        impart, blockdiag = after["asked"]
        resident = {one.name: one.resident_bytes for one in engine.models()}
        assert impart["device_bytes"] == resident["impart"] == after["deltas"]["used_bytes"]
        assert (impart["is_measured"], impart["is_resident"]) == (True, True)
        assert impart["cold_load_s"] > 0
        assert blockdiag["cold_load_s"] is None  # the first load of all tells no rate
        assert after["needed_bytes"] == impart["device_bytes"] + blockdiag["device_bytes"]
        assert after["kv_cache"]["tokens"] >= engine.max_model_len
        await ask(engine, "blockdiag")
        measured = (await engine.variants.capacity(["blockdiag"]))["asked"][0]
        assert measured["cold_load_s"] > 0
        with pytest.raises(ModelNotFound):
            await engine.variants.capacity(["nobody"])
        tight = after["needed_bytes"] - 1
    async with running(pair, delta_budget_bytes=tight) as engine:
        found = await engine.variants.capacity(list(PAIR))
        assert (found["fits"], found["needed_slots"]) == (False, 2)
        assert found["left_bytes"] < 0
    async with running(pair, max_resident_variants=1) as engine:
        assert (await engine.variants.capacity(list(PAIR)))["fits"] is False
