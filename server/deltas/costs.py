"""What it costs to bring variants back, and so which goes first from a tier that is full.

    first goes the greatest of    age x bytes / reload_s

    age       uses of any variants since its last: the longer ago, the less it is missed
    bytes     what its going frees
    reload_s  what its coming back takes, as measured: reading and decoding it, unless it is in host
              memory, and copying it

Differences below `ALIKE_S` are noise, and nobody minds them: such loads count by their bytes alone,
so that among them the least recently used goes first. That is the rule of GreedyDual-Size without
its clock: nothing that was dear once stays for ever, since its age grows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

ALIKE_S = 1.0
TYPICAL_RATE = 100e6  # bytes/s, of loads that nobody measured or minds
NEWEST_WEIGHT = 0.3  # of a load in the moving average


class Held(Protocol):
    """Something in a tier."""

    @property
    def key(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def last_used(self) -> int: ...


K = TypeVar("K", bound=Held)


def worth(age: float, n_bytes: int, reload_s: float) -> float:
    """How much there is to be won by dropping it; see the module's docstring."""
    noticed_s = max(reload_s - ALIKE_S, n_bytes / TYPICAL_RATE)
    return age * n_bytes / noticed_s if n_bytes else 0.0


class ReloadCosts:
    """Measured seconds by key. Written on the engine thread."""

    def __init__(self) -> None:
        self._read_s: dict[str, float] = {}
        self._copy_s: dict[str, float] = {}
        self._is_warm = False
        self._s_per_byte: float | None = None  # of artifacts that were read, moving average

    def __len__(self) -> int:
        return len(self._read_s.keys() | self._copy_s.keys())

    def was_read(self, key: str, artifact_bytes: int, seconds: float) -> None:
        """A variant was read and decoded. The first of all takes ten times as long as it will
        again, and says nothing of the rate.
        """
        self._read_s[key] = seconds
        if artifact_bytes and self._is_warm:
            own = seconds / artifact_bytes
            before = own if self._s_per_byte is None else self._s_per_byte
            self._s_per_byte = before + NEWEST_WEIGHT * (own - before)
        self._is_warm = True

    def was_copied(self, key: str, seconds: float) -> None:
        """A variant was copied into its slot."""
        self._copy_s[key] = seconds

    def reload_s(self, key: str, *, from_host: bool) -> float:
        """What bringing it back takes; what was never measured costs nothing."""
        read_s = 0.0 if from_host else self._read_s.get(key, 0.0)
        return read_s + self._copy_s.get(key, 0.0)

    def expected_s(self, artifact_bytes: int) -> float | None:
        """How long reading so many bytes takes, None if nothing was ever read."""
        return None if self._s_per_byte is None else artifact_bytes * self._s_per_byte

    def keep(self, keys: Collection[str]) -> None:
        """Forget all other variants."""
        for measured in (self._read_s, self._copy_s):
            for key in [key for key in measured if key not in keys]:
                del measured[key]


def in_order_of_worth(
    kept: Sequence[K], now: int, last_used: Sequence[int], reload_s: Sequence[float]
) -> list[K]:
    """What is kept in a tier, that first which is to go first.

    now  the count of uses that `last_used` are of
    """
    worths = [
        worth(now - used + 1, one.n_bytes, seconds)
        for one, used, seconds in zip(kept, last_used, reload_s, strict=True)
    ]
    order = sorted(range(len(kept)), key=lambda i: (-worths[i], last_used[i]))
    return [kept[i] for i in order]
