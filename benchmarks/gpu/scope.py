"""Sizes of a run: the target's, and a tiny one for the interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.cases import Place, Sizes
from benchmarks.gpu.shapes import LLAMA_8B, TINY, Codec, ModelShape


@dataclass(frozen=True)
class Scope:
    """What one run measures.

    codecs    whose kernels are checked and timed
    served    whose whole decode steps are timed: ratios 32, 128, 256 without scales
    variants  distinct variants in a step; as many rows as `batch` or as variants
    context   tokens before the timed steps
    n_steps   timed steps; n_loads cold loads
    """

    shape: ModelShape
    codecs: tuple[Codec, ...]
    served: tuple[Codec, ...]
    batch: int
    variants: tuple[int, ...]
    context: int
    prefill_rows: int
    n_steps: int
    n_loads: int
    copy_bytes: int
    device: torch.device
    dtype: torch.dtype

    @property
    def place(self) -> Place:
        return Place(self.device, self.dtype)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.batch, self.variants, self.context, self.prefill_rows)

    @property
    def mixes(self) -> list[tuple[int, int]]:
        """(rows, variants) of the steps: base only first, for every number of rows."""
        rows = sorted({max(self.batch, k) for k in self.variants})
        return [(n, 0) for n in rows] + [(max(self.batch, k), k) for k in self.variants]


SERVED = (Codec(4, 8), Codec(4, 32), Codec(4, 64))
FULL = Scope(
    LLAMA_8B,
    (Codec(4, 8), Codec(4, 32), Codec(4, 64), Codec(2, 4), Codec(2, 32), Codec(3, 6)),
    SERVED,
    batch=32,
    variants=(1, 8, 32, 64),
    context=1024,
    prefill_rows=2048,
    n_steps=60,
    n_loads=3,
    copy_bytes=4 << 30,
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
)
SMALL = Scope(
    replace(TINY, hidden=32, intermediate=32, heads=2, kv_heads=1, layers=1, vocab=32),
    (Codec(4, 2),),
    (Codec(4, 2),),
    batch=2,
    variants=(1, 2),
    context=8,
    prefill_rows=40,
    n_steps=1,
    n_loads=1,
    copy_bytes=1 << 16,
    device=torch.device("cpu"),
    dtype=torch.float32,
)
