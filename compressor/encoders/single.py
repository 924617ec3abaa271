"""What codecs that plan every matrix by itself have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from compressor.codecs.term import Params, Shape


class SingleMatrixCodec(ABC):
    """The part of `Codec` about siblings and terms, for one term a matrix and no siblings."""

    __slots__ = ()
    name: ClassVar[str]

    @abstractmethod
    def fit(self, shape: Shape, budget_bytes: float) -> Params:
        """See `Codec.fit`."""

    @property
    def joins_siblings(self) -> bool:
        """No: ranks are chosen matrix by matrix."""
        return False

    def fit_siblings(self, shapes: Sequence[Shape], budget_bytes: float) -> tuple[Params, ...]:
        """Plan the one matrix given."""
        (shape,) = shapes
        return (self.fit(shape, budget_bytes),)

    def probes(self, shape: Shape) -> tuple[Params, ...]:
        """Any setting."""
        return (self.fit(shape, shape[0] * shape[1] / 4),)

    def terms_of(self, params: Params) -> tuple[str, ...]:
        """The one."""
        del params
        return (self.name,)
