"""Run a kernel on torch's own OpenMP threads.

A second thread pool beside torch's would fight it for the cores: idle OpenMP threads spin for
milliseconds. ``GOMP_parallel`` is the stable entry of libgomp (and of LLVM's libomp), the one that
compiled ``#pragma omp parallel`` calls.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

_OPENMP = re.compile(r"/lib(gomp|omp|iomp5)[-.\w]*\.so[.\d]*$")


def torch_openmp() -> ctypes.PyDLL | None:
    """The OpenMP library that this process's torch uses, or None where it cannot be found.

    PyDLL keeps the interpreter lock during a call: kernels take microseconds, handing the lock
    over and back takes longer.
    """
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = sorted({line.split(maxsplit=5)[-1] for line in mapped if _OPENMP.search(line)})
    ours = [path for path in paths if "/torch/" in path or "/torch.libs/" in path] or paths
    for path in ours:
        library = ctypes.PyDLL(path)
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


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

    def run(
        self, kernel: Kernel, arguments: np.ndarray, n_tasks: int, *, unlocked: bool = False
    ) -> None:
        """Run until the tasks are used up. ``arguments`` int64; ``arguments[0]`` is overwritten.

        unlocked: without the interpreter lock, for what takes long: other threads answer clients.
        """
        arguments[0] = 0
        address = arguments.__array_interface__["data"][0]
        start = self._start_unlocked if unlocked else self._start
        if start is None or self.n_threads == 1 or n_tasks == 1:
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
