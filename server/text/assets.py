"""Tokenizer, chat template, generation defaults and stop tokens of the base or one variant.

The base's tokenizer is the operator's and is loaded here. What an artifact brings is a stranger's:
the serving process reads its JSON configuration, while its template and its tokenizer are only used
by text workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from compressor.artifact.settings_files import RANGES, SAMPLING
from server.errors import ConfigError
from server.text.description import likeness
from server.text.text_stream import text_stream
from server.text.token_width import max_chars_per_token
from server.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class TextAssets:
    """Everything between text and token ids for one variant.

    tokenizer        the base's; None for a variant that brings its own
    folder           of the tokenizer's files, for text workers
    template         instead of the tokenizer's own
    chars_per_token  the most characters of text that one token can stand for
    likeness         of the tokenizer: see `server.text.description.likeness`
    owner            who is to blame when text workers run into their limits: the variant's digest,
                     "" where all of it is the base's
    """

    vocabulary: Vocabulary
    eos_token_ids: frozenset[int]
    generation_defaults: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: Path | None = None
    template: str | None = None
    chars_per_token: int = 1
    likeness: str = ""
    owner: str = ""

    @classmethod
    def of_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: frozenset[int] = frozenset(),
        generation_defaults: dict[str, Any] | None = None,
        folder: Path | None = None,
    ) -> Self:
        """Return the assets of a tokenizer that this process has loaded."""
        backend = tokenizer.backend_tokenizer
        return cls(
            Vocabulary.of(backend),
            eos_token_ids,
            generation_defaults or {},
            tokenizer,
            folder,
            chars_per_token=max_chars_per_token(backend),
            likeness=likeness(tokenizer),
        )

    def decode(self, token_ids: Sequence[int], *, is_whole: bool = True) -> str:
        """All of the ids as text, special tokens included.

        is_whole  False: leave out a character at the end that the ids only begin
        """
        if is_whole:
            return self.vocabulary.decode(list(token_ids))
        stream = text_stream(self.vocabulary, skip_special_tokens=False)
        pieces = [piece for token_id in token_ids for piece in stream.push(token_id)]
        return "".join(pieces + stream.flush(at_end=False))

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """What each id adds to the text: "" for a part of a character that a later completes."""
        stream = text_stream(self.vocabulary, skip_special_tokens=False)
        pieces = [piece for token_id in token_ids for piece in stream.push(token_id)]
        return (pieces + stream.flush())[: len(token_ids)]


def stop_ids(
    generation: dict[str, Any], config: dict[str, Any], eos_token_id: int | None
) -> frozenset[int]:
    """Return the ids that end a text: what generation_config.json says, else config.json, else the
    tokenizer.
    """
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    if eos is None:
        eos = eos_token_id
    return frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos])


def defaults_of(generation: dict[str, Any]) -> dict[str, Any]:
    """What a request gets that says nothing else. `do_sample: false` is greedy: temperature 0, the
    filters of a draw left out, penalties as they are. Raises ConfigError.
    """
    given = {name: generation[name] for name in RANGES if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        given = {name: given[name] for name in given.keys() - {*SAMPLING}}
        given["temperature"] = 0.0
    length = given.get("max_new_tokens")
    if length is not None and (type(length) is not int or length < 1):
        raise ConfigError(
            "max_new_tokens of generation_config.json must be a whole number from 1 on; correct it"
        )
    return given
