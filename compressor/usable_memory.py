"""How much memory this process may still take.

The smaller of what the machine has available and what its cgroups leave (docker run --memory,
Kubernetes' limits). Standard library only; systems without /proc tell their whole memory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from compressor.cgroups import memory_left


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes. What cannot be read limits nothing. root: of /proc and of the cgroups' mounts."""
    left = memory_left(root)
    available = _available(root / "proc/meminfo")
    return min(available, sys.maxsize if left is None else left)


def _available(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text().splitlines()
        (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kib) * 1024
    except (OSError, ValueError, IndexError):
        return _installed()


def _installed() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize
