"""Linears of the base, one product for those that read the same input, then every slot's deltas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.deltas.parameter import DeltaParameter
from server.deltas.pools.base import FactorPool, TermPool
from server.deltas.pools.blockdiag import BlockDiagPool, SharedBlocks
from server.model.context import StepContext
from server.ops.joined import Joined, JoinedTerms
from server.ops.kernels import Kernels
from server.ops.linear import LinearOp, TorchLinear
from server.ops.row_mapping import RowMapping, Segment


@dataclass(frozen=True, slots=True)
class _Work:
    """The members' pools that the product itself does not add, by how they are applied, each with
    its member's index.

    shared   those of all members in one set of arrays
    factors  those of one kind together: one call serves them
    """

    shared: tuple[SharedBlocks, ...]
    factors: tuple[tuple[tuple[FactorPool, int], ...], ...]
    others: tuple[tuple[TermPool, int], ...]


class Product:
    """``x W^T`` of one linear, or of several that read the same x (q, k, v; gate, up).

    Their weights are rows of one fused matrix. The model definition still calls each member; the
    first call computes all of them, the others take their columns. If a member is called with
    another tensor than the first was, all are computed again for it.
    """

    def __init__(self, members: Sequence[DeltaLinear]) -> None:
        self.members = tuple(members)
        weights = tuple(member.delta_weight for member in members)
        self.parameters_in_order = weights
        self.reconstructed: dict[int, LinearOp] = {}  # by slot, see ReconstructedWeights
        self._sizes = [weight.shape[0] for weight in weights]
        self._linear: LinearOp = TorchLinear(weights[0].base)
        self._is_laid_out = False
        self._terms: JoinedTerms | None = None
        self._bias: Tensor | None = None
        self._work: _Work | None = None
        self._version = -1
        self._input: Tensor | None = None
        self._outputs: dict[DeltaLinear, Tensor] = {}

    def pack(self, *, quantise: bool = True, keep: bool = False) -> None:
        """Lay the weights out for their product; they are forgotten, unless to `keep`.

        quantise  as the residency says (not the output's)
        """
        weights = self.parameters_in_order
        for weight in weights if quantise else ():
            weight.base_quant = weight.residency.base_quant
        whole = weights[0].base if len(weights) == 1 else torch.cat([w.base for w in weights])
        self._is_laid_out = weights[0].base_quant is None
        linear = weights[0].make_linear(whole)
        self._terms = weights[0].kernels.joined_terms(linear, len(whole), weights[0].dtype)
        self.use(linear)
        biases = [member.bias for member in self.members]
        present = [bias for bias in biases if bias is not None]
        self._bias = torch.cat(present) if present else None
        for index, member in enumerate(self.members):
            member.product = self
            member.delta_weight.siblings = weights
            if self._terms is not None:
                joined = Joined(self._terms, sum(self._sizes[:index]))
                for weight in filter(None, (member.delta_weight, member.own)):
                    weight.joins = (*weight.joins, joined)
            if not keep:
                member.delta_weight.hand_over(_Rows(self, self._sizes, index))

    @property
    def linear(self) -> LinearOp:
        """The base's product, all members' outputs side by side."""
        return self._linear

    def laid_out(self, kernels: Kernels) -> LinearOp | None:
        """The same weights for these kernels' product, made beside steps; None if they lie in 8
        bits, which all kernels read.
        """
        return kernels.linear(self._linear.dense()) if self._is_laid_out else None

    def use(self, linear: LinearOp) -> None:
        """Multiply by it from the next step on; it holds the same weights."""
        self._linear = linear
        if self._terms is not None:
            self._terms.use(linear)
        for weight in self.parameters_in_order:
            weight.held_itemsize = linear.held_itemsize

    def exchange(self, slot: int, old: LinearOp, new: LinearOp) -> None:
        """Use the same reconstructed weights in another layout, if the slot still has them."""
        if self.reconstructed.get(slot) is old:
            self.reconstructed[slot] = new

    def take(self, member: DeltaLinear, x: Tensor, rows: RowMapping | None) -> Tensor:
        """The member's ``[T, m]`` for ``x [..., n]``."""
        if len(self.members) == 1:
            return self._compute(x.reshape(-1, x.shape[-1]), rows)[0]
        if x is not self._input or member not in self._outputs:
            parts = self._compute(x.reshape(-1, x.shape[-1]), rows)
            self._input, self._outputs = x, dict(zip(self.members, parts, strict=True))
        y = self._outputs.pop(member)
        if not self._outputs:
            self._input = None
        return y

    def _compute(self, x: Tensor, rows: RowMapping | None) -> Sequence[Tensor]:
        if rows is None or not rows.has_deltas:
            return self._split(self._linear(x, self._bias))
        rows.check(len(x))
        own = self._own_weights(rows)
        if own and len(own) == len(rows.segments):  # no row wants the base's product
            parts = self._without_base(x, own)
        else:
            parts = self._with_deltas(x, rows)
            self._put(parts, x, own)
        if self._bias is not None:
            for member, part in zip(self.members, parts, strict=True):
                assert member.delta_bias is not None
                part += member.delta_bias.vector_rows(rows)
        return parts

    def _split(self, y: Tensor) -> Sequence[Tensor]:
        if len(self._sizes) == 1:
            return (y,)
        parts: Sequence[Tensor] = y.split_with_sizes(self._sizes, dim=1)
        return parts

    def _with_deltas(self, x: Tensor, rows: RowMapping) -> Sequence[Tensor]:
        work = self._current_work()
        y = self._linear(x) if self._terms is None else self._terms.product(x, rows)
        parts = self._split(y)
        for shared in work.shared:
            shared.add_(parts, x, rows)
        for pool, index in work.others:
            if pool.as_data or not rows.as_data:  # else `Residency.eager` says so of its slots
                pool.add_(parts[index], x, rows)
        for together in work.factors:
            pools = [pool for pool, _ in together]
            pools[0].add_together_(pools, [parts[index] for _, index in together], x, rows)
        return parts

    def _own_weights(self, rows: RowMapping) -> list[tuple[Segment, LinearOp]]:
        """The segments whose slots' reconstructed weights this step uses, with those weights."""
        used = self.members[0].context.reconstructed
        if not used:
            return []
        return [
            (segment, self.reconstructed[segment.slot])
            for segment in rows.segments
            if segment.slot in used and segment.slot in self.reconstructed
        ]

    def _without_base(self, x: Tensor, own: Sequence[tuple[Segment, LinearOp]]) -> Sequence[Tensor]:
        if len(own) == 1:
            return self._split(own[0][1](x))
        parts = [x.new_empty((len(x), size)) for size in self._sizes]
        self._put(parts, x, own)
        return parts

    def _put(
        self, parts: Sequence[Tensor], x: Tensor, own: Sequence[tuple[Segment, LinearOp]]
    ) -> None:
        """Overwrite the rows of slots whose weights are reconstructed. The base's product was
        computed for all rows: one product is cheaper than parts of it.
        """
        for segment, op in own:
            at = slice(segment.start, segment.end)
            for part, values in zip(parts, self._split(op(x[at])), strict=True):
                part[at] = values

    def _current_work(self) -> _Work:
        """Changes with what is resident: seldom."""
        version = sum(weight.residency.version for weight in self.parameters_in_order)
        if self._work is None or self._version != version:
            self._work, self._version = self._find_work(), version
        return self._work

    def _find_work(self) -> _Work:
        shared: dict[SharedBlocks, None] = {}
        factors: list[list[tuple[FactorPool, int]]] = []  # by member
        others: list[tuple[TermPool, int]] = []
        for index, member in enumerate(self.members):
            factors.append([])
            for pool in member.pools():
                if any(terms is self._terms for terms, _ in pool.joins):
                    continue
                if isinstance(pool, BlockDiagPool) and pool.shared is not None:
                    shared[pool.shared] = None
                elif isinstance(pool, FactorPool):
                    factors[-1].append((pool, index))
                else:
                    others.append((pool, index))
        return _Work(tuple(shared), tuple(_of_one_kind(factors)), tuple(others))


def _of_one_kind(
    members: list[list[tuple[FactorPool, int]]],
) -> Iterator[tuple[tuple[FactorPool, int], ...]]:
    """Pools that one call serves: at most one of each member, as two would write one output."""
    kinds = dict.fromkeys(pool.kind for member in members for pool, _ in member)
    for kind in kinds:
        own = [[pair for pair in member if pair[0].kind == kind] for member in members]
        for together in itertools.zip_longest(*own):
            yield tuple(pair for pair in together if pair is not None)


class _Rows:
    """One member's rows of a fused weight."""

    def __init__(self, product: Product, sizes: list[int], index: int) -> None:
        self._product, self._sizes, self._index = product, sizes, index

    def __call__(self) -> Tensor:
        start = sum(self._sizes[: self._index])
        return self._product.linear.dense_rows(start, start + self._sizes[self._index])


class DeltaLinear(nn.Module):
    """``y = x W_base^T + b`` for all rows in one GEMM, then each slot's delta on its rows.

    is_output  whether it gives the logits
    kept       whether it sees only the rows whose logits are wanted
    """

    def __init__(
        self,
        weight: DeltaParameter,
        bias: DeltaParameter | None,
        context: StepContext,
        *,
        is_output: bool = False,
        kept: bool = False,
    ) -> None:
        super().__init__()
        self.delta_weight, self.delta_bias = weight, bias
        weight.is_multiplied = True
        self.context, self.is_output, self._kept = context, is_output, kept
        self.own: DeltaParameter | None = None  # of a tied weight: this module's alone
        self.product = Product([self])

    @property
    def weight(self) -> Tensor:
        return self.delta_weight.base

    @property
    def bias(self) -> Tensor | None:
        return None if self.delta_bias is None else self.delta_bias.base

    def pools(self) -> Iterator[TermPool]:
        """Of its weight's deltas."""
        yield from self.delta_weight.pools.values()
        if self.own is not None:
            yield from self.own.pools.values()

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., n]`` -> ``[..., m]``; wider than m if a slot has added vocabulary rows."""
        rows = self.context.rows_of(kept=self._kept)
        y = self.product.take(self, x, rows)
        if rows is not None and (
            self.delta_weight.extra or (self.own is not None and self.own.extra)
        ):
            y = self._with_extra(y, x.reshape(-1, x.shape[-1]), rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _with_extra(self, y: Tensor, flat: Tensor, rows: RowMapping) -> Tensor:
        owned = self.delta_weight.extra
        if self.own is not None:
            owned = owned | self.own.extra
        extra = {s: owned[s] for s in rows.slots if s in owned}
        if not extra:
            return y
        biases = {} if self.delta_bias is None else self.delta_bias.extra
        # Columns a variant does not have stay 0 here; the sampler masks ids past its vocabulary.
        grown = F.pad(y, (0, max(len(e) for e in extra.values())))
        for segment in rows.segments:
            if segment.slot in extra:
                part = slice(segment.start, segment.end)
                new = F.linear(flat[part], extra[segment.slot], biases.get(segment.slot))
                grown[part, y.shape[1] : y.shape[1] + new.shape[1]] = new
        return grown
