"""One parameter of the base model and the deltas of it that are resident, by slot.

A slot's life on a parameter: `stage` (any thread, host memory) -> `reserve` (engine thread) ->
a `Room` for its terms, `transfers`, carried out by the loader (no step reads the slot yet) ->
`show` (engine thread) -> `hide`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressor.codecs.term import TensorDelta
from compressor.errors import WrongShape
from server.deltas.pools.base import PoolParts, TermPool
from server.deltas.pools.blockdiag import BlockDiagPool, SharedBlocks
from server.deltas.pools.geometry import TermGeometry, geometry_of, make_pool
from server.deltas.residency import Residency
from server.deltas.upload import Transfer
from server.ops.joined import Joined
from server.ops.kernels import Kernels
from server.ops.linear import LinearOp
from server.ops.quantize import BaseQuant, quantize
from server.ops.row_mapping import RowMapping

Mode = Literal["apply", "reconstruct"]
PoolKey = tuple[int, TermGeometry]


@dataclass(frozen=True, slots=True)
class StagedParameter:
    """A decoded delta of one parameter, on the host, ready to be copied into a slot.

    terms   parts by pool; empty if the slot's reconstructed weights stand in for them
    is_dense  terms are not the delta's: one dense matrix, made by torch, stands in for all of them
    extra   [h, n] or [h] rows past the base's end (added vocabulary)
    vector  the fine-tune's own value, whole: [m] of a norm or bias, any shape of a `WholeParameter`
    """

    parameter: DeltaParameter
    terms: tuple[tuple[PoolKey, PoolParts], ...] = ()
    extra: Tensor | None = None
    vector: Tensor | None = None
    is_dense: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        parts = [part for _, staged in self.terms for part in staged]
        return parts + [t for t in (self.extra, self.vector) if t is not None]

    @property
    def n_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.tensors)


class DeltaParameter:
    """Base value and resident deltas of one parameter, in ``[out, in]`` orientation."""

    def __init__(
        self, name: str, base: Tensor, kernels: Kernels, residency: Residency | None = None
    ) -> None:
        self.name = name
        self.residency = residency or Residency()
        self.base_quant: BaseQuant | None = None  # its linear holds it in 8 bits
        self.held_itemsize: int | None = None  # see `LinearOp`
        self.kernels = kernels
        self._base: Tensor | None = base
        self._restore: Callable[[], Tensor] | None = None
        self.shape, self.dtype, self.device = tuple(base.shape), base.dtype, base.device
        # Parameters of linears that read the same input, this one included (see `Product`).
        self.siblings: tuple[DeltaParameter, ...] = (self,)
        self.joins: tuple[Joined, ...] = ()  # products that add its terms as part of theirs
        # Of a tied weight, by each of its names: what holds the deltas that are of that name only.
        self.untied: dict[str, DeltaParameter] = {}
        self.pools: dict[PoolKey, TermPool] = {}
        self.extra: dict[int, Tensor] = {}
        self.vectors = base.unsqueeze(0) if base.dim() == 1 else None  # [1 + slots, m]
        self.vector_slots: frozenset[int] = frozenset()
        self.transposed = False  # checkpoints hold ``[in, out]``, and so do old artifacts
        self.is_multiplied = False  # by a linear
        self.is_looked_up = False  # by an embedding

    @property
    def home(self) -> DeltaParameter:
        """Whose pools this one's terms are in: its own, but for an expert's."""
        return self

    def pool_slot(self, slot: int) -> int:
        """What the pools of its home call a slot."""
        return slot

    @property
    def base(self) -> Tensor:
        """``[m, n]`` or ``[m]``, on the device, in the compute dtype."""
        if self._base is not None:
            return self._base
        assert self._restore is not None
        return self._restore()

    @property
    def holds_base(self) -> bool:
        """Whether `base` is at hand: of an embedding it is, of a linear it is made anew."""
        return self._base is not None

    def make_linear(self, weight: Tensor) -> LinearOp:
        """The product with ``weight [m, n]``: this base value, or several stacked."""
        if self.base_quant is None:
            return self.kernels.linear(weight)
        return self.kernels.quantized_linear(quantize(weight, self.base_quant), self.dtype)

    @property
    def n_base_bytes(self) -> int:
        """Bytes of the base value in device memory."""
        n = math.prod(self.shape)
        if self.base_quant is not None:
            return n + 4 * self.shape[0]
        if self.held_itemsize is None:
            return n * self.dtype.itemsize
        in_table = 0 if self._base is None else self.dtype.itemsize  # of a tied output
        return n * (self.held_itemsize + in_table)

    def hand_over(self, restore: Callable[[], Tensor]) -> None:
        """Forget the base value: its linear keeps it in another layout and can give it back."""
        self._base, self._restore = None, restore

    def stage(self, delta: TensorDelta, *, without_terms: bool = False) -> StagedParameter:
        """Decode `delta` on the host. Raises WrongShape if it does not fit this parameter.

        without_terms  the slot's reconstructed weights stand in for a matrix's terms
        """
        if self.shape != delta.base_shape:
            raise WrongShape(
                f"{self.name}: this base has shape {self.shape}, "
                f"the delta expects {delta.base_shape}"
            )
        if len(self.shape) == 1:
            return self._stage_vector(delta)
        extra = self._stage_extra(delta)
        if without_terms:
            return StagedParameter(self, extra=extra)
        if self._replaces_base_rows(delta):
            base = self.base.detach().cpu()
            dense = (delta.reconstruct(base)[: len(base)] - base.float()).to(self.dtype)
            terms = (((0, ("dense", ())), (dense,)),)
            return StagedParameter(self, terms=terms, extra=extra, is_dense=True)
        staged = []
        for i, term in enumerate(delta.terms):
            key = (i, geometry_of(term))
            staged.append((key, self.new_pool(key).stage(term)))
        return StagedParameter(self, terms=tuple(staged), extra=extra)

    def _stage_vector(self, delta: TensorDelta) -> StagedParameter:
        """Of a bias that grew with the vocabulary, the rows past the base's end are `extra`."""
        n = self.shape[0]
        if delta.exact is None or delta.shape[0] < n:
            raise WrongShape(f"{self.name}: a 1-D parameter must be stored exactly")
        value = delta.reconstruct(self.base.detach().cpu()).to(self.dtype)
        return StagedParameter(self, vector=value[:n], extra=value[n:] if len(value) > n else None)

    def _stage_extra(self, delta: TensorDelta) -> Tensor | None:
        if delta.shape == delta.base_shape:
            return None
        n_base = delta.base_shape[0]
        if delta.exact is None or delta.exact.row_start > n_base:
            raise WrongShape(f"{self.name}: rows past the base's end must be stored exactly")
        return delta.exact.values[n_base - delta.exact.row_start :].to(self.dtype)

    def _replaces_base_rows(self, delta: TensorDelta) -> bool:
        return delta.exact is not None and delta.exact.row_start < delta.base_shape[0]

    def new_pool(self, key: PoolKey) -> TermPool:
        m, n = self.shape
        return make_pool(key[1], (m, n), self.dtype, self.device, self.kernels)

    def empty_pools(self, key: PoolKey) -> dict[DeltaParameter, TermPool]:
        """Make a pool, together with the siblings' if they can share one product. Nobody knows of
        them yet.
        """
        if len(self.siblings) < 2 or key[1][0] != "blockdiag" or self.joins:
            pool = self.new_pool(key)
            pool.map_slots(self._slot_map())
            pool.join(self.joins)
            return {self: pool}
        together: dict[DeltaParameter, TermPool] = {}
        blocks: list[BlockDiagPool] = []
        for sibling in self.siblings:
            pool = sibling.new_pool(key)
            assert isinstance(pool, BlockDiagPool)
            pool.map_slots(self._slot_map())
            together[sibling] = pool
            blocks.append(pool)
        SharedBlocks(blocks, self._slot_map())
        return together

    def _slot_map(self) -> Tensor:
        return torch.zeros(self.residency.n_slots, dtype=torch.int32, device=self.device)

    def reserve(self, slot: int, staged: StagedParameter, n_slots: int) -> None:
        """Make room for what is not terms of `slot`, which is below `n_slots`; see `Room`."""
        if staged.vector is not None:
            assert self.vectors is not None
            missing = n_slots + 1 - len(self.vectors)
            if missing > 0:
                # Slots without a value of their own hold the base's: see `StaticRowMapping`.
                room = self.base.expand(missing, -1)
                self.vectors = torch.cat([self.vectors, room])
                self.residency.moved(vectors=True)
        if staged.extra is not None:
            self.extra[slot] = torch.empty_like(staged.extra, device=self.device)

    def transfers(self, slot: int, staged: StagedParameter) -> Iterator[Transfer]:
        """What `reserve` has made room for, to be copied into a slot that no step reads yet."""
        if staged.vector is not None:
            assert self.vectors is not None
            yield self.vectors[slot + 1], staged.vector
        if staged.extra is not None:
            yield self.extra[slot], staged.extra

    def show(self, slot: int, staged: StagedParameter) -> None:
        """Apply the slot from the next step on."""
        for key, _ in staged.terms:
            self.pools[key].show(slot)
            if not self.pools[key].as_data:
                self.residency.eager[slot] = f"{key[1][0]} terms"
        if staged.extra is not None:
            self.residency.eager[slot] = "added vocabulary"
        if staged.vector is not None:
            self.vector_slots |= {slot}

    def untie(self, *names: str) -> None:
        """Let variants have deltas of this weight under one of its names only."""
        for name in names:
            own = DeltaParameter(name, self.base, self.kernels, self.residency)
            self.untied.setdefault(name, own)

    def hide(self, slot: int) -> None:
        """Forget the slot. Only when no running request holds it."""
        for own in self.untied.values():
            own.hide(slot)
        for key, pool in list(self.pools.items()):
            pool.hide(slot)
            if pool.idle:
                self.drop_pool(key, pool)
                self.residency.moved()
        self.residency.eager.pop(slot, None)
        if slot in self.vector_slots and self.vectors is not None:
            self.vectors[slot + 1] = self.vectors[0]
        self.vector_slots -= {slot}
        self.extra.pop(slot, None)

    def drop_pool(self, key: PoolKey, pool: TermPool) -> None:
        """Give the memory of an idle pool back, and of those that share it."""
        shared = pool.shared if isinstance(pool, BlockDiagPool) else None
        for parameter in (self,) if shared is None else self.siblings:
            parameter.pools.pop(key).leave()

    def touches(self, rows: RowMapping) -> bool:
        """1-D parameter: whether any row of the batch has a value of its own."""
        if rows.as_data:
            return rows.has_deltas
        return not rows.slots.isdisjoint(self.vector_slots)

    def vector_rows(self, rows: RowMapping) -> Tensor:
        """1-D parameter: the value for every row, ``[T, m]`` (or ``[1, m]`` if all rows agree)."""
        assert self.vectors is not None
        active = rows.slots & self.vector_slots
        if len(rows.segments) == 1:
            slot = rows.segments[0].slot
            return self.vectors[slot + 1 : slot + 2] if active else self.vectors[:1]
        return self.vectors.index_select(0, self.vector_index(rows))

    def vector_index(self, rows: RowMapping) -> Tensor:
        """1-D parameter: each row's place in `vectors`, int64 [T]."""
        assert self.vectors is not None
        return rows.vector_index(self.vector_slots, len(self.vectors))

    def pools_for(self, rows: RowMapping) -> list[TermPool]:
        """Pools that may hold terms of these rows' slots; `Residency.eager` tells of the others."""
        return [pool for pool in self.pools.values() if pool.as_data or not rows.as_data]
