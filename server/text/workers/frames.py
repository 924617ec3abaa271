"""Messages between the server and a text worker: a JSON record and a piece of bytes.

Nothing that comes from a worker can run code here, whatever a stranger's file did to the worker:
no pickles (multiprocessing would send them), and limits on every length.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

_LENGTHS = struct.Struct(">II")
MAX_RECORD_BYTES = 64 << 20
MAX_BLOB_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20


class BrokenFrame(Exception):
    """The other side sent what no side in order sends."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    record: dict[str, Any] = field(default_factory=dict)
    blob: bytes = b""


def send(connection: socket.socket, frame: Frame) -> None:
    """Send one message. Raises OSError."""
    record = json.dumps(frame.record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    connection.sendall(_LENGTHS.pack(len(record), len(frame.blob)) + record)
    if frame.blob:
        connection.sendall(frame.blob)


def receive(connection: socket.socket) -> Frame:
    """Wait for one message. Raises EOFError when the other side has gone, BrokenFrame, OSError."""
    n_record, n_blob = _LENGTHS.unpack(_read(connection, _LENGTHS.size))
    if n_record > MAX_RECORD_BYTES or n_blob > MAX_BLOB_BYTES:
        raise BrokenFrame("a message is too long")
    text = _read(connection, n_record)
    try:
        record = json.loads(text.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise BrokenFrame("a message is not JSON") from error
    if not isinstance(record, dict):
        raise BrokenFrame("a message is not a record")
    return Frame(record, bytes(_read(connection, n_blob)))


def _read(connection: socket.socket, n_bytes: int) -> bytearray:
    """Exactly so many bytes; memory is taken as they come, not as they are announced."""
    found = bytearray()
    while len(found) < n_bytes:
        part = connection.recv(min(n_bytes - len(found), _CHUNK_BYTES))
        if not part:
            raise EOFError
        found += part
    return found
