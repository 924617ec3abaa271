"""One request's chunk of a step, and what a step's chunks have to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.request import Request
from server.engine.schedule.pacing import StepLoad


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`n_tokens` of `request`, from its n_computed on."""

    request: Request
    n_tokens: int

    @property
    def finishes_known_tokens(self) -> bool:
        """Whether the chunk reaches the last known token, so that a new one can be sampled."""
        return self.request.n_computed + self.n_tokens == len(self.request.tokens)

    @property
    def is_decode(self) -> bool:
        return self.n_tokens == 1 and self.request.n_computed > 0


def remaining(request: Request) -> int:
    """Known tokens that are not computed."""
    return len(request.tokens) - request.n_computed


def load_of(batch: Sequence[Scheduled]) -> StepLoad:
    """What a batch has to compute; ask before it is accounted for."""
    decodes = [s.request.n_computed for s in batch if s.is_decode]
    load = StepLoad(len(decodes), sum(decodes))
    for item in batch:
        if not item.is_decode:
            load = load.with_chunk(item.request.n_computed, item.n_tokens)
    return load
