"""Work for a client that has left is ended: its answer would go nowhere."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


async def answer_while_connected(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send
) -> bool:
    """Run the application with a body that was read; cancel it when the client leaves.

    Return whether it came to its end. Raises what it raises.
    """
    is_answered = False

    async def send_noted(message: Message) -> None:
        nonlocal is_answered
        await send(message)
        is_answered = message["type"] == "http.response.body" and not message.get("more_body")

    async def work() -> None:
        await app(scope, _body_once(body), send_noted)

    working, leaving = asyncio.create_task(work()), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if is_answered:  # which ends the connection, or what the server tells of it
            await asyncio.wait({working})
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if working.cancelled():
        return False
    working.result()
    return True


def _body_once(body: bytes) -> Receive:
    """Return a `receive` that gives the body, and then nothing for ever."""
    parts = [body]

    async def receive() -> Message:
        if not parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": parts.pop(), "more_body": False}

    return receive


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
