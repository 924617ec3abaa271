"""One running server: warm it up, load it cell by cell, turn what came back into rows."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.child import ChildError, PeakRss, ServerChild, free_port
from benchmarks.load import LoadClient, Outcome, Workload, summarise
from benchmarks.peers.cells import BASE, Cell, Group, variant_names
from benchmarks.peers.errors import PeersError
from benchmarks.peers.rows import Row
from benchmarks.peers.systems import SYSTEMS, Site, versions
from benchmarks.peers.variants import mean_disk_bytes
from benchmarks.serve import environment, own_cpu_s

READY_TIMEOUT_S = 1800.0  # vLLM compiles on its first start
WARMUP_TOKENS = 8
TOUCH_CONCURRENCY = 4
TOUCH_TOKENS = 4  # in and out: less than a page of KV cache, so that none is kept


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    window_s   requests are started for so long, in each cell, and until as many as are in flight
               at once have been answered: a system may need minutes for its first answers
    id_range   token ids of prompts, lowest and one past the highest
    timeout_s  of one request
    logs       folder for the servers' output
    """

    window_s: float = 30.0
    id_range: tuple[int, int] = (1000, 10000)
    timeout_s: float = 900.0
    logs: Path = Path(".cache/bench/peers")


def measure_group(
    site: Site, group: Group, options: Options, tell: Callable[[str], None]
) -> Iterator[Row]:
    """Start the group's server and yield a row per cell. Raises PeersError."""
    blank = _known(site, group)
    with _running(site, group, options) as child:
        ready_s = child.wait_ready(READY_TIMEOUT_S)
        blank = replace(blank, ready_s=ready_s, rss_ready_bytes=child.rss_bytes())
        tell(f"{group.system}, {group.variants} variants: ready after {ready_s:.0f} s")
        blank = _touch_all(child, site, group, blank, options)
        for cell in group.cells:
            yield _measure_cell(child, site, cell, blank, options)


def _touch_all(child: ServerChild, site: Site, group: Group, blank: Row, options: Options) -> Row:
    """Have every model answer once, and note what memory that takes.

    The first half pays for what all variants share: buffers, the allocator's reserves.
    """
    _warm(child, [BASE], site.concurrency, options)
    names = variant_names(group.variants)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    _warm(child, first, len(first), options)
    blank = replace(blank, rss_half_bytes=child.rss_bytes())
    _warm(child, second, len(second), options)
    return replace(blank, rss_warm_bytes=child.rss_bytes())


def _known(site: Site, group: Group) -> Row:
    form = SYSTEMS[group.system].form
    where = environment()
    return Row(
        system=group.system,
        variants=group.variants,
        concurrency=site.concurrency,
        variant_disk_bytes=mean_disk_bytes(site.variants(form, group.variants))
        if group.variants
        else 0,
        versions=versions(site, group.system),
        cpus=where["cpus"] or 0,
        commit=where["commit"] or "",
    )


@contextmanager
def _running(site: Site, group: Group, options: Options) -> Iterator[ServerChild]:
    port = free_port()
    command = SYSTEMS[group.system].command(site, group.variants, port)
    log = options.logs / f"{group.system}-{group.variants}.log"
    try:
        with ServerChild(command, f"http://127.0.0.1:{port}", log) as child:
            yield child
    except ChildError as error:
        raise PeersError(f"{group.system}, {group.variants} variants: {error}") from error


def _warm(child: ServerChild, models: Sequence[str], count: int, options: Options) -> None:
    """Ask `models` for `count` short answers; their order visits each before any twice."""
    if not count:
        return
    workload = Workload(models, prompt_tokens=TOUCH_TOKENS, id_range=options.id_range, seed=count)
    outcomes, _ = _load(
        child, workload, TOUCH_TOKENS, options, concurrency=TOUCH_CONCURRENCY, n_requests=count
    )
    check(outcomes, TOUCH_TOKENS, TOUCH_TOKENS, child)


def _measure_cell(child: ServerChild, site: Site, cell: Cell, blank: Row, options: Options) -> Row:
    """Warm up with other prompts of the same shape, then measure."""
    load, n = cell.load, site.concurrency
    workload = cell.workload(options.id_range, warmup=True)
    warm, _ = _load(child, workload, WARMUP_TOKENS, options, concurrency=n, n_requests=n)
    check(warm, load.prompt_tokens, WARMUP_TOKENS, child)
    cpu_before = own_cpu_s()
    with PeakRss(child) as peak:
        outcomes, start = _load(
            child,
            cell.workload(options.id_range),
            load.max_tokens,
            options,
            concurrency=n,
            duration_s=options.window_s,
            at_least=n,
        )
        wall_s = time.perf_counter() - start
    check(outcomes, load.prompt_tokens, load.max_tokens, child)
    window_s = window(outcomes, start, options.window_s, n)
    row = replace(
        blank,
        load=str(load),
        mix=cell.mix,
        client_cpu_s=own_cpu_s() - cpu_before,
        rss_peak_bytes=peak.n_bytes,
        window_s=window_s,
        wall_s=wall_s,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    return replace(row, **statistics(outcomes, start, window_s, wall_s))


def window(outcomes: Sequence[Outcome], start_s: float, shortest_s: float, at_least: int) -> float:
    """Seconds during which requests were started: `shortest_s`, or until so many answers."""
    answered_s = sorted(outcome.end_s for outcome in outcomes)[at_least - 1] - start_s
    return max(shortest_s, answered_s)


def _load(
    child: ServerChild, workload: Workload, max_tokens: int, options: Options, **amount: Any
) -> tuple[list[Outcome], float]:
    """Outcomes, and when the first request was sent."""

    async def run() -> tuple[list[Outcome], float]:
        client = LoadClient(
            child.url, max_tokens=max_tokens, stream=True, timeout_s=options.timeout_s
        )
        try:
            start = time.perf_counter()
            return await client.run(workload.jobs(), **amount), start
        finally:
            await client.close()

    return asyncio.run(run())


def check(
    outcomes: Iterable[Outcome], prompt_tokens: int, max_tokens: int, child: ServerChild
) -> None:
    """Raise PeersError unless every request got exactly what it asked for."""
    for outcome in outcomes:
        wrong = outcome.error
        if wrong is None and outcome.n_tokens != max_tokens:
            wrong = f"{outcome.n_tokens} tokens instead of {max_tokens}"
        if wrong is None and outcome.n_prompt_tokens != prompt_tokens:
            wrong = f"read {outcome.n_prompt_tokens} prompt tokens instead of {prompt_tokens}"
        if wrong is not None:
            raise PeersError(f"{outcome.model}: {wrong}{child.tail()}")


def statistics(
    outcomes: Sequence[Outcome], start_s: float, window_s: float, wall_s: float
) -> dict[str, Any]:
    """The measured fields of a `Row`.

    start_s  when the first request was sent, on the clock of the outcomes

    A piece of output counts as its request's tokens over its pieces (a server may send several
    tokens at once).
    """
    end_s = start_s + window_s
    arrived = sum(
        outcome.n_tokens / len(outcome.chunk_s) * sum(at <= end_s for at in outcome.chunk_s)
        for outcome in outcomes
    )
    figures = summarise(outcomes, wall_s)
    unknown = {"p50": math.nan, "p99": math.nan}
    first, between = figures["ttft_ms"] or unknown, figures["inter_token_ms"] or unknown
    return {
        "requests": len(outcomes),
        "output_tokens_per_s": arrived / window_s,
        "drained_tokens_per_s": figures["output_tokens_per_s"],
        "ttft_p50_ms": first["p50"],
        "ttft_p99_ms": first["p99"],
        "itl_p50_ms": between["p50"],
        "itl_p99_ms": between["p99"],
    }
