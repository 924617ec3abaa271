"""A served model pinned to one digest, with its own tokenizer, template and stop tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.deltas.parameter import Mode
from server.deltas.registry import RegisteredDelta
from server.text.assets import TextAssets

BASE_KEY = "base"


@dataclass(frozen=True, slots=True)
class Variant:
    """What a request holds on to. Implements `server.engine.types.VariantHandle`.

    key     identity inside the engine: the delta's digest (and mode), or "base"
    origin  the artifact that it was opened from, None for the base
    """

    name: str
    key: str
    digest: str | None
    fingerprint: str
    vocab_size: int
    text: TextAssets
    mode: Mode = "apply"
    origin: RegisteredDelta | None = field(default=None, compare=False, repr=False)

    @property
    def chars_per_token(self) -> int:
        return self.text.chars_per_token

    @property
    def defaults(self) -> dict[str, Any]:
        return self.text.generation_defaults
