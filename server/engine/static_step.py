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

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.errors import ConfigError
from server.ops.rows import BASE_SLOT, Segment
from server.ops.triton.layout import SegmentArrays, cut_segments

log = logging.getLogger(__name__)
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
SEGMENT_ROWS = 16  # `blockdiag.DECODE_ROWS`, without importing triton
ALIGNED = 4  # int32 are 16 bytes


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence's new token.

    place   row of the flattened cache where its key and value go
    pages   the sequence's pages, the new token's included: one list all its life, which grows
    length  positions to attend to, the new token included
    slot    of its variant, -1 for the base
    source  place among the last step's tokens of this row's; `token` is not known then
    """

    token: int
    position: int
    place: int
    pages: Sequence[int]
    length: int
    slot: int = BASE_SLOT
    source: int = 0


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
GraphKey = tuple[int, bool]  # rows, with deltas


class StaticBuffers:
    """Host and device memory of one bucket: int64 ``[5, W]``, int32 ``[4 W + 4]`` and ``[P, T]``.

    The last two are one array, the page tables at its end, so that one copy takes both. W is T
    rounded up so that every field begins at a multiple of 16 bytes: Triton compiles kernels anew
    for other addresses, and would in the first step of 1, of 2 and of 4 rows.
    """

    def __init__(self, rows: int, max_pages: int, device: torch.device, padding_place: int) -> None:
        self.rows = rows
        self._stride = -(-rows // ALIGNED) * ALIGNED
        self._padding_place = padding_place
        self._n_fixed = 4 * self._stride + ALIGNED
        self._tables = PageTables(rows, max_pages)
        pinned = device.type == "cuda"
        n_small = self._n_fixed + rows * max_pages
        self._host_wide = torch.zeros((5, self._stride), dtype=torch.int64, pin_memory=pinned)
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
        ids, positions, places, vector_rows, _ = self.wide[:, :t]
        fields = self.small[: 4 * self._stride].view(4, -1)[:, :t]
        lengths, slots, starts, ends = fields
        count = self.small[4 * self._stride : 4 * self._stride + 1]
        return StaticBatch(
            input_ids=ids.view(1, t),
            position_ids=positions.view(1, t),
            places=places,
            vector_rows=vector_rows,
            pages=self.small[self._n_fixed :].view(-1, t).t(),
            lengths=lengths,
            rows=self._rows,
            segments=SegmentArrays(slots, starts, ends, count, SEGMENT_ROWS),
            table=fields[1:].t(),
        )

    def fill(self, rows: Sequence[DecodeRow], last_tokens: Tensor | None = None) -> int:
        """Write a step, sorted by slot, and padding after it; start the copies to the device.

        last_tokens  int64 on the device: where the rows' tokens are taken from, by their `source`

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
            [row.source for row in rows] + [0] * padding,
        ]
        self._host_wide[:, :t] = torch.tensor(wide)
        pieces = cut_segments(segments_of(rows), SEGMENT_ROWS)
        spare = [BASE_SLOT] * (t - len(pieces))
        fields = [
            [row.length for row in rows] + [0] * padding,
            [piece.slot for piece in pieces] + spare,
            [piece.start for piece in pieces] + spare,
            [piece.end for piece in pieces] + spare,
        ]
        fixed = self._host_small[: 4 * self._stride].view(4, -1)
        fixed[:, :t] = torch.tensor(fields, dtype=torch.int32)
        self._host_small[4 * self._stride] = len(pieces)
        n_pages = self._tables.write(self._host_pages, [row.pages for row in rows])
        n_used = self._n_fixed + t * n_pages
        self.wide.copy_(self._host_wide, non_blocking=True)
        self.small[:n_used].copy_(self._host_small[:n_used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if last_tokens is not None:
            torch.index_select(last_tokens, 0, self.wide[4, :n], out=self.wide[0, :n])
        return self.wide.nbytes + 4 * n_used


class PageTables:
    """What is written in the page tables ``[P, T]`` of a bucket, so that a step writes the new
    pages only: of long sequences they are few beside all. Places past a sequence's pages are 0.
    """

    def __init__(self, rows: int, max_pages: int) -> None:
        self._written: list[tuple[Sequence[int], int]] = [((), 0)] * rows
        self._width = max_pages  # rows of the tables that are not 0, at most

    def write(self, tables: Tensor, rows: Sequence[Sequence[int]]) -> int:
        """Bring ``tables int32 [P, T]`` up to date; returns how many of its rows may differ from
        before. A list that was written before has grown at its end only.
        """
        array = tables.numpy()
        longest = max(map(len, rows), default=0)
        assert longest <= len(array), "a sequence longer than the tables"
        for i, (before, n_before) in enumerate(self._written):
            pages: Sequence[int] = rows[i] if i < len(rows) else ()
            first = n_before if pages is before else 0
            if len(pages) > first:
                array[first : len(pages), i] = pages[first:]
            if n_before > len(pages):
                array[len(pages) : n_before, i] = 0
            self._written[i] = pages, len(pages)
        changed = max(longest, self._width)
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
        self._forward = forward
        wanted = [bucket for bucket in BUCKETS if bucket < max_rows]
        sizes = [*wanted, BUCKETS[len(wanted)]]
        self._buffers = {t: StaticBuffers(t, max_pages, device, padding_place) for t in sizes}
        self._graphs: dict[GraphKey, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._warm: set[GraphKey] = set()  # whose kernels are compiled
        self._given_up: set[GraphKey] = set()
        self._pool: Any = None
        # One for all captures: cuBLAS keeps a workspace for every stream it has seen.
        self._side = torch.cuda.Stream() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
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
        if self._side is None:
            return
        for bucket in reversed(self.buckets):
            for flag in with_deltas:
                self._capture((bucket, flag))

    def forget(self, *, with_deltas_only: bool = False, new_kernels: bool = True) -> None:
        """Some array has moved: capture anew, each graph when it is first needed.

        with_deltas_only  it was one that steps of the base alone do not read
        new_kernels       there are arrays of another kind, whose kernels may not be compiled yet
        """
        self._graphs = {k: g for k, g in self._graphs.items() if with_deltas_only and not k[1]}
        self._given_up.clear()
        if new_kernels:
            self._warm.clear()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle() if self._side is not None else None

    def _capture(self, key: GraphKey) -> None:
        assert self._side is not None
        (bucket, with_deltas), side = key, self._side
        buffers = self._buffers[bucket]
        buffers.fill([])
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        if key not in self._warm:
            with torch.cuda.stream(side):  # compiles kernels and sets up cuBLAS before the capture
                self._forward(buffers.batch, with_deltas)
            current.wait_stream(side)
            self._warm.add(key)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's thread may allocate and wait meanwhile, on its own stream. The
        # outer context gives this thread its stream back if the capture cannot be ended.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(
                graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
            ),
        ):
            logits = self._forward(buffers.batch, with_deltas)
        self._graphs[key] = graph, logits

    def _captured(self, key: GraphKey) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """The graph, captured if need be; None on a CPU, and where capturing failed."""
        if self._side is None or key in self._given_up:
            return None
        if key not in self._graphs:
            try:
                self._capture(key)
            except RuntimeError:  # memory; if the device is broken, the step itself will fail too
                log.exception("no graph of %d rows: such steps run eagerly, slower", key[0])
                self._given_up.add(key)
        return self._graphs.get(key)

    def runs_eagerly(self, n_rows: int, with_deltas: bool) -> bool:
        """Whether steps like the last of these are not captured although they should be."""
        return (self._bucket(n_rows), with_deltas) in self._given_up

    def _bucket(self, n_rows: int) -> int:
        return next(t for t in self.buckets if t >= n_rows)

    @torch.inference_mode()
    def run(self, rows: Sequence[DecodeRow], last_tokens: Tensor | None = None) -> Tensor:
        """Logits ``[n, V]`` of n rows sorted by slot; valid until the next call. `last_tokens`: see
        `StaticBuffers.fill`.
        """
        key = self._bucket(len(rows)), any(row.slot != BASE_SLOT for row in rows)
        captured, buffers = self._captured(key), self._buffers[key[0]]
        buffers.fill(rows, last_tokens)
        if captured is None:
            return self._forward(buffers.batch, key[1])[: len(rows)]
        graph, logits = captured
        graph.replay()
        return logits[: len(rows)]
