"""What OpenAI's client makes of our refusals: exceptions, codes, and when it comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from server.tenants.principal import Principal
from tests.server.api.conftest import serve
from tests.server.api.fake import BASE, FakeEngine
from tests.server.api.limited import KEY, directory


@contextmanager
def client_of(
    folder: Path, *, max_retries: int = 0, key: str = KEY, engine: Any = None, **limits: int
) -> Iterator[openai.OpenAI]:
    with (
        serve(engine or FakeEngine(), directory=directory(folder, **limits)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=max_retries) as client,
    ):
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": BASE, "prompt": "Hi", "max_tokens": 3, **fields})


def test_openais_client_raises_its_exceptions_with_our_codes(tmp_path: Path) -> None:
    with client_of(tmp_path, requests_per_minute=3, tokens_per_day=100) as client:
        with pytest.raises(openai.AuthenticationError) as unknown:
            ask(client.with_options(api_key="wrong-key-0123456789"))
        assert unknown.value.code == "invalid_api_key"
        assert unknown.value.response.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.NotFoundError) as absent:
            ask(client, model="nobody")
        assert (absent.value.code, absent.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as wrong:
            ask(client, n=0)
        assert (wrong.value.code, wrong.value.param) == ("integer_below_min_value", "n")
        with pytest.raises(openai.RateLimitError) as spent:
            ask(client, max_tokens=99)
        assert (spent.value.code, spent.value.type) == ("insufficient_quota", "insufficient_quota")
        with pytest.raises(openai.RateLimitError) as often:
            ask(client)
        assert (often.value.code, often.value.type) == ("rate_limit_exceeded", "rate_limit_error")


def test_openais_client_raises_what_ends_a_stream(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.fail_at = 2
    with client_of(tmp_path, engine=engine, tokens_per_minute=100) as client:
        stream = ask(client, stream=True)
        assert stream.response.headers["x-ratelimit-remaining-tokens"] == "95"
        with pytest.raises(openai.APIError) as failed:
            list(stream)
    assert (failed.value.code, failed.value.type) == ("server_error", "server_error")


def test_openais_client_learns_that_the_server_is_full(tmp_path: Path) -> None:
    engine = FakeEngine(max_open=1)
    taken = engine.admit(1, Principal("acme"))
    with client_of(tmp_path, engine=engine) as client, taken:
        with pytest.raises(openai.InternalServerError) as full:
            ask(client)
        assert (full.value.status_code, full.value.code) == (503, "server_is_overloaded")


def test_openais_client_comes_back_when_it_is_told_and_not_for_a_spent_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    with client_of(
        tmp_path, max_retries=2, requests_per_minute=1, tokens_per_minute=50, tokens_per_day=20
    ) as client:
        monkeypatch.setattr("openai._base_client.time.sleep", naps.append)
        with pytest.raises(openai.RateLimitError):
            ask(client, max_tokens=30)  # more than the day's; it counts as a request
        assert naps == []
        with pytest.raises(openai.RateLimitError) as often:
            ask(client)
        told_s = int(often.value.response.headers["retry-after-ms"]) / 1000
        assert len(naps) == 2
        assert all(told_s * 0.7 <= nap_s <= told_s * 1.3 for nap_s in naps)
        assert all(nap_s > 50 for nap_s in naps)
