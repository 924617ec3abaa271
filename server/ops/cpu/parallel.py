"""Run a kernel on torch's own OpenMP threads.

A second thread pool beside torch's would fight it for the cores: idle OpenMP threads spin for
milliseconds. ``GOMP_parallel`` is the stable entry of libgomp (and of LLVM's libomp), the one that
compiled ``#pragma omp parallel`` calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

_OPENMP = re.compile(r"/lib(gomp|omp|iomp5)[-.\w]*\.(so[.\d]*|dylib)$")
_MAPS = Path("/proc/self/maps")

log = logging.getLogger(__name__)


def torch_openmp() -> ctypes.PyDLL | None:
    """The OpenMP library that this process's torch uses, or None where it cannot be found.

    PyDLL keeps the interpreter lock during a call: kernels take microseconds, handing the lock
    over and back takes longer.
    """
    mapped = _mapped()
    ours = [path for path in mapped if "/torch/" in path or "/torch.libs/" in path] or mapped
    # Never load what is not there yet: that would be a second pool beside torch's.
    mode = getattr(os, "RTLD_NOLOAD", 0)
    for path in ours or _shipped():
        try:
            library = ctypes.PyDLL(path, mode)
        except OSError:
            continue
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


def _mapped() -> list[str]:
    """OpenMP libraries in this process; none where the system has no list of what is mapped."""
    try:
        lines = os.fsdecode(_MAPS.read_bytes()).splitlines()
    except OSError:
        return []
    return sorted({line.split(maxsplit=5)[-1] for line in lines if _OPENMP.search(line)})


def _shipped() -> list[str]:
    """Where torch's wheels (and conda, beside Python) keep OpenMP libraries."""
    package = Path(torch.__file__).parent
    folders = (package / "lib", package.with_name("torch.libs"), Path(sys.prefix, "lib"))
    files = (str(file) for folder in folders for file in sorted(folder.glob("lib*omp*")))
    return [file for file in files if _OPENMP.search(file)]


class Parallel:
    """Calls kernels with as many threads as torch uses, or one if torch's pool is out of reach."""

    def __init__(self) -> None:
        library = torch_openmp()
        self._start: Callable[..., Any] | None = None
        self._start_unlocked: Callable[..., Any] | None = None
        if library is not None:
            self._start = _entry(library)
            self._start_unlocked = _entry(ctypes.CDLL(library._name))
        self.n_threads = torch.get_num_threads() if self._start is not None else 1
        self._alone: set[int] = set()  # threads that compute without helpers
        if self._start is None and torch.get_num_threads() > 1:
            log.warning("torch's OpenMP library was not found: kernels run on one thread")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let the calling thread, which is not the steps', run kernels without helpers: it would
        get some of its own, which would spin beside the steps' ones.
        """
        self._alone.add(threading.get_ident())
        try:
            yield
        finally:
            self._alone.discard(threading.get_ident())

    def run(
        self, kernel: Kernel, arguments: np.ndarray, n_tasks: int, *, unlocked: bool = False
    ) -> None:
        """Run until the tasks are used up. ``arguments`` int64; ``arguments[0]`` is overwritten.

        unlocked: without the interpreter lock, for what takes long: other threads answer clients.
        """
        arguments[0] = 0
        address = arguments.__array_interface__["data"][0]
        start = self._start_unlocked if unlocked else self._start
        is_alone = bool(self._alone) and threading.get_ident() in self._alone
        if start is None or self.n_threads == 1 or n_tasks == 1 or is_alone:
            (kernel.call_unlocked if unlocked else kernel.call)(address)
        else:
            start(kernel.address, address, min(self.n_threads, n_tasks), 0)


def _entry(library: ctypes.CDLL) -> Callable[..., Any]:
    start = library.GOMP_parallel
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


class Kernel:
    """A compiled C function ``void f(int64 address)``."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled  # keeps the machine code alive
        self.address: int = compiled.address
        self.call = ctypes.PYFUNCTYPE(None, ctypes.c_int64)(compiled.address)
        self.call_unlocked = ctypes.CFUNCTYPE(None, ctypes.c_int64)(compiled.address)
