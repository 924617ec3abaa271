"""Compile a kernel, with numba's cache on disk.

The cache is one folder for each version of these sources, kind of CPU, numba, llvmlite and Python:
a folder that several kinds of machine share (a home directory, an image, a volume) never hands one
the code of another.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import cfunc, types

from server.ops.cpu.codegen.intrinsics import FAST
from server.ops.cpu.features import Target, host_target
from server.ops.cpu.parallel import Kernel

SOURCES = Path(__file__).parent


def compile_kernel(function: Callable[..., Any], fastmath: dict[str, bool] = FAST) -> Kernel:
    """Compile ``function(address of arguments)``; takes seconds unless it is in the cache."""
    options = {"fastmath": fastmath, "error_model": "numpy"}
    signature = types.void(types.int64)
    folder = cache_folder()
    if folder is not None:
        numba.config.CACHE_DIR = str(folder)
        try:
            return Kernel(cfunc(signature, cache=True, **options)(function))
        except (RuntimeError, OSError):  # numba's own word that it cannot keep it there
            pass
    return Kernel(cfunc(signature, **options)(function))


def cache_folder() -> Path | None:
    """Where this process keeps compiled kernels; None where it may write nowhere at all.

    ``NUMBA_CACHE_DIR``, else ``impart-serve`` in the user's cache. Where that cannot be written, a
    folder of this process alone, which goes when it ends. numba itself would notice a change in
    the kernel's own file only, not in what it calls.
    """
    own = f"kernels-{cache_key(host_target())}"
    wanted = _cache_root()
    if wanted is not None and _is_writable(wanted / own):
        return wanted / own
    private = _private_root()
    return None if private is None else private / own


def cache_root_of(folder: Path) -> Path:
    """What ``NUMBA_CACHE_DIR`` has to be in a process that shall use this `cache_folder`."""
    return folder.parent


def cache_key(target: Target) -> str:
    """What compiled code depends on, in 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.rglob("*.py")):
        digest.update(source.read_bytes())
    versions = (numba.__version__, llvmlite.__version__, sys.implementation.cache_tag)
    digest.update(repr((versions, target.triple, target.name, sorted(target.features))).encode())
    return digest.hexdigest()[:16]


def _cache_root() -> Path | None:
    folder = os.environ.get("NUMBA_CACHE_DIR")
    if folder:
        return Path(folder)
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(home or Path.home() / ".cache") / "impart-serve"
    except RuntimeError:  # no home directory can be found
        return None


def _is_writable(folder: Path) -> bool:
    """Tried, not asked: root may do anything but on a read-only disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@functools.cache
def _private_root() -> Path | None:
    """A new folder that nobody else may write to: numba's cache is code."""
    try:
        folder = tempfile.mkdtemp(prefix="impart-serve-")
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
