"""`impart-qt`: singular components kept at random by importance, 8, 3 or 2 bits a value.

    dW ~ Uhat diag(sigma / q^2) Vhat^T,  Uhat_ik = U_ik quantised for the components k drawn for
                                         the block of row i, and 0 otherwise; Vhat alike

Components 1-2 have 8 bits, 3-34 have 3, the rest 2. The draw is that of `impart`, made for each
of these classes on its own, so that every block keeps the same number of each: blocks are dense
and of one size. Nothing but 4 bytes a component is stored beside the codes: its probability, from
which, with one number for the whole matrix, every block's components are drawn again, and its
singular value. The quantisation steps of its U and V columns, one for each, are folded into that.

Source: Yang et al., ImPart-Qt, ACL 2025 (arXiv 2504.13237), Algorithms 1 to 3; the paper leaves
masks, singular values and scales out of its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from compressor.codecs.block_factors import BlockFactors
from compressor.codecs.impart import MAX_RANK
from compressor.codecs.impart_qt_sampling import (
    CLASS_BITS,
    WEIGHT_BITS,
    Kept,
    class_sizes,
    codes_size,
    draw_blocks,
)
from compressor.codecs.packing import pack_bits, packed_size, unpack_bits
from compressor.codecs.quantize import from_half
from compressor.codecs.quantize_groups import code_levels
from compressor.codecs.term import Params, Shape
from compressor.codecs.validate import (
    check_names,
    check_part,
    check_shape,
    int_param,
    unit_param,
)
from compressor.errors import Corrupt, WrongShape

MAX_PADDING = 1 << 20
_SETTINGS = ("beta", "C", "alpha", "seed", "gptq")
_CODEC = "impart-qt"


@dataclass(frozen=True, slots=True, eq=False)
class ImpartQtTerm:
    """Block-sparse quantised factors of a matrix ``[m, n]``.

    kept        components a block keeps of the classes of 8, 3 and 2 bits; S is their sum
    block_rows  rows a block, R; the last block may be shorter
    draw        names the draw, 53 bits
    weights     int64 ``[r]``, inclusion probabilities in ``2^-15``; each class's sum to its `kept`
    sigma_half  float16 ``[r]``, in `unit`: singular value times the reach (the largest level plus
                half a step) of its U and of its V column
    u_codes     uint8 ``[m, S]``, unpacked, columns by class; v_codes ``[n, S]`` alike
    padding     zero bytes behind the codes, where the budget could not be met to the byte
    settings    how it was made: beta, C, alpha, seed, gptq; not needed to decode

    On disk: ``weights`` int16 (less one), ``sigma`` float16 and ``codes``: for each class one bit
    stream of U's codes and then V's, row-major.
    """

    codec: ClassVar[str] = _CODEC
    shape: Shape
    kept: Kept
    block_rows: int
    draw: int
    unit: float
    weights: Tensor
    sigma_half: Tensor
    u_codes: Tensor
    v_codes: Tensor
    padding: int = 0
    settings: Params = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Components that occur at all, r."""
        return len(self.weights)

    def params(self) -> Params:
        k8, k3, k2 = self.kept
        return {
            "kept8": k8,
            "kept3": k3,
            "kept2": k2,
            "rank": self.rank,
            "block_rows": self.block_rows,
            "draw": self.draw,
            "unit": self.unit,
        } | self.settings

    def tensors(self) -> dict[str, Tensor]:
        return {
            "codes": _pack(self.kept, self.u_codes, self.v_codes, self.padding),
            "weights": (self.weights - 1).to(torch.int16),
            "sigma": self.sigma_half,
        }

    @classmethod
    def from_parts(cls, shape: Shape, params: Params, tensors: dict[str, Tensor]) -> Self:
        check_shape(_CODEC, shape)
        rank = int_param(_CODEC, params, "rank", 1, min(MAX_RANK, *shape))
        sizes = class_sizes(rank)
        k8, k3, k2 = (
            int_param(_CODEC, params, f"kept{bits}", min(1, size), size)
            for bits, size in zip(CLASS_BITS, sizes, strict=True)
        )
        kept = (k8, k3, k2)
        block_rows = int_param(_CODEC, params, "block_rows", 1, 1 << 20)
        draw = int_param(_CODEC, params, "draw", 0, (1 << 53) - 1)
        unit = unit_param(_CODEC, params, "unit")
        check_names(_CODEC, tensors, {"codes", "weights", "sigma"})
        stored = check_part(_CODEC, tensors, "weights", torch.int16, (rank,))
        weights = _check_weights(stored, kept)
        sigma = check_part(_CODEC, tensors, "sigma", torch.float16, (rank,))
        u_codes, v_codes, padding = _unpack(tensors["codes"], shape, kept)
        settings = {key: params[key] for key in _SETTINGS if key in params}
        term = cls(
            shape,
            kept,
            block_rows,
            draw,
            unit,
            weights,
            sigma,
            u_codes,
            v_codes,
            padding,
            settings,
        )
        if not bool(torch.isfinite(term.sigma).all()):
            raise WrongShape(f"{_CODEC}: weights are too small for sigma to stay finite")
        return term

    @property
    def sigma(self) -> Tensor:
        """Float32 ``[r]``, the weights on the rank axis, ``1 / q^2`` included."""
        keep = self.weights.float() / (1 << WEIGHT_BITS)
        return from_half(self.sigma_half, self.unit) / keep.square()

    def factors(self) -> BlockFactors:
        """The term dequantised, as a server stages it.

        The values are ``(2c + 1 - 2^b) / 2^b``, within (-1, 1): exact in bfloat16 and float16.
        """
        u_index, v_index = (
            term_index(self.weights, self.kept, size, self.block_rows, self.draw, side)
            for size, side in zip(self.shape, "uv", strict=True)
        )
        u_values, v_values = self._levels(self.u_codes), self._levels(self.v_codes)
        return BlockFactors(
            self.shape, self.block_rows, u_index, u_values, v_index, v_values, self.sigma
        )

    def apply(self, x: Tensor) -> Tensor:
        return self.factors().apply(x)

    def to_dense(self) -> Tensor:
        return self.factors().to_dense()

    def dense_rows(self, ids: Tensor) -> Tensor:
        return self.factors().dense_rows(ids)

    def _levels(self, codes: Tensor) -> Tensor:
        """Float32 ``[size, S]`` of the order of 1."""
        parts = torch.split(codes, list(self.kept), dim=1)
        return torch.cat(
            [
                code_levels(part, bits) / (1 << (bits - 1))
                for part, bits in zip(parts, CLASS_BITS, strict=True)
            ],
            dim=1,
        )


def term_index(
    weights: Tensor, kept: Kept, size: int, block_rows: int, draw: int, side: str
) -> Tensor:
    """Components of every block of one side: int64 ``[ceil(size / R), S]``, increasing."""
    n_blocks = -(-size // block_rows)
    drawn = draw_blocks(weights.numpy(), kept, n_blocks, f"impart-qt\0{draw}\0{side}")
    return torch.from_numpy(drawn)


def _pack(kept: Kept, u_codes: Tensor, v_codes: Tensor, padding: int) -> Tensor:
    streams = [
        pack_bits(torch.cat([u.flatten(), v.flatten()]), bits)
        for u, v, bits in zip(
            torch.split(u_codes, list(kept), dim=1),
            torch.split(v_codes, list(kept), dim=1),
            CLASS_BITS,
            strict=True,
        )
    ]
    return torch.cat([*streams, torch.zeros(padding, dtype=torch.uint8)])


def _unpack(packed: Tensor, shape: Shape, kept: Kept) -> tuple[Tensor, Tensor, int]:
    """Return U's codes, V's codes and the bytes of padding."""
    needed = codes_size(shape, kept)
    padding = len(packed) - needed if packed.ndim == 1 else -1
    if packed.dtype != torch.uint8 or not 0 <= padding <= MAX_PADDING:
        raise WrongShape(
            f"{_CODEC}: part codes should be {needed} bytes, found {list(packed.shape)} of "
            f"{packed.dtype}"
        )
    if bool(packed[needed:].any()):
        raise Corrupt(f"{_CODEC}: padding bytes after the codes are not zero")
    m, n = shape
    u_parts, v_parts, start = [], [], 0
    for bits, count in zip(CLASS_BITS, kept, strict=True):
        end = start + packed_size((m + n) * count, bits)
        codes = unpack_bits(packed[start:end], bits, (m + n) * count)
        u_parts.append(codes[: m * count].view(m, count))
        v_parts.append(codes[m * count :].view(n, count))
        start = end
    return torch.cat(u_parts, dim=1), torch.cat(v_parts, dim=1), padding


def _check_weights(stored: Tensor, kept: Kept) -> Tensor:
    weights = stored.long() + 1
    if int(weights.min()) < 1:
        raise WrongShape(f"{_CODEC}: a sampling weight is outside (0, 1]")
    for part, count in zip(
        torch.split(weights, list(class_sizes(len(weights)))), kept, strict=True
    ):
        if int(part.sum()) != count << WEIGHT_BITS:
            raise Corrupt(f"{_CODEC}: the sampling weights of a class do not sum to {count}")
    return weights
