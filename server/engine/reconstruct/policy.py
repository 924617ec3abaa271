"""Which variants deserve reconstructed weights: a cost model with hysteresis. No tensors here.

A step of one variant alone needs no delta work if its weights are reconstructed: it saves the
share `GAIN` of its time. In any other step they would be read beside the base's, which costs more
than applying a delta (on a CPU, SmolLM2-135M, 31 streams: a second pass over the weights is about
a third of a decode step, a delta an eighth), so they are not used there and what counts is

    share = time in steps of the variant alone / time,        over the last `WINDOW_S`

A build takes `build_s` of the same processor, paid back if ``share * GAIN * HORIZON_S >= build_s``:

    promote   share >= max(MIN_SHARE, build_s / (GAIN * HORIZON_S)), and the bytes fit
    demote    share <  DEMOTE * that, and reconstructed for MIN_RESIDENCE_S at least
    replace   a full budget gives way only to a share of 1 / DEMOTE times the victim's
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

GAIN = 0.1  # measured .12 to .19 with 1 to 31 streams of SmolLM2-135M on a CPU
HORIZON_S = 300.0
WINDOW_S = 30.0
MIN_SHARE = 0.2
DEMOTE = 0.5
MIN_RESIDENCE_S = 30.0
RETRY_S = 600.0  # after a build that failed
BYTES_PER_S = 100e6  # of building, until one was measured


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now: drop these, then perhaps build this one."""

    demote: tuple[str, ...] = ()
    promote: str | None = None


@dataclass
class HotPolicy:
    """Times are of one monotonic clock, given by the caller.

    budget_bytes   for all reconstructed weights, those that are being built included
    variant_bytes  of one variant at most
    build_bytes    more while one is being built
    """

    budget_bytes: int
    variant_bytes: int
    build_bytes: int
    build_s: float = 0.0
    _seconds: dict[str, float] = field(default_factory=dict)  # decayed to `_at`
    _at: float | None = None
    _since: float = 0.0
    _kept: dict[str, tuple[int, float]] = field(default_factory=dict)  # bytes, since when
    _building: str | None = None
    _failed: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.build_s = self.build_s or self.variant_bytes / BYTES_PER_S

    @property
    def threshold(self) -> float:
        """Share from which a build pays; above 1 it never does."""
        return max(MIN_SHARE, self.build_s / (GAIN * HORIZON_S))

    @property
    def reconstructed(self) -> dict[str, int]:
        """Bytes by key."""
        return {key: n_bytes for key, (n_bytes, _) in self._kept.items()}

    def ran(self, key: str | None, seconds: float, now: float) -> None:
        """A step ended; `key` is the variant of all its rows, None if they were mixed."""
        self._decay(now)
        if key is not None:
            self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def share(self, key: str, now: float) -> float:
        """Part of the recent time that went into steps of this variant alone, idle time included.

        A young window is not divided by less than half its length: a burst is no habit.
        """
        self._decay(now)
        age = max(now - self._since, WINDOW_S / 2)
        return self._seconds.get(key, 0.0) / (WINDOW_S * -math.expm1(-age / WINDOW_S))

    def decide(self, now: float) -> Decision:
        """Who leaves and who is built. The caller carries it out and says so."""
        demote = [k for k in self._kept if self._is_cold(k, now)]
        shares = {k: self.share(k, now) for k in self._seconds}
        for key in sorted(shares, key=lambda k: -shares[k]):
            if shares[key] < self.threshold or self._building is not None:
                break
            if key in self._kept or now - self._failed.get(key, -math.inf) < RETRY_S:
                continue
            victims = self._room_for(shares[key], demote, now)
            if victims is not None:
                return Decision((*demote, *victims), key)
        return Decision(tuple(demote))

    def started(self, key: str) -> None:
        self._building = key

    def finished(self, key: str, n_bytes: int, seconds: float, now: float) -> None:
        """Its weights are reconstructed and in use."""
        assert key == self._building
        self._building = None
        self.build_s = 0.5 * self.build_s + 0.5 * seconds
        self._kept[key] = (n_bytes, now)

    def abandoned(self, key: str, now: float, *, failed: bool) -> None:
        """The build came to nothing."""
        assert key == self._building
        self._building = None
        if failed:
            recent = {k: at for k, at in self._failed.items() if now - at < RETRY_S}
            self._failed = recent | {key: now}

    def dropped(self, key: str) -> None:
        del self._kept[key]

    def _room_for(self, share: float, leaving: list[str], now: float) -> list[str] | None:
        """Whom else to drop so that one more fits and can be built; None: it does not fit."""
        held = {k: n for k, (n, _) in self._kept.items() if k not in leaving}
        free = self.budget_bytes - sum(held.values()) - self.variant_bytes - self.build_bytes
        victims: list[str] = []
        for key in sorted(held, key=lambda k: self.share(k, now)):
            if free >= 0:
                break
            if not self._is_settled(key, now) or self.share(key, now) >= DEMOTE * share:
                break
            victims.append(key)
            free += held[key]
        return victims if free >= 0 else None

    def _is_cold(self, key: str, now: float) -> bool:
        return self._is_settled(key, now) and self.share(key, now) < DEMOTE * self.threshold

    def _is_settled(self, key: str, now: float) -> bool:
        return now - self._kept[key][1] >= MIN_RESIDENCE_S

    def _decay(self, now: float) -> None:
        if self._at is None:
            self._since = now
        else:
            factor = math.exp(-(now - self._at) / WINDOW_S)
            self._seconds = {k: v * factor for k, v in self._seconds.items() if v > 1e-6}
        self._at = now
