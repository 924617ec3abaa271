"""What a baseline is, and how a byte budget is shared out among matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from compressor.codecs import Params, Shape
from compressor.errors import BudgetError


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of the fine-tune that differs from the base's.

    is_vocabulary  an embedding or lm_head
    """

    name: str
    shape: Shape
    is_vocabulary: bool


class Encoded(NamedTuple):
    """What a stored matrix restores to, float32 ``[m, n]``, and the bytes it is stored in."""

    dense: Tensor
    n_bytes: int


class Baseline(Protocol):
    """One published method."""

    @property
    def draws(self) -> bool:
        """Whether the seed changes anything."""
        ...

    @property
    def fixed_ratio(self) -> float | None:
        """The nominal ratio of a method that has only one, else None."""
        ...

    @property
    def keeps_vectors(self) -> bool:
        """Whether norms, biases and added rows are stored (exactly) beside the matrices."""
        ...

    def plan(self, matrices: Sequence[Matrix], budget_bytes: float) -> list[Params | None]:
        """Settings of every matrix for a total near the budget; None: left as in the base.

        A method with a fixed ratio ignores the budget. Raises BudgetError if it cannot be met.
        """
        ...

    def encode(self, name: str, delta: Tensor, params: Params, seed: int) -> Encoded:
        """Encode one matrix ``delta`` float32 ``[m, n]``; same arguments, same result."""
        ...


def too_small(method: str, budget_bytes: float, least_bytes: float) -> BudgetError:
    """Return the error of a method whose smallest setting exceeds the budget."""
    return BudgetError(
        f"{method} at its smallest setting takes {least_bytes:,.0f} bytes "
        f"of {max(budget_bytes, 0):,.0f} allowed; ask for a lower ratio"
    )
