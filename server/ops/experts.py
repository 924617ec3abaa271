"""Products of experts: rows sorted by expert, one weight for each expert's rows.

Tensor parallelism: as linears', expert by expert; expert parallelism: a rank has some experts and
the rows that chose them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from server.ops.row_mapping import BASE_SLOT, RowMapping, Segment


@dataclass(frozen=True, slots=True)
class PairSegment:
    """Rows ``[start, end)`` are of one expert and one slot."""

    expert: int
    slot: int
    start: int
    end: int


class ExpertRows:
    """The S choices of a step, sorted by expert and then by slot.

    order     int64 [S]: which choice stands at each place
    tokens    int64 [S]: whose choice it is, of the step's rows
    segments  those of one expert and slot, in order
    """

    def __init__(self, experts: Tensor, rows: Tensor, mapping: RowMapping, n_chosen: int) -> None:
        """``experts [S]`` and ``rows [S]``, int64: of each choice. Waits for the device once."""
        self.n_chosen = n_chosen
        n_slots = max(mapping.slots, default=BASE_SLOT) - BASE_SLOT + 1
        slots = mapping.slot_of_row[rows] - BASE_SLOT
        keys, self.order = torch.sort(experts * n_slots + slots, stable=True)
        self.device, self.tokens = keys.device, rows[self.order]
        pairs = torch.stack(torch.unique_consecutive(keys, return_counts=True)).tolist()
        self.segments: list[PairSegment] = []
        start = 0
        for key, count in zip(*pairs, strict=True):
            expert, slot = divmod(key, n_slots)
            self.segments.append(PairSegment(expert, slot + BASE_SLOT, start, start + count))
            start += count

    @classmethod
    def of_choices(cls, chosen: Tensor, mapping: RowMapping) -> ExpertRows:
        """``chosen [T, k]`` integer: the experts of each row."""
        n_rows, n_chosen = chosen.shape
        rows = torch.arange(n_rows, device=chosen.device).repeat_interleave(n_chosen)
        return cls(chosen.reshape(-1).long(), rows, mapping, n_chosen)

    @cached_property
    def experts(self) -> Tensor:
        """int64 [S]: the expert of each choice."""
        counts = torch.tensor([s.end - s.start for s in self.segments])
        return (
            torch.tensor([s.expert for s in self.segments])
            .repeat_interleave(counts)
            .to(self.device)
        )

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Expert, first row, end row, of the experts that were chosen."""
        spans: list[tuple[int, int, int]] = []
        for segment in self.segments:
            if spans and spans[-1][0] == segment.expert:
                spans[-1] = (segment.expert, spans[-1][1], segment.end)
            else:
                spans.append((segment.expert, segment.start, segment.end))
        return spans

    @cached_property
    def by_slot(self) -> RowMapping:
        """Whose the rows are, for a module that is applied to them."""
        segments = [Segment(s.slot, s.start, s.end) for s in self.segments]
        return RowMapping(segments, self.device)

    def by_pair(self, n_experts: int) -> RowMapping:
        """The same for pools in which an expert's terms of a slot are ``slot * n_experts +
        expert``'s.
        """
        segments = [
            Segment(
                BASE_SLOT if s.slot == BASE_SLOT else s.slot * n_experts + s.expert, s.start, s.end
            )
            for s in self.segments
        ]
        return RowMapping(segments, self.device)

    def restore(self, x: Tensor) -> Tensor:
        """``x [S, n]``, sorted as here -> ``[T, k, n]``, where every row has k choices."""
        back = torch.empty_like(x)
        back[self.order] = x
        return back.view(-1, self.n_chosen, x.shape[1])


def grouped_linear(
    x: Tensor, weight: Tensor, spans: Sequence[tuple[int, int, int]], *, turned: bool
) -> Tensor:
    """``x [S, n]`` -> ``[S, m]``, each span's rows by its expert's weight.

    weight  [E, m, n], or [E, n, m] if `turned`; spans cover all rows, in order
    Accumulates in float32 and rounds once, on all devices.
    """
    if _has_grouped_mm(x, weight):
        ends = torch.zeros(len(weight), dtype=torch.int32)
        for expert, start, end in spans:
            ends[expert] = end - start
        ends = ends.cumsum(0, dtype=torch.int32).to(x.device)
        product: Tensor = F.grouped_mm(x, weight if turned else weight.transpose(1, 2), offs=ends)
        return product
    y = x.new_empty((len(x), weight.shape[2 if turned else 1]))
    for expert, start, end in spans:
        own = weight[expert] if turned else weight[expert].T
        torch.mm(x[start:end], own, out=y[start:end])
    return y


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """On a GPU that has it; a loop over the chosen experts is as fast on a CPU."""
    return (
        x.device.type == "cuda"
        and x.dtype == weight.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )
