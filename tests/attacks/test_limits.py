"""Limits are raced for, and outlive the server."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.attacks.conftest import TENANTS, Running


def limited(**limits: int) -> str:
    """The tenants, with these limits for acme."""
    lines = "\n".join(f"{name} = {limit}" for name, limit in limits.items())
    return TENANTS.replace("[tenants.acme]\n", f"[tenants.acme]\n{lines}\n")


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.slow  # tests/server/api/test_quota.py has both without a process
def test_fifty_at_once_get_ten_and_a_restart_gives_no_quota_back(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    tenants = limited(requests_per_minute=10, tokens_per_month=1000)
    state = ("--state-dir", str(tmp_path))
    first = start(*state, tenants=tenants)
    ask = first.client("acme")  # one, made before the threads
    body = {"model": "base", "prompt": "Hi", "max_tokens": 4}
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: ask.post("/v1/completions", json=body), range(50)))
    assert Counter(answer.status_code for answer in answers) == {200: 10, 429: 40}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refusal(refused) == (429, "rate_limit_exceeded")
    assert first.complete("globex", "base").status_code == 200
    usages = [a.json()["usage"] for a in answers if a.status_code == 200]
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(60) == 0

    second = start(*state, tenants=tenants)
    left = 1000 - sum(usage["total_tokens"] for usage in usages) - usages[0]["prompt_tokens"]
    beyond = second.complete("acme", "base", "Hi", max_tokens=left + 1)
    assert refusal(beyond) == (429, "insufficient_quota")
    within = second.complete("acme", "base", "Hi", max_tokens=left)
    assert refusal(within) == (400, "context_length_exceeded")  # the quota would have room
