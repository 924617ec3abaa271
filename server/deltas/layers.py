"""Modules that replace the base model's linears, embeddings and norms: base result, then deltas.

They are installed on module instances by `server.engine.surgery`; the Hugging Face model definition
around them stays untouched. `StepContext` says which rows belong to which slot in this step.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.deltas.parameter import DeltaParameter
from server.ops.rows import RowPlan


class StepContext:
    """What the layers need to know about the current engine step.

    rows         plan of the hidden rows
    output_rows  plan of the rows whose logits are wanted (the output embedding sees only those)
    """

    def __init__(self) -> None:
        self.rows: RowPlan | None = None
        self.output_rows: RowPlan | None = None


class DeltaLinear(nn.Module):
    """``y = x W_base^T + b`` for all rows in one GEMM, then each slot's delta on its rows."""

    def __init__(
        self,
        weight: DeltaParameter,
        bias: DeltaParameter | None,
        context: StepContext,
        *,
        is_output: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.base, requires_grad=False)
        self._weight, self._bias = weight, bias
        self._context = context
        self._is_output = is_output

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., n]`` -> ``[..., m]``; wider than m if a slot has added vocabulary rows."""
        rows = self._context.output_rows if self._is_output else self._context.rows
        flat = x.reshape(-1, x.shape[-1])
        if rows is None or not rows.slots:
            bias = None if self._bias is None else self._bias.base
            return F.linear(flat, self._weight.base, bias).view(*x.shape[:-1], -1)
        y = self._base(flat, rows)
        for pool in self._weight.pools.values():
            pool.add_(y, flat, rows)
        if self._bias is not None:
            y += self._bias.vector_rows(rows)
        if self._weight.extra:
            y = self._with_extra(y, flat, rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _base(self, flat: Tensor, rows: RowPlan) -> Tensor:
        merged = frozenset(self._weight.merged)
        if rows.slots.isdisjoint(merged):
            return F.linear(flat, self._weight.base)
        parts = []
        for span in rows.spans(merged):
            held = self._weight.merged.get(span.slot)
            weight = self._weight.base if held is None else held
            parts.append(F.linear(flat[span.start : span.end], weight))
        return torch.cat(parts)

    def _with_extra(self, y: Tensor, flat: Tensor, rows: RowPlan) -> Tensor:
        extra = {
            s.slot: self._weight.extra[s.slot]
            for s in rows.segments
            if s.slot in self._weight.extra
        }
        if not extra:
            return y
        # Columns a variant does not have stay 0 here; the sampler masks ids past its vocabulary.
        grown = F.pad(y, (0, max(len(e) for e in extra.values())))
        for segment in rows.segments:
            if segment.slot in extra:
                part = slice(segment.start, segment.end)
                new = F.linear(flat[part], extra[segment.slot])
                grown[part, y.shape[1] : y.shape[1] + new.shape[1]] = new
        return grown


class DeltaEmbedding(nn.Module):
    """``E_base[id]``, then each slot's delta row; ids past the base's end are the slot's own."""

    def __init__(self, inner: nn.Embedding, weight: DeltaParameter, context: StepContext) -> None:
        super().__init__()
        self.weight = inner.weight
        self._weight = weight
        self._context = context
        # Gemma's embedding multiplies its result.
        self._scale = getattr(inner, "embed_scale", None)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [...]`` int64 -> ``[..., n]``."""
        rows = self._context.rows
        flat = ids.reshape(-1)
        y = self._look_up(flat, rows)
        if self._scale is not None:
            y = y * torch.as_tensor(self._scale, dtype=y.dtype, device=y.device)
        return y.view(*ids.shape, y.shape[-1])

    def _look_up(self, ids: Tensor, rows: RowPlan | None) -> Tensor:
        base = self._weight.base
        if rows is None or not rows.slots:
            return F.embedding(ids, base)
        known = ids.clamp(max=len(base) - 1)
        y = F.embedding(known, base)
        for segment in rows.segments:
            held = self._weight.merged.get(segment.slot)
            if held is not None:
                part = slice(segment.start, segment.end)
                y[part] = F.embedding(known[part], held)
        for pool in self._weight.pools.values():
            pool.add_rows_(y, known, rows)
        for segment in rows.segments:
            extra = self._weight.extra.get(segment.slot)
            if extra is not None:
                part = slice(segment.start, segment.end)
                added = (ids[part] >= len(base)).unsqueeze(1)
                own = F.embedding((ids[part] - len(base)).clamp(min=0), extra)
                y[part] = torch.where(added, own, y[part])
        return y


class DeltaNorm(nn.Module):
    """Any norm that is affine in a 1-D weight (and bias): LayerNorm and every RMSNorm.

    The inner norm with a neutral weight gives the normalised rows; each row is then scaled by its
    own slot's weight. `offset` is 1 for Gemma's ``(1 + w) * x`` form, found by probing.
    """

    def __init__(
        self,
        inner: nn.Module,
        weight: DeltaParameter,
        bias: DeltaParameter | None,
        context: StepContext,
    ) -> None:
        super().__init__()
        self.inner = inner
        self._offset = _weight_offset(inner)
        self._unit = copy.deepcopy(inner)
        with torch.no_grad():
            _weight_of(self._unit).fill_(1.0 - self._offset)
            if bias is not None:
                self._unit.get_parameter("bias").zero_()
        self._weight, self._bias = weight, bias
        self._context = context

    @property
    def weight(self) -> Tensor:
        return self._weight.base

    def forward(self, x: Tensor) -> Tensor:
        """``x [1, T, n]`` or ``[1, T, heads, n]`` -> the same shape."""
        rows = self._context.rows
        changed = rows is not None and (
            self._weight.touches(rows) or (self._bias is not None and self._bias.touches(rows))
        )
        if not changed:
            return self.inner(x)
        assert rows is not None
        y = self._unit(x)
        if x.numel() // x.shape[-1] == rows.n_rows:
            shape: tuple[int, ...] = (-1, x.shape[-1])
        else:  # a norm per attention head (Qwen3): [1, T, H, D]
            shape = (-1, 1, x.shape[-1])
        scale = (self._weight.vector_rows(rows) + self._offset).view(shape)
        y = y * scale
        return y if self._bias is None else y + self._bias.vector_rows(rows).view(shape)


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
