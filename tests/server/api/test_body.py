"""Bytes of a body before they are fields."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine

MARK = b"\xef\xbb\xbf"


async def post(data: bytes) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(FakeEngine(), make_settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        headers = {"content-type": "application/json"}
        return await http.post("/v1/completions", content=data, headers=headers)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": BASE, "prompt": "Hi", "max_tokens": 2, **fields}).encode()


@pytest.mark.parametrize("field", ["model", "user", "cache_salt", "stop"])
async def test_lone_surrogate_in_any_field_is_refused_by_name(field: str):
    answer = await post(body(**{field: "a\ud800"}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


async def test_byte_order_mark_before_a_body_is_passed_over():
    answer = await post(MARK + body())
    assert answer.json()["choices"][0]["text"] == "01"
    assert (await post(MARK + MARK + body())).status_code == 400
