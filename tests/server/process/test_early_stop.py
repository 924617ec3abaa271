"""Signals while the server loads."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from server.process.early_stop import Stopped, stop_signals


@contextmanager
def cleaned_up(into: list[str]) -> Iterator[None]:
    try:
        yield
    finally:
        into.append("clean")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stop_signal_unwinds_through_handlers_of_errors(name: str) -> None:
    done: list[str] = []
    before = signal.getsignal(getattr(signal, name))

    def load() -> None:
        with stop_signals(), cleaned_up(done):
            try:
                os.kill(os.getpid(), getattr(signal, name))
                signal.pause()
            except Exception:  # what a library might do
                done.append("swallowed")

    with pytest.raises(Stopped) as stopped:
        load()
    assert stopped.value.name == name
    assert done == ["clean"]
    assert signal.getsignal(getattr(signal, name)) is before


def test_sighup_before_the_server_is_ready_ends_nothing() -> None:
    with stop_signals():
        os.kill(os.getpid(), signal.SIGHUP)
