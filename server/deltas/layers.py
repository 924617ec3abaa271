"""Modules that replace the base model's linears, embeddings and norms: base result, then deltas.

They are installed on module instances by `server.engine.model`; the Hugging Face model definition
around them stays untouched. `StepContext` says which rows belong to which slot in this step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.deltas.blockdiag_pools import BlockDiagPool, SharedBlocks
from server.deltas.parameter import DeltaParameter
from server.deltas.pool import FactorPool
from server.ops.linear import LinearOp, TorchLinear
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
        self.group: ProjectionGroup | None = None
        self.context = context
        self._is_output = is_output
        self._linear: LinearOp = TorchLinear(weight.base)
        self.merged: dict[int, LinearOp] = {}  # by slot, see MergeableWeights

    @property
    def parameters_in_order(self) -> tuple[DeltaParameter, ...]:
        return (self.delta_weight,)

    def join(self, group: ProjectionGroup, linear: LinearOp) -> None:
        """Compute together with the group from now on; `linear` is this member's share."""
        self.group, self._linear = group, linear
        self.delta_weight.hand_over(linear.dense)

    def pack(self, *, keep: bool) -> None:
        """Lay the base weight out for its product. `keep`: an embedding reads the plain one."""
        weight = self.delta_weight
        if not (keep or self._is_output):
            weight.base_quant = weight.residency.base_quant
        self._linear = weight.make_linear(weight.base)
        if not keep:
            weight.hand_over(self._linear.dense)

    @property
    def weight(self) -> Tensor:
        return self.delta_weight.base

    @property
    def bias(self) -> Tensor | None:
        return None if self.delta_bias is None else self.delta_bias.base

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., n]`` -> ``[..., m]``; wider than m if a slot has added vocabulary rows."""
        rows = self.context.output_rows if self._is_output else self.context.rows
        y = None if self.group is None else self.group.take(self, x, rows)
        if y is None:
            y = self._alone(x.reshape(-1, x.shape[-1]), rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _alone(self, flat: Tensor, rows: RowPlan | None) -> Tensor:
        if rows is None or not rows.has_deltas:
            return self._linear(flat, self.bias)
        whole = merged_op(self.merged, self.context)
        if whole is None:
            y = self._base(flat, rows)
            self.add_deltas_(y, flat, rows)
        else:
            y = whole(flat)
            self.add_bias_(y, rows)
        return self._with_extra(y, flat, rows) if self.delta_weight.extra else y

    def add_deltas_(self, y: Tensor, flat: Tensor, rows: RowPlan) -> None:
        """Add every resident term and each row's own bias to ``y [T, m]`` (computed without)."""
        for pool in self.delta_weight.pools_for(rows):
            pool.add_(y, flat, rows)
        self.add_bias_(y, rows)

    def add_bias_(self, y: Tensor, rows: RowPlan) -> None:
        """Add each row's own bias to ``y [T, m]``."""
        if self.delta_bias is not None:
            y += self.delta_bias.vector_rows(rows)

    def has_merged(self, rows: RowPlan) -> bool:
        """Whether some rows use a reconstructed weight instead of the base's."""
        return not rows.slots.isdisjoint(self.delta_weight.merged)

    def _base(self, flat: Tensor, rows: RowPlan) -> Tensor:
        if not self.has_merged(rows):
            return self._linear(flat)
        parts = []
        for span in rows.spans(frozenset(self.delta_weight.merged)):
            merged = self.delta_weight.merged.get(span.slot)
            own = flat[span.start : span.end]
            parts.append(self._linear(own) if merged is None else F.linear(own, merged))
        return torch.cat(parts)

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


def merged_op(merged: dict[int, LinearOp], context: StepContext) -> LinearOp | None:
    """The merged weight for this step, if it is one slot's alone and that slot has one."""
    return None if context.merged_slot is None else merged.get(context.merged_slot)


class ProjectionGroup:
    """Linears that read the same input (q, k, v; gate, up): one base GEMM for all of them.

    The members' weights are rows of one fused matrix. The model definition still calls each member;
    the first call computes all of them, the others take their columns. If a member is called with
    another tensor than the first was, it computes alone.
    """

    def __init__(self, members: list[DeltaLinear]) -> None:
        self._members = members
        weights = [m.delta_weight for m in members]
        for weight in weights:
            weight.base_quant = weight.residency.base_quant
        self._linear = weights[0].make_linear(torch.cat([w.base for w in weights]))
        biases = [m.bias for m in members]
        self._bias = (
            torch.cat([b for b in biases if b is not None])
            if any(b is not None for b in biases)
            else None
        )
        self._sizes = [w.shape[0] for w in weights]
        self.parameters_in_order = tuple(weights)
        self.merged: dict[int, LinearOp] = {}  # by slot, see MergeableWeights
        for place, member in enumerate(members):
            member.join(self, GroupMember(self._linear, self._sizes, place))
            member.delta_weight.siblings = tuple(weights)
        self._input: Tensor | None = None
        self._outputs: dict[DeltaLinear, Tensor] = {}

    def take(self, member: DeltaLinear, x: Tensor, rows: RowPlan | None) -> Tensor | None:
        """The member's ``[T, m]`` for this input, or None if it must compute alone."""
        if member is self._members[0]:
            self._compute(x, rows)
        if x is not self._input:
            return None
        y = self._outputs.pop(member, None)
        if not self._outputs:
            self._input = None
        return y

    def _compute(self, x: Tensor, rows: RowPlan | None) -> None:
        flat = x.reshape(-1, x.shape[-1])
        if rows is None or not rows.has_deltas:
            parts: Sequence[Tensor] = self._linear(flat, self._bias).split_with_sizes(
                self._sizes, dim=1
            )
        elif (whole := merged_op(self.merged, self._members[0].context)) is not None:
            parts = whole(flat).split_with_sizes(self._sizes, dim=1)
            for member, part in zip(self._members, parts, strict=True):
                member.add_bias_(part, rows)
        else:
            parts = self._products(flat, rows)
            self._add_deltas_(parts, flat, rows)
        self._input, self._outputs = x, dict(zip(self._members, parts, strict=True))

    def _products(self, flat: Tensor, rows: RowPlan) -> Sequence[Tensor]:
        """Base products of all rows, or reconstructed weights' where a slot has them.

        Rows of both kinds: the base's are computed for all, one product being cheaper than parts.
        """
        parts: Sequence[Tensor]
        if self._all_merged(rows):
            parts = [flat.new_empty((len(flat), size)) for size in self._sizes]
        else:
            parts = self._linear(flat).split_with_sizes(self._sizes, dim=1)
        for member, part in zip(self._members, parts, strict=True):
            merged = member.delta_weight.merged
            for segment in rows.segments if merged else ():
                if segment.slot in merged:
                    own = slice(segment.start, segment.end)
                    part[own] = F.linear(flat[own], merged[segment.slot])
        return parts

    def _all_merged(self, rows: RowPlan) -> bool:
        if rows.as_data:
            return False
        return all(
            segment.slot in member.delta_weight.merged
            for member in self._members
            for segment in rows.segments
        )

    def _add_deltas_(self, parts: Sequence[Tensor], flat: Tensor, rows: RowPlan) -> None:
        done: set[SharedBlocks] = set()
        factors: list[list[tuple[FactorPool, Tensor]]] = []  # by member
        for member, part in zip(self._members, parts, strict=True):
            factors.append([])
            for pool in member.delta_weight.pools_for(rows):
                shared = pool.shared if isinstance(pool, BlockDiagPool) else None
                if isinstance(pool, FactorPool):
                    factors[-1].append((pool, part))
                elif shared is None:
                    pool.add_(part, flat, rows)
                elif shared not in done:
                    shared.add_(parts, flat, rows)
                    done.add(shared)
            member.add_bias_(part, rows)
        for together in _of_one_kind(factors):
            pools, outputs = zip(*together, strict=True)
            pools[0].add_together_(pools, outputs, flat, rows)


def _of_one_kind(
    members: list[list[tuple[FactorPool, Tensor]]],
) -> Iterator[list[tuple[FactorPool, Tensor]]]:
    """Pools that one call serves: at most one of each member, as two would write one output."""
    kinds = dict.fromkeys(pool.kind for member in members for pool, _ in member)
    for kind in kinds:
        own = [[pair for pair in member if pair[0].kind == kind] for member in members]
        for together in itertools.zip_longest(*own):
            yield [pair for pair in together if pair is not None]


class GroupMember:
    """One member's rows of a group's fused weight, for the rare call outside the group."""

    def __init__(self, fused: LinearOp, sizes: list[int], place: int) -> None:
        self._fused, self._sizes, self._place = fused, sizes, place

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.split(self._fused(x), self._sizes, dim=1)[self._place]
        return y if bias is None else y + bias

    def dense(self) -> Tensor:
        return torch.split(self._fused.dense(), self._sizes)[self._place]


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
