"""Decode steps over buffers that never move, so that a CUDA graph can replay them.

A step is padded to a bucket of rows. Everything that changes from step to step - tokens, positions,
cache places, page tables, lengths, which rows belong to which slot - is data in two device buffers,
filled by two copies from pinned memory. The number of variants is therefore no graph key: there are
two graphs per bucket, with and without deltas. On a CPU the same code runs without capture.

Page tables are as wide as the longest sequence may get, but lie page by page (all rows' first
page, all rows' second, ...), so that a step fills and copies no more of them than its longest
sequence has; kernels read as far as each length says. Wide tables cost memory, nothing else.

Padding is inert: length 0 attends to nothing, place `padding_place` is of a page nobody reads (or
-1 where the cache write knows that), slot -1 has no delta. What such a row computes is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.errors import ConfigError
from server.ops.rows import BASE_SLOT, Segment
from server.ops.triton.layout import SegmentArrays, cut_segments

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
SEGMENT_ROWS = 16  # `blockdiag.DECODE_ROWS`, without importing triton
WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence's new token.

    place   row of the flattened cache where its key and value go
    pages   the sequence's pages, the new token's included
    length  positions to attend to, the new token included
    slot    of its variant, -1 for the base
    """

    token: int
    position: int
    place: int
    pages: Sequence[int]
    length: int
    slot: int = BASE_SLOT


@dataclass(frozen=True, slots=True)
class StaticBatch:
    """Device views of one bucket, T rows; their addresses never change.

    input_ids, position_ids  int64 [1, T]
    places       int64 [T]
    vector_rows  int64 [T], slot + 1: row of a 1-D parameter's ``[1 + C, m]`` values
    pages        int32 [T, P]; lengths int32 [T], 0 for padding
    rows         int64 [T], 0, 1, ...: every row decodes
    segments     at most T entries, the rest -1
    table        the same segments as [T, 3]
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor
    vector_rows: Tensor
    pages: Tensor
    lengths: Tensor
    rows: Tensor
    segments: SegmentArrays
    table: Tensor


Forward = Callable[[StaticBatch, bool], Tensor]


class StaticBuffers:
    """Host and device memory of one bucket: int64 ``[4, T]``, int32 ``[4 T + 1]`` and ``[P, T]``.

    The last two are one array, the page tables at its end, so that one copy takes both.
    """

    def __init__(self, rows: int, max_pages: int, device: torch.device, padding_place: int) -> None:
        self.rows = rows
        self._padding_place = padding_place
        self._n_fixed = 4 * rows + 1
        self._width = max_pages  # pages that are not 0 in the page tables, at most
        pinned = device.type == "cuda"
        n_small = self._n_fixed + rows * max_pages
        self._host_wide = torch.zeros((4, rows), dtype=torch.int64, pin_memory=pinned)
        self._host_small = torch.zeros(n_small, dtype=torch.int32, pin_memory=pinned)
        self.wide = self._host_wide.to(device, copy=True)
        self.small = self._host_small.to(device, copy=True)
        self._host_pages = self._host_small[self._n_fixed :].view(max_pages, rows)
        self._rows = torch.arange(rows, device=device)
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self.batch = self._views()
        self.fill([])

    def _views(self) -> StaticBatch:
        t = self.rows
        ids, positions, places, vector_rows = self.wide
        sizes = [t, t, t, t, 1, len(self.small) - self._n_fixed]
        lengths, slots, starts, ends, count, pages = self.small.split(sizes)  # type: ignore[no-untyped-call]
        return StaticBatch(
            input_ids=ids.view(1, t),
            position_ids=positions.view(1, t),
            places=places,
            vector_rows=vector_rows,
            pages=pages.view(-1, t).t(),
            lengths=lengths,
            rows=self._rows,
            segments=SegmentArrays(slots, starts, ends, count, SEGMENT_ROWS),
            table=self.small[t : 4 * t].view(3, t).t(),
        )

    def fill(self, rows: Sequence[DecodeRow]) -> int:
        """Write a step, sorted by slot, and padding after it; start the copies to the device.

        Returns the bytes copied.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the previous step's copy may still read the host side
        t, n = self.rows, len(rows)
        padding = t - n
        wide = [
            [row.token for row in rows] + [0] * padding,
            [row.position for row in rows] + [0] * padding,
            [row.place for row in rows] + [self._padding_place] * padding,
            [row.slot + 1 for row in rows] + [0] * padding,
        ]
        self._host_wide.copy_(torch.tensor(wide))
        pieces = cut_segments(segments_of(rows), SEGMENT_ROWS)
        spare = [BASE_SLOT] * (t - len(pieces))
        fixed = [
            *([row.length for row in rows] + [0] * padding),
            *([piece.slot for piece in pieces] + spare),
            *([piece.start for piece in pieces] + spare),
            *([piece.end for piece in pieces] + spare),
            len(pieces),
        ]
        self._host_small[: self._n_fixed] = torch.tensor(fixed, dtype=torch.int32)
        n_used = self._n_fixed + t * self._fill_pages(rows)
        self.wide.copy_(self._host_wide, non_blocking=True)
        self.small[:n_used].copy_(self._host_small[:n_used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return self.wide.nbytes + 4 * n_used

    def _fill_pages(self, rows: Sequence[DecodeRow]) -> int:
        """Write the page tables; returns how many pages of each row may differ from before."""
        longest = max((len(row.pages) for row in rows), default=0)
        changed = max(longest, self._width)
        self._host_pages[:changed] = 0
        if rows:
            lists = [list(row.pages) + [0] * (longest - len(row.pages)) for row in rows]
            self._host_pages[:longest, : len(rows)] = torch.tensor(lists, dtype=torch.int32).t()
        self._width = longest
        return changed


def segments_of(rows: Sequence[DecodeRow]) -> list[Segment]:
    """Runs of rows with one slot."""
    segments: list[Segment] = []
    for i, row in enumerate(rows):
        if segments and segments[-1].slot == row.slot:
            segments[-1] = Segment(row.slot, segments[-1].start, i + 1)
        else:
            segments.append(Segment(row.slot, i, i + 1))
    return segments


class StaticStep:
    """Runs decode steps: `forward` captured per bucket, with and without deltas.

    forward  ``(batch, with_deltas) -> logits [T, V]``. It reads what changes only from the batch
             (Python runs at capture, not at replay), allocates nothing that outlives it and never
             waits for the device. With `with_deltas` it applies whatever slots the batch names.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        max_rows: int,
        max_pages: int,
        device: torch.device,
        padding_place: int = -1,
    ) -> None:
        if max_rows > BUCKETS[-1]:
            raise ConfigError(
                f"{max_rows} decode rows per step are more than the largest graph's "
                f"{BUCKETS[-1]}; lower --max-num-seqs or use --enforce-eager"
            )
        self._forward, self._device = forward, device
        wanted = [bucket for bucket in BUCKETS if bucket < max_rows]
        sizes = [*wanted, BUCKETS[len(wanted)]]
        self._buffers = {t: StaticBuffers(t, max_pages, device, padding_place) for t in sizes}
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None
        self.forget()

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(self._buffers)

    def buffers(self, bucket: int) -> StaticBuffers:
        return self._buffers[bucket]

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]

    def prepare(self, *, with_deltas: Sequence[bool] = (False, True)) -> None:
        """Compile and capture everything: largest bucket first, so that the others share its
        memory. Call once the slot arrays and caches have their addresses. Does nothing on a CPU.
        """
        self.forget()
        if self._device.type != "cuda":
            return
        for bucket in reversed(self.buckets):
            for flag in with_deltas:
                self._capture(bucket, flag)

    def forget(self) -> None:
        """Some array has moved: capture anew, each graph when it is first needed."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    def _capture(self, bucket: int, with_deltas: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        buffers = self._buffers[bucket]
        buffers.fill([])
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):  # compiles kernels and sets up cuBLAS outside the capture
                self._forward(buffers.batch, with_deltas)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's thread may allocate and wait meanwhile, on its own stream.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(buffers.batch, with_deltas)
        self._graphs[bucket, with_deltas] = graph, logits
        return graph, logits

    @torch.inference_mode()
    def run(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Logits ``[n, V]`` of n rows sorted by slot; valid until the next call."""
        bucket = next(t for t in self.buckets if t >= len(rows))
        buffers = self._buffers[bucket]
        with_deltas = any(row.slot != BASE_SLOT for row in rows)
        captured = self._graphs.get((bucket, with_deltas))
        if captured is None and self._device.type == "cuda":
            captured = self._capture(bucket, with_deltas)
        buffers.fill(rows)
        if captured is None:
            return self._forward(buffers.batch, with_deltas)[: len(rows)]
        graph, logits = captured
        graph.replay()
        return logits[: len(rows)]
