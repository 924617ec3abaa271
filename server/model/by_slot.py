"""Parameters and buffers that are no linear's, embedding's or norm's: gates, scales, biases, sinks.

A method that reads one runs once for each slot of the step whose value is its own, on that slot's
rows alone and with that value in place; the results are joined. Nothing is known of what the method
computes. That it treats rows one by one but for attention, whose rows of one sequence belong to one
slot, is tried on what it got in the observed pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.deltas.whole import WholeParameter
from server.model.context import StepContext
from server.model.kv_store import KVStore
from server.model.observe import Call, Method, Observation, tensors_in, with_tensors
from server.ops.row_mapping import RowMapping

TOLERANCE = {torch.float32: 1e-3}  # of the largest value: products of fewer rows add in other order
ROUNDED = 0.03


@dataclass(frozen=True, slots=True)
class Split:
    """Where the tokens are in what a method takes and gives: an axis for each tensor, or None."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    kept: bool

    def part(self, given: Any, start: int, end: int) -> Any:
        """The rows ``[start, end)`` of everything in `given`."""
        parts = (
            tensor if axis is None else tensor.narrow(axis, start, end - start)
            for tensor, axis in zip(tensors_in(given), self.inputs, strict=True)
        )
        return with_tensors(given, parts)

    def joined(self, results: Sequence[Any]) -> Any:
        """The results of all parts as one."""
        columns = zip(*(tensors_in(result) for result in results), strict=True)
        whole = (torch.cat(c, axis) for c, axis in zip(columns, self.outputs, strict=True))
        return with_tensors(results[0], whole)


@dataclass(frozen=True, slots=True)
class OwnValue:
    """A parameter or buffer, where it is read, and the slots' values of it."""

    module: nn.Module
    name: str
    parameter: WholeParameter

    def put(self, value: Tensor) -> None:
        """Let whoever reads it get `value`."""
        store = "_parameters" if self.name in vars(self.module)["_parameters"] else "_buffers"
        vars(self.module)[store][self.name] = value


class BySlot:
    """The method, with each row's own values."""

    def __init__(
        self,
        method: Callable[..., Any],
        split: Split,
        values: Sequence[OwnValue],
        context: StepContext,
        store: KVStore,
    ) -> None:
        self._method, self._split, self._values = method, split, tuple(values)
        self._context, self._store = context, store

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._context.rows_of(kept=self._split.kept)
        if rows is None or not any(value.parameter.touches(rows) for value in self._values):
            return self._method(*args, **kwargs)
        runs = list(self._runs(rows))
        if len(runs) == 1:
            return self._with_values(runs[0][0], args, kwargs)
        return self._split.joined([self._run(*run, rows, args, kwargs) for run in runs])

    def _runs(self, rows: RowMapping) -> Iterator[tuple[int | None, int, int]]:
        """Slot (None: the base's values will do), first and end row, of rows with equal values."""
        values = [value.parameter for value in self._values]
        owners = [s.slot if any(s.slot in v.own for v in values) else None for s in rows.segments]
        pairs = zip(owners, rows.segments, strict=True)
        for owner, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            segments = [segment for _, segment in group]
            yield owner, segments[0].start, segments[-1].end

    def _run(
        self,
        slot: int | None,
        start: int,
        end: int,
        rows: RowMapping,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The method on these rows alone: whatever it calls knows of no others."""
        context, store = self._context, self._store
        before = (context.rows, context.output_rows, store.metadata)
        part = rows.part(start, end)
        if self._split.kept:
            context.output_rows = part
        else:
            context.rows = part
            store.metadata = None if store.metadata is None else store.metadata.part(start, end)
        try:
            given = self._split.part((args, kwargs), start, end)
            return self._with_values(slot, *given)
        finally:
            context.rows, context.output_rows, store.metadata = before

    def _with_values(self, slot: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            for value in self._values if slot is not None else ():
                assert slot is not None
                value.put(value.parameter.value_of(slot))
            return self._method(*args, **kwargs)
        finally:
            for value in self._values:
                value.put(value.parameter.base)


def split_of(frame: Method, seen: Observation) -> Split | None:
    """How a method's rows can be run apart, as its calls show; None if they cannot."""
    calls = seen.calls[frame.module, frame.method]
    splits = {_split_of_call(call, seen) for call in calls}
    split = splits.pop()
    if splits or split is None:
        return None
    method = getattr(frame.module, frame.method)
    try:
        return split if all(_agrees(method, split, call, seen) for call in calls) else None
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None  # it cannot run with fewer rows


def _split_of_call(call: Call, seen: Observation) -> Split | None:
    """None if some tensor has the tokens on several axes, or none has them on any."""
    given, got = list(tensors_in((call.args, call.kwargs))), list(tensors_in(call.output))
    numbers = {n for t in (*given, *got) for n in t.shape} & {seen.n_tokens, seen.n_kept}
    inputs, outputs = [_axis(t, seen) for t in given], [_axis(t, seen) for t in got]
    if len(numbers) != 1 or not outputs or -1 in (*inputs, *outputs) or None in outputs:
        return None
    if all(axis is None for axis in inputs):
        return None
    found = tuple(axis for axis in outputs if axis is not None)
    return Split(tuple(inputs), found, kept=numbers == {seen.n_kept})


def _axis(tensor: Tensor, seen: Observation) -> int | None:
    """The tokens' axis, None if there is none, -1 if there are several."""
    numbers = (seen.n_tokens, seen.n_kept)
    if not any(n in numbers for n in tensor.shape):
        return None
    axis = seen.axis(tensor.shape)
    return -1 if axis is None else axis


@torch.inference_mode()
def _agrees(method: Callable[..., Any], split: Split, call: Call, seen: Observation) -> bool:
    """Whether rows in two parts, one after the other, give what they gave together."""
    n = seen.n_kept if split.kept else seen.n_tokens
    results = []
    for start, end in ((0, n // 2), (n // 2, n)):
        given = split.part((call.args, call.kwargs), start, end)
        args, kwargs = with_tensors(given, (t.clone() for t in tensors_in(given)))
        results.append(method(*args, **kwargs))
    joined = tensors_in(split.joined(results))
    return all(_close(*pair) for pair in zip(joined, tensors_in(call.output), strict=True))


def _close(ours: Tensor, wanted: Tensor) -> bool:
    if ours.shape != wanted.shape:
        return False
    if not wanted.is_floating_point():
        return torch.equal(ours, wanted)
    bound = TOLERANCE.get(wanted.dtype, ROUNDED) * float(wanted.float().abs().max())
    return torch.allclose(ours.float(), wanted.float(), rtol=0, atol=bound)
