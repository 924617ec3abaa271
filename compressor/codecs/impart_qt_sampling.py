"""Mixed-precision allocation: which components are kept how often, at 8, 3 or 2 bits.

Source: Yang et al., ImPart, ACL 2025 (arXiv 2504.13237), Algorithm 3, with bytes counted as they
are stored: codes, sampling weights and singular values.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np

from compressor.codecs.impart_sampling import (
    FIXED_POINT,
    Floats,
    Ints,
    allocate_sparsity,
    kept_before_shift,
    sample_blocks,
    scale_to_sum,
    to_fixed_point,
)
from compressor.codecs.packing import packed_size
from compressor.codecs.term import Shape

CLASS_BITS = (8, 3, 2)
CLASS_STARTS = (0, 2, 34)  # first component of each class
WEIGHT_BITS = 15  # fraction bits of the stored sampling weights
COMPONENT_BYTES = 4  # a sampling weight and a singular value

_BISECTIONS = 50

Kept = tuple[int, int, int]


class QtAllocation(NamedTuple):
    """What Algorithm 3 decides for one matrix.

    alpha    the sparsity of U and V given to Algorithm 1
    kept     components a block keeps of each class
    weights  int64 ``[rank]``, inclusion probabilities in units of ``2^-15``, within 1 .. 2^15;
             those of a class sum to what it keeps
    """

    alpha: float
    kept: Kept
    weights: Ints


def class_sizes(rank: int) -> Kept:
    """How many of `rank` components belong to each class."""
    ends = (*CLASS_STARTS[1:], max(rank, CLASS_STARTS[-1]))
    first, second, third = (
        max(0, min(rank, end) - start) for start, end in zip(CLASS_STARTS, ends, strict=True)
    )
    return first, second, third


def codes_size(shape: Shape, kept: Kept) -> int:
    """Bytes of the packed codes of both sides; each class starts at a whole byte."""
    return sum(packed_size(sum(shape) * n, bits) for n, bits in zip(kept, CLASS_BITS, strict=True))


def qt_size(shape: Shape, kept: Kept, rank: int) -> int:
    """Bytes of everything stored."""
    return codes_size(shape, kept) + COMPONENT_BYTES * rank


def smallest_size(shape: Shape) -> int:
    """One component."""
    return qt_size(shape, (1, 0, 0), 1)


def largest_size(shape: Shape, beta: float) -> int:
    """Everything that the pre-pruning leaves."""
    rank = kept_before_shift(min(shape), beta)
    return qt_size(shape, class_sizes(rank), rank)


def solve_qt_allocation(
    sigma: Floats, shape: Shape, budget_bytes: int, beta: float, c: float
) -> QtAllocation:
    """Find the sparsity whose true bytes meet the budget (Algorithm 3), by bisection.

    sigma         ``[min(m, n)]`` singular values, descending
    budget_bytes  within `smallest_size` .. `largest_size`

    The sum of ``q_k`` over a class, its expected count, is then made whole; the first class is
    kept entirely. Bytes left over move the boundary shift back: components it had dropped stay,
    with the probability they had before.
    """
    if budget_bytes < qt_size(shape, (2, 0, 0), 2) or len(sigma) == 1:
        return QtAllocation(1.0, (1, 0, 0), np.array([1 << WEIGHT_BITS]))
    low, high = beta, 1.0
    if _real_size(1 - allocate_sparsity(sigma, beta, beta, c), shape) <= budget_bytes:
        high = beta
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _real_size(1 - allocate_sparsity(sigma, middle, beta, c), shape) > budget_bytes:
            low = middle
        else:
            high = middle
    q = 1 - allocate_sparsity(sigma, high, beta, c)
    most = kept_before_shift(len(sigma), beta)
    kept, rank = _whole_counts(q, shape, budget_bytes, most)
    rank = _fill(kept, rank, shape, budget_bytes, most)
    before_shift = _before_shift(sigma, high, beta, c)
    weights, start = [], 0
    for size, n in zip(class_sizes(rank), kept, strict=True):
        if size:
            scaled = scale_to_sum(before_shift[start : start + size], n)
            weights.append(to_fixed_point(scaled, n, WEIGHT_BITS))
        start += size
    return QtAllocation(high, kept, np.concatenate(weights))


def draw_blocks(weights: Ints, kept: Kept, n_blocks: int, key: str) -> Ints:
    """Draw the components of every block, class by class: int64 ``[n_blocks, sum(kept)]``.

    Rows are strictly increasing; component k is in a given row with probability
    ``weights[k] / 2^15``. The same key gives the same draw on any machine.
    """
    drawn, start = [], 0
    for index, (size, n) in enumerate(zip(class_sizes(len(weights)), kept, strict=True)):
        if n:
            inclusion = weights[start : start + size] << (FIXED_POINT - WEIGHT_BITS)
            drawn.append(start + sample_blocks(inclusion, n_blocks, f"{key}\0{index}"))
        start += size
    return np.concatenate(drawn, axis=1)


def draw_number(name: str, seed: int) -> int:
    """Name the draw of a tensor by a number of 53 bits, exact in any JSON reader."""
    digest = hashlib.sha256(f"impart-qt\0{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 11


def _real_size(q: Floats, shape: Shape) -> float:
    """Bytes if a class could keep any real number of components."""
    rank = int(np.count_nonzero(q))
    counts = _class_sums(q, rank)
    bits = sum(n * b for n, b in zip(counts, CLASS_BITS, strict=True))
    return sum(shape) * bits / 8 + COMPONENT_BYTES * rank


def _class_sums(q: Floats, rank: int) -> tuple[float, float, float]:
    return (
        float(min(CLASS_STARTS[1], rank)),
        math.fsum(q[CLASS_STARTS[1] : min(rank, CLASS_STARTS[2])]),
        math.fsum(q[CLASS_STARTS[2] : rank]),
    )


def _whole_counts(q: Floats, shape: Shape, budget_bytes: int, most: int) -> tuple[Kept, int]:
    """Whole numbers of components near the sums of q that use the most of the budget.

    A class that would keep none is dropped, and its components with it. The last class, two bits
    a step where the others have three, is begun before its turn if that leaves less unused.
    """
    rank = max(1, int(np.count_nonzero(q)))
    first, second, _ = class_sizes(rank)
    _, wanted, _ = _class_sums(q, rank)
    best, best_key = ((first, 0, 0), first), (math.inf, math.inf)
    step = sum(shape) / 8  # bytes of one bit a row
    for n3 in range(max(0, math.floor(wanted) - 1), min(second, math.ceil(wanted) + 1) + 1):
        without = (first, n3, 0), (min(rank, CLASS_STARTS[2]) if n3 else first)
        for kept, used in (without, _with_last_class(first, n3, rank, shape, budget_bytes, most)):
            left = budget_bytes - qt_size(shape, kept, used)
            key = (round(left / step), abs(n3 - wanted))
            if left >= 0 and key < best_key:
                best, best_key = (kept, used), key
    return best


def _with_last_class(
    first: int, n3: int, rank: int, shape: Shape, budget_bytes: int, most: int
) -> tuple[Kept, int]:
    """As much of the last class as fits, if one component of it does and n3 is not 0."""
    used = max(rank, CLASS_STARTS[2] + 1)
    left = budget_bytes - qt_size(shape, (first, n3, 0), used)
    n2 = min(max(rank - CLASS_STARTS[2], 1), math.floor(left / (sum(shape) / 4)))
    if n3 and used <= most and n2 > 0:
        return (first, n3, n2), used
    return (first, n3, 0), (min(rank, CLASS_STARTS[2]) if n3 else first)


def _fill(kept: Kept, rank: int, shape: Shape, budget_bytes: int, most: int) -> int:
    """The rank up to which sampling weights fit into what is left of the budget."""
    room = (budget_bytes - qt_size(shape, kept, rank)) // COMPONENT_BYTES
    if not kept[1]:
        return rank
    return min(rank + room, most if kept[2] else min(most, CLASS_STARTS[2]))


def _before_shift(sigma: Floats, alpha: float, beta: float, c: float) -> Floats:
    """``q_k`` of equation (7), before any component is dropped."""
    gamma = (alpha - beta) / (1 - beta)
    relative = (sigma / sigma[0]) ** c if sigma[0] > 0 else np.ones(len(sigma))
    q: Floats = np.maximum(1 - (1 - relative) * gamma, 2.0**-30)
    return q
