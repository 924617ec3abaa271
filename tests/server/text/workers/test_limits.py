"""Systems without timers or limits; what limits do is in `test_pool.py` and `test_worker.py`."""

from __future__ import annotations

import signal
import sys

import pytest

from server.text.workers import limits


def test_system_without_timers_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "setitimer")
    limits.begin_task(1.0, 1.0)
    limits.end_task()


def test_end_of_a_task_stops_both_timers() -> None:
    limits.begin_task(1000.0, 1000.0)
    assert signal.getitimer(signal.ITIMER_PROF)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    limits.end_task()
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_system_without_limits_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr("os.nice")
    try:
        limits.confine(1 << 30)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
