"""Tokenising and back, over HTTP."""

from __future__ import annotations

import json

import httpx
import pytest

from server.api.app import create_app
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine


async def test_tokenize_renders_conversations_and_names_tokens():
    transport = httpx.ASGITransport(create_app(FakeEngine(), make_settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        message = {"role": "user", "content": "Hi"}
        body = {"model": BASE, "messages": [message], "return_token_strs": True}
        found = (await http.post("/tokenize", json=body)).json()
        assert "".join(found["token_strs"]) == "<user>Hi\n<assistant>"
        assert found["count"] == len(found["tokens"])
        bad = {**body, "continue_final_message": True}
        assert (await http.post("/tokenize", json=bad)).status_code == 400
        assert (
            await http.post("/detokenize", json={"model": BASE, "tokens": [300]})
        ).status_code == 400


async def test_detokenize_takes_twice_a_context_and_no_more():
    engine = FakeEngine()
    transport = httpx.ASGITransport(create_app(engine, make_settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for n_tokens, status in (
            (2 * engine.max_model_len, 200),
            (2 * engine.max_model_len + 1, 400),
        ):
            answer = await http.post("/detokenize", json={"model": BASE, "tokens": [65] * n_tokens})
            assert answer.status_code == status


@pytest.mark.parametrize("field", ["prompt", "model"])
async def test_lone_surrogate_is_refused(field: str):
    transport = httpx.ASGITransport(create_app(FakeEngine(), make_settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        body = json.dumps({"model": BASE, "prompt": "Hi", field: "a\ud800"}).encode()
        headers = {"content-type": "application/json"}
        answer = await http.post("/tokenize", content=body, headers=headers)
        assert answer.status_code == 400
        assert "half of a surrogate pair" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"prompt": "Hi"}, True),
        ({"prompt": "Hi", "add_special_tokens": False}, False),
        ({"messages": [{"role": "user", "content": "Hi"}]}, False),
        ({"messages": [{"role": "user", "content": "Hi"}], "add_special_tokens": True}, True),
    ],
)
async def test_special_tokens_are_added_to_prompts_unless_the_caller_says_otherwise(fields, want):
    engine = FakeEngine()
    transport = httpx.ASGITransport(create_app(engine, make_settings()))
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for url, more in (("/tokenize", {}), (path, {"max_tokens": 1})):
            answer = await http.post(url, json={"model": BASE, **fields, **more})
            assert answer.status_code == 200, answer.text
    assert engine.special == [want, want]
