"""Signals before the server is ready: it ends in an orderly way, wherever loading has got to.

Loading runs in the main thread for seconds or minutes. A signal raises `Stopped` there, so that
locks are released, processes that were started are ended and temporary files go. Once the server
is ready, `server.process.run.Control` has the signals.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOPPING = ("SIGTERM", "SIGINT")


class Stopped(BaseException):
    """The process was asked to stop. Not an Exception: no handler of errors may swallow it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread on SIGTERM and SIGINT; let SIGHUP pass, which would end
    the process: what it asks for, reading the deltas' folder, is still to come.
    """
    handlers = dict.fromkeys(STOPPING, _stop) | {"SIGHUP": _pass}
    numbers = {name: getattr(signal, name) for name in handlers if hasattr(signal, name)}
    before = {number: signal.signal(number, handlers[name]) for name, number in numbers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise Stopped(signal.Signals(number).name)


def _pass(number: int, frame: FrameType | None) -> None:
    del number, frame
