"""What the engine tells others about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from server.deltas.slots import Slot
from server.engine.request import Request


class Observer(Protocol):
    """Told about requests and steps; implemented by the metrics."""

    def on_finished(self, request: Request) -> None: ...
    def on_step(self, n_prompt_tokens: int, n_generated_tokens: int) -> None: ...
    def on_loaded(self, name: str, seconds: float) -> None: ...
    def on_load_failed(self, name: str) -> None: ...
    def on_promoted(self, name: str) -> None: ...
    def on_demoted(self, name: str) -> None: ...
    def on_reconstruct_failed(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class CoreStats:
    """A snapshot for metrics and tests."""

    n_running: int
    n_waiting: int
    n_kv_blocks: int
    n_free_kv_blocks: int
    n_preemptions: int
    n_prefix_queried: int
    n_prefix_hit: int
    base_bytes: int
    n_static_steps: int
    n_eager_decode_steps: int
    resident: dict[str, Slot]
    reconstructed_bytes: dict[str, int]  # by key: of hot variants
