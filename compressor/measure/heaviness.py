"""Whether a difference is too heavy for the bytes it is given, and what to tell the user of it.

What a delta leaves wrong in the weights is the relative error of the differences times their size
beside the weights. In the measured pairs texts stayed whole while that was below a sixth and broke
down above a quarter (sampling at 512 and at 1024 times). Where `auto` has measured, the KL decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from compressor.artifact.config import TensorEntry
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.pairing import TensorPair

_HEAVY = 0.2  # of the weights' own size: so much noise and answers are lost
_UNRELATED = 0.7  # two independent models of one architecture differ by the square root of two
_BREAKDOWN = 0.1  # of the base's own KL: so much and answers are lost
_PIECES = 4  # of a tensor that are looked at, evenly spaced
_PIECE_ELEMENTS = 1 << 14


def relative_change(base: Checkpoint, tuned: Checkpoint, pairs: Iterable[TensorPair]) -> float:
    """Return ``|dW| / |W|`` (Frobenius) over a sample of every encoded matrix; 0 without any."""
    wanted = whole = 0.0
    for pair in pairs:
        if not pair.is_encoded:
            continue
        rows, width = base.tensors[pair.base_key].shape
        step = min(rows, max(1, _PIECE_ELEMENTS // width))
        for piece in range(_PIECES):
            start = piece * (rows - step) // (_PIECES - 1)
            ours = base.read_rows(pair.base_key, start, start + step).double()
            theirs = tuned.read_rows(pair.tuned_key, start, start + step).double()
            wanted += float(torch.linalg.vector_norm(theirs - ours)) ** 2
            whole += float(torch.linalg.vector_norm(ours)) ** 2
    return math.sqrt(wanted / whole) if whole else 0.0


def mean_error(entries: Sequence[TensorEntry]) -> float:
    """Mean of the tensors' relative errors, each weighted by its elements; 0 if none is known."""
    known = [(math.prod(e.base_shape), e.error) for e in entries if e.error is not None]
    total = sum(n for n, _ in known)
    return sum(n * error for n, error in known) / total if total else 0.0


def heavy_warnings(change: float, error: float, kl_share: float | None = None) -> Iterator[str]:
    """Yield what to say of a difference, of which `error` is left wrong.

    change    as `relative_change` says
    error     as `mean_error` says
    kl_share  of the base's own KL that is left, where that was measured
    """
    if change > _UNRELATED:
        yield (
            f"warning: the difference is {change:.0%} of the weights themselves: this is not a "
            "fine-tune of the base, or one of the two has random weights (what transformers makes "
            "of tensors that it does not find)"
        )
    remedy = "this difference is too heavy for so few bytes; ask for a lower --ratio"
    if kl_share is not None:
        if kl_share > _BREAKDOWN:
            yield (
                f"warning: the KL is {kl_share:.0%} of that of the base itself: {remedy}, or for a "
                "--max-kl"
            )
    elif change * error > _HEAVY:
        yield (
            f"warning: the difference is {change:.1%} of the weights and what is stored of it is "
            f"off by {error:.3g} times its size, {change * error:.0%} of the weights: {remedy}"
        )
