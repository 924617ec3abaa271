"""Errors on the wire: OpenAI's body, codes and headers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server import errors
from server.api.app import create_app
from server.api.errors import JITTER, headers_of, response_of
from server.engine.schedule.admission import MAX_RETRY_S
from server.errors import (
    ContextTooLong,
    ModelNotFound,
    QueueFull,
    QuotaExceeded,
    RateLimited,
    ServeError,
    Unauthenticated,
)
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine

CHAT = [{"role": "user", "content": "Hi"}]


async def post(path: str, body: dict[str, Any]) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(FakeEngine(max_model_len=64), make_settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.post(path, json={"model": BASE, **body})


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "headers"),
    [
        (
            Unauthenticated("Incorrect API key provided."),
            401,
            "invalid_request_error",
            "invalid_api_key",
            {"www-authenticate": "Bearer"},
        ),
        (ModelNotFound("No."), 404, "invalid_request_error", "model_not_found", {}),
        (ContextTooLong("No."), 400, "invalid_request_error", "context_length_exceeded", {}),
        (
            QuotaExceeded("Spent."),
            429,
            "insufficient_quota",
            "insufficient_quota",
            {"x-should-retry": "false"},
        ),
    ],
)
def test_error_has_openais_status_type_code_and_headers(
    error: ServeError, status: int, kind: str, code: str, headers: dict[str, str]
) -> None:
    answer = response_of(error)
    assert answer.status_code == status
    assert f'"type":"{kind}","param":null,"code":"{code}"'.encode() in answer.body
    assert headers_of(error) == headers


@pytest.mark.parametrize("kind", [RateLimited, QueueFull])
def test_time_to_wait_is_never_before_the_measured_one_and_jittered(kind: type[ServeError]) -> None:
    told = [headers_of(kind("Wait.", retry_after_s=2.5)) for _ in range(50)]
    waits_ms = [int(headers["retry-after-ms"]) for headers in told]
    assert all(2500 <= wait_ms <= 2500 * (1 + JITTER) + 1 for wait_ms in waits_ms)
    assert len(set(waits_ms)) > 10
    for headers, wait_ms in zip(told, waits_ms, strict=True):
        assert 0 <= int(headers["retry-after"]) * 1000 - wait_ms < 1000
        assert "x-should-retry" not in headers


def test_longest_wait_of_a_full_server_is_one_that_clients_wait_for() -> None:
    assert MAX_RETRY_S * (1 + JITTER) <= 120  # openai.OpenAI: beyond it there is no retry


def test_every_error_has_a_code_but_those_of_the_body() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    without = {kind.__name__ for kind in kinds if issubclass(kind, ServeError) and not kind.code}
    assert without == {"ClientError", "InvalidRequest"}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"chat_template": "x"}, "chat_template", "unknown_parameter"),
        ({"tools": [{}]}, "tools", "unsupported_parameter"),
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": []}, "messages", "empty_array"),
        ({"model": ""}, "model", "empty_string"),
        ({"user": "x" * 513}, "user", "string_above_max_length"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", "array_above_max_length"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 1 << 40}, "n", "integer_above_max_value"),
        ({"temperature": 101.5}, "temperature", "decimal_above_max_value"),
        ({"top_p": -0.5}, "top_p", "decimal_below_min_value"),
        ({"n": "1"}, "n", "invalid_type"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
    ],
)
async def test_wrong_field_has_openais_code_for_the_rule(
    fields: dict[str, Any], param: str, code: str
) -> None:
    answer = await post("/v1/chat/completions", {"messages": CHAT, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error"


async def test_missing_field_and_wrong_path_have_openais_codes() -> None:
    missing = (await post("/v1/completions", {})).json()["error"]
    assert (missing["param"], missing["code"]) == ("prompt", "missing_required_parameter")
    assert (await post("/v1/nothing", {})).json()["error"]["code"] == "unknown_url"
    assert (await post("/v1/models", {})).json()["error"]["code"] == "method_not_supported"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": [5] * 64}, "prompt"),
        ("/v1/completions", {"prompt": "x" * 64}, "prompt"),
        ("/v1/completions", {"prompt": "x" * 64 * 257}, "prompt"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 64}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [CHAT[0] | {"content": "x" * 64}]}, "messages"),
        ("/v1/chat/completions", {"messages": [CHAT[0] | {"content": "x" * 20000}]}, "messages"),
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 60}, "max_tokens"),
        (
            "/v1/chat/completions",
            {"messages": CHAT, "max_completion_tokens": 60},
            "max_completion_tokens",
        ),
    ],
)
async def test_what_does_not_fit_has_one_wording_and_names_the_callers_own_field(
    path: str, fields: dict[str, Any], param: str
) -> None:
    answer = await post(path, fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == param
    assert error["message"].startswith("This model's maximum context length is 64 tokens. However,")
