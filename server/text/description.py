"""What the serving process knows of a tokenizer that it must not parse itself.

A text worker loads the tokenizer and describes it: the tokens by id in one piece of bytes, and a
small record. `DescribedTokens` reads that without making an object for each token, and decodes with
the tokenizer's own decoder. Nothing of a description is believed beyond its limits: the worker has
parsed a stranger's file.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerBase

from server.text.token_width import max_chars_per_token
from server.text.vocabulary import Traits, Vocabulary, decoder_kinds, decoder_state, traits_of

MAX_TOKENS = 1 << 21
MAX_TOKEN_BYTES = 64 << 20  # of all tokens together
MAX_DECODER_BYTES = 16 << 10
MAX_DECODER_PARTS = 16
MAX_TEMPLATE_CHARS = 1 << 20
_PRESENT = b"\x01"  # before each token, so that an id without one differs from an empty token
# Parts of decoders that do a bounded amount of work on a token. Of others (a regular expression
# may take exponential time) nothing is run in the serving process.
_DECODERS = frozenset(
    {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece", "BPEDecoder", "CTC"}
)


class Undescribed(Exception):
    """A tokenizer that cannot be served; the message says why."""


@dataclass(frozen=True, slots=True)
class Description:
    """A tokenizer as the serving process has it.

    eos_token_id     the tokenizer's own
    chars_per_token  the most characters that one token can stand for
    likeness         equal for tokenizers that do the same, whatever their files say: see `likeness`
    template         its chat template, if that is one
    """

    vocabulary: Vocabulary
    eos_token_id: int | None
    chars_per_token: int
    likeness: str
    template: str | None


class DescribedTokens:
    """Tokens by id from one piece of bytes; see `server.text.vocabulary.Tokens`."""

    def __init__(self, ends: array[int], names: bytes, decoder: decoders.Decoder | None) -> None:
        """ends: where each id's part of `names` ends."""
        self._ends = ends
        self._names = names
        self._decoder = decoder

    def id_to_token(self, token_id: int) -> str | None:
        if not 0 <= token_id < len(self._ends):
            return None
        begin = self._ends[token_id - 1] if token_id else 0
        part = self._names[begin : self._ends[token_id]]
        return part[1:].decode("utf-8", "replace") if part else None

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """As `Tokenizer.decode` does, special tokens always included."""
        assert not skip_special_tokens, "streams leave them out themselves"
        names = [name for i in token_ids if (name := self.id_to_token(i)) is not None]
        if self._decoder is None:
            return " ".join(names)
        text: str = self._decoder.decode(names)
        return text


def likeness(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that tokenising and rendering read of a tokenizer but its template.

    Most fine-tunes change something else in tokenizer_config.json, and can share the base's.
    """
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8", "surrogatepass"))
    control = getattr(tokenizer, "chat_control_tokens", None)
    rest = [type(tokenizer).__name__, tokenizer.special_tokens_map, control, tokenizer.eos_token_id]
    digest.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def describe(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> tuple[dict[str, Any], bytes]:
    """Return the record and the bytes that `described` reads. For a text worker.

    n_rows  of the model's embedding: no id from there on is ever generated. Raises Undescribed.
    """
    backend = tokenizer.backend_tokenizer
    decoder = decoder_state(backend)
    _check_decoder(decoder)
    n_ids = min(n_rows, MAX_TOKENS, _last_id(backend) + 1)
    ends, names = array("I"), bytearray()
    for token_id in range(n_ids):
        name = backend.id_to_token(token_id)
        if name is not None:
            names += _PRESENT + name.encode("utf-8", "replace")
        if len(names) > MAX_TOKEN_BYTES:
            raise Undescribed(f"its tokens are more than {MAX_TOKEN_BYTES >> 20} MiB of text")
        ends.append(len(names))
    traits = traits_of(backend)
    record = {
        "decoder": decoder,
        "byte_of": sorted(traits.byte_of.items()),
        "special": sorted(i for i in traits.special if i < n_ids),
        "anchor": traits.anchor,
        "eos": tokenizer.eos_token_id,
        "likeness": likeness(tokenizer),
        "template": _template(tokenizer),
        "chars_per_token": max_chars_per_token(backend),
        "n_ids": n_ids,
    }
    return record, ends.tobytes() + bytes(names)


def described(record: Mapping[str, Any], blob: bytes) -> Description:
    """Read what `describe` made. Raises Undescribed for what no worker in order would send."""
    try:
        decoder = record["decoder"]
        _check_decoder(decoder)
        n_ids = int(record["n_ids"])
        ends = array("I")
        n_bytes = n_ids * ends.itemsize
        if (
            not 0 <= n_ids <= MAX_TOKENS
            or not n_bytes <= len(blob) <= n_bytes + MAX_TOKEN_BYTES * 2
        ):
            raise Undescribed("its tokens are too many")
        ends.frombytes(blob[:n_bytes])
        traits = Traits(
            frozenset(decoder_kinds(decoder)),
            {int(i): int(byte) & 0xFF for i, byte in record["byte_of"]},
            frozenset(int(i) for i in record["special"]),
            None if record["anchor"] is None else int(record["anchor"]),
        )
        tokens = DescribedTokens(ends, blob[n_bytes:], _decoder_of(decoder))
        eos = record["eos"]
        return Description(
            Vocabulary(tokens, traits),
            None if eos is None else int(eos),
            max(1, int(record["chars_per_token"])),
            str(record["likeness"]),
            None if record["template"] is None else str(record["template"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Undescribed("its description is not in order") from error


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A longer one, or several under names, stay where the worker finds them."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) and len(template) <= MAX_TEMPLATE_CHARS else None


def _last_id(backend: Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _check_decoder(decoder: Any) -> None:
    """Refuse a decoder that could do unbounded work. Raises Undescribed."""
    if decoder is None:
        return
    if len(json.dumps(decoder)) > MAX_DECODER_BYTES:
        raise Undescribed(f"its decoder is larger than {MAX_DECODER_BYTES >> 10} KiB")
    parts = list(_parts(decoder))
    if len(parts) > MAX_DECODER_PARTS:
        raise Undescribed(f"its decoder has more than {MAX_DECODER_PARTS} parts")
    for part in parts:
        _check_part(part)


def _check_part(part: Mapping[str, Any]) -> None:
    kind = part["type"]
    if kind == "Replace":
        pattern = part["pattern"].get("String", "")
        # A longer content, many times over, would make long texts of a few tokens.
        if not pattern or len(part["content"]) > len(pattern):
            raise Undescribed("its decoder replaces by a pattern or by something longer")
    elif kind == "Strip":
        if part["stop"] or not 0 <= part["start"] <= 1:
            raise Undescribed("its decoder strips more than a character from the beginning")
    elif kind not in _DECODERS:
        raise Undescribed(f"its decoder has a part of the kind {str(kind)[:40]!r}")


def _parts(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a decoder, sequences in sequences included."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for one in decoder["decoders"] for part in _parts(one)]


def _decoder_of(decoder: Mapping[str, Any] | None) -> decoders.Decoder | None:
    """The library's decoder of this state; it reads states as parts of a tokenizer only."""
    if decoder is None:
        return None
    empty = {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}
    whole = {"version": "1.0", "added_tokens": [], "model": empty, "decoder": decoder}
    found: decoders.Decoder = Tokenizer.from_str(json.dumps(whole)).decoder
    return found
