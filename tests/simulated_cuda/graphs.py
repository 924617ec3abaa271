"""CUDA graphs: the operations of a capture, run again on the memory they were captured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.simulated_cuda.streams import Streams

WAITS = {  # for a value, or for a size
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal",
    "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}  # fmt: skip
UNSET = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")


@dataclass(eq=False)
class Graph:
    """`torch.cuda.CUDAGraph`: Python does not run at `replay`."""

    gpu: Streams
    steps: list[Callable[[], None]] = field(default_factory=list)

    def replay(self) -> None:
        self.gpu.current().run_pending()
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            for step in self.steps:
                step()


class Recorder(TorchDispatchMode):
    """Notes every operation; raises on those that a capturing stream does not allow."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        check_capturable(function, args)
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        self._graph.steps.append(_again(function, args, kwargs, made))
        return made


def check_capturable(function: Any, args: Any) -> None:
    """AssertionError for operations that wait for the device."""
    schema = function._schema
    name = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
    if schema.name in WAITS or name in WAITS:
        raise AssertionError(f"{name} cannot be captured")
    by_mask = schema.name in ("aten::index", "aten::index_put", "aten::index_put_")
    if by_mask and any(t is not None and t.dtype is torch.bool for t in args[1]):
        raise AssertionError(f"{name} with a mask cannot be captured")


def _again(function: Any, args: Any, kwargs: Any, made: Any) -> Callable[[], None]:
    """What a replay does: run it, and put what it makes where it was made at capture."""
    inputs = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    outputs = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
    fresh = [_memory(t) not in inputs for t in outputs]
    unset = function._schema.name.startswith(UNSET)

    def step() -> None:
        if unset or (not function._schema.is_mutable and not any(fresh)):
            return  # nothing but memory, or a view
        results = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, Tensor)]
        for new, old, is_fresh in zip(results, outputs, fresh, strict=True):
            if is_fresh:
                old.copy_(new)

    return step


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
