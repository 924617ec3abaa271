"""Mixture-of-experts layers whose experts may be each variant's own.

Transformers keeps a layer's experts in 3-D parameters and computes them with one of several grouped
products, all of which mean the same (`transformers.integrations.moe`). A step without deltas of
experts uses the definition's; else the same is computed here: the choices of all rows are sorted by
(expert, slot), every product is one for all rows, and the variants' terms are added to their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.deltas.experts import ExpertsProjection
from server.deltas.pools.base import TermPool
from server.deltas.pools.blockdiag import BlockDiagPool, SharedBlocks
from server.deltas.whole import WholeParameter
from server.model.context import StepContext
from server.ops.experts import ExpertRows, grouped_linear
from server.ops.row_mapping import RowMapping


@dataclass(frozen=True, slots=True)
class ExpertsPart:
    """Outputs of a product that have deltas of their own: all of it, or the gate's or the up's."""

    projection: ExpertsProjection
    columns: slice


class ExpertsProduct:
    """``x W_e^T + b_e`` of all experts, then every slot's deltas.

    weight  [E, m, n], or [E, n, m] if `turned`
    bias    [E, m], and each slot's own
    """

    def __init__(
        self,
        weight: Tensor,
        parts: Sequence[ExpertsPart],
        bias: WholeParameter | None,
        *,
        turned: bool,
    ) -> None:
        self._weight, self._bias, self._turned = weight, bias, turned
        self._parts = tuple(parts)
        self._work: list[tuple[TermPool | SharedBlocks, slice]] = []
        self._version = -1

    def has_own(self, slots: frozenset[int]) -> bool:
        """Whether some of these slots have deltas here."""
        if self._bias is not None and not slots.isdisjoint(self._bias.own):
            return True
        return any(not slots.isdisjoint(part.projection.slots) for part in self._parts)

    def __call__(self, x: Tensor, rows: ExpertRows) -> Tensor:
        """``x [S, n]``, sorted as `rows` -> ``[S, m]``."""
        y = grouped_linear(x, self._weight, rows.spans, turned=self._turned)
        work = self._current_work()
        if work:
            self._add_terms_(y, x, rows.by_pair(len(self._weight)))
        if self._bias is not None:
            y += _bias_of(self._bias, rows)
        return y

    def _add_terms_(self, y: Tensor, x: Tensor, rows: RowMapping) -> None:
        for pool, columns in self._work:
            if isinstance(pool, SharedBlocks):
                pool.add_([y[:, part.columns] for part in self._parts_of(pool)], x, rows)
            else:
                pool.add_(y[:, columns], x, rows)

    def _parts_of(self, shared: SharedBlocks) -> list[ExpertsPart]:
        return [part for pool in shared.pools for part in self._parts if _has(part, pool)]

    def _current_work(self) -> list[tuple[TermPool | SharedBlocks, slice]]:
        """Changes with what is resident: seldom."""
        version = self._parts[0].projection.residency.version
        if version != self._version:
            self._version = version
            work: dict[TermPool | SharedBlocks, slice] = {}
            for part in self._parts:
                for pool in part.projection.pools.values():
                    shared = pool.shared if isinstance(pool, BlockDiagPool) else None
                    work.setdefault(shared or pool, part.columns)
            self._work = list(work.items())
        return self._work


def _has(part: ExpertsPart, pool: TermPool) -> bool:
    return any(own is pool for own in part.projection.pools.values())


def _bias_of(bias: WholeParameter, rows: ExpertRows) -> Tensor:
    """``[S, m]``: of each row's expert and slot."""
    y = bias.base[rows.experts]
    for segment in rows.segments:
        own = bias.own.get(segment.slot)
        if own is not None:
            y[segment.start : segment.end] = own[segment.expert]
    return y


class DeltaExperts:
    """The forward of an experts module, by what its definition says of itself (transformers'
    `use_experts_implementation`: whether there is a gate, a norm after each expert, ...).
    """

    def __init__(
        self, module: nn.Module, first: ExpertsProduct, last: ExpertsProduct, context: StepContext
    ) -> None:
        self._module: Any = module
        self._inner = module.forward
        self._first, self._last, self._context = first, last, context
        # Norms and the like within see this step's choices as rows, not its rows.
        self._has_layers = any(True for part in module.children() for _ in part.parameters())
        vars(module)["forward"] = self.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x [T, n]``, chosen experts ``[T, k]``, their weights ``[T, k]`` -> ``[T, n]``."""
        rows = self._context.rows
        if rows is None or not self._is_changed(rows):
            unchanged: Tensor = self._inner(x, *args, **kwargs)
            return unchanged
        chosen, weights = (*args, *kwargs.values())
        choices = ExpertRows.of_choices(chosen, rows)
        out = self._computed(x[choices.tokens], choices)
        weighted = out * weights.reshape(-1)[choices.order].unsqueeze(1)
        return choices.restore(weighted).sum(dim=1).to(x.dtype)

    def _is_changed(self, rows: RowMapping) -> bool:
        if self._has_layers and rows.has_deltas:
            return True
        return self._first.has_own(rows.slots) or self._last.has_own(rows.slots)

    def _computed(self, x: Tensor, choices: ExpertRows) -> Tensor:
        """``x [S, n]`` as the choices are sorted -> ``[S, n]``, not weighted."""
        outer = self._context.rows
        self._context.rows = choices.by_slot
        try:
            hidden = self._first(x, choices)
            out = self._last(self._activated(hidden), choices)
            if getattr(self._module, "has_post_expert_norm", False):
                out = self._module.post_expert_norm(out)
        finally:
            self._context.rows = outer
        return out

    def _activated(self, hidden: Tensor) -> Tensor:
        module = self._module
        activated: Tensor = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        return activated


class DeltaEveryExpert(DeltaExperts):
    """Experts that are all given all rows, zero where a row did not choose them (Llama 4): only the
    others are computed.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x [E * T, n]``, expert by expert -> the same shape."""
        rows = self._context.rows
        if rows is None or not self._is_changed(rows):
            unchanged: Tensor = self._inner(x, *args, **kwargs)
            return unchanged
        return self.by_choices(x.view(-1, x.shape[-1]), rows)

    def by_choices(self, x: Tensor, rows: RowMapping) -> Tensor:
        """The same computed here, whatever is resident."""
        given = (x != 0).any(dim=1).nonzero()[:, 0]
        choices = ExpertRows(given // rows.n_rows, given % rows.n_rows, rows, n_chosen=1)
        places = given[choices.order]
        y = torch.zeros_like(x)
        if len(places):
            y[places] = self._computed(x[places], choices)
        return y

    def _activated(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        activated: Tensor = up * self._module.act_fn(gate)
        return activated
