"""Memory of a decode step that never moves: a step is data in two device buffers.

Everything that changes from step to step - tokens, positions, cache rows, KV block tables,
lengths, which rows belong to which slot - is filled by two copies from pinned memory, for a bucket
of rows of which some are padding.

KV block tables are as wide as the longest sequence may get, but lie KV block by KV block (all rows'
first KV block, all rows' second, ...), so that a step fills and copies no more of them than its
longest sequence has; kernels read as far as each length says. Wide tables cost memory, nothing
else.

Padding is inert: length 0 attends to nothing, row `padding_row` is of a KV block nobody reads
(or -1 where the cache write knows that), slot -1 has no delta. What such a row computes is thrown
away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.ops.row_mapping import BASE_SLOT, Segment
from server.ops.triton.segments import DECODE_ROWS, SegmentArrays, cut_segments

ALIGNED = 4  # int32 are 16 bytes


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence's new token.

    cache_row  row of the flattened cache where its key and value go
    kv_blocks  the sequence's, the new token's included: one list all its life, which grows
    length     positions to attend to, the new token included
    slot       of its variant, -1 for the base
    source     index among the last step's tokens of this row's; `token` is not known then
    """

    token: int
    position: int
    cache_row: int
    kv_blocks: Sequence[int]
    length: int
    slot: int = BASE_SLOT
    source: int = 0


@dataclass(frozen=True, slots=True)
class StaticBatch:
    """Device views of one bucket, T rows; their addresses never change.

    input_ids, position_ids  int64 [1, T]
    cache_rows   int64 [T]
    vector_rows  int64 [T], slot + 1: row of a 1-D parameter's ``[1 + C, m]`` values
    kv_blocks    int32 [T, P]; lengths int32 [T], 0 for padding
    rows         int64 [T], 0, 1, ...: every row decodes
    segments     at most T entries, the rest -1
    table        the same segments as [T, 3]
    """

    input_ids: Tensor
    position_ids: Tensor
    cache_rows: Tensor
    vector_rows: Tensor
    kv_blocks: Tensor
    lengths: Tensor
    rows: Tensor
    segments: SegmentArrays
    table: Tensor


class StaticBuffers:
    """Host and device memory of one bucket: int64 ``[5, W]``, int32 ``[4 W + 4]`` and ``[P, T]``.

    The last two are one array, the KV block tables at its end, so that one copy takes both. W is T
    rounded up so that every field begins at a multiple of 16 bytes: Triton compiles kernels anew
    for other addresses, and would in the first step of 1, of 2 and of 4 rows.
    """

    def __init__(
        self, rows: int, max_kv_blocks: int, device: torch.device, padding_row: int
    ) -> None:
        self.rows = rows
        self._stride = -(-rows // ALIGNED) * ALIGNED
        self._padding_row = padding_row
        self._n_fixed = 4 * self._stride + ALIGNED
        self._tables = KVBlockTables(rows, max_kv_blocks)
        pinned = device.type == "cuda"
        n_small = self._n_fixed + rows * max_kv_blocks
        self._host_wide = torch.zeros((5, self._stride), dtype=torch.int64, pin_memory=pinned)
        self._host_small = torch.zeros(n_small, dtype=torch.int32, pin_memory=pinned)
        self.wide = self._host_wide.to(device, copy=True)
        self.small = self._host_small.to(device, copy=True)
        self._host_kv_blocks = self._host_small[self._n_fixed :].view(max_kv_blocks, rows)
        self._rows = torch.arange(rows, device=device)
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self.batch = self._views()
        self.fill([])

    def _views(self) -> StaticBatch:
        t = self.rows
        ids, positions, cache_rows, vector_rows, _ = self.wide[:, :t]
        fields = self.small[: 4 * self._stride].view(4, -1)[:, :t]
        lengths, slots, starts, ends = fields
        count = self.small[4 * self._stride : 4 * self._stride + 1]
        return StaticBatch(
            input_ids=ids.view(1, t),
            position_ids=positions.view(1, t),
            cache_rows=cache_rows,
            vector_rows=vector_rows,
            kv_blocks=self.small[self._n_fixed :].view(-1, t).t(),
            lengths=lengths,
            rows=self._rows,
            segments=SegmentArrays(slots, starts, ends, count, DECODE_ROWS),
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
            [row.cache_row for row in rows] + [self._padding_row] * padding,
            [row.slot + 1 for row in rows] + [0] * padding,
            [row.source for row in rows] + [0] * padding,
        ]
        self._host_wide[:, :t] = torch.tensor(wide)
        pieces = cut_segments(segments_of(rows), DECODE_ROWS)
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
        n_kv_blocks = self._tables.write(self._host_kv_blocks, [row.kv_blocks for row in rows])
        n_used = self._n_fixed + t * n_kv_blocks
        self.wide.copy_(self._host_wide, non_blocking=True)
        self.small[:n_used].copy_(self._host_small[:n_used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if last_tokens is not None:
            torch.index_select(last_tokens, 0, self.wide[4, :n], out=self.wide[0, :n])
        return self.wide.nbytes + 4 * n_used


class KVBlockTables:
    """What is written in the KV block tables ``[P, T]`` of a bucket, so that a step writes the new
    KV blocks only: of long sequences they are few beside all. What is past a sequence's is 0.
    """

    def __init__(self, rows: int, max_kv_blocks: int) -> None:
        self._written: list[tuple[Sequence[int], int]] = [((), 0)] * rows
        self._width = max_kv_blocks  # rows of the tables that are not 0, at most

    def write(self, tables: Tensor, rows: Sequence[Sequence[int]]) -> int:
        """Bring ``tables int32 [P, T]`` up to date; returns how many of its rows may differ from
        before. A list that was written before has grown at its end only.
        """
        array = tables.numpy()
        longest = max(map(len, rows), default=0)
        assert longest <= len(array), "a sequence longer than the tables"
        for i, (before, n_before) in enumerate(self._written):
            kv_blocks: Sequence[int] = rows[i] if i < len(rows) else ()
            first = n_before if kv_blocks is before else 0
            if len(kv_blocks) > first:
                array[first : len(kv_blocks), i] = kv_blocks[first:]
            if n_before > len(kv_blocks):
                array[len(kv_blocks) : n_before, i] = 0
            self._written[i] = kv_blocks, len(kv_blocks)
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
