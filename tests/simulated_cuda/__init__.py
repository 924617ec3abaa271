"""A GPU for tests on machines without one: CUDA's rules over CPU memory, kernels interpreted.

    with simulated_cuda() as gpu:
        base = load_base_model(path, torch.device("cuda"), ...)

It answers as ``torch.cuda`` would and refuses what CUDA refuses, or what would give wrong data
there: tensors of host and device in one operation or kernel, waiting for the device or copying to
it under capture, pinned memory written to while a copy reads it, data used before its copy has
arrived. A graph replays the operations of its capture on the memory they had then, without
running Python. What it cannot show: races between programs of a kernel, and speed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from triton.runtime.interpreter import GridExecutor

from tests.simulated_cuda.device import CUDA, Device, Everywhere
from tests.simulated_cuda.graphs import Graph, Recorder
from tests.simulated_cuda.streams import Event, SimulationError, Stream

__all__ = ["Device", "SimulationError", "simulated_cuda"]
N_BYTES = 16 << 30


@contextmanager
def simulated_cuda() -> Iterator[Device]:
    """Make ``torch.device("cuda")`` work in this thread and in those started inside."""
    gpu = Device()
    with ExitStack() as stack:
        for name, value in _cuda_functions(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        launch, run, to = GridExecutor.__call__, threading.Thread.run, nn.Module.to

        def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
            return gpu.launch(lambda *a, **k: launch(self, *a, **k), args, kwargs)

        def run_inside(self: threading.Thread) -> None:
            with Everywhere(gpu):
                run(self)

        def moved(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            if not any(isinstance(a, torch.device | str) and "cuda" in str(a) for a in args):
                return to(self, *args, **kwargs)
            gpu.move_module(self, CUDA)
            return self

        def moved_back(self: nn.Module) -> nn.Module:
            gpu.move_module(self, torch.device("cpu"))
            return self

        stack.enter_context(mock.patch.object(GridExecutor, "__call__", launched))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_inside))
        stack.enter_context(mock.patch.object(nn.Module, "to", moved))
        stack.enter_context(mock.patch.object(nn.Module, "cpu", moved_back))
        stack.enter_context(Everywhere(gpu))
        yield gpu


def _cuda_functions(gpu: Device) -> dict[str, Any]:
    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before = gpu.enter(chosen)
        try:
            yield
        finally:
            gpu.enter(before)

    @contextmanager
    def graph(graph: Graph, pool: Any = None, **_: Any) -> Iterator[None]:
        gpu.synchronize()
        gpu.capture(graph)
        try:
            with Recorder(graph):
                yield
        finally:
            gpu.capture(None)

    def synchronize(device: Any = None) -> None:
        gpu.host_waits("synchronize")
        gpu.synchronize()

    properties = SimpleNamespace(
        multi_processor_count=4, name="simulated", total_memory=N_BYTES, major=9, minor=0
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (N_BYTES, N_BYTES),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "get_device_name": lambda device=None: "simulated",
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "Stream": gpu.make,
        "Event": lambda **kwargs: Event(gpu, **kwargs),
        "stream": stream,
        "current_stream": lambda device=None: gpu.current(),
        "default_stream": lambda device=None: gpu.default,
        "graph_pool_handle": object,
        "is_current_stream_capturing": lambda: gpu.graph is not None,
        "CUDAGraph": lambda: Graph(gpu),
        "graph": graph,
    }
