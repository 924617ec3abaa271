"""Share bytes out among matrices by what each byte saves: one Lagrangian over true bytes.

The error of `blockdiag` in matrix t, weighted by how much the model minds it (`HeadCosts`), is

    cost_t(s, r) = energy_t(r) * (s (1 + D) - 1)

with s blocks, a head of rank r that leaves the energy given, and D the relative squared error of
the quantiser: keeping one of s blocks and rescaling has variance s - 1, and what quantisation adds
is rescaled too. Where it is allowed, the head may be all (s = 0), at the cost of leaving out the
rest: no noise, but an error that adds up, so that cost is measured along it
(`HeadCosts.left_out`). The sum of the costs is minimised under the sum of the bytes by bisecting
the price of a byte; at a given price every site is its own small search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from compressor.codecs.lowrank import lowrank_size
from compressor.codecs.rows import most_rows, rows_size
from compressor.codecs.term import Params, Shape
from compressor.encoders.blockdiag import ROW_BITS, BlockDiagCodec, blocks_size
from compressor.plan.budget import Allotment, Site, allotment

# Relative squared error of `quantize_rows` on Gaussian values, by bits.
GAUSSIAN_ERROR = {2: 0.119, 3: 0.0374, 4: 0.0115, 8: 1e-4, 16: 0.0}

# Of the bytes, what rows of the vocabulary get that are kept whole where it has no blocks. No text
# need show what they are for, so no text says how many: measured on tasks that texts did not show.
ROW_SHARE = 0.1

_BISECTIONS = 60
_FEW_DIVISORS = 6
_GRID = 48  # block counts tried where few divide both sides
_REFUNDS = (0.9, 0.7, 0.5, 0.3)  # prices, of the last one, at which what is left over is spent

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeadCosts:
    """What heads leave of one matrix: weighted squared norms of the rest, by rank.

    ranks     ascending, from 0
    energy    ``sum_ij weight_ij (dW - head_r)_ij^2`` of each: by this goes what noise costs
    left_out  of each, what it costs to store the head alone; empty if that is not to be
    """

    ranks: tuple[int, ...]
    energy: tuple[float, ...]
    left_out: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class _Menu:
    """What a site can choose from: bytes by number of blocks S, where 0 stands for the rows given;
    ranks R, their bytes and costs ``[S, R]`` by matrix.
    """

    n_blocks: npt.NDArray[np.int64]
    block_bytes: Floats
    n_rows: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    head_bytes: tuple[Floats, ...]
    costs: tuple[Floats, ...]


@dataclass(frozen=True, slots=True)
class _Pick:
    n_blocks: int
    n_rows: tuple[int, ...]
    ranks: tuple[int, ...]
    n_bytes: float
    cost: float


class NoiseAllotter:
    """An `Allotter` for `blockdiag` that spends every byte where it saves most.

    costs       by matrix name, of every matrix it will be asked about
    leaves_out  whether a matrix may do without blocks where `HeadCosts.left_out` says what that
                costs; a few of its rows are then kept whole
    """

    def __init__(
        self, codec: BlockDiagCodec, costs: Mapping[str, HeadCosts], *, leaves_out: bool = False
    ) -> None:
        self._codec, self._costs, self._leaves_out = codec, costs, leaves_out

    def __call__(
        self, names: Sequence[tuple[str, ...]], sites: Sequence[Site], budget_bytes: float
    ) -> list[Allotment]:
        """Return one allotment a site, in all as near below `budget_bytes` as the search gets.

        Beyond what the codec can do, the smallest or largest total.
        """
        left_out = [name for site in names for name in site if self._costs[name].left_out]
        row_bytes = ROW_SHARE * budget_bytes / max(1, len(left_out))
        menus = [self._menu(*pair, row_bytes) for pair in zip(names, sites, strict=True)]
        picks = _spend(menus, budget_bytes)
        codec = self._codec
        return [
            allotment(
                codec,
                site,
                tuple(
                    codec.settings(rank, pick.n_blocks, n_rows)
                    for rank, n_rows in zip(pick.ranks, pick.n_rows, strict=True)
                ),
            )
            for site, pick in zip(sites, picks, strict=True)
        ]

    def _menu(self, names: tuple[str, ...], site: Site, row_bytes: float) -> _Menu:
        codec = self._codec
        scale_bits = 16 if codec.bits == 16 else codec.scale_bits
        counts = block_counts(site)
        block_bytes = [
            sum(blocks_size(shape, s, codec.bits, scale_bits) for shape in site) for s in counts
        ]
        tables = [self._costs[name] for name in names]
        factors = np.array(counts) * (1 + GAUSSIAN_ERROR[codec.bits]) - 1
        costs = [np.multiply.outer(factors, np.array(table.energy)) for table in tables]
        n_rows = (0,) * len(site)
        if self._leaves_out and all(table.left_out for table in tables):
            n_rows = tuple(most_rows(shape, row_bytes, ROW_BITS) for shape in site)
            sizes = (rows_size(shape, n, ROW_BITS) for shape, n in zip(site, n_rows, strict=True))
            counts, block_bytes = [0, *counts], [sum(sizes), *block_bytes]
            costs = [
                np.vstack([np.array(table.left_out), cost])
                for table, cost in zip(tables, costs, strict=True)
            ]
        return _Menu(
            np.array(counts),
            np.array(block_bytes, dtype=np.float64),
            n_rows,
            tuple(table.ranks for table in tables),
            tuple(
                np.array([lowrank_size(shape, r, codec.head_bits) for r in table.ranks], np.float64)
                for shape, table in zip(site, tables, strict=True)
            ),
            tuple(costs),
        )


def block_counts(site: Site) -> list[int]:
    """Numbers of blocks worth trying: those that divide all sides, or a grid where few do."""
    most = min(min(shape) for shape in site)
    common = math.gcd(*(side for shape in site for side in shape))
    divisors = [s for s in range(1, most + 1) if common % s == 0]
    if len(divisors) >= min(_FEW_DIVISORS, most):
        return divisors
    return sorted({*divisors, *(round(most ** (i / _GRID)) for i in range(_GRID + 1))})


def possible_ranks(shape: Shape) -> tuple[int, ...]:
    """Ranks of a head worth trying: few enough that finding them is cheap."""
    grid = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
    return tuple(rank for rank in grid if rank <= min(shape) // 6)


class Shares(NamedTuple):
    """What part of the bytes of `blockdiag` encodings is in their heads, and in rows kept whole."""

    heads: float
    rows: float


def byte_shares(settings: Iterable[tuple[Shape, Params]]) -> Shares:
    """Return the shares for matrices with these settings."""
    codec = BlockDiagCodec()
    total = heads = rows = 0
    for shape, params in settings:
        if not codec.terms_of(params):
            continue
        size = codec.size_bytes(shape, params)
        total += size
        heads += size - codec.size_bytes(shape, params | {"head_rank": 0})
        rows += size - codec.size_bytes(shape, params | {"n_rows": 0})
    return Shares(heads / total, rows / total) if total else Shares(0.0, 0.0)


def _spend(menus: Sequence[_Menu], budget_bytes: float) -> list[_Pick]:
    """Bisect the price of a byte, then spend what is left over where it saves most."""
    low, high = -80.0, 80.0  # natural logarithms: sure to overspend, sure to underspend
    picks = [_pick(menu, math.exp(high)) for menu in menus]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found = [_pick(menu, math.exp(middle)) for menu in menus]
        if sum(pick.n_bytes for pick in found) > budget_bytes:
            low = middle
        else:
            high, picks = middle, found
    rest = budget_bytes - sum(pick.n_bytes for pick in picks)
    for refund in _REFUNDS:
        price = math.exp(high) * refund
        for index, menu in enumerate(menus):
            better = _pick(menu, price)
            extra = better.n_bytes - picks[index].n_bytes
            if 0 < extra <= rest:
                picks[index] = better
                rest -= extra
    return picks


def _pick(menu: _Menu, price: float) -> _Pick:
    """The cheapest choice of one site where a byte costs `price`."""
    cost = np.zeros(len(menu.n_blocks))
    n_bytes = menu.block_bytes.copy()
    chosen = []
    for costs, head_bytes in zip(menu.costs, menu.head_bytes, strict=True):
        best = (costs + price * head_bytes).argmin(axis=1)
        chosen.append(best)
        cost += np.take_along_axis(costs, best[:, None], axis=1)[:, 0]
        n_bytes += head_bytes[best]
    at = int((cost + price * n_bytes).argmin())
    ranks = tuple(r[int(best[at])] for r, best in zip(menu.ranks, chosen, strict=True))
    n_blocks = int(menu.n_blocks[at])
    n_rows = (0,) * len(ranks) if n_blocks else menu.n_rows
    return _Pick(n_blocks, n_rows, ranks, float(n_bytes[at]), float(cost[at]))
