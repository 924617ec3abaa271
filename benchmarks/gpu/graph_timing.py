"""Device time of a launch by CUDA graphs: none of the host's, and with a cold L2 cache.

Two graphs are captured: one of N times (flush, launch), one of N times the flush alone. A flush
reads `FLUSH_BYTES`, several times the L2 cache, so that what the launch reads comes from memory and
the lines it must push out are clean. (`triton.testing.do_bench` writes zeros: their write-back is
then paid by the launch, and it counts what the host takes to launch.) Both graphs are replayed in
turn; the seconds of one launch are the median of the differences of their times, by CUDA events,
over N. In it are: the kernels, and for each of them what a graph takes from one node to the next,
as in a captured decode step. What it has written and left in the cache is written back within the
next flush, so that is in it too. Not in it: Python, launches by the host, allocation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import torch

FLUSH_BYTES = 256 << 20
WARM_UPS = 3
N_REPLAYS = 7
GRAPH_S = 5e-3  # of launches in one graph, flushes aside
MOST, FEWEST = 50, 3  # launches in one graph


class NotCapturable(RuntimeError):
    """A launch waits for the device or copies to it, so its time alone cannot be told."""


def device_seconds(run: Callable[[], object]) -> float:
    """See the module's docstring. NaN if the flushes' own spread hides the launch.

    Raises NotCapturable for what no graph can hold.
    """
    values = torch.ones(FLUSH_BYTES // 4, device="cuda")
    seen = torch.zeros((), device="cuda")

    def flush() -> None:
        torch.amax(values, dim=0, out=seen)

    _warm_up(run, flush)
    once_s = _seconds_of(run)
    n = min(MOST, max(FEWEST, math.ceil(GRAPH_S / once_s)))
    alone = _captured(n, [flush])
    both = _captured(n, [flush, run])
    for graph in (alone, both):
        graph.replay()
    pairs = [(_seconds_of(both.replay), _seconds_of(alone.replay)) for _ in range(N_REPLAYS)]
    seconds = median(with_run - without for with_run, without in pairs) / n
    return seconds if seconds > 0 else math.nan


def _warm_up(run: Callable[[], object], flush: Callable[[], None]) -> None:
    """Compile and set up outside the capture, on a stream of its own as capturing asks for."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            flush()
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def _captured(n: int, runs: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.stream(torch.cuda.current_stream())  # a failed capture does not come back
    try:
        with here, torch.cuda.graph(graph):
            for _ in range(n):
                for run in runs:
                    run()
    except Exception as error:
        raise NotCapturable(f"not capturable: {error}") from error
    return graph


def _seconds_of(run: Callable[[], object]) -> float:
    """Between two events around it on the current stream; launching by the host included."""
    start, end = _event(), _event()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
