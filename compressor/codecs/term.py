"""What every codec produces: terms, and the record of one tensor made of them.

An encoded tensor is ``W_ft ~ W_base + sum(term.to_dense() for term in terms)``, with some rows
optionally stored exactly. Matrices are always in the orientation ``[m, n] = [out, in]``
(``[vocabulary, width]`` for embeddings); a checkpoint that stores ``[in, out]`` (GPT-2's Conv1D)
is marked ``transposed`` and turned round at the edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from compressor.errors import WrongShape

Shape = tuple[int, int]
Params = dict[str, Any]


class MatrixSource(Protocol):
    """One matrix ``dW`` read piece by piece, so that encoders never need all of it in memory."""

    @property
    def shape(self) -> Shape: ...

    def block(self, row_start: int, row_end: int, col_start: int, col_end: int) -> Tensor:
        """Return ``dW[row_start:row_end, col_start:col_end]`` as a new float32 tensor."""
        ...


@runtime_checkable
class Term(Protocol):
    """One summand of an encoded matrix ``[m, n]``. Immutable once built."""

    codec: ClassVar[str]

    @property
    def shape(self) -> Shape: ...

    def params(self) -> Params:
        """JSON-able settings that, with the shape and `tensors`, rebuild the term exactly."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The stored parts by short name, contiguous, in their on-disk dtype."""
        ...

    @classmethod
    def from_parts(cls, shape: Shape, params: Params, tensors: dict[str, Tensor]) -> Self:
        """Rebuild and validate every size, index range and value.

        Raises WrongShape, NonFinite or Corrupt; never allocates beyond a small multiple of
        the parts given.
        """
        ...

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x @ dW^T`` in float32, the reference: ``x [T, n]`` any float -> ``[T, m]``."""
        ...

    def to_dense(self) -> Tensor:
        """Return ``dW [m, n]`` in float32."""
        ...

    def dense_rows(self, ids: Tensor) -> Tensor:
        """Return ``dW[ids]``: ``ids [T]`` int64 -> ``[T, n]`` float32 (embedding look-up)."""
        ...


@dataclass(frozen=True, slots=True)
class DenseRows:
    """Rows of the fine-tune stored exactly: ``W_ft[row_start : row_start + len(values)]``.

    values  ``[h]`` or ``[h, n]`` in the fine-tune's own dtype. Replaces the base's rows there
            (for rows past the base's end there is nothing to replace).
    """

    codec: ClassVar[str] = "dense"
    row_start: int
    values: Tensor


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """The delta of one named parameter.

    name        parameter name in the Hugging Face model, e.g. ``model.layers.0.mlp.up_proj.weight``
    shape       shape in the fine-tune, in ``[out, in]`` orientation (1-D stays 1-D)
    base_shape  shape in the base, same orientation; differs only in rows (added vocabulary)
    transposed  True if the checkpoint stores ``[in, out]``
    terms       summands over the rows the base has, each of shape ``base_shape``
    exact       rows stored exactly, or None
    """

    name: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    transposed: bool
    terms: tuple[Term, ...]
    exact: DenseRows | None

    def applied_to_stored(self, stored: Tensor) -> Tensor:
        """As `reconstruct`, from and to the orientation in which checkpoints have the tensor.

        stored  the base's: of any number of dimensions, as its checkpoint has it; the result has
                as many, one axis for all after the first where there are more than 4
        """
        if self.transposed:
            return self.reconstruct(stored.T).T
        return self.reconstruct(stored.reshape(self.base_shape))

    def reconstruct(self, base: Tensor) -> Tensor:
        """Return ``W_base + dW`` in float32 (float64 for whole numbers), ``[out, in]`` orientation.

        base  the base parameter in ``[out, in]`` orientation, shape `base_shape`.
        """
        if tuple(base.shape) != self.base_shape:
            raise WrongShape(
                f"{self.name}: base has shape {tuple(base.shape)}, the delta expects "
                f"{self.base_shape}"
            )
        dtype = torch.float32 if base.is_floating_point() else torch.float64
        merged = base.to(dtype, copy=True)
        if self.shape != self.base_shape:
            grown = torch.zeros(self.shape, dtype=dtype)
            grown[: base.shape[0]] = merged
            merged = grown
        rows = base.shape[0]
        for term in self.terms:
            merged[:rows] += term.to_dense()
        if self.exact is not None:
            start = self.exact.row_start
            merged[start : start + len(self.exact.values)] = self.exact.values.to(dtype)
        return merged
