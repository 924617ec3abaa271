"""Routers of experts: each variant's rows by its own values."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.deltas.whole import WholeParameter
from server.model.context import StepContext
from server.model.own_values import own_values
from server.ops.row_mapping import RowMapping, Segment

MakeWhole = Callable[[str, Tensor], WholeParameter]


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor of the definition: where a module keeps it, and what each slot has instead."""

    keeper: dict[str, Any]
    key: str
    base: Tensor
    parameter: WholeParameter


class SplitByRows:
    """A module that gives one row for each row it is given: it runs once for the rows of each slot
    that has values of its own, with those in place, and once for each stretch of rows between.

    values     of the module and of those in it
    arguments  values that its parent gives it
    """

    def __init__(
        self,
        module: nn.Module,
        values: Sequence[_Value],
        arguments: Sequence[_Value],
        context: StepContext,
    ) -> None:
        self._inner = module.forward
        self._values, self._arguments = tuple(values), tuple(arguments)
        self._context = context
        vars(module)["forward"] = self.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``x [T, n]`` or ``[1, T, n]``, all rows of a step -> what the module gives for them."""
        rows = self._context.rows
        owners = frozenset[int]() if rows is None else self._owners(rows)
        if rows is None or not owners:
            return self._inner(x, *args, **kwargs)
        stretches = _stretches(rows.segments, owners)
        if len(stretches) == 1:
            return self._run(stretches[0], rows, x, args, kwargs)
        parts = [
            self._run(stretch, rows, x[..., stretch.start : stretch.end, :], args, kwargs)
            for stretch in stretches
        ]
        return _joined(parts, [stretch.end - stretch.start for stretch in stretches])

    def _owners(self, rows: RowMapping) -> frozenset[int]:
        """Slots of the step with values of their own; none in a static step (`Residency.eager`)."""
        values = (*self._values, *self._arguments)
        return frozenset(s for s in rows.slots if any(s in v.parameter.own for v in values))

    def _run(
        self,
        stretch: _Stretch,
        rows: RowMapping,
        x: Tensor,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        self._context.rows = RowMapping(stretch.segments, rows.device)
        try:
            with self._in_place(stretch.owner):
                given = [self._argument(value, stretch.owner) for value in args]
                named = {k: self._argument(value, stretch.owner) for k, value in kwargs.items()}
                return self._inner(x, *given, **named)
        finally:
            self._context.rows = rows

    @contextlib.contextmanager
    def _in_place(self, owner: int | None) -> Iterator[None]:
        kept = [(v, v.keeper[v.key]) for v in self._values]
        try:
            for value in self._values:
                value.keeper[value.key] = _own(value, owner)
            yield
        finally:
            for value, tensor in kept:
                value.keeper[value.key] = tensor

    def _argument(self, given: Any, owner: int | None) -> Any:
        return next((_own(v, owner) for v in self._arguments if v.base is given), given)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring rows of one slot that has values of its own, or of several that have none.

    segments  counted from the first of them
    """

    owner: int | None
    start: int
    end: int
    segments: tuple[Segment, ...]


def _stretches(segments: Sequence[Segment], owners: frozenset[int]) -> list[_Stretch]:
    groups: list[list[Segment]] = []
    for segment in segments:
        alone = segment.slot in owners
        if alone or not groups or groups[-1][-1].slot in owners:
            groups.append([])
        groups[-1].append(segment)
    return [_stretch(group, owners) for group in groups]


def _stretch(group: Sequence[Segment], owners: frozenset[int]) -> _Stretch:
    start = group[0].start
    moved = tuple(Segment(s.slot, s.start - start, s.end - start) for s in group)
    owner = group[0].slot if group[0].slot in owners else None
    return _Stretch(owner, start, group[-1].end, moved)


def _own(value: _Value, owner: int | None) -> Tensor:
    return value.base if owner is None else value.parameter.own.get(owner, value.base)


def _joined(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The parts' outputs one after the other: tensors, or tuples of them, with a row for each row.

    Raises RuntimeError if a module does something else.
    """
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, tuple | list):
        return tuple(_joined(column, sizes) for column in zip(*parts, strict=True))
    axis = max(first.dim() - 2, 0)
    if first.dim() == 0 or [part.shape[axis] for part in parts] != list(sizes):
        raise RuntimeError("a router gives something else than one row for each row it is given")
    return torch.cat(list(parts), dim=axis)


def split_routers(
    parent: nn.Module, path: str, context: StepContext, make: MakeWhole, known: Sequence[type]
) -> None:
    """Make the routers beside experts, children of `parent` at `path`, take each slot's values.

    make   the parameter of that name
    known  classes of modules that see to their own deltas
    """
    for name, module in parent.named_children():
        if not _routes(name, module) or isinstance(module, tuple(known)):
            continue
        prefix = f"{path}.{name}" if path else name
        values = list(_values_in(module, prefix, make, tuple(known)))
        asked = inspect.signature(module.forward).parameters
        arguments = [
            _Value(keeper, key, tensor, make(f"{path}.{key}", tensor))
            for keeper, key, tensor in _tensors_of(parent)
            if key in asked
        ]
        if values or arguments:
            SplitByRows(module, values, arguments, context)


def _routes(name: str, module: nn.Module) -> bool:
    return name in ("gate", "router") or "Router" in type(module).__name__


def _values_in(
    module: nn.Module, path: str, make: MakeWhole, known: tuple[type, ...]
) -> Iterator[_Value]:
    for keeper, key, tensor in _tensors_of(module):
        yield _Value(keeper, key, tensor, make(f"{path}.{key}", tensor))
    for name, child in module.named_children():
        if not isinstance(child, known):
            yield from _values_in(child, f"{path}.{name}", make, known)


def _tensors_of(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Of `own_values` those that are numbers, and where the module keeps them."""
    for key, value in own_values(module):
        if value.is_floating_point():
            yield module._parameters if key in module._parameters else module._buffers, key, value
