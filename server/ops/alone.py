"""Work of a few rows, computed by the calling thread alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Of the weights that are read: one core reads them in a tenth of a second.
SMALL_BYTES = 1 << 30


@contextlib.contextmanager
def alone_if_small(n_bytes: int) -> Iterator[None]:
    """Let torch use no helpers meanwhile, if a pass reads no more than `SMALL_BYTES`.

    At start-up a model runs for a few rows, again and again. Threads share thousands of operations
    of microseconds then, and where other processes want the cores each of them waits for its helper
    to be scheduled: a second becomes a minute. On idle cores it takes half a second longer. The CPU
    kernels keep their threads: how they share work is checked as it will be.
    """
    n_threads = torch.get_num_threads()
    if n_bytes > SMALL_BYTES or n_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
