"""What one parameter of an architecture is, by the module that has it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from compressor.codecs.term import TensorDelta

# table: a 2-D parameter of any other module (a router of experts), stored exactly like a vector;
# experts: 3-D, becomes one linear per expert; other: a convolution, say, stored exactly.
Kind = Literal["linear", "embedding", "vector", "table", "experts", "other"]

_MAX_DIMENSIONS = 4  # of a tensor in an artifact


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter as the model declares it, or a buffer that its checkpoint holds.

    shape       in ``[out, in]`` orientation for matrices; as a delta has it, see `storable_shape`
    transposed  True if the checkpoint stores ``[in, out]`` (GPT-2's Conv1D, gpt-oss's experts)
    integral    True for whole numbers (a table of expert numbers, say)
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    transposed: bool
    module: str
    integral: bool = False

    def takes(self, delta: TensorDelta) -> bool:
        """Whether a delta is of this parameter. Artifacts of earlier releases have the matrices of
        experts as they are stored; every delta says which way round it is.
        """
        if delta.transposed == self.transposed:
            return delta.base_shape == self.shape
        return self.transposed and delta.base_shape == self.shape[::-1]


def storable_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a delta has of a tensor: 1 to 4 numbers, the first of them the same.

    A scalar has one element; the dimensions of a 5-D tensor (a convolution over video) after the
    first are one.
    """
    if not shape:
        return (1,)
    return shape if len(shape) <= _MAX_DIMENSIONS else (shape[0], math.prod(shape[1:]))


def describe_parameter(name: str, part: str, module: Module, tensor: Tensor) -> Parameter:
    """Say what `tensor`, the parameter or buffer `part` of `module`, is."""
    import torch
    from transformers.pytorch_utils import Conv1D

    shape = tuple(tensor.shape)
    integral = not tensor.dtype.is_floating_point
    kind: Kind = "other"
    transposed = False
    if len(shape) <= 1:
        kind = "vector"
    elif len(shape) == 2 and part == "weight" and not integral:
        if isinstance(module, torch.nn.Embedding):
            kind = "embedding"
        elif isinstance(module, torch.nn.Linear):
            kind = "linear"
        elif isinstance(module, Conv1D):
            kind, transposed = "linear", True
            shape = (shape[1], shape[0])
        else:
            kind = "table"
    elif len(shape) == 2:
        kind = "table"
    elif not integral and _holds_experts(module, shape):
        kind, transposed = "experts", _stores_inputs_first(module)
        if transposed:
            shape = (shape[0], shape[2], shape[1])
    shape = storable_shape(shape)
    return Parameter(name, kind, shape, transposed, type(module).__name__, integral)


def _holds_experts(module: Module, shape: tuple[int, ...]) -> bool:
    """One matrix per expert; a stack of vectors is none."""
    import torch

    is_convolution = isinstance(module, torch.nn.modules.conv._ConvNd)
    return len(shape) == 3 and not is_convolution and min(shape[1:]) > 1


def _stores_inputs_first(module: Module) -> bool:
    """Whether its experts are ``[in, out]``: transformers says so, or (Llama 4) the shapes do, for
    the second product's inputs are half the first one's outputs.
    """
    own = {name: tuple(value.shape) for name, value in module.named_parameters(recurse=False)}
    first, last = own.get("gate_up_proj", ()), own.get("down_proj", ())
    by_shape = len(first) == len(last) == 3 and first[1:] == (last[2], 2 * last[1])
    return by_shape or bool(getattr(module, "is_transposed", False))
