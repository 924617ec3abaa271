"""Attention sinks that may be each variant's own.

A sink is a logit of each head that joins the softmax and has no value (gpt-oss): a 1-D parameter
that the attention module hands to the attention function. Rows of several variants attend together,
each with its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from server.deltas.parameter import DeltaParameter
from server.deltas.residency import Residency
from server.model.context import StepContext
from server.model.kv_store import KVStore, ProbedCall
from server.ops.kernels import Kernels


class RowSinks:
    """One module's sinks, of the rows of the step in progress."""

    def __init__(self, parameter: DeltaParameter, context: StepContext) -> None:
        self._parameter, self._context = parameter, context

    def __call__(self) -> Tensor:
        """``[H]`` if all rows have the base's, else ``[T, H]``."""
        parameter, rows = self._parameter, self._context.rows
        if rows is None or not parameter.touches(rows):
            return parameter.base
        assert parameter.vectors is not None
        return parameter.vectors.index_select(0, parameter.vector_index(rows))


def serve_sinks(
    model: nn.Module,
    seen: Mapping[nn.Module, Sequence[ProbedCall]],
    store: KVStore,
    parameters: dict[str, DeltaParameter],
    context: StepContext,
    kernels: Kernels,
    residency: Residency,
) -> None:
    """Enter the sinks that the modules were seen to hand over in `parameters`, and let `store` take
    each row's own. Those that are there already somebody else serves.
    """
    for path, module in model.named_modules():
        given = [call.sinks for call in seen.get(module, ())]
        for name, value in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if full not in parameters and given and all(value is sinks for sinks in given):
                parameters[full] = DeltaParameter(full, value.data, kernels, residency)
                store.sinks[module] = RowSinks(parameters[full], context)
