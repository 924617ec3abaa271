"""The process's memory between loads."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Give back to the system what the allocator keeps though nothing uses it; takes milliseconds.

    A load needs about as much memory again as the variant keeps, and grown arrays are copied: glibc
    would hold on to nearly all of it. Other C libraries have no such call; there it does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
