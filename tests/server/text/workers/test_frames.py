"""Messages over a socket."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from server.text.workers.frames import BrokenFrame, Frame, receive, send


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for one in (ours, theirs):
            one.settimeout(10)
        yield ours, theirs


@pytest.mark.parametrize(
    "frame",
    [Frame(), Frame({"a": ["é", "\ud800", "\x00", 1.5, None]}, b"\x00\xff"), Frame({}, b"x" * 999)],
)
def test_message_arrives_as_it_was_sent(
    pair: tuple[socket.socket, socket.socket], frame: Frame
) -> None:
    send(pair[0], frame)
    send(pair[0], Frame({"next": 1}))
    assert receive(pair[1]) == frame
    assert receive(pair[1]) == Frame({"next": 1})


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">II", 1 << 31, 0),
        struct.pack(">II", 2, 1 << 31) + b"{}",
        struct.pack(">II", 2, 0) + b"[]",
        struct.pack(">II", 3, 0) + b"\xff{}",
        struct.pack(">II", 200_000, 0) + b"[" * 200_000,
    ],
)
def test_message_out_of_order_is_refused(
    pair: tuple[socket.socket, socket.socket], raw: bytes
) -> None:
    pair[0].sendall(raw)
    with pytest.raises(BrokenFrame):
        receive(pair[1])


def test_end_of_the_other_side_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(struct.pack(">II", 5, 0) + b"{")
    pair[0].close()
    with pytest.raises(EOFError):
        receive(pair[1])
