"""What a tokenizer's ids are beside text: bytes, special tokens, ids without a token.

A character may be split over ids in two ways. A byte-level tokenizer writes every byte of every
token as a letter of its own; one with byte fallback has 256 tokens `<0x00>` to `<0xFF>` for what it
has no other token for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Protocol, Self

from tokenizers import Tokenizer

N_BYTES = 256
# Decoders that change nothing of what ByteLevel makes.
_NEUTRAL = frozenset({"ByteLevel", "Fuse"})


class Tokens(Protocol):
    """What a vocabulary is read from: a `tokenizers.Tokenizer`, or a worker's description of one
    (`server.text.description`).
    """

    def id_to_token(self, token_id: int) -> str | None: ...
    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class Traits:
    """What is found once for each tokenizer.

    kinds    the types of its decoder's parts
    byte_of  byte that an id of byte fallback stands for
    special  ids of special tokens
    anchor   an ordinary token with text, None where there is none: see `Vocabulary`
    """

    kinds: frozenset[str]
    byte_of: Mapping[int, int]
    special: frozenset[int]
    anchor: int | None


class Vocabulary:
    """Made once for each tokenizer; it is read only.

    byte_of        byte that an id of byte fallback stands for
    is_byte_level  whether the text is exactly the tokens' bytes, one after the other
    may_split      whether other tokens than those of `byte_of` may end within a character
    anchor         an ordinary token with text; decoded before others, it makes them show as they
                   do within a text (the first token of a text may lose its space). None where the
                   tokenizer has no such token
    """

    def __init__(self, tokens: Tokens, traits: Traits) -> None:
        self._tokens = tokens
        self.is_byte_level = "ByteLevel" in traits.kinds and traits.kinds <= _NEUTRAL
        self.may_split = "ByteLevel" in traits.kinds and not self.is_byte_level
        self.byte_of = traits.byte_of
        self.anchor = traits.anchor
        self._special = traits.special
        self._letters = {ord(letter): byte for byte, letter in enumerate(byte_letters())}

    @classmethod
    def of(cls, backend: Tokenizer) -> Self:
        """Return the vocabulary of a tokenizer that this process has loaded."""
        return cls(backend, traits_of(backend))

    def is_shown(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether the id has a place in a text at all."""
        if skip_special_tokens and token_id in self._special:
            return False
        return self._tokens.id_to_token(token_id) is not None

    def name(self, token_id: int) -> str:
        """The token as the vocabulary writes it, "" for an id that has none."""
        return self._tokens.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes | None:
        """The token's own bytes where it may be a part of a character; None elsewhere."""
        if token_id in self.byte_of:
            return bytes([self.byte_of[token_id]])
        if not (self.is_byte_level or self.may_split):
            return None
        letters = self._letters
        name = self.name(token_id)
        try:
            return bytes([letters[ord(letter)] for letter in name])
        except KeyError:  # an added token, which is text
            return name.encode("utf-8", "replace")

    def decode(self, token_ids: list[int]) -> str:
        """All of the ids as text, special tokens included."""
        return self._tokens.decode(token_ids, skip_special_tokens=False)


def traits_of(backend: Tokenizer) -> Traits:
    """Return what a vocabulary needs to know of a tokenizer. It takes long for a hostile one."""
    kinds = frozenset(decoder_kinds(decoder_state(backend)))
    byte_of = _fallback_bytes(backend) if "ByteFallback" in kinds else {}
    added = backend.get_added_tokens_decoder().items()
    special = frozenset(token_id for token_id, token in added if token.special)
    anchor = next(_ordinary(backend, byte_of.keys() | special), None)
    return Traits(kinds, byte_of, special, anchor)


def decoder_state(backend: Tokenizer) -> dict[str, Any] | None:
    """Return what a tokenizer's decoder is, as tokenizer.json has it; None: it has none."""
    if backend.decoder is None:
        return None
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return state


def _ordinary(backend: Tokenizer, others: Set[int]) -> Iterator[int]:
    """Ids of tokens that are letters, from the first, but for `others`."""
    for token_id in range(backend.get_vocab_size()):
        name = "" if token_id in others else backend.id_to_token(token_id) or ""
        if name.isalpha() and backend.decode([token_id], skip_special_tokens=False) == name:
            yield token_id


def byte_letters() -> list[str]:
    """The letter that a byte-level tokenizer writes for each byte: GPT-2's table.

    Bytes that are printable in Latin-1 are themselves, the others follow from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(N_BYTES, 2 * N_BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(N_BYTES)]


def decoder_kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    """The types of a decoder and of all that it is made of."""
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from decoder_kinds(part)
    else:
        yield decoder["type"]


def _fallback_bytes(backend: Tokenizer) -> dict[int, int]:
    """Bytes by id. The decoder reads both cases of the hexadecimal digits."""
    found = {}
    for byte in range(N_BYTES):
        for name in (f"<0x{byte:02X}>", f"<0x{byte:02x}>"):
            token_id = backend.token_to_id(name)
            if token_id is not None:
                found[token_id] = byte
    return found
