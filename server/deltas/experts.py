"""Deltas of experts: one matrix per expert and slot, all of one projection in the same pools.

To the pools each (slot, expert) is a slot of its own, so that terms of one geometry have an expert
axis: one product serves the rows of all experts and all variants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.codecs.term import TensorDelta
from compressor.errors import WrongShape
from server.deltas.parameter import DeltaParameter, StagedParameter
from server.deltas.residency import Residency
from server.ops.kernels import Kernels


class ExpertsProjection(DeltaParameter):
    """One projection of all experts of a layer: the home of their terms.

    slots  those that have terms of some expert here
    """

    def __init__(
        self, name: str, example: Tensor, n_experts: int, kernels: Kernels, residency: Residency
    ) -> None:
        """example: one expert's ``[m, n]``."""
        super().__init__(name, example, kernels, residency)
        self.n_experts = n_experts
        self.slots: set[int] = set()

    def pool_slot_of(self, slot: int, expert: int) -> int:
        """What the pools call an expert's terms of a slot."""
        return slot * self.n_experts + expert

    def _slot_map(self) -> Tensor:
        n = self.residency.n_slots * self.n_experts
        return torch.zeros(n, dtype=torch.int32, device=self.device)


class ExpertParameter(DeltaParameter):
    """One expert's matrix of a projection, or some of its rows (the gate's of gate and up).

    turned  the checkpoint stores ``[in, out]``. Where the artifact's terms are of that orientation
            too, they are made dense: right, and large
    """

    def __init__(
        self,
        name: str,
        base: Tensor,
        home: ExpertsProjection,
        expert: int,
        *,
        turned: bool,
        counted: bool,
    ) -> None:
        """counted: whether its bytes are counted as the base's; a part's are the whole's."""
        super().__init__(name, base, home.kernels, home.residency)
        self._home, self._expert = home, expert
        self._counted, self.transposed = counted, turned
        self.is_multiplied = True

    @property
    def home(self) -> DeltaParameter:
        return self._home

    def pool_slot(self, slot: int) -> int:
        return self._home.pool_slot_of(slot, self._expert)

    @property
    def n_base_bytes(self) -> int:
        return super().n_base_bytes if self._counted else 0

    def is_turned_for(self, delta: TensorDelta) -> bool:
        """Whether the delta is of the orientation ``[in, out]`` of the checkpoint."""
        return self.transposed and not delta.transposed

    def stage(self, delta: TensorDelta, *, without_terms: bool = False) -> StagedParameter:
        """As `DeltaParameter.stage`; nothing stands in for an expert's terms."""
        if delta.shape != delta.base_shape:
            raise WrongShape(f"{self.name}: the matrix of an expert has no rows past the base's")
        if not self.is_turned_for(delta):
            return super().stage(delta)
        base = self.base.T
        if tuple(base.shape) != delta.base_shape:
            raise WrongShape(
                f"{self.name}: this base has shape {tuple(base.shape)}, "
                f"the delta expects {delta.base_shape}"
            )
        base = base.detach().cpu()
        dense = (delta.reconstruct(base) - base.float()).T.to(self.dtype).contiguous()
        return StagedParameter(self, terms=(((0, ("dense", ())), (dense,)),), is_dense=True)

    def show(self, slot: int, staged: StagedParameter) -> None:
        for key, _ in staged.terms:
            self._home.pools[key].show(self.pool_slot(slot))
        if staged.terms:
            self._home.slots.add(slot)
            self.residency.eager[slot] = "deltas of experts"

    def hide(self, slot: int) -> None:
        """Forget the slot, which is hidden on all experts together."""
        own = self.pool_slot(slot)
        for key, pool in list(self._home.pools.items()):
            pool.hide(own)
            if pool.idle:
                self._home.drop_pool(key, pool)
                self.residency.moved()
        self._home.slots.discard(slot)
        self.residency.eager.pop(slot, None)
