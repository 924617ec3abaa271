"""Share a byte budget out among matrices so that the total comes out right.

Every matrix gets bytes in proportion to its elements. A codec can only meet a share roughly (a
whole number of blocks, of ranks), so what one matrix leaves over or overdraws is carried to the
next ones of the same size class, as in error diffusion; what remains is settled one matrix at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compressor.codecs import Params, Shape
from compressor.encoders.codec import Codec
from compressor.errors import BudgetError

TOLERANCE = 0.03  # of the ratio asked for

_MAX_CARRY = 0.3  # of a matrix's own share: no matrix pays for, or gains from, a large neighbour
_GOOD_ENOUGH = 2e-4  # of the budget
_BISECTIONS = 40
_SETTLEMENTS = 100


# Matrices that are planned together: one, or siblings with the same number of columns.
Site = tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Allotment:
    """Settings of each of one site's matrices, and the exact payload bytes they give together."""

    settings: tuple[Params, ...]
    n_bytes: int


# Chooses settings for named sites: (names of each site's matrices, sites, bytes in all).
Allotter = Callable[[Sequence[tuple[str, ...]], Sequence[Site], float], list[Allotment]]


def share_out(codec: Codec, sites: Sequence[Site], budget_bytes: float) -> list[Allotment]:
    """Return one allotment a site, their total as near `budget_bytes` as the codec can get.

    Beyond what the codec can do, the smallest or largest total: the caller compares.
    """
    planner = _Fitter(codec, sites)
    low, high = 0.0, max(budget_bytes, 1.0) / max(1, planner.n_elements)
    best = planner.diffuse(low)
    if _total(best) >= budget_bytes:
        return best
    largest = planner.largest()
    if _total(largest) <= budget_bytes:
        return largest
    while _total(candidate := planner.diffuse(high)) < budget_bytes:
        best = _nearer(best, candidate, budget_bytes)
        low, high = high, 2 * high
    best = _nearer(best, candidate, budget_bytes)
    for _ in range(_BISECTIONS):
        if abs(_total(best) - budget_bytes) <= _GOOD_ENOUGH * budget_bytes:
            return best
        middle = (low + high) / 2
        candidate = planner.diffuse(middle)
        best = _nearer(best, candidate, budget_bytes)
        if _total(candidate) < budget_bytes:
            low = middle
        else:
            high = middle
    return planner.settle(best, budget_bytes)


def allotment(codec: Codec, site: Site, settings: tuple[Params, ...]) -> Allotment:
    """Return these settings with their exact size."""
    sizes = (codec.size_bytes(s, p) for s, p in zip(site, settings, strict=True))
    return Allotment(settings, sum(sizes))


def check_ratio(requested: float, possible: float, reason: str) -> None:
    """Raise BudgetError if the ratio that would result is further off than `TOLERANCE`."""
    if abs(possible / requested - 1) <= TOLERANCE:
        return
    raise BudgetError(
        f"ratio {requested:g} cannot be met within {TOLERANCE:.0%}: {reason}; "
        f"the nearest possible here is {_two_digits(possible, up=possible > requested):g}"
    )


class _Fitter:
    """Settings of one codec for fixed sites; remembers them, for equal sites recur."""

    def __init__(self, codec: Codec, sites: Sequence[Site]) -> None:
        self._codec = codec
        self._sites = sites
        self.n_elements = sum(_elements(site) for site in sites)
        self._order = sorted(range(len(sites)), key=lambda i: (-_elements(sites[i]), sites[i], i))
        self._known: dict[tuple[Site, int], Allotment] = {}

    def fit(self, site: Site, budget_bytes: float) -> Allotment:
        key = (site, max(0, round(budget_bytes)))
        if key not in self._known:
            settings = self._codec.fit_siblings(site, key[1])
            self._known[key] = allotment(self._codec, site, settings)
        return self._known[key]

    def largest(self) -> list[Allotment]:
        """The most the codec can spend, asked for with 8 bytes an element."""
        return [self.fit(site, 8 * _elements(site)) for site in self._sites]

    def diffuse(self, bytes_per_element: float) -> list[Allotment]:
        found: dict[int, Allotment] = {}
        carry = 0.0
        for index in self._order:
            site = self._sites[index]
            share = bytes_per_element * _elements(site)
            allowed = _MAX_CARRY * share
            found[index] = given = self.fit(site, share + min(max(carry, -allowed), allowed))
            # What a matrix at its smallest setting overdraws is for the bisection to recover.
            if given.n_bytes > self.fit(site, 0).n_bytes:
                carry += share - given.n_bytes
        return [found[index] for index in range(len(self._sites))]

    def settle(self, allotments: list[Allotment], budget_bytes: float) -> list[Allotment]:
        """Fit single matrices again, each time the one that brings the total nearest."""
        settled = list(allotments)
        rest = budget_bytes - _total(settled)
        for _ in range(_SETTLEMENTS):
            if abs(rest) <= _GOOD_ENOUGH * budget_bytes:
                break
            options = [
                (abs(rest - (given.n_bytes - old.n_bytes)), index, given)
                for index, old in enumerate(settled)
                if (given := self._fit_again(index, old, rest)).n_bytes != old.n_bytes
            ]
            if not options or min(options, key=_first_two)[0] >= abs(rest):
                break
            _, index, given = min(options, key=_first_two)
            rest -= given.n_bytes - settled[index].n_bytes
            settled[index] = given
        return settled

    def _fit_again(self, index: int, old: Allotment, rest: float) -> Allotment:
        wanted = min(max(old.n_bytes + rest, old.n_bytes / 2), old.n_bytes * 2)
        return self.fit(self._sites[index], wanted)


def _elements(site: Site) -> int:
    return sum(m * n for m, n in site)


def _first_two(option: tuple[float, int, Allotment]) -> tuple[float, int]:
    return option[:2]


def _total(allotments: Sequence[Allotment]) -> int:
    return sum(allotment.n_bytes for allotment in allotments)


def _nearer(a: list[Allotment], b: list[Allotment], budget_bytes: float) -> list[Allotment]:
    return a if abs(_total(a) - budget_bytes) <= abs(_total(b) - budget_bytes) else b


def _two_digits(ratio: float, *, up: bool) -> float:
    """Round to about three digits, to the side where the ratio can still be met."""
    scale = 10.0 ** (2 - math.floor(math.log10(ratio)))
    rounded = math.ceil(ratio * scale) if up else math.floor(ratio * scale)
    return rounded / scale
