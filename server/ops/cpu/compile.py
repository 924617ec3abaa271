"""Compile a kernel, with a cache on disk.

The cache is one folder for each version of these sources, kind of CPU, numba, llvmlite and Python:
a folder that several kinds of machine share (a home directory, an image, a volume) never hands one
the code of another. Where the sources lie, and how old their files are, does not count: another
virtual environment or container finds what the first one compiled.
"""

from __future__ import annotations

import atexit
import contextlib
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
from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.ccallback import CFunc

from server.ops.cpu.codegen.intrinsics import FAST
from server.ops.cpu.features import Target, host_target
from server.ops.cpu.parallel import Kernel

SOURCES = Path(__file__).parent
VERDICTS = "verdicts.json"  # of the trials (`server.ops.cpu.check`), beside the code


def compile_kernel(function: Callable[..., Any], fastmath: dict[str, bool] = FAST) -> Kernel:
    """Compile ``function(address of arguments)``; takes seconds unless it is in the cache."""
    options = {"fastmath": fastmath, "error_model": "numpy"}
    compiled: Any = CFunc(function, ((types.int64,), types.void), locals={}, options=options)
    if cache_folder() is not None:
        compiled._cache = _FolderCache(function)
    compiled.compile()
    return Kernel(compiled)


class _Folder(_CacheLocator):  # type: ignore[misc]  # numba has no types
    """`cache_folder`, whose name already says all that the code in it depends on.

    numba's own locators name folders after the path of the source and look at its time: each
    environment would compile for itself.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Folder | None:
        del py_func, py_file
        folder = cache_folder()
        return None if folder is None else cls(folder)

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return ""

    def get_disambiguator(self) -> str:
        return "kernel"


class _FolderCacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Folder,)


class _FolderCache(FunctionCache):  # type: ignore[misc]
    _impl_class = _FolderCacheImpl

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk, or one that became read-only
            super().save_overload(sig, data)


def cache_folder() -> Path | None:
    """Where this process keeps compiled kernels; None where it may write nowhere at all.

    ``NUMBA_CACHE_DIR``, else ``impart-serve`` in the user's cache. Where that cannot be written, a
    folder of this process alone, which goes when it ends; but what was compiled ahead need not be
    written again.
    """
    own = f"kernels-{cache_key(host_target())}"
    wanted = _cache_root()
    if wanted is not None and ((wanted / own / VERDICTS).is_file() or _is_writable(wanted / own)):
        return wanted / own
    private = _private_root()
    return None if private is None else private / own


def is_kept(folder: Path) -> bool:
    """Whether this `cache_folder` is still there when this process has ended."""
    wanted = _cache_root()
    return wanted is not None and folder.parent == wanted


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
