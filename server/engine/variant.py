"""A served model pinned to one digest, with its own tokenizer, template and stop tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.text.assets import TextAssets

BASE_KEY = "base"


@dataclass(frozen=True, slots=True)
class Variant:
    """What a request holds on to. Implements `server.engine.types.VariantHandle`.

    key  identity inside the engine: the delta's digest (and mode), or "base"
    """

    name: str
    key: str
    digest: str | None
    fingerprint: str
    vocab_size: int
    text: TextAssets

    @property
    def chars_per_token(self) -> int:
        return self.text.chars_per_token

    @property
    def defaults(self) -> dict[str, Any]:
        return self.text.generation_defaults
