"""What the base model's embeddings become: base rows, then each slot's deltas."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from server.deltas.parameter import DeltaParameter
from server.model.context import StepContext
from server.model.observe import Observation
from server.model.positions import CountedPositions, StepPositions
from server.ops.row_mapping import RowMapping


class DeltaEmbedding(nn.Embedding):
    """``E_base[id]``, then each slot's delta row; ids past the base's end are the slot's own.

    A module becomes one where it stands (`make_delta_embedding`), under whatever class of a
    definition's own: that one may scale what it gets (Gemma) or shift its positions (OPT).
    """

    _delta_weight: DeltaParameter
    _context: StepContext
    _kept: bool
    own: DeltaParameter | None = None  # of a tied weight: this module's alone
    counted: CountedPositions | None = None  # of a table of positions: what it looks up instead

    def reads(self, parameter: DeltaParameter) -> bool:
        """Whether this is the parameter of this table (tied weights)."""
        return parameter is self._delta_weight

    def forward(self, input: Tensor) -> Tensor:
        """``input [...]`` int64, an id for every row of the step -> ``[..., n]``."""
        if self.counted is not None:
            input = self.counted(self, input)
        y = self._look_up(input.reshape(-1), self._context.rows_of(kept=self._kept))
        return y.view(*input.shape, y.shape[-1])

    def _look_up(self, ids: Tensor, rows: RowMapping | None) -> Tensor:
        base = self._delta_weight.base
        if rows is None or not rows.has_deltas:
            return F.embedding(ids, base)
        rows.check(len(ids))
        known = ids.clamp(max=len(base) - 1)
        y = F.embedding(known, base)
        alone = self._delta_weight if self.own is None else self.own
        for weight in {self._delta_weight: None, alone: None}:
            for pool in weight.pools_for(rows):
                pool.add_rows_(y, known, rows)
        for segment in rows.segments:
            extra = (self._delta_weight.extra | alone.extra).get(segment.slot)
            if extra is not None:
                part = slice(segment.start, segment.end)
                added = (ids[part] >= len(base)).unsqueeze(1)
                own = F.embedding((ids[part] - len(base)).clamp(min=0), extra)
                y[part] = torch.where(added, own, y[part])
        return y


def looks_up_rows(module: nn.Embedding, seen: Observation) -> bool:
    """Whether it looks up one id for every token, as `nn.Embedding` does, whatever else it does."""
    if module.max_norm is not None or not seen.of(module):
        return False
    n_rows = (seen.n_kept if seen.sees_kept_rows(module) else seen.n_tokens,)
    if type(module).forward is nn.Embedding.forward:
        return all(_n_ids(call.tensors) == n_rows for call in seen.of(module))
    with _noting(module) as ids, torch.inference_mode():
        for call in seen.of(module):
            module(*call.args, **call.kwargs)
    return len(ids) == len(seen.of(module)) and set(ids) == set(n_rows)


def make_delta_embedding(
    module: nn.Embedding, weight: DeltaParameter, context: StepContext, *, kept: bool
) -> None:
    """Turn `module` into a `DeltaEmbedding`, below its own class if it has one."""
    _put_below(module, DeltaEmbedding)
    assert isinstance(module, DeltaEmbedding)
    weight.is_looked_up = True
    vars(module).update(_delta_weight=weight, _context=context, _kept=kept)


def count_positions(model: PreTrainedModel, tables: Mapping[nn.Embedding, int]) -> None:
    """Let these tables look up the step's positions, where they have become delta-aware."""
    if not tables:
        return
    positions = StepPositions(model)
    for table, first in tables.items():
        if isinstance(table, DeltaEmbedding):
            table.counted = CountedPositions(positions, first)


def _n_ids(shapes: tuple[torch.Size, ...]) -> tuple[int, ...]:
    return tuple(shape.numel() for shape in shapes)


def _put_below(module: nn.Embedding, lookup: type[nn.Embedding]) -> None:
    """Let what the module's class calls as `nn.Embedding`'s be `lookup`'s."""
    own = type(module)
    kind = lookup if own is nn.Embedding else type(f"Delta{own.__name__}", (own, lookup), {})
    module.__class__ = kind


@contextlib.contextmanager
def _noting(module: nn.Embedding) -> Iterator[list[int]]:
    """How many ids each call looks up through `nn.Embedding`, for as long as this is entered."""
    found: list[int] = []

    class Noting(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            found.append(input.numel())
            return super().forward(input)

    own = type(module)
    _put_below(module, Noting)
    try:
        yield found
    finally:
        module.__class__ = own
