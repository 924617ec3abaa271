"""The model as transformers defines it, beside the served one, with the served one's weights.

A copy of the module tree as it was before layers were replaced; of the weights it has none of its
own. While a decoder layer runs, its weights are read back from the served model's parameters, with
a delta added where one is asked for, and forgotten after: memory for one layer, whatever the model.
It computes with transformers' own eager attention: what the engine computes is compared with this.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.codecs.lowrank import LowRankTerm
from compressor.codecs.term import TensorDelta
from server.deltas.experts import ExpertParameter
from server.deltas.parameter import DeltaParameter
from server.errors import ConfigError
from server.model.mask import use_attention
from server.model.state import decoder_layers

Deltas = Mapping[DeltaParameter, TensorDelta]


class Watch:
    """What decoder layers and the embedding give in forward passes, by path, in order of calls."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._points: dict[str, nn.Module] = dict(decoder_layers(model))
        embedding = model.get_input_embeddings()
        for path, module in model.named_modules():
            if module is embedding:
                self._points = {path: module} | self._points
        self.outputs: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self, noise: float = 0.0) -> Iterator[None]:
        """Keep what comes out meanwhile, instead of what was kept before; see `Definition.run`."""
        self.outputs = {}
        hooks = [
            module.register_forward_hook(self._keep(path, noise))
            for path, module in self._points.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, path: str, noise: float) -> Callable[[nn.Module, object, object], object]:
        generator = torch.Generator().manual_seed(0)

        def keep(_: nn.Module, __: object, output: object) -> object:
            first = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(first, Tensor) or not first.is_floating_point() or first.dim() < 2:
                return None
            if noise:
                signs = torch.randint(0, 2, first.shape, generator=generator) * 2 - 1
                first = first + first * (noise * signs).to(first)
            self.outputs.setdefault(path, []).append(first.clone())
            if not noise:
                return None
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return keep


@dataclass(slots=True)
class _Place:
    """Where a module of the copy has a parameter, and where its value is.

    values     the module's parameters or its buffers
    rest       what is there while the module does not run
    parameter  the served model's, by its name; else `original` is still there, and `views` are
               parameters that are parts of it (an expert's matrix of all experts')
    """

    module: nn.Module
    values: dict[str, Any]
    name: str
    path: str
    rest: Tensor
    original: weakref.ref[Tensor]
    parameter: DeltaParameter | None = None
    views: tuple[DeltaParameter, ...] = ()

    @property
    def is_filled(self) -> bool:
        return self.values[self.name] is not self.rest

    def put(self, value: Tensor) -> None:
        self.values[self.name] = value

    def value(self, deltas: Deltas) -> Tensor:
        if self.parameter is not None:
            value = _changed(self.parameter, deltas.get(self.parameter))
            return value.t() if isinstance(self.module, Conv1D) and value.dim() == 2 else value
        changed = [view for view in self.views if view in deltas]
        if not changed:
            return self.rest
        whole = self.rest.detach().clone(memory_format=torch.contiguous_format)
        for view in changed:
            base = view.base
            offset = base.storage_offset() - self.rest.storage_offset()
            part = torch.as_strided(whole, base.shape, base.stride(), offset)
            part.copy_(_changed(view, deltas[view]))
        return whole


class Definition:
    """Make it before the model's layers are replaced, `bind` it after, then `run` it."""

    def __init__(self, model: PreTrainedModel) -> None:
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.model: PreTrainedModel = copy.deepcopy(model, shared)
        use_attention(self.model, "eager")
        self.parameters: set[DeltaParameter] = set()  # whose deltas `run` can add
        self._deltas: Deltas = {}
        self._places: dict[nn.Module, list[_Place]] = {}
        for path, module in self.model.named_modules():
            for name, value in module._parameters.items():
                if value is not None:
                    whole_name = f"{path}.{name}" if path else name
                    place = _Place(
                        module,
                        cast(dict[str, Any], module._parameters),
                        name,
                        whole_name,
                        _empty(value),
                        weakref.ref(value),
                    )
                    self._places.setdefault(module, []).append(place)
        for place in self._all_places():
            place.put(place.rest)

    def bind(self, parameters: Mapping[str, DeltaParameter]) -> None:
        """Say where the weights are: in the served model's parameters, by name, or where they were.

        Raises ConfigError if one is gone.
        """
        by_storage: dict[int, list[DeltaParameter]] = {}
        for parameter in dict.fromkeys(parameters.values()):
            if parameter.holds_base:
                by_storage.setdefault(_storage(parameter.base), []).append(parameter)
        for place in self._all_places():
            original = place.original()
            place.parameter = parameters.get(place.path)
            if place.parameter is not None:
                self.parameters.add(place.parameter)
            elif original is None:
                raise ConfigError(f"the self-check cannot find the weights of {place.path}")
            else:
                place.rest = original
                place.put(original)
                place.views = tuple(by_storage.get(_storage(original), ()))
                self.parameters.update(place.views)
        self._bind_buffers(parameters)
        for module in self.model.modules():
            self._fill_while_running(module, self._places.get(module, []))
        for layer in decoder_layers(self.model).values():
            inside = [p for module in layer.modules() for p in self._places.get(module, [])]
            self._fill_while_running(layer, inside)

    def _bind_buffers(self, parameters: Mapping[str, DeltaParameter]) -> None:
        """Those that can have a delta: a router's bias is a buffer in some definitions."""
        for path, module in self.model.named_modules():
            for name, value in module._buffers.items():
                parameter = parameters.get(f"{path}.{name}")
                if value is not None and parameter is not None:
                    buffers = cast(dict[str, Any], module._buffers)
                    kept = weakref.ref(value)
                    place = _Place(module, buffers, name, f"{path}.{name}", value, kept, parameter)
                    self._places.setdefault(module, []).append(place)
                    self.parameters.add(parameter)

    @torch.inference_mode()
    def run(self, ids: Tensor, deltas: Deltas, watch: Watch, noise: float = 0.0) -> Tensor:
        """Forward pass of ``ids [B, T]`` -> logits ``[B, T, V]``, with these deltas added.

        noise  a relative error of this size, of either sign, in every value that a layer gives
        """
        self._deltas = deltas
        try:
            with watch.watching(noise):
                logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            self._deltas = {}
        return logits

    @property
    def has_experts(self) -> bool:
        """Whether some parameter is of many matrices, of which routing chooses some."""
        return any(place.rest.dim() == 3 for place in self._all_places())

    def _all_places(self) -> Iterator[_Place]:
        for places in self._places.values():
            yield from places

    def _fill_while_running(self, module: nn.Module, places: list[_Place]) -> None:
        """Before its forward: the weights that are not there. After: without those again."""
        wanted = [place for place in places if place.parameter is not None or place.views]
        if not wanted:
            return
        filled: list[list[_Place]] = []

        def before(*_: object) -> None:
            missing = [place for place in wanted if not place.is_filled]
            for place in missing:
                place.put(place.value(self._deltas))
            filled.append(missing)

        def after(*_: object) -> None:
            for place in filled.pop():
                place.put(place.rest)

        module.register_forward_pre_hook(before, prepend=True)
        module.register_forward_hook(after, always_call=True)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _empty(value: Tensor) -> Tensor:
    """What says shape, dtype and device and takes no memory."""
    return value.new_zeros(()).expand(value.shape)


def _changed(parameter: DeltaParameter, delta: TensorDelta | None) -> Tensor:
    """The value with a delta added: ``[out, in]``, rounded once to the parameter's dtype."""
    base = parameter.base
    if delta is None:
        return base
    if isinstance(parameter, ExpertParameter) and parameter.is_turned_for(delta):
        return _added(base.t(), delta).t()
    return _added(base, delta)


def _added(base: Tensor, delta: TensorDelta) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    value = base.to(wide, copy=True)
    if delta.shape != delta.base_shape:  # rows past the base's end
        value = torch.cat([value, value.new_zeros(delta.shape[0] - len(base), *base.shape[1:])])
    rows = value[: len(base)]
    for term in delta.terms:
        if isinstance(term, LowRankTerm):
            rows.addmm_(term.b.to(value).t(), term.a.to(value))
        else:
            rows += term.to_dense().to(value)
    if delta.exact is not None:
        start = delta.exact.row_start
        value[start : start + len(delta.exact.values)] = delta.exact.values.to(value)
    return value.to(base.dtype)
