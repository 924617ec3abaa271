"""The module that replaces the base model's embedding: base rows, then each slot's deltas."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.deltas.parameter import DeltaParameter
from server.model.context import StepContext
from server.ops.row_mapping import RowMapping


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

    def _look_up(self, ids: Tensor, rows: RowMapping | None) -> Tensor:
        base = self._weight.base
        if rows is None or not rows.has_deltas:
            return F.embedding(ids, base)
        known = ids.clamp(max=len(base) - 1)
        y = F.embedding(known, base)
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
