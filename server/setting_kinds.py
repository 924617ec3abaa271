"""The kinds of values that settings have: sizes, seconds, counts, keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, SecretStr

GIB = 1 << 30
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_size(size: object) -> object:
    """Return bytes from ``4GiB``, ``500MB``, ``1.5 GB`` or digits; what is no text as it is."""
    if not isinstance(size, str):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", size.strip().lower())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{size!r} is not a size; write 4GiB, 500MB or a number of bytes")
    return round(float(match[1]) * UNITS[match[2]])


def size_text(n_bytes: int) -> str:
    """Return the shortest exact binary size, for people."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if n_bytes and n_bytes % UNITS[unit.lower()] == 0:
            return f"{n_bytes // UNITS[unit.lower()]}{unit}"
    return str(n_bytes)


def parse_overrides(overrides: object) -> object:
    """Return ``{"a": "apply"}`` from ``["a=apply"]`` (flags) or ``"a=apply"`` (a variable)."""
    items = overrides.split() if isinstance(overrides, str) else overrides
    if not isinstance(items, list):
        return items
    modes = {}
    for item in items:
        name, _, mode = str(item).partition("=")
        if not name or mode not in ("apply", "reconstruct"):
            raise ValueError(f"{item!r} is not VARIANT=MODE with MODE apply or reconstruct")
        modes[name] = mode
    return modes


def parse_words(words: object) -> object:
    """Return ``("a", "b")`` from ``["a", "b"]`` (flags) or ``"a b"`` (a variable)."""
    return tuple(words.split()) if isinstance(words, str) else words


@dataclass(frozen=True, slots=True)
class Unit:
    """What a value counts, as ``--help`` shows it in place of the value."""

    name: str


@dataclass(frozen=True, slots=True)
class WhenUnset:
    """What happens where a setting without a default is not given."""

    meaning: str


Bytes = Annotated[int, BeforeValidator(parse_size), Unit("SIZE")]
Seconds = Annotated[float, Unit("SECONDS")]
Tokens = Annotated[int, Unit("TOKENS")]
Count = Annotated[int, Unit("N")]
Ratio = Annotated[float, Unit("RATIO")]
Key = Annotated[SecretStr, Unit("KEY")]
Mode = Literal["apply", "reconstruct"]
Overrides = Annotated[dict[str, Mode], BeforeValidator(parse_overrides), Unit("VARIANT=MODE")]
KeyFiles = Annotated[tuple[Path, ...], BeforeValidator(parse_words), Unit("PUBKEYFILE")]
Url = Annotated[SecretStr, Unit("URL")]
Prefixes = Annotated[tuple[str, ...], BeforeValidator(parse_words), Unit("PREFIX")]
