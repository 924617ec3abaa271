"""What a parameter is, by its module and shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.checkpoint.parameter import Kind, describe_parameter, storable_shape


class Stack(nn.Module):
    """Holds what no module of torch does."""


@pytest.mark.parametrize(
    ("module", "part", "shape", "kind"),
    [
        (nn.Linear(2, 3), "weight", (3, 2), "linear"),
        (nn.Embedding(3, 2), "weight", (3, 2), "embedding"),
        (nn.LayerNorm(2), "weight", (2,), "vector"),
        (nn.Conv1d(2, 2, 3), "weight", (2, 2, 3), "other"),
        (Stack(), "gate_up_proj", (4, 6, 2), "experts"),
        (Stack(), "decay", (1, 1, 6), "other"),
        (Stack(), "A_log", (4, 6), "table"),
        (Stack(), "scalar", (), "vector"),
    ],
)
def test_describe_parameter_says_the_kind(
    module: nn.Module, part: str, shape: tuple[int, ...], kind: Kind
) -> None:
    found = describe_parameter("x", part, module, torch.empty(shape))
    assert (found.kind, found.integral) == (kind, False)
    assert found.shape == (shape or (1,))


def test_describe_parameter_whole_numbers_are_no_linear() -> None:
    found = describe_parameter("x", "weight", nn.Linear(2, 3), torch.empty(3, 2, dtype=torch.int64))
    assert (found.kind, found.integral) == ("table", True)


@pytest.mark.parametrize(
    ("shape", "stored"), [((), (1,)), ((3, 2, 2, 2), (3, 2, 2, 2)), ((3, 1, 2, 2, 2), (3, 8))]
)
def test_storable_shape_has_one_to_four_numbers(
    shape: tuple[int, ...], stored: tuple[int, ...]
) -> None:
    assert storable_shape(shape) == stored
