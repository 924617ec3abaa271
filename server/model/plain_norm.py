"""Which norms can be replaced: those called with one tensor whose tokens lie on a known axis, and
whose result is that of `DeltaNorm` when rows have weights of their own.

Gated norms, norms with other arguments or with a weight per head and dimension are none: they stay
as they are (see `server.model.by_slot`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from server.deltas.parameter import DeltaParameter
from server.model.context import StepContext
from server.model.norm import DeltaNorm
from server.model.observe import Call, Observation, tensors_in
from server.ops.kernels import Kernels
from server.ops.row_mapping import BASE_SLOT, RowMapping, Segment

TOLERANCE = {torch.float32: 1e-4}  # of the largest value; others are rounded at other places
ROUNDED = 0.03
N_SLOTS = 2  # beside the base, in the trial


def plain_axes(module: nn.Module, seen: Observation) -> dict[int, int] | None:
    """The tokens' axis by the number of axes of what `module` norms; None if it is no norm with a
    weight for every column, or not called as one.
    """
    calls = seen.of(module)
    if not _is_affine_norm(module) or not calls:
        return None
    axes: dict[int, int] = {}
    for call in calls:
        x = _only_tensor(call)
        axis = None if x is None else seen.axis(x.shape)
        if x is None or axis is None or axis == x.dim() - 1:
            return None
        if axes.setdefault(x.dim(), axis) != axis or not _keeps_shape(call, x):
            return None
    return axes


def agrees(
    module: nn.Module,
    axes: Mapping[int, int],
    seen: Observation,
    kernels: Kernels,
) -> bool:
    """Whether `DeltaNorm` gives rows of several slots what `module` gives with their weights."""
    try:
        return all(_agrees(module, axes, call, kernels) for call in seen.of(module))
    except (RuntimeError, ValueError, TypeError, IndexError):  # not the form that it looked like
        return False


def _is_affine_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    has_children = next(module.children(), None) is not None
    return (
        "Norm" in type(module).__name__
        and not has_children
        and set(own) in ({"weight"}, {"weight", "bias"})
        and all(value.dim() == 1 for value in own.values())
    )


def _only_tensor(call: Call) -> Tensor | None:
    """What the call was given, if that is one tensor and nothing else."""
    given = [*call.args, *call.kwargs.values()]
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None


def _keeps_shape(call: Call, x: Tensor) -> bool:
    return isinstance(call.output, Tensor) and call.output.shape == x.shape


def _agrees(module: nn.Module, axes: Mapping[int, int], call: Call, kernels: Kernels) -> bool:
    (x,) = tensors_in((call.args, call.kwargs))
    axis = axes[x.dim()]
    segments = _thirds(x.shape[axis])
    trial, values = _trial(module, axes, segments, kernels)
    with torch.inference_mode():
        ours = trial(x)
        for segment in segments:
            wanted = _with_values(module, values, segment.slot + 1)(x)
            part = (segment.start, segment.end - segment.start)
            if not _close(ours.narrow(axis, *part), wanted.narrow(axis, *part)):
                return False
    return True


def _thirds(n: int) -> list[Segment]:
    """A segment of the base and one of each slot of the trial."""
    ends = [n // 3, 2 * n // 3, n]
    starts = [0, *ends[:-1]]
    slots = range(BASE_SLOT, N_SLOTS)
    return [Segment(*found) for found in zip(slots, starts, ends, strict=True)]


def _trial(
    module: nn.Module, axes: Mapping[int, int], segments: Sequence[Segment], kernels: Kernels
) -> tuple[DeltaNorm, dict[str, Tensor]]:
    """A `DeltaNorm` of parameters that only it has, and their values ``[1 + slots, n]``."""
    generator = torch.Generator().manual_seed(0)
    parameters: dict[str, DeltaParameter] = {}
    values: dict[str, Tensor] = {}
    for name, value in module.named_parameters(recurse=False):
        noise = torch.rand((N_SLOTS, len(value)), generator=generator).to(value)
        values[name] = torch.cat([value.data.unsqueeze(0), value.data + noise])
        parameters[name] = DeltaParameter(name, value.data, kernels)
        parameters[name].vectors = values[name]
        parameters[name].vector_slots = frozenset(range(N_SLOTS))
    context = StepContext()
    device = next(iter(values.values())).device
    context.rows = RowMapping(segments, device)
    norm = DeltaNorm(module, parameters["weight"], parameters.get("bias"), context, axes)
    return norm, values


def _with_values(module: nn.Module, values: Mapping[str, Tensor], place: int) -> nn.Module:
    other = copy.deepcopy(module)
    for name, choices in values.items():
        other.get_parameter(name).data.copy_(choices[place])
    return other


def _close(ours: Tensor, wanted: Tensor) -> bool:
    tolerance = TOLERANCE.get(wanted.dtype, ROUNDED)
    bound = tolerance * float(wanted.float().abs().max())
    return torch.allclose(ours.float(), wanted.float(), rtol=0, atol=bound)
