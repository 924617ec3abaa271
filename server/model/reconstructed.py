"""Reconstructed weights ``W_base + dW`` of variants, by slot: the one place that makes them.

They are one operation per unit (a `Product` of the base) and stand beside the base's own. Two come
for them: the loader, for a variant of mode `reconstruct`, before its slot is ready; and
`Reconstructor`, for a hot variant whose deltas are resident. What differs is when a step uses them
(`used_in`). An embedding is no unit: it looks rows up and adds their deltas, without a product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from compressor.artifact.reader import Artifact
from compressor.codecs.term import TensorDelta
from server.deltas.failures import check_range
from server.deltas.parameter import DeltaParameter
from server.model.embedding import DeltaEmbedding
from server.model.linear import DeltaLinear, Product
from server.ops.linear import LinearOp

ReconstructedOps = dict[Product, LinearOp]
NOBODY: frozenset[int] = frozenset()
FLOAT_BYTES = 4
FLOAT_COPIES = 3  # float32 copies of one parameter while it is reconstructed


class ReconstructStopped(Exception):
    """The build was told to stop; nothing is wrong."""


class ReconstructedWeights:
    """Every unit of a model, and the weights of slots that were reconstructed for them.

    `install`, `remove` and `used_in` belong to the engine thread between steps; `build` may run
    beside steps: it reads base weights, which never change, and touches no unit.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, DeltaParameter]) -> None:
        self._parameters = parameters
        self._units = products_of(model)
        self._only_multiplied = _only_multiplied(model, self._units)
        self._always: dict[int, bool] = {}  # by slot: see `install`
        self._stream = _own_stream(parameters)
        self.n_bytes = ops_bytes(self._units)  # of one variant at most
        # Beside them while building: one unit's base and own weights, one parameter's copies.
        self.build_bytes = max(
            2 * ops_bytes([unit])
            + FLOAT_COPIES * FLOAT_BYTES * max(_numel(p) for p in unit.parameters_in_order)
            for unit in self._units
        )

    def replaces(self, parameter: DeltaParameter) -> bool:
        """Whether nothing reads a slot's terms of this parameter if its weights are always used."""
        return parameter in self._only_multiplied

    def bytes_for(self, artifact: Artifact) -> int:
        """Device bytes of what `build` makes of it."""
        changed = self._deltas(artifact).keys()
        return ops_bytes(u for u in self._units if not changed.isdisjoint(u.parameters_in_order))

    def build(
        self, artifact: Artifact, may_go_on: Callable[[], bool] = lambda: True
    ) -> ReconstructedOps:
        """Reconstruct every unit that the artifact changes, one at a time.

        On a GPU that happens on a stream of its own, which has finished when this returns. Raises
        ReconstructStopped.
        """
        deltas = self._deltas(artifact)
        built: ReconstructedOps = {}
        beside = contextlib.nullcontext() if self._stream is None else _on(self._stream)
        with beside:
            for unit in self._units:
                if not may_go_on():
                    raise ReconstructStopped
                if any(p in deltas for p in unit.parameters_in_order):
                    built[unit] = _reconstruct(unit.parameters_in_order, deltas)
        if self._stream is not None:
            self._stream.synchronize()
        return built

    def _deltas(self, artifact: Artifact) -> dict[DeltaParameter, TensorDelta]:
        """By parameter, but for weights that the variant unties: those keep their terms."""
        untied = artifact.config.base.untied_names
        return {
            self._parameters[delta.name]: delta
            for delta in artifact.tensors
            if delta.name not in untied and delta.name in self._parameters
        }

    def install(self, slot: int, ops: ReconstructedOps, *, always: bool) -> None:
        """Use these from now on: in every step with rows of the slot, or in steps of it alone."""
        for unit, op in ops.items():
            unit.reconstructed[slot] = op
        self._always[slot] = always

    def remove(self, slot: int) -> None:
        """Forget the slot's weights, if it has any."""
        if self._always.pop(slot, None) is not None:
            for unit in self._units:
                unit.reconstructed.pop(slot, None)

    def used_in(self, slots: Collection[int]) -> frozenset[int]:
        """Slots whose reconstructed weights a step uses that has rows of all these."""
        if not self._always:
            return NOBODY
        alone = len(slots) == 1
        return frozenset(s for s in slots if self._always.get(s) or (alone and s in self._always))


def products_of(model: nn.Module) -> list[Product]:
    """All of a model's, each once."""
    linears = (module for module in model.modules() if isinstance(module, DeltaLinear))
    return list(dict.fromkeys(linear.product for linear in linears))


def _only_multiplied(model: nn.Module, units: Sequence[Product]) -> frozenset[DeltaParameter]:
    embeddings = [module for module in model.modules() if isinstance(module, DeltaEmbedding)]
    parameters = {p for unit in units for p in unit.parameters_in_order}
    return frozenset(p for p in parameters if not any(e.reads(p) for e in embeddings))


def _own_stream(parameters: Mapping[str, DeltaParameter]) -> torch.cuda.Stream | None:
    device = next(iter(parameters.values())).device
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _on(stream: torch.cuda.Stream) -> contextlib.AbstractContextManager[None]:
    context: contextlib.AbstractContextManager[None] = torch.cuda.stream(stream)
    return context


@torch.inference_mode()
def _reconstruct(
    parameters: Sequence[DeltaParameter], deltas: Mapping[DeltaParameter, TensorDelta]
) -> LinearOp:
    weights = []
    for parameter in parameters:
        weight = parameter.base
        delta = deltas.get(parameter)
        if delta is not None:
            own = delta.reconstruct(weight.cpu())[: len(weight)]
            weight = own.to(parameter.dtype)
            check_range(delta.name, weight)
            weight = weight.to(parameter.device)
        weights.append(weight)
    whole = weights[0] if len(weights) == 1 else torch.cat(weights)
    return parameters[0].kernels.linear(whole.contiguous())


def ops_bytes(ops: Iterable[Product]) -> int:
    """Bytes of the reconstructed weights of these units."""
    return sum(_numel(p) * p.dtype.itemsize for unit in ops for p in unit.parameters_in_order)


def _numel(parameter: DeltaParameter) -> int:
    return int(torch.Size(parameter.shape).numel())
