"""Who cannot be served in time hears so at once, with the seconds to wait; who can is served."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from server.errors import LoadsBehind
from tests.server.conftest import ALL_CODECS, Served
from tests.server.engine.test_core import assert_true_text
from tests.server.engine.test_core_variants import intercept_reads
from tests.server.helpers import CoreHarness

PROMPT = "The quick brown fox"
A, B, C = list(ALL_CODECS)[:3]
Make = Callable[..., CoreHarness]


@pytest.fixture
def many(served: Callable[..., Served]) -> Served:
    return served("llama", ALL_CODECS)


def test_request_behind_loads_beyond_its_time_is_refused_with_the_seconds(
    many: Served, harness: Make
) -> None:
    engine = harness(many, kernels="torch")
    may_read = threading.Event()

    def wait(name: str) -> None:
        assert may_read.wait(60)

    names = intercept_reads(engine, wait)
    sizes = {d.name: d.n_bytes for d in engine.catalog.registry.all()}
    rate_s = 1000 / sizes[A]  # a byte
    for _ in range(2):
        engine.core.loader.costs.was_read("another", 1, rate_s)
    soon = time.monotonic() + 600
    alone = engine.submit(A, PROMPT, deadline=soon)
    engine.until(lambda: engine.core.loader.loading() != [])
    late = engine.submit(B, PROMPT, deadline=soon)
    engine.run(late)
    assert isinstance(late.error, LoadsBehind)
    assert "1 other variants" in late.error.message
    wanted = 500 + sizes[B] * rate_s - 600  # half of A's load is still to be done
    assert wanted <= late.error.retry_after_s <= wanted + 30  # it took a while to come here
    same, patient = engine.submit(A, PROMPT, deadline=soon), engine.submit(C, PROMPT)
    engine.core.turn()
    assert not same.done
    may_read.set()
    engine.run(alone, same, patient)
    assert names == [A, C]
    assert_true_text(many, alone, same, patient)
    engine.assert_idle()


def test_request_is_not_refused_for_a_rate_that_nobody_measured(
    many: Served, harness: Make
) -> None:
    engine = harness(many, kernels="torch")
    sent = [engine.submit(name, PROMPT, deadline=time.monotonic() + 60) for name in (A, B, C)]
    engine.run(*sent)
    assert_true_text(many, *sent)
