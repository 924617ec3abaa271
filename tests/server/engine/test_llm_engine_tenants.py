"""Tenants side by side in one engine: whose turn it is, and how urgent a request may be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from server.engine.llm_engine import LLMEngine
from server.engine.request import Request
from server.engine.types import Generation, SamplingParams
from server.tenants.principal import Principal
from tests.server.conftest import PAIR, Served
from tests.server.engine.test_llm_engine import is_empty, running, until

pytestmark = pytest.mark.usefixtures("shared_text_workers")


@pytest.fixture
def pair(served: Callable[..., Served]) -> Served:
    return served("llama", PAIR)


async def begin(
    engine: LLMEngine, tenant: Principal, n_tokens: int, *, priority: int = 0
) -> Generation:
    return engine.generate(
        await engine.open("base"),
        [5, 6, 7],
        SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True),
        request_id="r",
        on_output=lambda: None,
        principal=tenant,
        priority=priority,
    )


async def n_tokens_of(generation: Generation) -> int:
    """Wait until it has ended."""
    n_tokens = 0
    async with asyncio.timeout(60):
        while True:
            for chunk in generation.take():
                n_tokens += len(chunk.token_ids)
                if chunk.finish_reason is not None:
                    return n_tokens
            await asyncio.sleep(0.002)


async def test_quiet_tenant_is_answered_while_a_flood_holds_every_place(pair: Served) -> None:
    flood, quiet = Principal("flood"), Principal("quiet")
    async with running(pair, max_num_seqs=2) as engine:
        long = [await begin(engine, flood, 150) for _ in range(4)]
        await until(lambda: engine.stats().n_running == 2)
        short = await begin(engine, quiet, 8)
        assert await n_tokens_of(short) == 8
        assert engine.stats().n_preemptions == 1
        assert engine.stats().n_waiting >= 2  # none of the flood's had to end for it
        assert [await n_tokens_of(one) for one in long] == [150] * 4
        await until(lambda: is_empty(engine))


async def test_priority_is_no_more_urgent_than_the_tenants_ceiling(
    pair: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    async with running(pair, scheduling_policy="priority") as engine:
        submit = engine.core.submit

        def noted(request: Request, ticket: object = None) -> None:
            seen.append(request.priority)
            submit(request)

        monkeypatch.setattr(engine.core, "submit", noted)
        for ceiling, asked in ((0, 0), (0, -3), (0, 3), (-2, -3), (-2, -1), (4, 0), (4, 5)):
            tenant = Principal("acme", max_priority=ceiling)
            await n_tokens_of(await begin(engine, tenant, 1, priority=asked))
    assert seen == [0, 0, 3, -2, -1, 4, 5]
