"""What the kernel holds a text worker to. For the worker itself.

Timers and limits of the kernel end the process whatever it computes: a power of two large numbers
or a parser in native code holds the interpreter, and no thread or signal handler of Python runs.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

NICENESS = 10  # engine steps go first


def confine(memory_bytes: int) -> None:
    """Bound the calling process's memory, and let it write no files. What a system lacks, it goes
    on without; CPU and wall time are then all that ends a task.
    """
    with suppress(OSError, AttributeError):
        os.nice(NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM):  # the server drains; it ends its workers itself
        signal.signal(number, signal.SIG_IGN)
    try:
        import resource
    except ImportError:
        return
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    if sys.platform == "linux":  # elsewhere it is not there or does nothing
        _lower(resource.RLIMIT_AS, memory_bytes)


def begin_task(cpu_s: float, wall_s: float) -> None:
    """From now on so much time, then the kernel ends the process (SIGPROF or SIGALRM)."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        signal.setitimer(signal.ITIMER_REAL, wall_s)


def end_task() -> None:
    """No limit while the worker waits."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _lower(kind: int, value: int) -> None:
    import resource

    _, hard = resource.getrlimit(kind)
    limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (limit, limit))
