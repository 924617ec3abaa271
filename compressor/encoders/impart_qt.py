"""Encoder of `impart-qt`: decompose, allocate, draw, quantise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.codecs.block_factors import index_by_row, select_kept
from compressor.codecs.impart import MAX_RANK
from compressor.codecs.impart_qt import ImpartQtTerm, term_index
from compressor.codecs.impart_qt_sampling import (
    CLASS_BITS,
    WEIGHT_BITS,
    Kept,
    class_sizes,
    draw_number,
    largest_size,
    qt_size,
    smallest_size,
    solve_qt_allocation,
)
from compressor.codecs.impart_sampling import kept_before_shift
from compressor.codecs.quantize import to_half, unit_for
from compressor.codecs.quantize_groups import code_levels, fit_steps, nearest_codes
from compressor.codecs.term import MatrixSource, Params, Shape, Term
from compressor.encoders.gptq import gptq_left, gptq_right
from compressor.encoders.impart import check_sampling_options, project_kept
from compressor.encoders.single import SingleMatrixCodec
from compressor.encoders.sources import WithInputs
from compressor.encoders.svd import spectrum, tall
from compressor.errors import InputError, UnsupportedTensor


@dataclass(frozen=True, slots=True)
class ImpartQtCodec(SingleMatrixCodec):
    """Options of the codec, named as in the paper.

    beta        share of the components pruned beforehand, within [0, 1)
    C           weight of importance in the drop probability, above 0
    block_rows  rows that share their components; fewer is nearer to the paper's independent
                masks, costs no bytes, and makes the products of a server smaller
    gptq        quantise by GPTQ where the source knows its layer's inputs (`WithInputs`), instead
                of to nearest
    """

    name: ClassVar[str] = "impart-qt"
    beta: float = 0.6
    C: float = 1.0
    block_rows: int = 64
    gptq: bool = False

    def __post_init__(self) -> None:
        check_sampling_options(self.name, self.beta, self.C, self.block_rows)
        if not isinstance(self.gptq, bool):
            raise InputError(f"impart-qt: gptq must be true or false, got {self.gptq!r}")

    def options(self) -> Params:
        """Resolved options, JSON-able."""
        return asdict(self)

    @property
    def wants_inputs(self) -> bool:
        """Whether sources should be `WithInputs` where that is possible."""
        return self.gptq

    def fit(self, shape: Shape, budget_bytes: float) -> Params:
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
        u_side = Side(u, u_index, block_rows, kept)
        v_side = Side(v, v_index, block_rows, kept)
        u_steps, v_steps = u_side.fit_steps(rank), v_side.fit_steps(rank)
        reach = torch.tensor(class_reach(rank), dtype=torch.float64)
        if params["gptq"] and isinstance(source, WithInputs):
            with_gptq = True
            keep = weights.double() / (1 << WEIGHT_BITS)
            v_codes, u_codes = gptq_sides(
                u_side, v_side, u_steps, v_steps, sigma / keep.square(), source.hessian
            )
        else:
            with_gptq = False
            u_codes, v_codes = u_side.nearest(u_steps), v_side.nearest(v_steps)
        strength = (sigma * u_steps * v_steps * reach * reach).float()
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
                "gptq": with_gptq,
            },
        )
        return (term,)


@dataclass(frozen=True, slots=True)
class Side:
    """The kept entries of U, or of V.

    values  float32 ``[size, S]``, columns by class
    index   int64 ``[blocks, S]``, components of each block
    """

    values: Tensor
    index: Tensor
    block_rows: int
    kept: Kept

    @property
    def components(self) -> Tensor:
        """Int64 ``[size, S]``: which component each value belongs to."""
        return index_by_row(self.index, self.block_rows, len(self.values))

    def classes(self) -> Iterator[tuple[int, slice]]:
        """Bits and columns of each class that is there."""
        start = 0
        for bits, count in zip(CLASS_BITS, self.kept, strict=True):
            if count:
                yield bits, slice(start, start + count)
            start += count

    def fit_steps(self, rank: int) -> Tensor:
        """One step for all kept values of a component: float64 ``[rank]``, least squares."""
        steps = torch.zeros(rank, dtype=torch.float64)
        components = self.components
        for bits, part in self.classes():
            steps += fit_steps(self.values[:, part], components[:, part], rank, bits).double()
        return steps

    def nearest(self, steps: Tensor) -> Tensor:
        """Round to nearest: codes uint8 ``[size, S]``."""
        codes = torch.empty(self.values.shape, dtype=torch.uint8)
        by_value = steps.float()[self.components]
        for bits, part in self.classes():
            codes[:, part] = nearest_codes(self.values[:, part], by_value[:, part], bits)
        return codes

    def dense(self, codes: Tensor, steps: Tensor) -> Tensor:
        """The side as quantised, spread over all components: float64 ``[size, rank]``."""
        components, levels = self.components, torch.empty(codes.shape, dtype=torch.float64)
        for bits, part in self.classes():
            levels[:, part] = code_levels(codes[:, part], bits).double()
        spread = torch.zeros(len(codes), len(steps), dtype=torch.float64)
        return spread.scatter_(1, components, levels * steps[components])


def class_reach(rank: int) -> list[int]:
    """``2^(bits - 1)`` for each component: its largest level plus half a step, in steps."""
    return [
        1 << (bits - 1)
        for bits, size in zip(CLASS_BITS, class_sizes(rank), strict=True)
        for _ in range(size)
    ]


def gptq_sides(
    u: Side, v: Side, u_steps: Tensor, v_steps: Tensor, strength: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantise V for the layer's inputs, then U for what the quantised V makes of them.

    strength  float64 ``[r]``, the weights on the rank axis, ``sigma / q^2``
    hessian   ``[n, n]``, second moment of the input
    returns   codes of V and of U
    """
    moments = hessian.double()
    v_codes = gptq_right(v.values, v.index, v.block_rows, v.kept, v_steps, moments)
    down = v.dense(v_codes, v_steps) * strength
    u_codes = gptq_left(u.values, u.index, u.block_rows, u.kept, u_steps, down.T @ moments @ down)
    return v_codes, u_codes
