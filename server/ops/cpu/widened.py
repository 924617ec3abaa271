"""The base's products in float32 with weights held in bfloat16, for CPUs without bfloat16 units.

Where products run in float32 because bfloat16 ones are slow, most weights are still bfloat16
numbers: held as such they are half the bytes, which is what a step of few rows waits for.

A weight lies in panels of WIDTH outputs, in the order in which it is read: ``[panel, n / 2,
WIDTH]`` words, each of two neighbouring inputs. A task is one panel and some rows, six of which
share what is loaded. Sums are float32 in the order of the inputs, whatever the other rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from server.ops.cpu.codegen.intrinsics import FAST, f32_at, i64_at, next_task
from server.ops.cpu.codegen.piece_product import FLOAT_BYTES
from server.ops.cpu.codegen.widened_product import (
    WIDTH,
    four_rows,
    one_row,
    six_rows,
    two_rows,
)
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.features import Target
from server.ops.cpu.linear import panel_rows, panels_of
from server.ops.cpu.panel_terms import (
    ROOM_BYTES,
    T_N_TASKS,
    T_PADDED,
    add_terms_to_floats,
    shrink_floats,
    wait_for_heads,
)
from server.ops.cpu.panel_terms import ROWS as ROOM_ROWS
from server.ops.cpu.parallel import Parallel
from server.ops.cpu.pieces import KnownPieces
from server.ops.cpu.term_table import JoinedLinear, Scratch, TermCall, TermTable

U = np.uint64
ROWS = 6  # that share loaded weights: their sums stay in registers
TASK_ROWS = 64  # at most: with a panel they fit the L2 cache

# Places in the argument array. Strides are in elements.
(_X, _X_ROW, _N_ROWS, _WEIGHT, _N, _M, _OUT, _OUT_ROW) = range(1, 9)
(_BIAS, _CHUNK, _TERMS, _N_ARGUMENTS) = range(9, 13)


def _widened(address):
    a = i64_at(address)
    n, m = a[_N], a[_M]
    n_panels = (m + WIDTH - 1) // WIDTH
    n_chunks = (a[_N_ROWS] + a[_CHUNK] - 1) // a[_CHUNK]
    stride, terms = 4 * a[_X_ROW], a[_TERMS]
    n_heads = i64_at(terms)[T_N_TASKS] if terms != 0 else np.int64(0)
    n_padded = ROOM_ROWS * i64_at(terms)[T_PADDED] if terms != 0 else np.int64(0)
    # With deltas all rows' sums are kept until those are added; see `server.ops.cpu.linear`.
    kept_rows = a[_CHUNK] if terms != 0 else np.int64(0)
    space = np.empty((kept_rows + ROWS + 2) * WIDTH, np.float32)
    sums = (space.ctypes.data + 63) // 64 * 64
    first_sum = U((sums - space.ctypes.data) // 4)
    padded, more = np.empty(n_padded, np.float32), np.empty(ROOM_BYTES, np.uint8)
    room, spare = padded.ctypes.data, more.ctypes.data
    while True:
        task = next_task(address) - n_heads
        if task < 0:
            shrink_floats(terms, task + n_heads, a[_X], stride, room, spare)
            continue
        if task >= n_panels * n_chunks:
            break
        panel, chunk = task // n_chunks, task % n_chunks
        weight = a[_WEIGHT] + panel * n * WIDTH * 2
        first, end = chunk * a[_CHUNK], min(a[_N_ROWS], (chunk + 1) * a[_CHUNK])
        row = first
        if a[_WEIGHT] == 0:
            _load(address, space, first_sum, first, end - first, panel * WIDTH)
            row = end
        while row < end:
            left = end - row
            # As many passes as needed, of equal sizes: eight rows are twice four.
            n_passes = (left + ROWS - 1) // ROWS
            count = (left + n_passes - 1) // n_passes
            x, to = a[_X] + row * stride, sums
            if terms != 0:
                to = sums + 4 * WIDTH * (row - first)
            if count == 1:
                one_row(x, stride, count - 1, weight, n // 2, to)
            elif count == 2:
                two_rows(x, stride, count - 1, weight, n // 2, to)
            elif count <= 4:
                four_rows(x, stride, count - 1, weight, n // 2, to)
            else:
                six_rows(x, stride, count - 1, weight, n // 2, to)
            if terms == 0:
                _store(address, space, first_sum, row, count, panel * WIDTH)
            row += count
        if terms != 0:
            wait_for_heads(terms)
            add_terms_to_floats(
                terms,
                panel,
                min(panel + 1, n_panels - 1),
                np.int64(WIDTH),
                a[_X],
                stride,
                first,
                end,
                sums,
                np.int64(4 * WIDTH),
                room,
            )
            _store(address, space, first_sum, first, end - first, panel * WIDTH)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _load(address, space, first_sum, row, count, column):
    a = i64_at(address)
    width = U(min(np.int64(WIDTH), a[_M] - column))
    for r in range(count):
        found = f32_at(a[_OUT] + 4 * ((row + r) * a[_OUT_ROW] + column))
        for i in range(width):
            space[first_sum + U(r * WIDTH) + i] = found[i]


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _store(address, space, first_sum, row, count, column):
    a = i64_at(address)
    width = U(min(np.int64(WIDTH), a[_M] - column))
    bias = f32_at(a[_BIAS] + 4 * column)
    for r in range(count):
        out = f32_at(a[_OUT] + 4 * ((row + r) * a[_OUT_ROW] + column))
        place = first_sum + U(r * WIDTH)
        if a[_BIAS] != 0:
            for i in range(width):
                out[i] = space[place + i] + bias[i]
        else:
            for i in range(width):
                out[i] = space[place + i]


class WidenedKernel:
    """The compiled kernel, shared by all weights."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.compiled = compile_kernel(_widened)
        self._pieces, self._scratch = KnownPieces(WIDTH), Scratch()

    def new_table(self, n_outputs: int) -> TermTable:
        """An empty table of a product with so many outputs."""
        return TermTable(n_outputs, WIDTH, FLOAT_BYTES, self._pieces, self._scratch)

    def add_(self, y: Tensor, x: Tensor, terms: TermCall) -> None:
        """Add deltas alone to ``y [T, m]``, rows contiguous, of ``x [T, n]``; all float32."""
        if len(x) == 0:
            return
        chunk, n_panels = min(len(x), TASK_ROWS), -(-y.shape[1] // WIDTH)
        a = np.zeros(_N_ARGUMENTS, np.int64)
        a[_X : _N_ROWS + 1] = x.data_ptr(), x.stride(0), len(x)
        a[_N : _OUT_ROW + 1] = x.shape[1], y.shape[1], y.data_ptr(), y.stride(0)
        a[_CHUNK], a[_TERMS] = chunk, terms.address
        n_tasks = n_panels * -(-len(x) // chunk) + terms.n_tasks
        self.parallel.run(self.compiled, a, n_tasks, unlocked=True)

    @staticmethod
    def pays_on(target: Target) -> bool:
        """Whether the base's products run in float32 on such a CPU: bfloat16's are slow."""
        return not target.has_bf16_products

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether every value is a bfloat16 number, so that holding it as one changes nothing."""
        if weight.dtype is not torch.float32 or weight.shape[1] % 2:
            return False
        return all(torch.equal(rows.bfloat16().float(), rows) for rows in weight.split(4096))


class WidenedLinear(JoinedLinear):
    """One weight ``[m, n]`` float32 of bfloat16 numbers, n even.

    The arguments that stay the same are laid out once: a call writes a handful of numbers. One
    thread at a time may call it.
    """

    held_itemsize = 2

    def __init__(self, kernel: WidenedKernel, weight: Tensor) -> None:
        self._parallel, self._compiled = kernel.parallel, kernel.compiled
        self._shape = m, n = weight.shape
        self._n_panels = -(-m // WIDTH)
        self._panels = panels_of(weight.bfloat16(), WIDTH)
        self._arguments = np.zeros(_N_ARGUMENTS, np.int64)
        self._arguments[_WEIGHT : _M + 1] = self._panels.data_ptr(), n, m

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `LinearOp`; x float32."""
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
        chunk = min(n_rows, TASK_ROWS)
        a = self._arguments
        a[_X : _N_ROWS + 1] = x.data_ptr(), x.stride(0), n_rows
        a[_OUT : _OUT_ROW + 1] = out.data_ptr(), self._shape[0]
        a[_CHUNK], a[_BIAS] = chunk, 0 if bias is None else bias.data_ptr()
        a[_TERMS] = 0 if terms is None else terms.address
        n_tasks = self._n_panels * -(-n_rows // chunk) + (0 if terms is None else terms.n_tasks)
        self._parallel.run(self._compiled, a, n_tasks, unlocked=True)
        return out

    def dense(self) -> Tensor:
        return self.dense_rows(0, self._shape[0])

    def dense_rows(self, start: int, end: int) -> Tensor:
        return panel_rows(self._panels, start, end).float()
