"""Tokenising and back, over HTTP."""

from __future__ import annotations

import httpx

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
