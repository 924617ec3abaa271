"""The page that Prometheus reads: rendered beside the event loop, once for all who ask."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest

from server.metrics.page import MetricsPage, metrics_text


class Watched(CollectorRegistry):
    """Notes who collects, and waits until it may."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[threading.Thread] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.fails = False

    def collect(self) -> Iterator[Metric]:
        self.threads.append(threading.current_thread())
        assert self.may_go_on.wait(20)
        if self.fails:
            raise ValueError("it fails")
        yield from super().collect()


@pytest.fixture
def registry() -> Watched:
    watched = Watched()
    counter = Counter("served", "Requests", ("model",), registry=watched)
    for name in ("a", 'b"\n\\', "é"):
        counter.labels(name).inc(3)
    Histogram("took_seconds", "Time", registry=watched).observe(0.3)
    return watched


def test_text_is_what_the_library_makes_of_all_at_once(registry: Watched) -> None:
    assert metrics_text(registry, pause_s=0) == generate_latest(registry)


async def test_event_loop_runs_while_the_page_is_rendered(registry: Watched) -> None:
    registry.may_go_on.clear()
    page = MetricsPage(registry)
    asked = [asyncio.create_task(page.text()) for _ in range(5)]
    while not registry.threads:
        await asyncio.sleep(0.001)
    registry.may_go_on.set()
    texts = await asyncio.gather(*asked)
    assert len(set(texts)) == 1
    (thread,) = registry.threads
    assert thread is not threading.current_thread()


async def test_page_is_rendered_anew_once_it_is_old(registry: Watched) -> None:
    page = MetricsPage(registry, fresh_s=3600)
    await page.text()
    await page.text()
    assert len(registry.threads) == 1
    page = MetricsPage(registry, fresh_s=0)
    await page.text()
    await page.text()
    assert len(registry.threads) == 3


async def test_failed_rendering_is_not_kept(registry: Watched) -> None:
    page = MetricsPage(registry, fresh_s=3600)
    registry.fails = True
    with pytest.raises(ValueError, match="it fails"):
        await page.text()
    registry.fails = False
    assert b"served_total" in await page.text()


async def test_who_leaves_does_not_end_it_for_others(registry: Watched) -> None:
    registry.may_go_on.clear()
    page = MetricsPage(registry)
    gone, stays = (asyncio.create_task(page.text()) for _ in range(2))
    while not registry.threads:
        await asyncio.sleep(0.001)
    gone.cancel()
    registry.may_go_on.set()
    assert b"served_total" in await stays
