"""Full weights ``W_base + dW`` of a variant whose deltas are resident as well.

They stand beside the deltas, one operation per unit (a `Product` of the base), and are used in
steps all of whose rows are the variant's; any other step applies the deltas. So they may come and
go between any two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from compressor.artifact.reader import Artifact
from compressor.codecs.term import TensorDelta
from server.deltas.parameter import DeltaParameter
from server.model.linear import DeltaLinear, Product
from server.ops.linear import LinearOp

MergedOps = dict[Product, LinearOp]
FLOAT_BYTES = 4
MERGE_COPIES = 3  # float32 copies of one parameter while it is merged


class MergeStopped(Exception):
    """The build was told to stop; nothing is wrong."""


class MergeableWeights:
    """Every unit of a model, and the weights of slots merged for them.

    `install`, `remove` belong to the engine thread between steps; `build` may run beside steps: it
    reads base weights, which never change, and touches no unit.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, DeltaParameter]) -> None:
        self._parameters = parameters
        self._units = _units(model)
        self.n_bytes = ops_bytes(self._units)  # of one variant
        # Beside them while building: one unit's base and merged weights, one parameter's copies.
        self.build_bytes = max(
            2 * ops_bytes([unit])
            + MERGE_COPIES * FLOAT_BYTES * max(_numel(p) for p in unit.parameters_in_order)
            for unit in self._units
        )

    def build(self, artifact: Artifact, may_go_on: Callable[[], bool]) -> MergedOps:
        """Merge every unit that the artifact changes, one at a time. Raises MergeStopped."""
        deltas = {self._parameters[d.name]: d for d in artifact.tensors}
        built: MergedOps = {}
        for unit in self._units:
            if not may_go_on():
                raise MergeStopped
            if any(p in deltas for p in unit.parameters_in_order):
                built[unit] = _merge(unit.parameters_in_order, deltas)
        return built

    def install(self, slot: int, ops: MergedOps) -> None:
        """Use these in steps of the slot alone from now on."""
        for unit, op in ops.items():
            unit.merged[slot] = op

    def remove(self, slot: int) -> None:
        """Apply the slot's deltas again."""
        for unit in self._units:
            unit.merged.pop(slot, None)


def _units(model: nn.Module) -> list[Product]:
    found: dict[Product, None] = {}
    for module in model.modules():
        if isinstance(module, DeltaLinear):
            found[module.product] = None
    return list(found)


@torch.inference_mode()
def _merge(
    parameters: Sequence[DeltaParameter], deltas: Mapping[DeltaParameter, TensorDelta]
) -> LinearOp:
    weights = []
    for parameter in parameters:
        base = parameter.base
        delta = deltas.get(parameter)
        if delta is not None:
            merged = delta.merge(base.cpu())[: len(base)]
            base = merged.to(parameter.dtype).to(parameter.device)
        weights.append(base)
    whole = weights[0] if len(weights) == 1 else torch.cat(weights)
    return parameters[0].kernels.linear(whole.contiguous())


def ops_bytes(ops: Iterable[Product]) -> int:
    """Bytes of the merged weights of these units."""
    return sum(_numel(p) * p.dtype.itemsize for unit in ops for p in unit.parameters_in_order)


def _numel(parameter: DeltaParameter) -> int:
    return int(torch.Size(parameter.shape).numel())
