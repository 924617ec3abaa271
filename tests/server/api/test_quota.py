"""A tenant's limits over HTTP: who is admitted, and what is counted and told."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from server.errors import Unavailable
from server.ledger.ledger import open_ledger
from tests.server.api.call import until
from tests.server.api.conftest import make_settings, serve
from tests.server.api.fake import BASE, FakeEngine
from tests.server.api.limited import COMPLETIONS, KEY, OTHER, Served, directory
from tests.server.tenants.redis_server import Redis, free_port, redis

__all__ = ["redis"]  # a fixture
CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "Hi"}]


def check_refused(answer: httpx.Response, code: str, *, retry: bool) -> None:
    assert answer.status_code == 429, answer.text
    assert answer.json()["error"]["code"] == code
    assert ("retry-after" in answer.headers) == ("retry-after-ms" in answer.headers) == retry
    assert answer.headers.get("x-should-retry") == (None if retry else "false")


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max_concurrent_requests", "requests_per_minute"])
async def test_fifty_at_once_at_a_limit_of_ten_admit_exactly_ten(
    limit: str, tmp_path: Path
) -> None:
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    with serve(engine, directory=directory(tmp_path, **{limit: 10})) as url:
        async with httpx.AsyncClient(base_url=url, limits=httpx.Limits()) as client:

            async def ask(key: str) -> int:
                fields = {"model": BASE, "prompt": "Hi", "max_tokens": 2}
                headers = {"authorization": f"Bearer {key}"}
                answer = await client.post(COMPLETIONS, json=fields, headers=headers)
                return answer.status_code

            asked = [asyncio.create_task(ask(KEY)) for _ in range(50)]
            others = [asyncio.create_task(ask(OTHER)) for _ in range(20)]
            async with asyncio.timeout(30):
                while sum(task.done() for task in asked) < 40 or engine.n_active < 30:
                    await asyncio.sleep(0.01)
            assert engine.n_active == 30  # all of the other's, ten of this one's
            engine.hold._loop.call_soon_threadsafe(engine.hold.set)  # type: ignore[attr-defined]
            statuses = Counter(await asyncio.gather(*asked))
            assert statuses == {200: 10, 429: 40}
            assert set(await asyncio.gather(*others)) == {200}


async def test_request_over_the_limit_is_refused_before_its_body_is_read(tmp_path: Path) -> None:
    served = Served(tmp_path, max_concurrent_requests=1)
    served.engine.hold = asyncio.Event()
    first = served.call(stream=True)
    await until(lambda: served.engine.n_active == 1)
    late = served.call(stream=True)
    await late.finish()
    assert (late.status, late.read) == (429, False)
    first.gone.set()
    await first.finish()
    served.engine.hold.set()
    assert (await served.post(COMPLETIONS, prompt="Hi", max_tokens=1)).status_code == 200
    text = served.app.state.api.metrics.render().decode()
    assert 'impart_tenant_rejections_total{reason="concurrency",tenant="acme"} 1.0' in text


async def test_tokenising_counts_as_a_request_and_lists_do_not(tmp_path: Path) -> None:
    served = Served(tmp_path, requests_per_minute=2)
    assert (await served.post("/tokenize", prompt="Hi")).status_code == 200
    assert (await served.post("/detokenize", tokens=[72])).status_code == 200
    refused = await served.post(COMPLETIONS, prompt="Hi")
    check_refused(refused, "rate_limit_exceeded", retry=True)
    assert 55 <= int(refused.headers["retry-after"]) <= 76
    assert "Please try again in " in refused.json()["error"]["message"]
    assert refused.headers["x-ratelimit-limit-requests"] == "2"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    transport = httpx.ASGITransport(served.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        listed = await client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
    assert listed.status_code == 200
    assert (await served.post(COMPLETIONS, OTHER, prompt="Hi")).status_code == 200


# -- headers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_answers_say_what_is_left(stream: bool, tmp_path: Path) -> None:
    served = Served(tmp_path, requests_per_minute=100, tokens_per_minute=1000)
    answer = await served.post(COMPLETIONS, prompt="Hi", max_tokens=8, n=2, stream=stream)
    told = {name: value for name, value in answer.headers.items() if "ratelimit" in name}
    assert told.pop("x-ratelimit-reset-requests") in ("1m0s", "1m0.1s", "1m0.099s")
    assert told == {
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "99",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": str(1000 - 2 - 16),
        "x-ratelimit-reset-tokens": "0s",
    }


async def test_unknown_is_left_out_and_who_has_no_limit_is_told_nothing(tmp_path: Path) -> None:
    served = Served(tmp_path, requests_per_minute=100, tokens_per_minute=1000)
    unknown = await served.post(COMPLETIONS, model="nobody", prompt="Hi")
    assert unknown.status_code == 404
    assert unknown.headers["x-ratelimit-remaining-requests"] == "99"
    assert "x-ratelimit-remaining-tokens" not in unknown.headers
    free = await served.post(COMPLETIONS, OTHER, prompt="Hi")
    assert not any("ratelimit" in name for name in free.headers)


# -- tokens ----------------------------------------------------------------------------------------


async def test_prompts_count_once_and_choices_each_and_all_of_it_is_one_request(
    tmp_path: Path,
) -> None:
    served = Served(tmp_path, tokens_per_minute=1000, requests_per_minute=2)
    answer = await served.post(COMPLETIONS, prompt=["Hi", "You"], n=2, max_tokens=3)
    usage = answer.json()["usage"]
    assert usage["total_tokens"] == 2 + 3 + 4 * 3 == await served.used_tokens()
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"


async def test_ended_requests_count_what_they_were_and_not_what_they_might_have_become(
    tmp_path: Path,
) -> None:
    served = Served(tmp_path, tokens_per_minute=1000)
    stopped = await served.post(COMPLETIONS, prompt="Hi", max_tokens=500, stop="2")
    assert stopped.json()["usage"]["total_tokens"] == 5 == await served.used_tokens()

    served.engine.hold, served.engine.hold_after = asyncio.Event(), 3
    leaves = served.call(stream=True)
    await until(lambda: len(leaves.events()) == 3)
    check_refused(
        await served.post(COMPLETIONS, prompt="x" * 893, max_tokens=1),
        "rate_limit_exceeded",
        retry=True,
    )  # 5 are used, 102 reserved by the one that runs
    leaves.gone.set()
    await leaves.finish()
    assert await served.used_tokens() == 5 + 2 + 3

    served.engine.hold, served.engine.fail_at = None, 4
    failed = await served.post(COMPLETIONS, prompt="Hi", max_tokens=100)
    assert failed.status_code == 500
    assert await served.used_tokens() == 10 + 2 + 4

    too_long = await served.post(COMPLETIONS, prompt="Hi", max_tokens=600)
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    assert await served.used_tokens() == 16
    assert served.limiter._running == {}


async def test_request_that_can_never_fit_is_not_to_be_tried_again(tmp_path: Path) -> None:
    served = Served(tmp_path, tokens_per_minute=50)
    refused = await served.post(COMPLETIONS, prompt="Hi", max_tokens=49)
    check_refused(refused, "rate_limit_exceeded", retry=False)
    assert "51 tokens" in refused.json()["error"]["message"]
    assert (await served.post(COMPLETIONS, prompt="Hi", max_tokens=48)).status_code == 200


async def test_answer_without_a_bound_reserves_little_and_counts_whole(tmp_path: Path) -> None:
    served = Served(tmp_path, tokens_per_minute=600)
    first = await served.post(CHAT, messages=QUESTION)
    n_prompt = first.json()["usage"]["prompt_tokens"]
    assert first.json()["usage"]["total_tokens"] == 512  # all of the context
    assert first.headers["x-ratelimit-remaining-tokens"] == str(600 - n_prompt - 256)
    assert await served.used_tokens() == 512
    check_refused(await served.post(CHAT, messages=QUESTION), "rate_limit_exceeded", retry=True)


async def test_spent_quota_is_not_to_be_tried_again(tmp_path: Path) -> None:
    served = Served(tmp_path, tokens_per_month=20)
    assert (await served.post(COMPLETIONS, prompt="Hi", max_tokens=10)).status_code == 200
    refused = await served.post(COMPLETIONS, prompt="Hi", max_tokens=7)
    check_refused(refused, "insufficient_quota", retry=False)
    assert refused.json()["error"]["type"] == "insufficient_quota"
    assert "20 tokens a month" in refused.json()["error"]["message"]
    assert (await served.post(COMPLETIONS, OTHER, prompt="Hi", max_tokens=9)).status_code == 200
    assert (await served.post(COMPLETIONS, prompt="Hi", max_tokens=6)).status_code == 200


async def test_quota_goes_on_after_a_restart_from_what_the_ledger_has(tmp_path: Path) -> None:
    settings = make_settings(state_dir=tmp_path / "state")
    settings.state_dir.mkdir()
    for used, left in ((0, 20), (12, 8)):
        with open_ledger(settings) as ledger:
            served = Served(tmp_path, settings=settings, ledger=ledger, tokens_per_day=20)
            refused = await served.post(COMPLETIONS, prompt="Hi", max_tokens=left - 1)
            check_refused(refused, "insufficient_quota", retry=False)
            assert f"{left} are left" in refused.json()["error"]["message"], used
            answer = await served.post(COMPLETIONS, prompt="Hi", max_tokens=min(10, left - 2))
            assert answer.status_code == 200


async def test_ledger_that_cannot_be_read_refuses_who_has_a_quota(tmp_path: Path) -> None:
    class Broken:
        def used_tokens(self, *_: Any) -> int:
            raise Unavailable("The ledger cannot be read.")

        def add(self, *_: Any) -> None: ...

    served = Served(tmp_path, ledger=Broken(), tokens_per_day=20)
    answer = await served.post(COMPLETIONS, prompt="Hi")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")
    assert (await served.post(COMPLETIONS, OTHER, prompt="Hi")).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        (COMPLETIONS, {"prompt": ["Hi", "x" * 41]}, "prompt", "context_length_exceeded"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x" * 41}]},
            "messages",
            "context_length_exceeded",
        ),
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": 31}, "max_tokens", "invalid_value"),
        (
            CHAT,
            {"messages": QUESTION, "max_completion_tokens": 31},
            "max_completion_tokens",
            "invalid_value",
        ),
    ],
)
async def test_longer_than_the_tenant_may_is_refused_by_its_field(
    path: str, fields: dict[str, Any], param: str, code: str, tmp_path: Path
) -> None:
    served = Served(tmp_path, max_prompt_tokens=40, max_output_tokens=30)
    answer = await served.post(path, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


async def test_output_that_the_request_leaves_open_ends_at_the_tenants_longest(
    tmp_path: Path,
) -> None:
    served = Served(tmp_path, max_output_tokens=30)
    answer = await served.post(CHAT, messages=QUESTION)
    assert answer.json()["usage"]["completion_tokens"] == 30
    assert answer.json()["choices"][0]["finish_reason"] == "length"


# -- a shared store --------------------------------------------------------------------------------


async def test_two_servers_count_together_in_redis(redis: Redis, tmp_path: Path) -> None:
    settings = make_settings(limits_storage=SecretStr(redis.url))
    one, two = (
        Served(tmp_path, settings=settings, requests_per_minute=4, tokens_per_day=100)
        for _ in range(2)
    )
    try:
        for served in (one, two, one):
            answer = await served.post(COMPLETIONS, prompt="Hi", max_tokens=28)
            assert answer.status_code == 200
            while served.limiter.store._owed:
                await asyncio.sleep(0.001)
        spent = await two.post(COMPLETIONS, prompt="Hi", max_tokens=28)
        check_refused(spent, "insufficient_quota", retry=False)
        check_refused(await one.post(COMPLETIONS, prompt="Hi"), "rate_limit_exceeded", retry=True)
    finally:
        for served in (one, two):
            await served.limiter.store.close()


@pytest.mark.parametrize(("fail_open", "status"), [(False, 503), (True, 200)])
async def test_store_that_is_away_refuses_or_admits_as_set(
    fail_open: bool, status: int, tmp_path: Path
) -> None:
    url = SecretStr(f"redis://127.0.0.1:{free_port()}")
    settings = make_settings(limits_storage=url, limits_fail_open=fail_open)
    served = Served(tmp_path, settings=settings, requests_per_minute=4, tokens_per_minute=100)
    began = time.monotonic()
    answer = await served.post(COMPLETIONS, prompt="Hi", max_tokens=2)
    assert time.monotonic() - began < 5
    assert answer.status_code == status
    metrics = served.app.state.api.metrics.render().decode()
    assert "impart_limits_unreachable_total 0.0" not in metrics
    assert "impart_limits_unreachable_total " in metrics
    assert not any("ratelimit" in name for name in answer.headers)
    assert (await served.post(COMPLETIONS, OTHER, prompt="Hi")).status_code == 200  # has no limits
    if not fail_open:
        assert answer.json()["error"]["code"] == "service_unavailable"
        assert 5 <= int(answer.headers["retry-after"]) <= 7
    await served.limiter.store.close()
