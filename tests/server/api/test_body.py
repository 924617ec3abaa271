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
async def test_lone_surrogate_in_any_field_is_refused_by_its_place(field: str):
    answer = await post(body(**{field: "a\ud800"}))
    assert answer.status_code == 400
    assert "half of a surrogate pair" in answer.json()["error"]["message"]
    assert "at line 1 column" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"secret": 1, "secret": 2}', "has an object with the same key twice at line 1 column"),
        (b'{"a": {"b": [{"secret": 1, "secret": 2}]}}', "has an object with the same key twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": -NaN}', "is not valid JSON at line 1 column"),
        (b'{"a": Infinity}', "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b'{"a": 1} {"secret": 2}', "is not valid JSON"),
        (b'{"a": 1,}', "is not valid JSON"),
        (b"{'secret': 1}", "is not valid JSON"),
    ],
)
async def test_leniency_of_usual_readers_is_refused_in_words_of_our_own(data: bytes, says: str):
    answer = await post(data)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert "secret" not in answer.text


async def test_byte_order_mark_before_a_body_is_passed_over():
    answer = await post(MARK + body())
    assert answer.json()["choices"][0]["text"] == "01"
    assert (await post(MARK + MARK + body())).status_code == 400
