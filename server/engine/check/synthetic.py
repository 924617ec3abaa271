"""A delta of every parameter that can have one, made up, and put into a slot for a while."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from compressor.codecs.lowrank import lowrank_from_factors
from compressor.codecs.term import DenseRows, TensorDelta
from server.deltas.parameter import DeltaParameter, StagedParameter
from server.deltas.room import Room
from server.model.definition import Deltas

SHARE = 0.25  # of a product, roughly, that its delta adds: it must show
N_SAMPLED = 64  # rows of a table, for the size of its values


def synthetic_deltas(parameters: Iterable[DeltaParameter]) -> dict[DeltaParameter, TensorDelta]:
    """One for each vector and matrix, the same with every call. Their values are the same in
    bfloat16 and in float32, so that both sides of the comparison add the same.
    """
    generator = torch.Generator().manual_seed(0)
    apart = _apart(dict.fromkeys(parameters))
    return {p: _synthetic(p, generator) for p in apart if len(p.shape) in (1, 2)}


def _apart(parameters: Iterable[DeltaParameter]) -> list[DeltaParameter]:
    """Of several names for the same values (all of an expert's, or parts of them) the last ones:
    an artifact has deltas of either.
    """
    taken: set[int] = set()
    chosen = []
    for parameter in reversed(list(parameters)):
        if parameter.holds_base:
            base = parameter.base
            last = sum((n - 1) * step for n, step in zip(base.shape, base.stride(), strict=True))
            first = base.data_ptr()
            edges = {first, first + last * base.element_size()}
            if not taken.isdisjoint(edges):
                continue
            taken |= edges
        chosen.append(parameter)
    return chosen[::-1]


def _synthetic(parameter: DeltaParameter, generator: torch.Generator) -> TensorDelta:
    shape = parameter.shape
    if len(shape) == 1:
        values = parameter.base.float().cpu()
        noise = torch.randn(shape, generator=generator)
        moved = values + SHARE * noise * (0.5 * values.abs().mean() + 0.05)
        exact = DenseRows(0, moved.to(parameter.dtype))
        return TensorDelta(parameter.name, shape, shape, False, (), exact)
    a = _levels(shape[1], generator) * _step(parameter)
    term = lowrank_from_factors(a.unsqueeze(0), _levels(shape[0], generator).unsqueeze(0), 32)
    return TensorDelta(parameter.name, shape, shape, parameter.transposed, (term,), None)


def _levels(n: int, generator: torch.Generator) -> Tensor:
    """Of few significant bits: a half, one or one and a half, of either sign."""
    sizes = torch.randint(1, 4, (n,), generator=generator) / 2
    return sizes * (torch.randint(0, 2, (n,), generator=generator) * 2 - 1)


def _step(parameter: DeltaParameter) -> float:
    """A power of two in proportion to the values, as far as that costs nothing to know."""
    size = parameter.shape[1] ** -0.5  # of a linear that keeps the size of its input
    if parameter.holds_base:
        size = float(parameter.base[:N_SAMPLED].float().std())
    return float(2.0 ** round(math.log2(max(SHARE * size, 1e-6))))


@contextmanager
def resident(deltas: Deltas, slot: int) -> Iterator[None]:
    """Meanwhile the slot has these deltas, in the arrays where variants have theirs."""
    staged = [parameter.stage(delta) for parameter, delta in deltas.items()]
    try:
        _show(staged, slot)
        yield
    finally:
        for one in staged:
            one.parameter.hide(slot)


def _show(staged: list[StagedParameter], slot: int) -> None:
    room = Room(slot, staged)
    for one in staged:
        one.parameter.reserve(slot, one, slot + 1)
    room.make(staged)
    deque(room.opening(), maxlen=0)
    transfers = list(room.transfers(staged))
    for one in staged:
        transfers += one.parameter.transfers(slot, one)
    for target, source in transfers:
        target.copy_(source)
    for one in staged:
        one.parameter.show(slot, one)


def by_parameter(
    deltas: Iterable[TensorDelta], parameters: Mapping[str, DeltaParameter]
) -> dict[DeltaParameter, TensorDelta]:
    """An artifact's, where each goes. KeyError where the model has no such parameter."""
    return {parameters[delta.name]: delta for delta in deltas}
