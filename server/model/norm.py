"""Norms whose weight may be each variant's own."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from server.deltas.parameter import DeltaParameter
from server.model.context import StepContext
from server.ops.attention import HeadNorm
from server.ops.norm import RmsForm, rms_norm

AHEAD = "impart_normed_ahead"  # attribute of a sum: the norm that follows, and its result


class DeltaNorm(nn.Module):
    """Any norm that is affine in a 1-D weight (and bias): LayerNorm and every RMSNorm.

    A known RMSNorm is one kernel call. Otherwise the inner norm with a neutral weight gives the
    normalised rows; each row is then scaled by its own slot's weight. Both are found by probing.

    axes  the tokens' axis by the number of axes of what is normed: definitions norm heads before
          they transpose them, or after
    kept  whether it sees only the rows whose logits are wanted
    """

    def __init__(
        self,
        inner: nn.Module,
        weight: DeltaParameter,
        bias: DeltaParameter | None,
        context: StepContext,
        axes: Mapping[int, int],
        *,
        kept: bool = False,
    ) -> None:
        super().__init__()
        self.inner = inner
        self._form = find_form(inner) if bias is None else None
        self._offset = _weight_offset(inner)
        self._unit = copy.deepcopy(inner)
        with torch.no_grad():
            _weight_of(self._unit).fill_(1.0 - self._offset)
            if bias is not None:
                self._unit.get_parameter("bias").zero_()
        self._weight, self._bias = weight, bias
        self._context, self._axes, self._kept = context, dict(axes), kept

    @property
    def weight(self) -> Tensor:
        return self._weight.base

    @property
    def can_add(self) -> bool:
        """Whether `add` is one kernel call."""
        return self._form is not None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., n]``, tokens on the axis that the definition has them on -> the same shape."""
        owner, ahead = getattr(x, AHEAD, (None, None))
        if owner is self and ahead is not None:
            delattr(x, AHEAD)
            return cast(Tensor, ahead)
        return self.along(x, self._axes[x.dim()])

    def along(self, x: Tensor, axis: int) -> Tensor:
        """``x [..., n]`` with the tokens on `axis` -> the same shape."""
        if self._form is not None and x.dtype == self._weight.dtype:
            weights, index = self._weights_along(x, axis)
            return self._weight.kernels.rms_norm(x, weights, index, self._form)
        return self._in_torch(x, axis)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``residual + x`` normed, and that sum; shapes as in `forward`."""
        if self._form is None or not x.dtype == residual.dtype == self._weight.dtype:
            summed = residual + x
            return self(summed), summed
        weights, index = self._weights_along(x, self._axes[x.dim()])
        return self._weight.kernels.add_rms_norm(x, residual, weights, index, self._form)

    def add_ahead(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + x``. Normed already: whoever calls this norm with it gets that for nothing.

        The normed rows hang on the sum, so that they cannot be taken for those of another tensor,
        nor live longer than it.
        """
        ahead, summed = self.add(x, residual)
        setattr(summed, AHEAD, (self, ahead))
        return summed

    def of_heads(self, dtype: torch.dtype) -> HeadNorm | None:
        """For a kernel that does more, in this step; None if it is none of the usual norms."""
        if self._form is None or dtype != self._weight.dtype:
            return None
        return HeadNorm(*self._weights(), self._form)

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """Of the step's rows: all weights, and each row's place among them."""
        rows, weights = self._context.rows_of(kept=self._kept), self._weight.vectors
        assert weights is not None
        if rows is None or not self._weight.touches(rows):
            return weights, None
        return weights, self._weight.vector_index(rows)

    def _weights_along(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor | None]:
        """Of rows that are on this axis, as `Kernels.rms_norm` takes them."""
        weights, index = self._weights()
        if index is None:
            return weights, None
        assert len(index) == x.shape[axis], "a norm got other rows than the step has for it"
        times = math.prod(x.shape[:axis])
        return weights, index if times == 1 else index.repeat(times)

    def _in_torch(self, x: Tensor, axis: int) -> Tensor:
        rows = self._context.rows_of(kept=self._kept)
        changed = rows is not None and (
            self._weight.touches(rows) or (self._bias is not None and self._bias.touches(rows))
        )
        if not changed:
            unchanged: Tensor = self.inner(x)
            return unchanged
        assert rows is not None
        rows.check(x.shape[axis])
        y: Tensor = self._unit(x)
        y = y * _along(self._weight.vector_rows(rows) + self._offset, x, axis)
        return y if self._bias is None else y + _along(self._bias.vector_rows(rows), x, axis)


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """``values [T or 1, n]`` so that they meet the tokens on this axis of x."""
    shape = [1] * x.dim()
    shape[axis], shape[-1] = len(values), values.shape[1]
    return values.view(shape)


def find_form(norm: nn.Module) -> RmsForm | None:
    """The form of a model's RMSNorm, by comparing results; None if it is something else."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float):
        return None
    probe = copy.deepcopy(norm).cpu()
    weight = _weight_of(probe)
    generator = torch.Generator().manual_seed(0)
    weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    x = torch.randn(16, len(weight), generator=generator).to(weight.dtype)
    wanted = probe(x)
    tolerance = 1e-6 if weight.dtype is torch.float32 else 0.0  # nearest forms differ by one ulp
    for offset, casts_first in itertools.product((0.0, 1.0), (True, False)):
        form = RmsForm(eps, offset, casts_first)
        ours = rms_norm(x, weight.unsqueeze(0), None, form)
        if wanted.dtype == ours.dtype and torch.allclose(
            ours.float(), wanted.float(), rtol=tolerance, atol=tolerance
        ):
            return form
    return None


def _weight_of(norm: nn.Module) -> Tensor:
    return norm.get_parameter("weight").data


def _weight_offset(norm: nn.Module) -> float:
    """0 if the norm multiplies by its weight, 1 if by one plus it. ValueError if neither."""
    probe = copy.deepcopy(norm).float().cpu()
    weight = _weight_of(probe)
    if "bias" in dict(probe.named_parameters()):
        probe.get_parameter("bias").data.zero_()
    x = torch.linspace(-1.0, 2.0, weight.numel()).unsqueeze(0)
    outputs = []
    for value in (0.0, 1.0, 2.0):
        weight.fill_(value)
        outputs.append(probe(x))
    zero, one, two = outputs
    if torch.allclose(two - one, one - zero, atol=1e-5):
        if torch.allclose(zero, torch.zeros_like(zero)):
            return 0.0
        if torch.allclose(zero * 2, one, atol=1e-5):
            return 1.0
    raise ValueError(f"{type(norm).__name__} is not affine in its weight")
