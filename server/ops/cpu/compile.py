"""Compile a kernel, with numba's cache on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import cfunc, types

from server.ops.cpu.codegen.intrinsics import FAST
from server.ops.cpu.parallel import Kernel


def compile_kernel(function: Callable[..., Any], fastmath: dict[str, bool] = FAST) -> Kernel:
    """Compile ``function(address of arguments)``; takes seconds unless it is in the cache."""
    options = {"fastmath": fastmath, "error_model": "numpy"}
    signature = types.void(types.int64)
    numba.config.CACHE_DIR = str(cache_folder())
    try:
        return Kernel(cfunc(signature, cache=True, **options)(function))
    except (RuntimeError, OSError):  # the cache cannot be written: compile at every start
        return Kernel(cfunc(signature, **options)(function))


def cache_folder() -> Path:
    """Where compiled kernels are kept, one folder for each version of these sources.

    numba itself would notice a change in the kernel's own file only, not in what it calls.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    folder = os.environ.get("NUMBA_CACHE_DIR")
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = str(Path(home) / "impart-serve")
    return Path(folder) / f"kernels-{digest[:16]}"
