"""Threads that bring variants in: they take the processor time that steps leave over.

Their work is CPU work on the cores that the steps need. A thread of lower priority runs while the
steps' threads wait for memory, for each other or for a request, and makes way when they go on.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

NICENESS = 15


def background_pool(n_threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool whose threads, and those that they start, have low priority."""
    return ThreadPoolExecutor(n_threads, name, initializer=lower_priority)


def lower_priority() -> None:
    """Lower the calling thread's priority, where a thread has one of its own."""
    if sys.platform == "linux":  # elsewhere niceness belongs to the process
        niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(niceness, NICENESS))
