"""Whatever is done for a request ends when its client leaves."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from server.api import body as body_module
from server.api.app import create_app
from server.api.disconnect import answer_while_connected
from tests.server.api.call import Call, until
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine

MESSAGES = [{"role": "user", "content": "Hi"}]
WORK = {
    "encode": ("/tokenize", {"prompt": "Hi"}),
    "render_chat": ("/tokenize", {"messages": MESSAGES}),
    "token_texts": ("/tokenize", {"prompt": "Hi", "return_token_strs": True}),
    "decode": ("/detokenize", {"tokens": [1]}),
    "open": ("/detokenize", {"tokens": [1]}),
}


@pytest.mark.parametrize("method", WORK)
async def test_work_on_text_ends_when_its_client_leaves(method: str) -> None:
    engine, states = FakeEngine(), []

    async def stuck(*_: Any, **__: Any) -> None:
        states.append("begun")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            states.append("cancelled")
            raise

    setattr(engine, method, stuck)
    path, fields = WORK[method]
    call = Call(create_app(engine, make_settings()), path, {"model": BASE, **fields})
    await until(lambda: states)
    call.gone.set()
    await call.finish()
    assert states == ["begun", "cancelled"]
    assert call.messages == []


async def test_large_body_whose_client_leaves_while_it_waits_is_not_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, parsed = threading.Event(), []

    def held(raw: bytes) -> object:
        parsed.append(len(raw))
        assert go_on.wait(30)
        return {}

    monkeypatch.setattr(body_module, "parse_json", held)
    app = create_app(FakeEngine(), make_settings())
    large = {"model": BASE, "prompt": "x" * body_module.INLINE_BYTES}
    calls = [Call(app, "/tokenize", large) for _ in range(3)]
    await until(lambda: parsed and all(call.read for call in calls))
    calls[1].gone.set()
    await calls[1].finish()
    go_on.set()
    for call in calls:
        await call.finish()
    assert len(parsed) == 2
    assert [len(call.messages) for call in calls] == [2, 0, 2]


async def test_answer_whose_connection_ends_with_it_is_finished() -> None:
    """Servers tell of the end of a request by the same message as of the end of a connection."""
    answered, states = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert await receive() == {"type": "http.request", "body": b"abc", "more_body": False}
        await send({"type": "http.response.body", "body": b""})
        await asyncio.sleep(0.01)
        states.append("noted")

    async def receive() -> dict[str, Any]:
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        answered.set()

    assert await answer_while_connected(app, {"type": "http"}, b"abc", receive, send)
    assert states == ["noted"]


async def test_error_of_the_application_is_raised() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("own")

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(RuntimeError, match="own"):
        await answer_while_connected(app, {"type": "http"}, b"", receive, None)  # type: ignore[arg-type]
