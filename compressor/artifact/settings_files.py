"""The fine-tune's small files of settings in an artifact: what a server takes from them is checked.

They are copies of a stranger's files. Only what is used is looked at: other keys stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.artifact.files import GENERATION
from compressor.artifact.json_fields import load_json
from compressor.checkpoint.companions import changed_companions
from compressor.errors import CheckpointError, Corrupt

SETTINGS_FILES = (
    "added_tokens.json",
    GENERATION,
    "special_tokens_map.json",
    "tokenizer_config.json",
)
SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # of a draw: greedy decoding uses none
_MAX_EOS = 64
_MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Range:
    """What a number may be.

    above  the number is greater than `low`, not equal to it
    """

    low: float
    high: float
    whole: bool = False
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        if not self.low <= value <= self.high or not math.isfinite(value):
            return False
        return value > self.low or not self.above

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"


# What a request may ask for too: a test compares them with the fields of the HTTP API.
RANGES: Mapping[str, Range] = {
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, above=True),
    "top_k": Range(-1, 1_000_000, whole=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0.01, 100),
    "max_new_tokens": Range(1, 1 << 24, whole=True),
}


def companions_of(base: Path, tuned: Path) -> dict[str, bytes]:
    """The fine-tune's companion files that differ from the base's, by name, for an artifact.

    Raises CheckpointError for one that no server would take: before an hour's work, not after it.
    """
    companions = changed_companions(base, tuned)
    for name, content in companions.items():
        try:
            check_settings_file(name, content)
        except Corrupt as error:
            raise CheckpointError(
                f"{tuned.name}: no server would take this: {error}; correct the file"
            ) from error
    return companions


def check_settings_file(name: str, content: bytes) -> None:
    """Raises Corrupt if a server could not use it; a file of another kind is not looked at."""
    if name not in SETTINGS_FILES:
        return
    record = load_json(content, name)
    if name == GENERATION:
        check_generation(record)


def check_generation(record: Mapping[str, Any]) -> None:
    """Check the keys of ``generation_config.json`` that a server uses. null counts as absent.

    Raises Corrupt, naming the key.
    """
    do_sample = record.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise Corrupt(f"{GENERATION}: do_sample must be true or false")
    unused = SAMPLING if do_sample is False else ()
    for key, allowed in RANGES.items():
        value = record.get(key)
        if value is not None and key not in unused and value not in allowed:
            raise Corrupt(f"{GENERATION}: {key} must be {allowed}")
    _check_eos(record.get("eos_token_id"))


def _check_eos(value: object) -> None:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > _MAX_EOS or not all(type(i) is int and 0 <= i <= _MAX_TOKEN_ID for i in ids):
        raise Corrupt(f"{GENERATION}: eos_token_id must be a token id, or up to {_MAX_EOS} of them")
