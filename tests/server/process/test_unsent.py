"""Answers that nobody reads are dropped; who reads slowly gets them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from server.api.app import create_app
from server.metrics.series import Metrics
from server.process.run import Server, run_in_loop, uvicorn_config
from server.process.unsent import MIN_TAKEN_BYTES, SMALL_BYTES, UnsentWatch
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine


@dataclass
class Transport:
    unsent: int
    aborted: bool = False
    closing: bool = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.aborted = True


@dataclass
class Cycle:
    response_complete: bool = True


@dataclass(eq=False)
class Connection:
    transport: Transport
    cycle: Cycle | None = field(default_factory=Cycle)


def connection(n_bytes: int, *, complete: bool = True) -> Connection:
    return Connection(Transport(n_bytes), Cycle(complete))


def test_answer_that_nobody_takes_is_dropped_after_the_stall() -> None:
    totals: list[int] = []
    watch = UnsentWatch(totals.append, stall_s=60)
    one, other = connection(10_000_000), connection(0)
    for now in (0.0, 30.0, 59.0):
        watch.check({one, other}, now)
        assert not one.transport.aborted
    watch.check({one, other}, 60.0)
    assert one.transport.aborted
    assert not other.transport.aborted
    assert totals == [10_000_000, 10_000_000, 10_000_000, 0]


@pytest.mark.parametrize("n_bytes", [1, 1000, SMALL_BYTES])
def test_small_answer_that_nobody_takes_is_dropped_too(n_bytes: int) -> None:
    watch, one = UnsentWatch(stall_s=60), connection(n_bytes)
    watch.check({one}, 0.0)
    watch.check({one}, 60.0)
    assert one.transport.aborted


def test_slow_reader_is_let_be_and_one_that_takes_next_to_nothing_is_not() -> None:
    watch = UnsentWatch(stall_s=60)
    slow, drop = connection(1_000_000), connection(1_000_000)
    for second in range(0, 600, 10):
        slow.transport.unsent -= MIN_TAKEN_BYTES // 5
        drop.transport.unsent -= 10
        watch.check({slow, drop} if not drop.transport.aborted else {slow}, float(second))
    assert not slow.transport.aborted
    assert drop.transport.aborted


def test_stream_is_left_to_its_own_bound_until_its_writes_wait() -> None:
    watch = UnsentWatch(stall_s=60)
    keeps_up = connection(SMALL_BYTES, complete=False)
    stuck = connection(SMALL_BYTES + 1, complete=False)
    closing = connection(10, complete=False)
    closing.transport.closing = True
    for now in (0.0, 60.0):
        watch.check({keeps_up, stuck, closing}, now)
    assert not keeps_up.transport.aborted
    assert stuck.transport.aborted
    assert closing.transport.aborted


def test_too_many_bytes_in_all_drop_who_has_waited_longest() -> None:
    totals: list[int] = []
    watch = UnsentWatch(totals.append, max_bytes=250)
    first, second, third = (connection(100) for _ in range(3))
    watch.check({first}, 0.0)
    watch.check({first, second}, 1.0)
    watch.check({first, second, third}, 2.0)
    assert [c.transport.aborted for c in (first, second, third)] == [True, False, False]
    assert totals == [100, 200, 200]


def test_connection_that_is_gone_is_forgotten() -> None:
    watch, one = UnsentWatch(stall_s=60), connection(100)
    watch.check({one}, 0.0)
    watch.check(set(), 1.0)
    watch.check({one}, 61.0)
    assert not one.transport.aborted


@contextmanager
def serving(watch: UnsentWatch, engine: FakeEngine) -> Iterator[tuple[str, Server]]:
    """A real server, in a thread."""
    settings = make_settings()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    metrics = Metrics()
    server = Server(uvicorn_config(create_app(engine, settings, metrics), settings), watch)
    thread = threading.Thread(target=lambda: run_in_loop(server.serve([listener])), daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(15)


def wait_for(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ask_and_never_read(url: str, body: object) -> socket.socket:
    data = json.dumps(body).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    head = b"POST /detokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return client


class LongText(FakeEngine):
    async def decode(self, variant: object, token_ids: object, *, is_whole: bool = True) -> str:
        return "x" * (8 << 20)


def test_whole_answer_that_nobody_reads_is_dropped_by_a_real_server() -> None:
    totals: list[int] = []
    watch = UnsentWatch(totals.append, stall_s=2)
    with serving(watch, LongText()) as (url, server):
        clients = [ask_and_never_read(url, {"model": BASE, "tokens": [1]}) for _ in range(3)]
        wait_for(lambda: totals and totals[-1] > 3 * (2 << 20))
        wait_for(lambda: not server.server_state.connections)
        wait_for(lambda: totals[-1] == 0)
        answer = httpx.post(f"{url}/detokenize", json={"model": BASE, "tokens": [1]}, timeout=20)
        assert len(answer.json()["prompt"]) == 8 << 20
        for client in clients:
            client.close()
