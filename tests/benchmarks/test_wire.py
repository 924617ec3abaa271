"""The load client's HTTP against a server that the test plays byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.wire import EventReader, HttpClient, WireError

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def served(serve: Serve, timeout_s: float = 5.0) -> AsyncIterator[HttpClient]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with HttpClient(f"http://127.0.0.1:{port}/root", timeout_s) as client:
        yield client
    server.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next((line for line in head.splitlines() if line.startswith("content-length")), ": 0")
    return head.splitlines()[0], await reader.readexactly(int(length.split(":")[1]))


async def test_connection_is_reused_and_one_closed_meanwhile_is_replaced() -> None:
    n_connections, seen = 0, []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_connections
        n_connections += 1
        for _ in range(2):
            seen.append(await read_request(reader))
            writer.write(OK)
        await read_request(reader)  # a third gets no answer on this connection

    async with served(serve) as client:
        for n in range(4):
            assert (await client.post("/x", {"n": n})).json() == {}
    assert seen == [("POST /root/x HTTP/1.1", b'{"n": %d}' % n) for n in range(4)]
    assert n_connections == 2


async def test_body_of_a_stream_is_handed_on_as_it_comes_and_an_errors_is_kept() -> None:
    go = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await go.wait()
        writer.write(b"2\r\nde\r\n0\r\n\r\n")
        await read_request(reader)
        writer.write(b"HTTP/1.1 404 No\r\ncontent-length: 4\r\n\r\ngone")

    pieces: list[bytes] = []

    def take(piece: bytes) -> None:
        pieces.append(piece)
        go.set()

    async with served(serve) as client:
        assert (await client.post("/x", {}, take)).status == 200
        assert pieces == [b"abc", b"de"]
        answer = await client.post("/x", {}, take)
        assert (answer.status, answer.text, len(pieces)) == (404, "gone", 2)


async def test_body_that_ends_with_the_connection_is_whole() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\none")
        await writer.drain()
        writer.write(b"two")

    pieces: list[bytes] = []
    async with served(serve) as client:
        for n in (1, 2):  # each on a connection of its own
            assert (await client.post("/x", {}, pieces.append)).status == 200
            assert b"".join(pieces) == b"onetwo" * n
        assert (await client.get("/x")).text == "onetwo"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", "connection was lost"),
        (b"not HTTP at all\r\n\r\n", "Parser"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", "was lost"),
        (b"HTTP/1.0 200 OK\r\nserver: half a he", "connection was lost"),
        (b"", "connection was lost"),
    ],
)
async def test_broken_answer_is_a_wire_error(answer: bytes, message: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)

    async with served(serve) as client:
        with pytest.raises(WireError, match=message):
            await client.get("/x")


async def test_no_answer_in_time_is_a_wire_error_and_resets_the_connection() -> None:
    hung_up = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        hung_up.set()

    async with served(serve, timeout_s=0.05) as client:
        with pytest.raises(WireError, match="no whole answer"):
            await client.get("/x")
        async with asyncio.timeout(5):
            await hung_up.wait()


@pytest.mark.parametrize("key", [None, "secret"])
async def test_key_is_a_bearer_token(key: str | None) -> None:
    heads: list[list[str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode().splitlines())
        writer.write(OK)

    async with served(serve) as client:
        keyed = HttpClient(f"http://{client._host}:{client._port}", 5.0, key)
        await keyed.get("/x")
        await keyed.close()
    sent = [line for line in heads[0] if line.startswith("authorization")]
    assert sent == ([] if key is None else ["authorization: Bearer secret"])


async def test_failure_in_the_readers_callback_fails_the_request() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)

    def broken(_: bytes) -> None:
        raise ValueError("no JSON")

    async with served(serve) as client:
        with pytest.raises(WireError, match="on_body"):
            await client.post("/x", {}, broken)


@given(st.lists(st.integers(1, 40), max_size=30))
def test_feed_events_cut_anywhere_are_read_whole(cuts: list[int]) -> None:
    body = b"data: one\n\n: comment\n\nevent: x\r\ndata:two\r\n\r\ndata: [DONE]\n\n"
    found: list[bytes] = []
    reader = EventReader(found.append)
    for size in [*cuts, len(body)]:
        reader.feed(body[:size])
        body = body[size:]
    assert found == [b"one", b"two", b"[DONE]"]
