"""Clocks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.graph_timing import device_seconds
from benchmarks.gpu.scope import Scope


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run: on a GPU the device's own with a cold L2 cache (`graph_timing`), on a CPU
    one run by the clock.
    """
    if device.type == "cuda":
        return device_seconds(run)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def copy_bandwidth(scope: Scope) -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    source = torch.zeros(scope.copy_bytes, dtype=torch.uint8, device=scope.device)
    target = torch.empty_like(source)
    return 2 * scope.copy_bytes / timed(lambda: target.copy_(source), scope.device)


def seconds_of(run: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` runs, host side included; `run` waits for the device itself."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
