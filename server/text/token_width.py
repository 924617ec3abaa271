"""How many characters of text one token can stand for, at the most.

A text of more characters than a context has tokens times that cannot fit, whatever its tokens are,
and is refused before the work of tokenising it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

# For a tokenizer that may leave out text (whitespace, unknown words), nothing is certain. No
# tokenizer in use has a longer token (the longest are runs of 128 blanks, in Llama 3 and Qwen).
USUAL_CHARS = 256
# Composition (NFC, NFKC) makes one character of at most so many.
COMPOSED_CHARS = 4
_KEEPING = frozenset({"ByteLevel", "Digits", "Metaspace", "Prepend"})
_COMPOSING = frozenset({"NFC", "NFKC"})


def max_chars_per_token(backend: Tokenizer) -> int:
    """Return the most characters of a text that one token can take."""
    names = (backend.id_to_token(i) for i in range(backend.get_vocab_size()))
    longest = max((len(name) for name in names if name), default=1)
    if not _keeps_all_text(backend):
        return max(USUAL_CHARS, longest)
    return longest * (COMPOSED_CHARS if _composes(backend) else 1)


def _keeps_all_text(backend: Tokenizer) -> bool:
    """Whether every character ends up in a token that is as long as what it stands for."""
    if any(t.lstrip or t.rstrip for t in backend.get_added_tokens_decoder().values()):
        return False  # such a token takes any amount of whitespace along
    parts = [*_parts(_state(backend.normalizer)), *_parts(_state(backend.pre_tokenizer))]
    if not all(_is_keeping(part) for part in parts):
        return False
    is_byte_level = any(part["type"] == "ByteLevel" for part in parts)
    return is_byte_level or bool(getattr(backend.model, "byte_fallback", False))


def _is_keeping(part: dict[str, Any]) -> bool:
    kind = part["type"]
    if kind == "Split":
        return bool(part["behavior"] != "Removed")
    if kind == "Replace":
        pattern = part["pattern"].get("String", "")
        return 0 < len(pattern) <= len(part["content"])
    return kind in _KEEPING or kind in _COMPOSING


def _composes(backend: Tokenizer) -> bool:
    return any(part["type"] in _COMPOSING for part in _parts(_state(backend.normalizer)))


def _state(part: Any) -> dict[str, Any] | None:
    state: dict[str, Any] | None = None if part is None else json.loads(part.__getstate__())
    return state


def _parts(state: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer, or all that a sequence of them is made of."""
    if state is None:
        return
    if state["type"] == "Sequence":
        for part in state.get("normalizers", state.get("pretokenizers", [])):
            yield from _parts(part)
    else:
        yield state
