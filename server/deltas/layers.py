"""Modules that replace the base model's linears, embeddings and norms: base result, then deltas.

They are installed on module instances by `server.engine.model`; the Hugging Face model definition
around them stays untouched. `StepContext` says which rows belong to which slot in this step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.deltas.parameter import DeltaParameter
from server.deltas.products import Product
from server.ops.rows import RowPlan


class StepContext:
    """What the layers need to know about the current engine step.

    rows         plan of the hidden rows
    output_rows  plan of the rows whose logits are wanted (the output embedding sees only those)
    merged_slot  slot of every row of this step, if its merged weights are to be used
    """

    def __init__(self) -> None:
        self.rows: RowPlan | None = None
        self.output_rows: RowPlan | None = None
        self.merged_slot: int | None = None


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
        self.delta_weight, self.delta_bias = weight, bias
        self.context, self.is_output = context, is_output
        self.product = Product([self])

    @property
    def weight(self) -> Tensor:
        return self.delta_weight.base

    @property
    def bias(self) -> Tensor | None:
        return None if self.delta_bias is None else self.delta_bias.base

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., n]`` -> ``[..., m]``; wider than m if a slot has added vocabulary rows."""
        rows = self.context.output_rows if self.is_output else self.context.rows
        y = self.product.take(self, x, rows)
        if rows is not None and self.delta_weight.extra:
            y = self._with_extra(y, x.reshape(-1, x.shape[-1]), rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _with_extra(self, y: Tensor, flat: Tensor, rows: RowPlan) -> Tensor:
        owned = self.delta_weight.extra
        extra = {s: owned[s] for s in rows.slots if s in owned}
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
        self._weight = weight
        self._context = context
        # Gemma's embedding multiplies its result.
        self._scale = getattr(inner, "embed_scale", None)

    def reads(self, parameter: DeltaParameter) -> bool:
        """Whether this is the parameter of this table (tied weights)."""
        return parameter is self._weight

    @property
    def weight(self) -> Tensor:
        return self._weight.base

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [...]`` int64 -> ``[..., n]``."""
        rows = self._context.rows
        flat = ids.reshape(-1)
        y = self._look_up(flat, rows)
        if self._scale is not None:
            y = y * torch.as_tensor(self._scale, dtype=y.dtype)  # a CPU scalar needs no copy
        return y.view(*ids.shape, y.shape[-1])

    def _look_up(self, ids: Tensor, rows: RowPlan | None) -> Tensor:
        base = self._weight.base
        if rows is None or not rows.has_deltas:
            return F.embedding(ids, base)
        known = ids.clamp(max=len(base) - 1)
        y = F.embedding(known, base)
        for segment in rows.segments:
            held = self._weight.merged.get(segment.slot)
            if held is not None:
                part = slice(segment.start, segment.end)
                y[part] = F.embedding(known[part], held)
        for pool in self._weight.pools_for(rows):
            pool.add_rows_(y, known, rows)
        for segment in rows.segments:
            extra = self._weight.extra.get(segment.slot)
            if extra is not None:
                part = slice(segment.start, segment.end)
                added = (ids[part] >= len(base)).unsqueeze(1)
                own = F.embedding((ids[part] - len(base)).clamp(min=0), extra)
                y[part] = torch.where(added, own, y[part])
        return y
