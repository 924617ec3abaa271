"""Threads that bring variants in: they take the processor time that steps leave over.

Their work is CPU work on the cores that the steps need. A thread of lower priority runs while the
steps' threads wait for memory, for each other or for a request, and makes way when they go on. It
computes alone: two threads of low priority that wait for each other at every operation would take
many times as long as one, and keep the steps' caches cold meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

NICENESS = 10


def background_pool(n_threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool of threads of low priority, all of them started."""
    started = threading.Barrier(n_threads + 1)

    def enter() -> None:
        try:
            make_background()
        finally:
            started.wait()

    pool = ThreadPoolExecutor(n_threads, name, initializer=enter)
    for _ in range(n_threads):
        pool.submit(int)
    started.wait()
    return pool


def make_background() -> None:
    """Give the calling thread low priority and let it compute without helpers."""
    lower_priority()
    if "OpenMP" in torch.__config__.parallel_info():
        _without_helpers()


def lower_priority(niceness: int = NICENESS) -> None:
    """Let the calling thread, and processes it starts, take what others leave; where that is
    forbidden it goes on.
    """
    if sys.platform == "linux":  # elsewhere niceness belongs to the process
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            niceness = max(niceness, os.getpriority(os.PRIO_PROCESS, thread))
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _without_helpers() -> None:
    """With OpenMP the number of threads is one of the calling thread; but threads that compute for
    the first time take the last number that anybody has set, so that has to be put back, by a
    thread that nobody else uses.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    restoring = threading.Thread(target=torch.set_num_threads, args=(n_threads,))
    restoring.start()
    restoring.join()
