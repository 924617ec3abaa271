"""Tensors that say they lie on a GPU: CPU memory under CUDA's rules of who may meet whom."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.simulated_cuda.graphs import Graph
from tests.simulated_cuda.streams import SimulationError, Streams

CUDA = torch.device("cuda", 0)
TO_HOST = {  # waits for the device
    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
    Tensor.__index__, Tensor.__contains__, torch.equal, Tensor.equal,
}  # fmt: skip
REFUSED = {Tensor.numpy, Tensor.__array__}
BY_INDEX = {Tensor.__getitem__, Tensor.__setitem__}
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray}
ANSWERS: dict[Any, Any] = {  # what a tensor on the device says of itself
    Tensor.device.__get__: CUDA,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
    Tensor.get_device: 0,
    Tensor.is_pinned: False,
}


class Simulated(Tensor):
    """Base of the two kinds of tensors below; `device` is set by `Device`."""

    owner: Device

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return cls.owner.run(function, args, kwargs or {})


class Everywhere(TorchFunctionMode):
    """Hands factories and `to` over, which no tensor on the device takes part in."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._device.run(function, args, kwargs or {})


class Device(Streams):
    """One simulated GPU. `OnDevice` and `Pinned` are its kinds of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.OnDevice: type[Tensor] = type("OnDevice", (Simulated,), {"owner": self})
        self.Pinned: type[Tensor] = type("Pinned", (Simulated,), {"owner": self})
        self._capture = threading.local()
        self.n_launches = 0
        # Triton's interpreter replaces functions of its language while a kernel runs.
        self._interpreter = threading.RLock()

    # Capture

    @property
    def graph(self) -> Graph | None:
        """What this thread is capturing into."""
        return getattr(self._capture, "graph", None)

    def capture(self, graph: Graph | None) -> None:
        self._capture.graph = graph

    def host_waits(self, why: str) -> None:
        if self.graph is not None:
            raise SimulationError(f"{why} during capture")

    # Operations

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One call of a torch function, under this device's rules."""
        tensors = list(_tensors((args, kwargs)))
        here = any(isinstance(t, self.OnDevice) for t in tensors)
        first = args[0] if args else None
        if function in ANSWERS and isinstance(first, Tensor):
            if isinstance(first, self.OnDevice):
                return ANSWERS[function]
            if function is Tensor.is_pinned:
                return isinstance(first, self.Pinned)
        if function is Tensor.to:
            return self._to(args, dict(kwargs))
        if function is Tensor.cuda:
            return self._to((first, CUDA), dict(kwargs))
        if function is Tensor.__deepcopy__:
            return self._deepcopy(first, args[1])
        if function is Tensor.copy_:
            return self._copy(*args, **kwargs)
        if function is Tensor.pin_memory:
            return _plain(first).clone().as_subclass(self.Pinned)
        if here and function in REFUSED:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if here and function in TO_HOST:
            self.host_waits(function.__name__)
            self.current().host_waited()
            if function is Tensor.cpu:
                return _plain(first).clone()
            return _call(function, args, kwargs)
        return self._compute(function, args, dict(kwargs), tensors, here)

    def _compute(
        self, function: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], here: bool
    ) -> Any:
        if here:
            self._check_places(function, args, tensors)
            self.current().run_pending()
        kind = self.OnDevice if here else None
        if kwargs.get("device") is not None:
            kind = None
            if _is_cuda(kwargs["device"]):
                kind, kwargs["device"] = self.OnDevice, "cpu"
                if function in FROM_PYTHON:
                    self.host_waits("a copy from pageable memory")
        if kwargs.pop("pin_memory", False):
            kind = self.Pinned
        if not here and kind is None:
            for tensor in tensors:
                if isinstance(tensor, self.Pinned):
                    kind = self.Pinned if _is_view(function) else None
                    if _writes(function) and tensor is args[0]:
                        self.check_unread(tensor)
        made = _call(function, args, kwargs)
        return made if kind is None else _as_kind(made, kind, args)

    def _check_places(self, function: Any, args: Any, tensors: list[Tensor]) -> None:
        strangers = [t for t in tensors if not isinstance(t, self.OnDevice) and t.dim() > 0]
        indexed = function in BY_INDEX and isinstance(args[0], self.OnDevice)
        if indexed and (strangers or _has_list(args[1])):
            self.host_waits("an index from pageable memory")
            strangers = [t for t in strangers if not _is_index(t, args[1])]
        if strangers:
            raise SimulationError(
                f"{getattr(function, '__name__', function)}: tensors on cuda:0 and on the CPU, "
                f"of shape {tuple(strangers[0].shape)}"
            )

    def _to(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, device = args[0], kwargs.pop("device", None)
        if device is not None and torch.device(device).type == "meta":
            return _call(Tensor.to, args, kwargs | {"device": device})
        rest: list[Any] = []
        for value in args[1:]:
            if isinstance(value, torch.device | str) or type(value) is int:
                device = value
            elif isinstance(value, Tensor):
                device = value.device
                rest.append(value.dtype)
            elif value is not None:
                rest.append(value)
        if kwargs.get("dtype") is None:
            kwargs.pop("dtype", None)
            rest = rest if rest and isinstance(rest[0], torch.dtype) else [tensor.dtype, *rest]
        was_here = isinstance(tensor, self.OnDevice)
        goes_here = was_here if device is None else _is_cuda(device)
        if was_here:
            self.current().run_pending()
        made: Tensor = _call(Tensor.to, (tensor, *rest), kwargs)
        if was_here == goes_here:
            return made if made is tensor or not was_here else made.as_subclass(self.OnDevice)
        by_stream = kwargs.get("non_blocking") and isinstance(tensor, self.Pinned)
        if not by_stream:
            self.host_waits("a copy between host and device")
            self.current().host_waited()
        copied = _plain(made).clone()
        if by_stream:
            self.copy_from_pinned(lambda: copied.copy_(_plain(tensor)), _plain(tensor))
        return copied.as_subclass(self.OnDevice) if goes_here else copied

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        here, there = isinstance(target, self.OnDevice), isinstance(source, self.OnDevice)
        if isinstance(target, self.Pinned):
            self.check_unread(target)
        if here and not there and non_blocking and isinstance(source, self.Pinned):
            if self.graph is not None:
                raise SimulationError("a copy from the host in a graph")
            plain, values = _plain(target), _plain(source)
            self.copy_from_pinned(lambda: plain.copy_(values), values)
            return target
        if here or there:
            self.current().run_pending()
        if there and isinstance(target, self.Pinned) and non_blocking:
            plain, values = _plain(target), _plain(source).clone()
            plain.fill_(torch.iinfo(plain.dtype).min if not plain.is_floating_point() else math.nan)
            self.copy_to_pinned(lambda: plain.copy_(values))
            return target
        if here != there and source.dim() > 0:
            self.host_waits("a copy between host and device")
            self.current().host_waited()
        _call(Tensor.copy_, (target, source), {})
        return target

    def _deepcopy(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if not isinstance(tensor, Simulated):
            return _call(Tensor.__deepcopy__, (tensor, memo), {})
        if id(tensor) not in memo:
            copied = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(copied, False) if is_parameter else copied
        return memo[id(tensor)]

    def move_module(self, module: nn.Module, device: torch.device) -> None:
        """`nn.Module.to`, tied weights staying one object."""
        moved: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None and id(value) not in moved:
                    moved[id(value)] = nn.Parameter(value.detach().to(device), False)
                if value is not None:
                    part._parameters[name] = moved[id(value)]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.to(device)

    # Triton

    def launch(self, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A kernel's launch: every tensor must be here."""
        for tensor in _tensors((args, kwargs)):
            if not isinstance(tensor, self.OnDevice):
                raise SimulationError(f"a kernel gets a CPU tensor of shape {tuple(tensor.shape)}")
        self.current().run_pending()
        args, kwargs = _all_plain(args), {k: _all_plain(v) for k, v in kwargs.items()}
        self.n_launches += 1

        def alone() -> Any:
            with self._interpreter:
                return run(*args, **kwargs)

        graph = self.graph
        if graph is None:
            return alone()
        graph.steps.append(alone)
        with torch.utils._python_dispatch._disable_current_modes():
            return alone()


def _call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def _all_plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value)
    if isinstance(value, tuple):
        return tuple(_all_plain(v) for v in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _as_kind(made: Any, kind: type[Tensor], args: Any) -> Any:
    if isinstance(made, Tensor):
        if isinstance(made, Simulated) or any(made is a for a in _tensors(args)):
            return made
        with torch._C.DisableTorchFunctionSubclass():
            return made.as_subclass(kind)
    if isinstance(made, list | tuple):
        items = [_as_kind(item, kind, args) for item in made]
        is_named = isinstance(made, tuple) and hasattr(made, "_fields")
        return type(made)(*items) if is_named else type(made)(items)
    return made


def _is_cuda(device: Any) -> bool:
    return not isinstance(device, int) and torch.device(device).type == "cuda"


def _is_index(tensor: Tensor, index: Any) -> bool:
    return any(tensor is t for t in _tensors(index))


def _has_list(index: Any) -> bool:
    return isinstance(index, list) or (
        isinstance(index, tuple) and any(isinstance(i, list) for i in index)
    )


def _writes(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return function is Tensor.__setitem__ or (name.endswith("_") and not name.endswith("__"))


def _is_view(function: Any) -> bool:
    names = ("view", "__getitem__", "t", "transpose", "split", "unbind", "reshape", "narrow")
    return getattr(function, "__name__", "") in names
