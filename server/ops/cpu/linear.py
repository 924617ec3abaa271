"""The base's products in bfloat16, for CPUs that multiply bfloat16 pairs in AVX-512 registers
(`NEEDS`): at 8 to 64 rows oneDNN loses a fifth to a quarter of them waiting for weights.

The weight lies in panels of WIDTH outputs, in the order in which it is read: ``[panel, n / 2,
WIDTH]`` words of two neighbouring inputs. A task is one panel and a chunk of rows, ROWS of which
share what is loaded; meanwhile the thread's next panel comes into the cache. Products are exact,
sums float32, rounded once when bias and residual are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from server.ops.cpu.blockdiag import NumbaBlockDiag
from server.ops.cpu.codegen.bf16_pairs import (
    add_pair_products,
    floats,
    load_words,
    plus,
    splat_word,
    store_floats,
)
from server.ops.cpu.codegen.intrinsics import FAST, from_bf16, i64_at, next_task, to_bf16, u16_at
from server.ops.cpu.codegen.vectors import I64, LANES, prefetch
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.features import Target
from server.ops.cpu.late import LateBlockDiag
from server.ops.cpu.panel_blocks import (
    BITS,
    PADDED_ROWS,
    PanelBlocks,
    Pieces,
    add_blocks,
    find_pieces,
)
from server.ops.cpu.parallel import Parallel
from server.ops.linear import BlockShare, LinearOp
from server.ops.packed import PackedBlocks

U = np.uint64
VECTORS = 3
WIDTH = VECTORS * LANES  # outputs of a panel
ROWS = 8  # that share loaded weights: 24 sums stay in registers
MOST_ROWS = 192  # of a task: with a panel they fit the L2 cache
FEWEST_ROWS = 32  # of a task, or all: fewer would wait for the panel
TASKS_PER_THREAD = 4  # at least, if there are rows enough, so that threads finish together
LINE = 64  # bytes of a cache line
NEEDS = ("avx512f", "avx512bw", "avx512bf16")
OUTDONE_BY = ("amx-bf16",)  # matrix units, which oneDNN uses
AHEAD = 3  # first groups of rows that fetch a share of the next panel

# Places in the argument array. Strides are in elements.
(_X, _X_ROW, _N_ROWS, _WEIGHT, _N, _M, _OUT, _OUT_ROW) = range(1, 9)
(_BIAS, _CHUNK, _N_RANGES, _N_BLOCKS, _BLOCKS, _PADDED, _SLOTS, _N_ARGUMENTS) = range(9, 17)


def _panel_code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    rows, (lanes, n, ahead, target) = args[:ROWS], args[ROWS:]
    keys = [(r, v) for r in range(ROWS) for v in range(VECTORS)]
    totals = {key: cgutils.alloca_once_value(builder, floats(0.0)) for key in keys}
    with cgutils.for_range(builder, n) as loop:
        line = builder.add(lanes, builder.mul(loop.index, I64(4 * WIDTH)))
        loaded = [load_words(builder, plus(builder, line, 64 * v)) for v in range(VECTORS)]
        prefetch(builder, builder.add(ahead, builder.mul(loop.index, I64(LINE))))
        step = builder.mul(loop.index, I64(4))
        for r, row in enumerate(rows):
            word = splat_word(builder, builder.add(row, step))
            for v in range(VECTORS):
                total = builder.load(totals[r, v])
                added = add_pair_products(context, builder, total, word, loaded[v])
                builder.store(added, totals[r, v])
    for r, v in keys:
        place = plus(builder, target, 4 * WIDTH * r + 64 * v)
        store_floats(builder, builder.load(totals[r, v]), place)
    return context.get_dummy_value()


@intrinsic
def _panel(typingctx, r0, r1, r2, r3, r4, r5, r6, r7, lanes, n, ahead, target):
    """``target[r, i]`` float32 ``[ROWS, WIDTH]`` = products of 8 rows of n words with a panel."""
    return types.void(*[types.int64] * 12), _panel_code


def _linear(address):
    a = i64_at(address)
    n, m = a[_N], a[_M]
    n_panels = (m + WIDTH - 1) // WIDTH
    panel_bytes = n // 2 * WIDTH * 4
    n_chunks = (a[_N_ROWS] + a[_CHUNK] - 1) // a[_CHUNK]
    # Threads take turns, so each mostly stays within a range of its own: the panel it fetches ahead
    # is the one it gets, and neighbours share cache lines of the deltas' codes.
    n_ranges = a[_N_RANGES]
    per_range = (n_panels + n_ranges - 1) // n_ranges
    per_chunk = n_ranges * per_range
    n_blocks, sources = a[_N_BLOCKS], i64_at(a[_BLOCKS])
    # With deltas all rows' sums are kept until those are added: one loop over them runs better
    # than a short one after every group of rows.
    sums_rows = a[_CHUNK] if n_blocks > 0 else np.int64(ROWS)
    space = np.empty(sums_rows * WIDTH + 2 * LANES, np.float32)
    sums = (space.ctypes.data + 63) // 64 * 64
    first_sum = U((sums - space.ctypes.data) // 4)
    padded = np.empty(PADDED_ROWS * a[_PADDED], np.uint16)
    while True:
        task = next_task(address)
        if task >= per_chunk * n_chunks:
            break
        place, chunk = task % per_chunk, task // per_chunk
        panel = place % n_ranges * per_range + place // n_ranges
        if panel >= n_panels:
            continue
        weight = a[_WEIGHT] + panel * panel_bytes
        following = min(panel + 1, n_panels - 1)
        ahead = a[_WEIGHT] + following * panel_bytes
        first, end = chunk * a[_CHUNK], min(a[_N_ROWS], (chunk + 1) * a[_CHUNK])
        width = min(np.int64(WIDTH), m - panel * WIDTH)
        step = 2 * a[_X_ROW]
        for row in range(first, end, ROWS):
            part = (row - first) // ROWS
            last = end - 1 - row
            x = a[_X] + row * step
            kept = row - first if n_blocks > 0 else np.int64(0)
            _panel(
                x,
                x + step * min(np.int64(1), last),
                x + step * min(np.int64(2), last),
                x + step * min(np.int64(3), last),
                x + step * min(np.int64(4), last),
                x + step * min(np.int64(5), last),
                x + step * min(np.int64(6), last),
                x + step * min(np.int64(7), last),
                weight,
                n // 2,
                ahead + min(part, np.int64(AHEAD - 1)) * (n // 2) * LINE,
                sums + 4 * WIDTH * kept,
            )
            if n_blocks == 0:
                for r in range(min(np.int64(ROWS), end - row)):
                    place = first_sum + U(r * WIDTH)
                    _store(address, space, place, row + r, panel * WIDTH, width)
        if n_blocks > 0:
            for i in range(n_blocks):
                source, room = sources[U(i)], padded.ctypes.data
                add_blocks(
                    source,
                    panel,
                    following,
                    a[_SLOTS],
                    a[_X],
                    step,
                    first,
                    end,
                    sums,
                    4 * WIDTH,
                    room,
                )
            for row in range(first, end):
                place = first_sum + U((row - first) * WIDTH)
                _store(address, space, place, row, panel * WIDTH, width)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _store(address, space, place, row, column, width):
    a = i64_at(address)
    out = u16_at(a[_OUT] + 2 * (row * a[_OUT_ROW] + column))
    if a[_BIAS] != 0:
        bias = u16_at(a[_BIAS] + 2 * column)
        for i in range(U(width)):
            space[place + i] += from_bf16(bias[i])
    for i in range(U(width)):
        out[i] = to_bf16(space[place + i])


def panels_of(weight: Tensor, width: int) -> Tensor:
    """``[m, n]`` in 16 bits, n even -> ``[panel, n / 2, width, 2]``, zeros past the last output."""
    m, n = weight.shape
    n_panels = -(-m // width)
    padded = F.pad(weight, (0, 0, 0, n_panels * width - m))
    return padded.view(n_panels, width, n // 2, 2).transpose(1, 2).contiguous()


def panel_rows(panels: Tensor, start: int, end: int) -> Tensor:
    """Rows ``[start, end)`` of what `panels_of` was given, read from their panels alone."""
    _, n_words, width, _ = panels.shape
    first = start // width
    words = panels[first : -(-end // width)].view(torch.int32).squeeze(-1)
    rows = words.transpose(1, 2).reshape(len(words) * width, n_words)[
        start - first * width : end - first * width
    ]
    return rows.contiguous().view(panels.dtype)


class LinearKernel:
    """The compiled kernel, shared by all weights."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.compiled = compile_kernel(_linear)
        self._pieces: dict[tuple[Any, ...], Pieces] = {}

    def pieces_of(self, blocks: PackedBlocks, first: int, n_panels: int) -> Pieces:
        """`find_pieces`, once for all layers of one shape."""
        key = (blocks.codes.shape[1:], blocks.sizes, blocks.n, first, n_panels)
        if key not in self._pieces:
            self._pieces[key] = find_pieces(blocks, first, n_panels, WIDTH)
        return self._pieces[key]

    @staticmethod
    def pays_on(target: Target) -> bool:
        """Whether products are faster here than oneDNN's on such a CPU."""
        return target.has(NEEDS) and not target.has(OUTDONE_BY)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether a product with this weight can be computed here."""
        return weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0


class PanelLinear(LinearOp):
    """One bfloat16 weight ``[m, n]``, n even.

    The arguments that stay the same are laid out once: a call writes a handful of numbers. One
    thread at a time may call it.
    """

    def __init__(self, kernel: LinearKernel, weight: Tensor) -> None:
        self._kernel = kernel
        self._parallel, self._compiled = kernel.parallel, kernel.compiled
        self._shape = m, n = weight.shape
        self._n_panels = -(-m // WIDTH)
        self._panels = panels_of(weight, WIDTH)
        self._arguments = np.zeros(_N_ARGUMENTS, np.int64)
        self._arguments[_WEIGHT : _M + 1] = self._panels.data_ptr(), n, m
        self._arguments[_OUT_ROW] = m
        self._arguments[_N_RANGES] = self._parallel.n_threads
        self._sources = np.zeros(0, np.int64)  # addresses of the sets of blocks of a call

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `LinearOp`; x bfloat16."""
        return self._run(x, bias, ())

    def with_blocks(self, x: Tensor, shares: Sequence[BlockShare]) -> Tensor:
        """See `LinearOp`. Blocks of 2 to 4 bits are added to the sums before their one rounding."""
        joined, others = [], []
        for share in shares:
            blocks = self._in_panels(share)
            if blocks is None:
                others.append(share)
            else:
                joined.append(blocks)
        slots = shares[0].rows.slot_of_row
        y = self._run(x, None, joined, slots)
        for share in others:
            share.add_(y, x)
        return y

    def _in_panels(self, share: BlockShare) -> PanelBlocks | None:
        op = share.op.current if isinstance(share.op, LateBlockDiag) else share.op
        if not isinstance(op, NumbaBlockDiag) or op.blocks.bits not in BITS:
            return None
        found = op.in_panels.get(share.first)
        if found is None:
            pieces = self._kernel.pieces_of(op.blocks, share.first, self._n_panels)
            found = op.in_panels[share.first] = PanelBlocks(op.blocks, pieces)
        return found

    def _run(
        self,
        x: Tensor,
        bias: Tensor | None,
        blocks: Sequence[PanelBlocks],
        slots: Tensor | None = None,
    ) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        n_rows = len(x)
        out = x.new_empty((n_rows, self._shape[0]))
        if n_rows == 0:  # lm_head in a step of prompt chunks that samples nothing
            return out
        chunk = self._rows_of_a_task(n_rows)
        a = self._arguments
        a[_X : _N_ROWS + 1] = x.data_ptr(), x.stride(0), n_rows
        a[_OUT], a[_CHUNK] = out.data_ptr(), chunk
        a[_BIAS] = 0 if bias is None else bias.data_ptr()
        a[_N_BLOCKS] = len(blocks)
        if slots is not None:
            self._name_sources(blocks)
            a[_SLOTS] = slots.data_ptr()
        n_ranges = self._parallel.n_threads
        n_tasks = -(-self._n_panels // n_ranges) * n_ranges * -(-n_rows // chunk)
        self._parallel.run(self._compiled, a, n_tasks, unlocked=True)
        return out

    def _name_sources(self, blocks: Sequence[PanelBlocks]) -> None:
        if len(blocks) > len(self._sources):
            self._sources = np.zeros(2 * len(blocks), np.int64)
            self._arguments[_BLOCKS] = self._sources.ctypes.data
        self._sources[: len(blocks)] = [one.address for one in blocks]
        self._arguments[_PADDED] = max((one.padded for one in blocks), default=0)

    def _rows_of_a_task(self, n_rows: int) -> int:
        wanted = -(-TASKS_PER_THREAD * self._parallel.n_threads // self._n_panels)
        n_chunks = max(-(-n_rows // MOST_ROWS), min(wanted, n_rows // FEWEST_ROWS), 1)
        return -(-n_rows // (n_chunks * ROWS)) * ROWS

    def dense(self) -> Tensor:
        return self.dense_rows(0, self._shape[0])

    def dense_rows(self, start: int, end: int) -> Tensor:
        return panel_rows(self._panels, start, end)
