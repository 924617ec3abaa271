"""What every kernel shares: the interpreter's rules, dot products, launch sizes.

The interpreter (``TRITON_INTERPRET=1``, set before triton is first imported) runs the kernels on a
CPU, one program after the other. Where it differs from a GPU the kernels follow these rules:

- ``tl.dot`` on bfloat16 multiplies raw bits there: every dot goes through `mac`, which converts to
  float32 under the interpreter (`UPCAST`).
- float32 -> bfloat16 truncates there: tests compare in float32, or allow one bfloat16 step.
- a masked load without ``other`` gives 0 there and garbage on a GPU: every masked load has one.
- small integers wrap: indices are int32 before arithmetic, offsets into slot arrays int64.
- programs never wait for each other: no barriers, no atomics, one owner per output element.
- float32 dots on a GPU default to TF32: `mac` asks for IEEE.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRET: bool = bool(triton.knobs.runtime.interpret)
# Passed to every kernel that uses `mac`.
UPCAST = INTERPRET


@triton.jit
def mac(acc, a, b, UPCAST: tl.constexpr):
    """``acc + a @ b`` with float32 accumulation; a and b of one dtype."""
    if UPCAST:
        return tl.dot(
            a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee", out_dtype=tl.float32
        )
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def slot_of(seg_slot, present, n_present, segment):
    """Place of the segment's slot (`present` holds place + 1, 0 for none), or -1 if it has nothing
    to add: base rows, padding, absent slots, slots that the map does not know.
    """
    slot = tl.load(seg_slot + segment).to(tl.int32)
    here = 0
    if (slot >= 0) & (slot < n_present):
        here = tl.load(present + slot)
    return here - 1


@triton.jit
def n_pieces(where):
    """Pieces of at most TILE_T rows that the segments in `where` (see `where_of`) consist of."""
    return tl.load(where[3]) * where[5]


@triton.jit
def piece_rows(where, present, n_present, piece, TILE_T: tl.constexpr):
    """Place of the piece's slot (-1: nothing to add), its rows, and which of these there are."""
    entry = piece // where[5] * where[4]
    start = tl.load(where[1] + entry).to(tl.int32) + piece % where[5] * TILE_T
    end = tl.load(where[2] + entry).to(tl.int32)
    place = -1
    if start < end:
        place = slot_of(where[0], present, n_present, entry)
    token = start + tl.arange(0, TILE_T)
    return place, token, token < end


@triton.jit
def first_item(before):
    """The program's first item of a list that is dealt out after `before` other items."""
    n = tl.num_programs(0)
    return (tl.program_id(0) + n - before % n) % n


def next_power_of_two(n: int) -> int:
    """Smallest power of two >= n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def is_wide(dtype: torch.dtype) -> bool:
    """Whether dots run on the ordinary cores, each thread holding whole rows of both operands:
    tiles of 16 bits' size would then spill tens of kilobytes a thread.
    """
    return dtype.itemsize > 2


def tile_of(size: int) -> int:
    """Rows or columns of a tile: what covers `size`, within a tensor-core operand's 16 and 64."""
    return max(16, min(64, next_power_of_two(size)))


def n_programs(device: torch.device, per_processor: int) -> int:
    """Programs of a persistent kernel: enough to fill the device, few under the interpreter."""
    if device.type != "cuda":
        return 4
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return per_processor * processors


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """``kernel[grid](*args, **meta)``; an empty grid is no launch."""
    if all(grid):
        kernel[grid](*args, **meta)
