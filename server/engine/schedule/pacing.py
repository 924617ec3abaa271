"""How much prefill a step may carry while streams wait for their next token.

A step that takes prompt tokens along makes every running stream wait for them. `StepCost` learns
from the steps themselves what decodes and prompt tokens cost on this machine with this model;
`PrefillPacer` then grants as many prompt tokens as keep the step within `max_slowdown` times a
step of decodes alone (stall-free batching as in Sarathi-Serve, OSDI 2024, with a measured instead
of a fixed token budget). Without running streams there is nobody to hold up and no limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_PREFILL_TOKENS = 32  # granted whatever it costs, so that prompts always advance
MIN_CHUNK_TOKENS = 16  # fewer are not worth the calls, unless a prompt has no more left
FORGET = 0.99  # weight of a step after the next of its kind: about 100 steps count
RIDGE = 1e-4  # of the weight of all steps; settles what the steps seen cannot tell apart
WARM_STEPS = 32
OUTLIER = 4.0  # a step this much slower than expected was held up by something else
REFIT_STEPS = 8
TYPICAL_TOKENS = 2000.0  # decoded tokens over which the typical wait is averaged
# Typical sizes of the features, so that one ridge fits all: 1, n_decode, decode_context, ...
SCALES = (1.0, 32.0, 8192.0, 64.0, 65536.0)


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step has to compute.

    n_decode        streams that get one token
    decode_context  positions they attend to, summed
    n_prefill       prompt tokens
    prefill_pairs   (prompt token, position it attends to) pairs
    """

    n_decode: int = 0
    decode_context: int = 0
    n_prefill: int = 0
    prefill_pairs: float = 0.0

    def with_chunk(self, context: int, n_tokens: int) -> StepLoad:
        """Return this load and a prompt's chunk of `n_tokens` after `context` known ones."""
        return StepLoad(
            self.n_decode,
            self.decode_context,
            self.n_prefill + n_tokens,
            self.prefill_pairs + n_tokens * (context + n_tokens / 2),
        )

    def features(self) -> NDArray[np.float64]:
        """[5] float64, see SCALES."""
        values = (1, self.n_decode, self.decode_context, self.n_prefill, self.prefill_pairs)
        return np.asarray(values) / SCALES


class StepCost:
    """Seconds of a step, linear in its `StepLoad`: recursive least squares with forgetting.

    Errors count relative to the step's own time. Coefficients are kept >= 0: more work never takes
    less time. Steps with and without prefill are forgotten separately, so that an hour of decoding
    does not make the first prompt look free, nor an hour of prompts a decode.
    """

    def __init__(self) -> None:
        n = len(SCALES)
        self._normal = np.zeros((2, n, n))
        self._target = np.zeros((2, n))
        self._coefficients = np.zeros(n)
        self._n_seen = 0
        self._n_new = 0

    def learn(self, load: StepLoad, seconds: float) -> None:
        """A step of this load took so long."""
        x = load.features()
        if self._n_seen >= WARM_STEPS:
            seconds = min(seconds, OUTLIER * max(self.seconds(load), 1e-6))
        weight = max(seconds, 1e-6) ** -2
        kind = int(load.n_prefill > 0)
        self._normal[kind] = FORGET * self._normal[kind] + weight * np.outer(x, x)
        self._target[kind] = FORGET * self._target[kind] + weight * seconds * x
        self._n_seen += 1
        self._n_new += 1

    def seconds(self, load: StepLoad) -> float:
        """Expected time; 0 for what was never seen."""
        return float(load.features() @ self._fitted())

    def prefill_costs(self) -> tuple[float, float]:
        """Seconds per prompt token and per pair."""
        _, _, _, token, pair = self._fitted() / SCALES
        return float(token), float(pair)

    def _fitted(self) -> NDArray[np.float64]:
        if self._n_new >= REFIT_STEPS or (self._n_new and self._n_seen < WARM_STEPS):
            self._n_new = 0
            self._coefficients = _solve(self._normal.sum(0), self._target.sum(0))
        return self._coefficients


def _solve(normal: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ridge solution with no negative entry: the most negative leaves until none is."""
    normal = normal + RIDGE * normal[0, 0] * np.eye(len(target))
    active = np.arange(len(target))
    result = np.zeros(len(target))
    while len(active):
        found = np.linalg.solve(normal[np.ix_(active, active)], target[active])
        if found.min() >= 0:
            result[active] = found
            break
        active = np.delete(active, found.argmin())
    return result


class Allowance:
    """Prompt tokens that one step may still take."""

    def __init__(
        self, n_tokens: int, seconds: float = math.inf, costs: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        self.n_tokens = n_tokens
        self.seconds = seconds
        self._costs = costs
        self._kept_tokens, self._kept_seconds = 0, 0.0
        self._floor = MIN_PREFILL_TOKENS

    def keep(self, share: float) -> None:
        """Set this share aside until `give_back`; both parts may advance, whatever it costs."""
        self._kept_tokens = math.ceil(share * self.n_tokens)
        self._kept_seconds = share * self.seconds if math.isfinite(self.seconds) else 0.0
        self._floor = MIN_CHUNK_TOKENS

    def give_back(self) -> None:
        """What was kept may be used from now on."""
        if self._kept_tokens:
            self._floor = MIN_CHUNK_TOKENS
        self._kept_tokens, self._kept_seconds = 0, 0.0

    def grant(self, context: int, wanted: int) -> int:
        """Take up to `wanted` tokens of a prompt of which `context` are computed; 0: none left."""
        room = max(0, self.n_tokens - self._kept_tokens)
        token, pair = self._costs
        left = max(0.0, self.seconds - self._kept_seconds)
        affordable = _tokens_within(left, token + pair * context, pair)
        if affordable < min(wanted, MIN_CHUNK_TOKENS):
            affordable = 0
        n_tokens = min(wanted, room, max(affordable, self._floor))
        self.n_tokens -= n_tokens
        self.seconds -= token * n_tokens + pair * n_tokens * (context + n_tokens / 2)
        self._floor = max(0, self._floor - n_tokens)
        return n_tokens


def _tokens_within(seconds: float, linear: float, quadratic: float) -> int:
    """Largest n with ``linear n + quadratic n^2 / 2 <= seconds``."""
    if not math.isfinite(seconds) or linear + quadratic <= 0:
        return 1 << 30
    if quadratic * seconds < 1e-9 * linear * linear:
        return int(min(seconds / linear, 1 << 30))
    return int((math.sqrt(linear * linear + 2 * quadratic * seconds) - linear) / quadratic)


class PrefillPacer:
    """Decides each step's `Allowance`. Engine thread only.

    max_slowdown  longest step relative to one of decodes alone; 0 for no limit

    A lone stream's step is short, and the first of 32 prompts should not make the other 31 wait for
    it: the reference is the step of decodes alone that is to come once all that are here decode, or
    what streams typically waited of late without prefill, whichever is longer. (With the present
    decodes as the reference, few streams would leave little room for prompts, and stay few.)
    """

    def __init__(self, max_slowdown: float) -> None:
        self._max_slowdown = max_slowdown
        self.cost = StepCost()
        self._typical_s = 0.0

    def allowance(self, contexts: Iterable[int], n_tokens: int, n_to_come: int = 0) -> Allowance:
        """For a step that decodes one token after each of `contexts`, with room for `n_tokens`.

        n_to_come  sequences that wait for their prompts to be computed
        """
        lengths = list(contexts)
        if not lengths or not self._max_slowdown:
            return Allowance(n_tokens)
        decodes = StepLoad(len(lengths), sum(lengths))
        alone_s = self.cost.seconds(decodes)
        n_all = len(lengths) + n_to_come
        later_s = self.cost.seconds(StepLoad(n_all, sum(lengths) * n_all // len(lengths)))
        limit_s = self._max_slowdown * max(later_s, self._typical_s)
        return Allowance(n_tokens, max(0.0, limit_s - alone_s), self.cost.prefill_costs())

    def ran(self, load: StepLoad, seconds: float) -> None:
        """A step of this load took so long."""
        self.cost.learn(load, seconds)
        if load.n_decode:
            alone_s = self.cost.seconds(StepLoad(load.n_decode, load.decode_context))
            share = 1 - math.exp(-load.n_decode / TYPICAL_TOKENS)
            self._typical_s += share * (alone_s - self._typical_s)
