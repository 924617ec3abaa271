"""One spec per launch site: what it must read, what is expected of it, how to make and check it.

The same specs give the predictions (nothing is allocated until one is made), are compiled offline,
run tiny under the interpreter in a test, and are timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Codec, Group
from compressor.codecs.columns import packed_rows
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import Segment

BLOCK_TOKENS = 32


@dataclass(frozen=True)
class Place:
    """Where a case is made, and its compute dtype."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Case:
    """A spec with its tensors.

    run    one launch (in place where the kernel is)
    error  runs once on fresh outputs; largest deviation from float64 in units of the largest
           float64 result
    """

    run: Callable[[], object]
    error: Callable[[], float]


@dataclass(frozen=True)
class Spec:
    """One launch site.

    n_bytes     least bytes it must move
    share       expected share of the copy bandwidth, launches aside
    n_launches  kernels it takes
    n_flops     multiplications and additions, where they rather than bytes bind (prefill)
    bound       what the error may be: roundings of the dtypes involved
    variants    distinct ones whose deltas it applies in a decode step; 0: it does something else
    """

    name: str
    n_bytes: int
    share: float
    make: Callable[[Place], Case]
    n_launches: int = 1
    n_flops: int = 0
    bound: float = 0.02
    variants: int = 0


def relative(got: Tensor, want: Tensor) -> float:
    """Largest deviation over the largest magnitude; infinite if anything is not finite or there is
    nothing to compare with.
    """
    largest = float(want.double().abs().max())
    if largest == 0.0 or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got.double() - want.double()).abs().max()) / largest


def random_blocks(group: Group, codec: Codec, n_slots: int, device: torch.device) -> PackedBlocks:
    """Slot arrays full of random values of about 1e-3."""
    s, bits = codec.n_blocks, codec.bits
    outputs = sum(-(-m // s) for m in group.sizes)
    shape = (n_slots, s, packed_rows(-(-group.n // s), bits), outputs)
    if bits == 16:
        codes = torch.randn(shape, device=device).half()
    else:
        codes = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    scales = torch.rand((n_slots, s, outputs), device=device).add_(0.5).half()
    units = torch.full((n_slots, len(group.sizes)), 2.0**-10, device=device)
    return PackedBlocks(codes, scales, units, group.sizes, group.n, bits)


def even_segments(rows: int, slots: int) -> list[Segment]:
    """`rows` rows shared by `slots` slots as evenly as possible."""
    cuts = [rows * i // slots for i in range(slots + 1)]
    return [Segment(i, a, b) for i, (a, b) in enumerate(pairwise(cuts)) if b > a]


def all_places(slots: int, device: torch.device) -> Tensor:
    """The map from slots to places in which every slot has its own."""
    return torch.arange(1, slots + 1, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Sizes:
    """What `all_specs` covers: decode rows, numbers of variants, context, rows of a prefill."""

    rows: int
    variants: tuple[int, ...]
    length: int
    prefill_rows: int
