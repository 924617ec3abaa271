"""Published ways to compress a delta that this project measures itself against.

Reconstruct-only: each gives the matrix it would restore and the bytes it would store, counted on
the stored parts themselves. Nothing here is served or written to an artifact.
"""

from __future__ import annotations

from benchmarks.baselines.base import Baseline, Encoded, Matrix
from benchmarks.baselines.bitdelta import BitDelta
from benchmarks.baselines.dare import Dare
from benchmarks.baselines.deltacome import DeltaCome
from benchmarks.baselines.lora import ExtractedLora
from benchmarks.baselines.rtn import RoundToNearest

__all__ = [
    "BASELINES",
    "Baseline",
    "BitDelta",
    "Dare",
    "DeltaCome",
    "Encoded",
    "ExtractedLora",
    "Matrix",
    "RoundToNearest",
]

# Name on the command line -> method.
BASELINES: dict[str, Baseline] = {
    "dare": Dare(),
    "delta-come": DeltaCome(),
    "lora": ExtractedLora(),
    "bitdelta": BitDelta(per_row=False),
    "bitdelta-row": BitDelta(per_row=True),
    "rtn-4": RoundToNearest(4),
    "rtn-8": RoundToNearest(8),
}
