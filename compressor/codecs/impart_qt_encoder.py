"""Encoder of `impart-qt`: decompose, allocate, draw, quantise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.codecs.block_factors import index_by_row, select_kept
from compressor.codecs.impart import MAX_RANK
from compressor.codecs.impart_encoder import check_sampling_options, project_kept
from compressor.codecs.impart_qt import ImpartQtTerm, term_index
from compressor.codecs.impart_qt_sampling import (
    CLASS_BITS,
    Kept,
    draw_number,
    largest_size,
    qt_size,
    smallest_size,
    solve_qt_allocation,
)
from compressor.codecs.impart_sampling import kept_before_shift
from compressor.codecs.quantize import to_half, unit_for
from compressor.codecs.quantize_groups import fit_steps, nearest_codes
from compressor.codecs.svd import spectrum, tall
from compressor.codecs.term import MatrixSource, Params, Shape, Term
from compressor.errors import UnsupportedTensor


@dataclass(frozen=True, slots=True)
class ImpartQtCodec:
    """Options of the codec, named as in the paper.

    beta        share of the components pruned beforehand, within [0, 1)
    C           weight of importance in the drop probability, above 0
    block_rows  rows that share their components; fewer is nearer to the paper's independent
                masks, costs no bytes, and makes the products of a server smaller
    """

    name: ClassVar[str] = "impart-qt"
    beta: float = 0.6
    C: float = 1.0
    block_rows: int = 64

    def __post_init__(self) -> None:
        check_sampling_options(self.name, self.beta, self.C, self.block_rows)

    def options(self) -> Params:
        """Resolved options, JSON-able."""
        return asdict(self)

    @property
    def joins_siblings(self) -> bool:
        """No: ranks are chosen matrix by matrix."""
        return False

    def plan_siblings(self, shapes: Sequence[Shape], budget_bytes: float) -> Params:
        """Plan the one matrix given."""
        (shape,) = shapes
        return self.plan(shape, budget_bytes)

    def plan(self, shape: Shape, budget_bytes: float) -> Params:
        """Return the budget itself: it is met to the byte once the spectrum is known.

        Within what one component takes and what beta leaves.
        """
        most = largest_size(shape, self.beta)
        return {"payload": min(max(round(budget_bytes), smallest_size(shape)), most)} | asdict(self)

    def size_bytes(self, shape: Shape, params: Params) -> int:
        """Exact payload bytes."""
        del shape
        n_bytes: int = params["payload"]
        return n_bytes

    def encode(
        self, name: str, source: MatrixSource, params: Params, seed: int
    ) -> tuple[Term, ...]:
        """Return one term; `name` and `seed` together name the draw."""
        shape, block_rows = source.shape, params["block_rows"]
        most = kept_before_shift(min(shape), params["beta"])
        if most > MAX_RANK:
            raise UnsupportedTensor(
                f"{name}: {most} components exceed the format's {MAX_RANK}; raise beta"
            )
        longer, flipped = tall(source)
        sigma, right = spectrum(name, longer)
        allocation = solve_qt_allocation(
            sigma.numpy(), shape, params["payload"], params["beta"], params["C"]
        )
        kept, weights = allocation.kept, torch.from_numpy(allocation.weights)
        rank = len(weights)
        sigma, right = sigma[:rank], right[:, :rank]
        draw = draw_number(name, seed)
        u_index, v_index = (
            term_index(weights, kept, size, block_rows, draw, side)
            for size, side in zip(shape, "uv", strict=True)
        )
        inverse = torch.where(sigma > 0, 1.0 / sigma.clamp(min=1e-300), 0.0)
        long_index, short_index = (v_index, u_index) if flipped else (u_index, v_index)
        long = project_kept(longer, right * inverse, long_index, block_rows)
        short = select_kept(right.float(), short_index, block_rows)
        u, v = (short, long) if flipped else (long, short)
        u_codes, u_reach = quantise_side(u, index_by_row(u_index, block_rows, len(u)), rank, kept)
        v_codes, v_reach = quantise_side(v, index_by_row(v_index, block_rows, len(v)), rank, kept)
        strength = (sigma * u_reach * v_reach).float()
        unit = unit_for(strength)
        term = ImpartQtTerm(
            shape=shape,
            kept=kept,
            block_rows=block_rows,
            draw=draw,
            unit=unit,
            weights=weights,
            sigma_half=to_half(strength, unit),
            u_codes=u_codes,
            v_codes=v_codes,
            padding=params["payload"] - qt_size(shape, kept, rank),
            settings={
                "beta": params["beta"],
                "C": params["C"],
                "alpha": allocation.alpha,
                "seed": seed,
            },
        )
        return (term,)


def quantise_side(
    values: Tensor, components: Tensor, rank: int, kept: Kept
) -> tuple[Tensor, Tensor]:
    """Round to nearest, one step for all kept entries of a component.

    values      float32 ``[size, S]``, columns by class
    components  int64 ``[size, S]``
    returns     codes uint8 ``[size, S]`` and the reach of each component, float64 ``[rank]``:
                its step times ``2^(bits - 1)``
    """
    codes = torch.empty(values.shape, dtype=torch.uint8)
    reach = torch.zeros(rank, dtype=torch.float64)
    start = 0
    for bits, count in zip(CLASS_BITS, kept, strict=True):
        if count:
            part = slice(start, start + count)
            steps = fit_steps(values[:, part], components[:, part], rank, bits)
            codes[:, part] = nearest_codes(values[:, part], steps[components[:, part]], bits)
            reach += steps.double() * (1 << (bits - 1))
        start += count
    return codes, reach
