"""`impart`: singular components kept at random by importance, in blocks of rows.

    dW ~ Uhat Vhat^T,  Uhat_ik = sqrt(sigma_k) U_ik / q_k for the components k drawn for the block
                       of row i, and 0 otherwise; Vhat alike and independently

All `block_rows` rows of a block keep the same S components, so a block is a dense ``[R, S]``
matrix and S indices, and no mask per element is stored. Unbiased: each factor is. The singular
values are folded half into each side, which saves their bytes and makes the size of a term known
before its spectrum is.

Source: Yang et al., ImPart, ACL 2025 (arXiv 2504.13237); theirs masks every element on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from compressor.codecs.block_factors import BlockFactors
from compressor.codecs.term import Params, Shape
from compressor.codecs.validate import (
    check_names,
    check_part,
    check_shape,
    int_param,
    unit_param,
)
from compressor.errors import Corrupt, WrongShape

MAX_RANK = 1 << 15  # indices are int16
_SETTINGS = ("beta", "C", "alpha", "seed")


@dataclass(frozen=True, slots=True, eq=False)
class ImpartTerm:
    """Block-sparse factors of a matrix ``[m, n]``.

    rank        components that occur at all, r
    block_rows  rows a block, R; the last block may be shorter
    u_index     int16 ``[ceil(m / R), S]``, strictly increasing within 0 .. r - 1
    u_values    float16 ``[m, S]``: row i's values for the components of its block, in `unit_u`
    v_index, v_values  the same for the n columns, in `unit_v`
    settings    how the allocation was made: beta, C, alpha, seed; not needed to decode
    """

    codec: ClassVar[str] = "impart"
    shape: Shape
    rank: int
    block_rows: int
    u_index: Tensor
    u_values: Tensor
    v_index: Tensor
    v_values: Tensor
    unit_u: float
    unit_v: float
    settings: Params = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Components kept in each block, S."""
        return self.u_index.shape[1]

    @property
    def sigma(self) -> Tensor:
        """Float32 ``[r]``, the weights on the rank axis: ``dW = Uhat diag(sigma) Vhat^T``.

        Constant, the product of the units: the singular values are in the factors.
        """
        return torch.full((self.rank,), self.unit_u * self.unit_v, dtype=torch.float32)

    def params(self) -> Params:
        return {
            "rank": self.rank,
            "kept": self.kept,
            "block_rows": self.block_rows,
            "unit_u": self.unit_u,
            "unit_v": self.unit_v,
        } | self.settings

    def tensors(self) -> dict[str, Tensor]:
        return {
            "u_index": self.u_index,
            "u_values": self.u_values,
            "v_index": self.v_index,
            "v_values": self.v_values,
        }

    @classmethod
    def from_parts(cls, shape: Shape, params: Params, tensors: dict[str, Tensor]) -> Self:
        check_shape(cls.codec, shape)
        rank = int_param(cls.codec, params, "rank", 1, min(MAX_RANK, *shape))
        kept = int_param(cls.codec, params, "kept", 1, rank)
        block_rows = int_param(cls.codec, params, "block_rows", 1, 1 << 20)
        unit_u = unit_param(cls.codec, params, "unit_u")
        unit_v = unit_param(cls.codec, params, "unit_v")
        check_names(cls.codec, tensors, {"u_index", "u_values", "v_index", "v_values"})
        for side, size in zip("uv", shape, strict=True):
            index_shape = (-(-size // block_rows), kept)
            index = check_part(cls.codec, tensors, f"{side}_index", torch.int16, index_shape)
            _check_index(f"{side}_index", index, rank)
            check_part(cls.codec, tensors, f"{side}_values", torch.float16, (size, kept))
        settings = {key: params[key] for key in _SETTINGS if key in params}
        return cls(
            shape, rank, block_rows, **tensors, unit_u=unit_u, unit_v=unit_v, settings=settings
        )

    def factors(self) -> BlockFactors:
        """The parts as a server stages them; no copies."""
        return BlockFactors(
            self.shape,
            self.block_rows,
            self.u_index,
            self.u_values,
            self.v_index,
            self.v_values,
            self.sigma,
        )

    def apply(self, x: Tensor) -> Tensor:
        return self.factors().apply(x)

    def to_dense(self) -> Tensor:
        return self.factors().to_dense()

    def dense_rows(self, ids: Tensor) -> Tensor:
        return self.factors().dense_rows(ids)


def impart_size(shape: Shape, kept: int, block_rows: int) -> int:
    """Payload bytes of an `ImpartTerm`."""
    return sum(2 * kept * (size + -(-size // block_rows)) for size in shape)


def _check_index(name: str, index: Tensor, rank: int) -> None:
    if int(index.min()) < 0 or int(index.max()) >= rank:
        raise WrongShape(f"impart: {name} points outside the {rank} components")
    if not bool((index[:, 1:] > index[:, :-1]).all()):
        raise Corrupt(f"impart: {name} is not strictly increasing within a block")
