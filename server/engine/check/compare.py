"""How far what the engine computes may be from what the definition does, and where they part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.engine.check.steps import Rows

LOGITS = "the logits"
# Relative differences of a row that rounding explains, whatever the model: float32's with room for
# hundreds of layers, TF32's where CUDA kernels may use it.
FLOOR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
FLOOR_TF32 = 1e-2
# In half precision every model makes something else of its rounding. How much is measured: the
# definition runs once more with an error of one unit in the last place after each layer; inside a
# layer ten values are rounded. No more than `CEILING` is ever allowed.
ROUNDINGS = 8
CEILING = 0.3
# Of the rows of a model with experts, in half precision: where two experts are equal, rounding
# chooses, and that row is another one's.
OUTLIERS = 0.25


@dataclass(frozen=True, slots=True)
class Parting:
    """The first place where both differ: `error` is the relative difference of the worst row."""

    place: str
    error: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.place} differ from those of transformers' own definition by "
            f"{self.error:.2g} of their size ({self.allowed:.2g} is allowed)"
        )


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest relative difference that rounding explains: `by_place`, else `floor`.

    outliers  the share of rows that may be farther off
    """

    floor: float
    by_place: Mapping[str, float] = field(default_factory=dict)
    outliers: float = 0.0

    def at(self, place: str) -> float:
        return min(max(self.floor, self.by_place.get(place, 0.0)), max(CEILING, self.floor))

    @property
    def largest(self) -> float:
        return max(map(self.at, self.by_place), default=self.floor)


def floor_of(dtype: torch.dtype, device: torch.device) -> float:
    """What is allowed of any model."""
    is_tf32 = device.type == "cuda" and dtype is torch.float32
    return FLOOR_TF32 if is_tf32 else FLOOR[dtype]


def is_exact_enough(dtype: torch.dtype) -> bool:
    """Whether rounding is too small to be measured first."""
    return dtype in (torch.float32, torch.float64)


def measured_bounds(
    floor: float, noisy: Sequence[Rows], plain: Sequence[Rows], outliers: float = 0.0
) -> Bounds:
    """From runs of the definition with and without an error after each layer."""
    found: dict[str, float] = {}
    for with_noise, without in zip(noisy, plain, strict=True):
        for place, error in _errors(with_noise, without, outliers):
            found[place] = max(found.get(place, 0.0), ROUNDINGS * error)
    return Bounds(floor, found, outliers)


def first_parting(ours: Rows, wanted: Rows, bounds: Bounds) -> Parting | None:
    """In the order in which the definition runs; None if all agree."""
    for place, error in _errors(ours, wanted, bounds.outliers):
        if not error <= bounds.at(place):  # NaN is no agreement
            return Parting(place, error, bounds.at(place))
    return None


def worst(ours: Rows, wanted: Rows, bounds: Bounds) -> float:
    """The largest relative difference anywhere, as it is compared with the bounds."""
    return max(error for _, error in _errors(ours, wanted, bounds.outliers))


def _errors(ours: Rows, wanted: Rows, outliers: float) -> Iterator[tuple[str, float]]:
    """Places and the relative difference of the worst row there."""
    for path, rows in wanted.points.items():
        mine = ours.points.get(path)
        # A place that sees other rows in the engine is passed over: the logits tell.
        if mine is not None and mine.shape == rows.shape:
            yield f"the values after {path}", _error(mine, rows, outliers)
    positions = sorted(ours.logits)
    both = [torch.stack([rows.logits[p] for p in positions]) for rows in (ours, wanted)]
    n_known = min(logits.shape[1] for logits in both)  # a variant may have added tokens
    yield LOGITS, _error(both[0][:, :n_known], both[1][:, :n_known], outliers)


def _error(ours: Tensor, wanted: Tensor, outliers: float) -> float:
    """Of the worst row but for a share of outliers. NaN where a value is not finite."""
    difference = (ours.double() - wanted.double()).norm(dim=-1)
    errors = difference / wanted.double().norm(dim=-1).clamp(min=1e-9)
    if not bool(errors.isfinite().all()):
        return math.nan
    return float(errors.sort(descending=True).values[int(outliers * len(errors))])
