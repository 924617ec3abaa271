"""What the engine tells others about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from server.deltas.slots import Slot
from server.engine.life_types import Tier
from server.engine.request import Request
from server.engine.types import EngineStats


class Observer(Protocol):
    """Told about requests and steps; implemented by the metrics."""

    def on_finished(self, request: Request) -> None: ...
    def on_step(self, n_prompt_tokens: int, n_generated_tokens: int) -> None: ...
    def on_loaded(self, name: str, seconds: float) -> None: ...
    def on_tier_loaded(self, tier: Tier, seconds: float) -> None: ...
    def on_load_failed(self, name: str) -> None: ...
    def on_promoted(self, name: str) -> None: ...
    def on_demoted(self, name: str) -> None: ...
    def on_reconstruct_failed(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class CoreStats(EngineStats):
    """What the engine's own thread knows beside the counts, by variant key.

    reconstructed_bytes  full weights of hot variants
    """

    resident: dict[str, Slot]
    reconstructed_bytes: dict[str, int]
