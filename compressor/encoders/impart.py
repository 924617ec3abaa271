"""Encoder of `impart`: decompose, allocate, draw, rescale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.codecs.block_factors import select_kept
from compressor.codecs.impart import MAX_RANK, ImpartTerm, impart_size
from compressor.codecs.impart_sampling import (
    Allocation,
    kept_before_shift,
    sample_blocks,
    solve_allocation,
)
from compressor.codecs.quantize import to_half, unit_for
from compressor.codecs.term import MatrixSource, Params, Shape, Term
from compressor.encoders.single import SingleMatrixCodec
from compressor.encoders.svd import Spectrum, root_inverse, row_strips, spectrum, tall
from compressor.errors import InputError, UnsupportedTensor


@dataclass(frozen=True, slots=True)
class ImpartCodec(SingleMatrixCodec):
    """Options of the codec, named as in the paper.

    beta        share of the components pruned beforehand, within [0, 1)
    C           weight of importance in the drop probability, above 0
    block_rows  rows that share their components; fewer is nearer to the paper's independent
                masks and costs more index bytes
    """

    name: ClassVar[str] = "impart"
    beta: float = 0.6
    C: float = 1.0
    block_rows: int = 64

    def __post_init__(self) -> None:
        check_sampling_options(self.name, self.beta, self.C, self.block_rows)

    def options(self) -> Params:
        """Resolved options, JSON-able."""
        return {"beta": self.beta, "C": self.C, "block_rows": self.block_rows}

    def fit(self, shape: Shape, budget_bytes: float) -> Params:
        """Return the number of components a block keeps whose size is nearest the budget.

        At least 1, at most what beta leaves.
        """
        ideal = round(budget_bytes / impart_size(shape, 1, self.block_rows))
        most = kept_before_shift(min(shape), self.beta)
        return {"kept": min(max(ideal, 1), most)} | self.options()

    def size_bytes(self, shape: Shape, params: Params) -> int:
        """Exact payload bytes."""
        return impart_size(shape, params["kept"], params["block_rows"])

    def encode(
        self, name: str, source: MatrixSource, params: Params, seed: int
    ) -> tuple[Term, ...]:
        """Return one term; `name` and `seed` together name the draw."""
        longer, _ = tall(source)
        parts = spectrum(name, longer)
        allocation = solve_allocation(
            parts.sigma.numpy(), params["kept"], params["beta"], params["C"]
        )
        made_with = {"beta": params["beta"], "C": params["C"]}
        block_rows: int = params["block_rows"]
        return (encode_drawn(name, source, parts, allocation, block_rows, seed, made_with),)


def encode_drawn(
    name: str,
    source: MatrixSource,
    parts: Spectrum,
    allocation: Allocation,
    block_rows: int,
    seed: int,
    made_with: Params,
    *,
    rescale: bool = True,
) -> ImpartTerm:
    """Draw components by `allocation` and store what is drawn.

    parts      of the tall `source`, all of it
    made_with  recorded in the term beside alpha and seed
    rescale    divide by the probability, which is what makes the draw unbiased
    """
    shape = source.shape
    longer, flipped = tall(source)
    rank = len(allocation.inclusion)
    if rank > MAX_RANK:
        raise UnsupportedTensor(
            f"{name}: {rank} components exceed the format's {MAX_RANK}; raise beta"
        )
    indices = [
        _draw(allocation, size, block_rows, f"impart\0{seed}\0{name}\0{side}")
        for side, size in zip("uv", shape, strict=True)
    ]
    if flipped:
        indices.reverse()
    keep = torch.from_numpy(allocation.probabilities) if rescale else 1.0
    sigma, right = parts.sigma[:rank], parts.right[:, :rank]
    long_values = project_kept(longer, right * root_inverse(sigma) / keep, indices[0], block_rows)
    short_values = select_kept((right * sigma.sqrt() / keep).float(), indices[1], block_rows)
    sides = [(indices[0], long_values), (indices[1], short_values)]
    if flipped:
        sides.reverse()
    (u_index, u), (v_index, v) = sides
    # Values of order 1: what is applied in float16 then neither overflows nor vanishes.
    unit_u, unit_v = unit_for(u, headroom_bits=1), unit_for(v, headroom_bits=1)
    return ImpartTerm(
        shape=shape,
        rank=rank,
        block_rows=block_rows,
        u_index=u_index,
        u_values=to_half(u, unit_u),
        v_index=v_index,
        v_values=to_half(v, unit_v),
        unit_u=unit_u,
        unit_v=unit_v,
        settings=made_with | {"alpha": allocation.alpha, "seed": seed},
    )


def check_sampling_options(codec: str, beta: float, c: float, block_rows: int) -> None:
    """Raise InputError for an option outside its range."""
    if not 0 <= beta < 1:
        raise InputError(f"{codec}: beta must be within [0, 1), got {beta}")
    if not 0 < c <= 100:
        raise InputError(f"{codec}: C must be within (0, 100], got {c}")
    if not isinstance(block_rows, int) or not 1 <= block_rows <= 4096:
        raise InputError(f"{codec}: block_rows must be within 1..4096, got {block_rows}")


def _draw(allocation: Allocation, size: int, block_rows: int, key: str) -> Tensor:
    """Component indices int16 ``[blocks, S]`` of one side."""
    drawn = sample_blocks(allocation.inclusion, -(-size // block_rows), key)
    return torch.from_numpy(drawn).to(torch.int16)


def project_kept(source: MatrixSource, weights: Tensor, index: Tensor, block_rows: int) -> Tensor:
    """``(A @ weights)`` strip by strip, keeping only the drawn components: ``[m, S]``."""
    m, n = source.shape
    weights = weights.float()
    kept = torch.empty(m, index.shape[1], dtype=torch.float32)
    for start, end in row_strips(m, n, multiple=block_rows):
        first, last = start // block_rows, -(-end // block_rows)
        strip = source.block(start, end, 0, n)
        projected = (strip @ weights.to(strip.device)).cpu()
        kept[start:end] = select_kept(projected, index[first:last], block_rows)
    return kept
