"""Parameters of which each slot has a value of its own, whole: routers of experts, biases, scales,
and whatever else is small and read by the definition itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.codecs.term import TensorDelta
from compressor.errors import WrongShape
from server.deltas.parameter import DeltaParameter, StagedParameter
from server.deltas.residency import Residency
from server.deltas.upload import Transfer
from server.ops.kernels import Kernels
from server.ops.row_mapping import RowMapping


class WholeParameter(DeltaParameter):
    """A parameter or buffer of any shape. What reads it runs on the rows of each such slot alone.

    own  ``W_base + dW`` in the base's dtype, by slot that is shown
    """

    def __init__(self, name: str, base: Tensor, kernels: Kernels, residency: Residency) -> None:
        super().__init__(name, base, kernels, residency)
        self.vectors = None
        self.own: dict[int, Tensor] = {}
        self._arriving: dict[int, Tensor] = {}

    def stage(self, delta: TensorDelta, *, without_terms: bool = False) -> StagedParameter:
        """As `DeltaParameter.stage`; nothing stands in for it."""
        base = self.base.detach().cpu()
        expected = torch.Size(delta.base_shape)
        if delta.shape != delta.base_shape or expected.numel() != base.numel():
            raise WrongShape(
                f"{self.name}: this base has shape {self.shape}, the delta has {delta.shape}"
            )
        # An artifact knows vectors and matrices; what has other axes is one of them by its rows.
        value = delta.reconstruct((base.t() if delta.transposed else base).reshape(expected))
        value = (value.t() if delta.transposed else value).reshape(self.shape)
        return StagedParameter(self, vector=value.to(self.dtype).contiguous())

    def reserve(self, slot: int, staged: StagedParameter, n_slots: int) -> None:
        assert staged.vector is not None
        self._arriving[slot] = torch.empty_like(staged.vector, device=self.device)

    def transfers(self, slot: int, staged: StagedParameter) -> Iterator[Transfer]:
        assert staged.vector is not None
        yield self._arriving[slot], staged.vector

    def show(self, slot: int, staged: StagedParameter) -> None:
        self.own[slot] = self._arriving.pop(slot)
        self.residency.eager[slot] = f"{self.name} of their own"

    def hide(self, slot: int) -> None:
        self._arriving.pop(slot, None)
        self.own.pop(slot, None)
        self.residency.eager.pop(slot, None)

    def touches(self, rows: RowMapping) -> bool:
        return not rows.slots.isdisjoint(self.own)

    def value_of(self, slot: int) -> Tensor:
        """The slot's own value, or the base's."""
        return self.own.get(slot, self.base)
