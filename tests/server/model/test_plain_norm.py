"""Which norms get a weight for every row, and that they then compute what their definition does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from server.model.norm import DeltaNorm
from server.model.observe import Call, Observation
from server.model.plain_norm import agrees, plain_axes
from server.ops.kernels import TorchKernels
from tests.server.model.test_fused_layer import prepared

N_TOKENS, WIDTH = 7, 8


class Gated(nn.RMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        y: Tensor = super().forward(x)
        return y if gate is None else y * gate


class SquaredNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return x * self.weight**2


class MixingNorm(nn.RMSNorm):
    """Not of one row alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(dim=-2, keepdim=True)


def seen_with(norm: nn.Module, *calls: tuple[Tensor, ...]) -> Observation:
    seen = Observation(N_TOKENS, 3)
    seen.calls[norm, "forward"] = [Call(x, {}, tuple(t.shape for t in x), norm(*x)) for x in calls]
    return seen


def weighted(norm: nn.Module) -> nn.Module:
    for parameter in norm.requires_grad_(False).parameters():
        parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return norm


@pytest.mark.parametrize("make", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1, 7, 8), 1), ((1, 7, 2, 8), 1), ((1, 2, 7, 8), 2), ((2, 3, 7, 8), 2), ((7, 8), 0)],
)
def test_plain_norm_rows_have_their_slots_weights(
    make: Callable[..., nn.Module], shape: tuple[int, ...], axis: int
) -> None:
    norm = weighted(make(WIDTH, eps=1e-6))
    x = torch.randn(shape)
    seen = Observation(N_TOKENS, 5)
    seen.calls[norm, "forward"] = [Call((x,), {}, (x.shape,), norm(x))]
    assert plain_axes(norm, seen) == {len(shape): axis}
    assert agrees(norm, {len(shape): axis}, seen, TorchKernels())


def test_agrees_with_another_axis_is_false() -> None:
    """What was wrong: heads taken for tokens."""
    norm = weighted(nn.RMSNorm(WIDTH, eps=1e-6))
    seen = seen_with(norm, (torch.randn(1, N_TOKENS, N_TOKENS, WIDTH),))
    assert not agrees(norm, {4: 3}, seen, TorchKernels())


@pytest.mark.parametrize("make", [SquaredNorm, MixingNorm])
def test_agrees_with_other_forms_is_false(make: Callable[..., nn.Module]) -> None:
    norm = weighted(make(WIDTH, eps=1e-6))
    x = torch.randn(1, N_TOKENS, WIDTH)
    seen = seen_with(norm, (x,))
    assert not agrees(norm, {3: 1}, seen, TorchKernels())


def test_plain_axes_of_a_gated_norm_is_none() -> None:
    norm = weighted(Gated(WIDTH))
    x = torch.randn(1, N_TOKENS, WIDTH)
    assert plain_axes(norm, seen_with(norm, (x, x))) is None


@pytest.mark.parametrize("shape", [(1, 7, 7, 8), (1, 14, 8), (1, 8, 7)])
def test_plain_axes_without_one_axis_of_tokens_is_none(shape: tuple[int, ...]) -> None:
    norm = weighted(nn.RMSNorm(shape[-1], eps=1e-6))
    assert plain_axes(norm, seen_with(norm, (torch.randn(shape),))) is None


def test_plain_axes_of_a_norm_that_nobody_calls_is_none() -> None:
    assert plain_axes(nn.RMSNorm(WIDTH), Observation(N_TOKENS, 3)) is None


def test_norms_of_a_model_are_replaced_whatever_the_kernels_hold() -> None:
    """Compiled kernels hold what cannot be copied, and modules find them through the store."""

    class Uncopied(TorchKernels):
        def __deepcopy__(self, _: object) -> TorchKernels:
            raise ValueError("ctypes objects containing pointers cannot be pickled")

    layer = prepared("qwen3", Uncopied()).model.model.layers[0]
    norms = (layer.input_layernorm, layer.self_attn.q_norm, layer.self_attn.k_norm)
    assert all(isinstance(norm, DeltaNorm) for norm in norms)
