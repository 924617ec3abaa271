"""What a text worker does: one task at a time from its socket, until the server closes that."""

from __future__ import annotations

import os
import socket
from typing import Any

from server.errors import InvalidRequest
from server.text.description import Undescribed
from server.text.workers import limits
from server.text.workers.frames import Frame, receive, send
from server.text.workers.tasks import Tokenizers, do_task, share_added_tokens


def serve_tasks(descriptor: int, memory_bytes: int, first_folder: str) -> None:
    """Serve tasks until the server has gone, or until memory has run out.

    first_folder  of a tokenizer that is loaded before the first task, "": none is
    """
    limits.confine(memory_bytes)
    share_added_tokens()
    tokenizers = Tokenizers()
    if first_folder:
        tokenizers.load(first_folder)
    with socket.socket(fileno=descriptor) as connection:
        send(connection, Frame({"ready": True}))
        _be_silent()
        try:
            is_sound = True
            while is_sound:
                is_sound = _serve_one(connection, tokenizers)
        except (EOFError, OSError):
            return  # the server closed the socket, or is gone


def _serve_one(connection: socket.socket, tokenizers: Tokenizers) -> bool:
    """Do one task; return whether the worker is sound afterwards."""
    frame = receive(connection)
    order = frame.record
    reply = _reply(order, frame.blob, tokenizers)
    limits.end_task()
    send(connection, reply)
    return "ended" not in reply.record


def _reply(order: dict[str, Any], blob: bytes, tokenizers: Tokenizers) -> Frame:
    """What comes of a task. Loading its tokenizer has limits of its own: a template gets no more
    time because its worker is new.
    """
    cpu_s, wall_s, load_factor = order["cpu_s"], order["wall_s"], order["load_factor"]
    try:
        limits.begin_task(cpu_s * load_factor, wall_s * load_factor)
        loaded = tokenizers.load(order["folder"])
        limits.begin_task(cpu_s, wall_s)
        done = do_task(order["task"], loaded, Frame(order["record"], blob))
    except MemoryError:
        return Frame({"ended": "memory"})
    except InvalidRequest as error:
        return Frame({"refused": error.message, "param": error.param, "code": error.code})
    except Undescribed as error:
        return Frame({"unusable": str(error)})
    except BaseException as error:  # native code raises panics, which are no Exception
        return Frame({"failed": type(error).__name__})
    return Frame({"done": done.record}, done.blob)


def _be_silent() -> None:
    """Errors of native code may hold a request's text, which no log may have."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
