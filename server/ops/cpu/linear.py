"""The base's products in bfloat16, for CPUs that multiply bfloat16 pairs in AVX-512 registers
(`NEEDS`): at 8 to 64 rows oneDNN loses a fifth to a quarter of them waiting for weights.

The weight lies in panels of WIDTH outputs, in the order in which it is read: ``[panel, n / 2,
WIDTH]`` words of two neighbouring inputs. A task is one panel and a chunk of rows, ROWS of which
share what is loaded; meanwhile the thread's next panel comes into the cache. Products are exact,
sums float32, rounded once when the bias is added. The terms of all variants in the batch are added
to the same sums (`server.ops.cpu.panel_terms`); without a weight they are added to what is there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from server.ops.cpu.codegen.bf16_pairs import (
    add_pair_products,
    floats,
    load_words,
    plus,
    splat_word,
    store_floats,
)
from server.ops.cpu.codegen.intrinsics import FAST, from_bf16, i64_at, next_task, to_bf16, u16_at
from server.ops.cpu.codegen.piece_product import PAIR_BYTES
from server.ops.cpu.codegen.vectors import I64, LANES, prefetch
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.features import Target
from server.ops.cpu.panel_terms import (
    ROOM_BYTES,
    T_N_TASKS,
    T_PADDED,
    add_terms_to_pairs,
    shrink_pairs,
    wait_for_heads,
)
from server.ops.cpu.panel_terms import ROWS as ROOM_ROWS
from server.ops.cpu.parallel import Parallel
from server.ops.cpu.pieces import KnownPieces
from server.ops.cpu.term_table import JoinedLinear, Scratch, TermCall, TermTable

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
(_BIAS, _CHUNK, _N_RANGES, _TERMS, _N_ARGUMENTS) = range(9, 14)


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
    terms, step = a[_TERMS], 2 * a[_X_ROW]
    n_heads = i64_at(terms)[T_N_TASKS] if terms != 0 else np.int64(0)
    n_padded = ROOM_ROWS * i64_at(terms)[T_PADDED] if terms != 0 else np.int64(0)
    # With deltas all rows' sums are kept until those are added: one loop over them runs better
    # than a short one after every group of rows.
    sums_rows = a[_CHUNK] if terms != 0 else np.int64(ROWS)
    space = np.empty(sums_rows * WIDTH + 2 * LANES, np.float32)
    sums = (space.ctypes.data + 63) // 64 * 64
    first_sum = U((sums - space.ctypes.data) // 4)
    padded, more = np.empty(n_padded, np.uint16), np.empty(ROOM_BYTES, np.uint8)
    room, spare = padded.ctypes.data, more.ctypes.data
    while True:
        task = next_task(address) - n_heads
        if task < 0:
            shrink_pairs(terms, task + n_heads, a[_X], step, room, spare)
            continue
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
        if a[_WEIGHT] == 0:
            for row in range(first, end):
                place = first_sum + U((row - first) * WIDTH)
                _load(address, space, place, row, panel * WIDTH, width)
        else:
            for row in range(first, end, ROWS):
                part = (row - first) // ROWS
                last = end - 1 - row
                x = a[_X] + row * step
                kept = row - first if terms != 0 else np.int64(0)
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
                if terms == 0:
                    for r in range(min(np.int64(ROWS), end - row)):
                        place = first_sum + U(r * WIDTH)
                        _store(address, space, place, row + r, panel * WIDTH, width)
        if terms != 0:
            wait_for_heads(terms)
            add_terms_to_pairs(
                terms,
                panel,
                following,
                np.int64(WIDTH),
                a[_X],
                step,
                first,
                end,
                sums,
                np.int64(4 * WIDTH),
                room,
            )
            for row in range(first, end):
                place = first_sum + U((row - first) * WIDTH)
                _store(address, space, place, row, panel * WIDTH, width)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _load(address, space, place, row, column, width):
    a = i64_at(address)
    found = u16_at(a[_OUT] + 2 * (row * a[_OUT_ROW] + column))
    for i in range(U(width)):
        space[place + i] = from_bf16(found[i])


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
        self._pieces, self._scratch = KnownPieces(WIDTH), Scratch()

    @staticmethod
    def pays_on(target: Target) -> bool:
        """Whether the base's products are faster here than oneDNN's on such a CPU."""
        return target.has(NEEDS) and not target.has(OUTDONE_BY)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether a product with this weight can be computed here."""
        return weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0

    def new_table(self, n_outputs: int) -> TermTable:
        """An empty table of a product with so many outputs."""
        return TermTable(n_outputs, WIDTH, PAIR_BYTES, self._pieces, self._scratch)

    def add_(self, y: Tensor, x: Tensor, terms: TermCall) -> None:
        """Add deltas alone to ``y [T, m]``, rows contiguous, of ``x [T, n]``; all bfloat16."""
        if len(x) == 0:
            return
        n_panels = -(-y.shape[1] // WIDTH)
        chunk = rows_of_a_task(len(x), n_panels, self.parallel.n_threads)
        a = np.zeros(_N_ARGUMENTS, np.int64)
        a[_X : _N_ROWS + 1] = x.data_ptr(), x.stride(0), len(x)
        a[_N : _OUT_ROW + 1] = x.shape[1], y.shape[1], y.data_ptr(), y.stride(0)
        a[_CHUNK], a[_N_RANGES], a[_TERMS] = chunk, self.parallel.n_threads, terms.address
        self.parallel.run(self.compiled, a, _n_tasks(a, n_panels) + terms.n_tasks, unlocked=True)


def rows_of_a_task(n_rows: int, n_panels: int, n_threads: int) -> int:
    """How many rows of one panel a thread takes at a time."""
    wanted = -(-TASKS_PER_THREAD * n_threads // n_panels)
    n_chunks = max(-(-n_rows // MOST_ROWS), min(wanted, n_rows // FEWEST_ROWS), 1)
    return -(-n_rows // (n_chunks * ROWS)) * ROWS


def _n_tasks(a: np.ndarray, n_panels: int) -> int:
    n_ranges, n_rows, chunk = int(a[_N_RANGES]), int(a[_N_ROWS]), int(a[_CHUNK])
    return -(-n_panels // n_ranges) * n_ranges * -(-n_rows // chunk)


class PanelLinear(JoinedLinear):
    """One bfloat16 weight ``[m, n]``, n even.

    The arguments that stay the same are laid out once: a call writes a handful of numbers. One
    thread at a time may call it.
    """

    def __init__(self, kernel: LinearKernel, weight: Tensor) -> None:
        self._parallel, self._compiled = kernel.parallel, kernel.compiled
        self._shape = m, n = weight.shape
        self._n_panels = -(-m // WIDTH)
        self._panels = panels_of(weight, WIDTH)
        self._arguments = np.zeros(_N_ARGUMENTS, np.int64)
        self._arguments[_WEIGHT : _M + 1] = self._panels.data_ptr(), n, m
        self._arguments[_OUT_ROW] = m
        self._arguments[_N_RANGES] = self._parallel.n_threads

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `LinearOp`; x bfloat16."""
        return self._run(x, bias, None)

    def with_terms(self, x: Tensor, terms: TermCall) -> Tensor:
        """See `JoinedLinear`."""
        return self._run(x, None, terms)

    def _run(self, x: Tensor, bias: Tensor | None, terms: TermCall | None) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        n_rows = len(x)
        out = x.new_empty((n_rows, self._shape[0]))
        if n_rows == 0:  # lm_head in a step of prompt chunks that samples nothing
            return out
        a = self._arguments
        a[_X : _N_ROWS + 1] = x.data_ptr(), x.stride(0), n_rows
        a[_OUT] = out.data_ptr()
        a[_CHUNK] = rows_of_a_task(n_rows, self._n_panels, self._parallel.n_threads)
        a[_BIAS] = 0 if bias is None else bias.data_ptr()
        a[_TERMS] = 0 if terms is None else terms.address
        n_tasks = _n_tasks(a, self._n_panels) + (0 if terms is None else terms.n_tasks)
        self._parallel.run(self._compiled, a, n_tasks, unlocked=True)
        return out

    def dense(self) -> Tensor:
        return self.dense_rows(0, self._shape[0])

    def dense_rows(self, start: int, end: int) -> Tensor:
        return panel_rows(self._panels, start, end)
