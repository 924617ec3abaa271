"""Control tokens in the content of messages: marked before a template runs, encoded as text after.

The way is that of transformers' `apply_chat_template(..., sanitize_control_tokens=True)` (5.23,
Apache-2.0), which is not public and not in the older versions that serve here. What differs:
tokens are found in any case, for a template may change it.

Each one is put between two characters of a private-use plane, which come through a template that
tests, trims, splits or joins the content. In what the template returns, what stands between them is
run through the tokenizer without its added tokens; all else is encoded as always. Markers that a
template has torn apart still break the text, so that its two sides cannot join.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

START, END = "\U000f0000", "\U000f0001"
_NEWLINE = "\n"


class UnmarkableToken(ValueError):
    """The tokenizer makes a control token of its plain letters."""


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    """Special tokens, and other added tokens that the template itself writes. White space is
    ordinary text even where it is an added token.
    """
    written = _literal_text(template)
    return tuple(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in written and not token.content.isspace())
    )


def marked(value: Any, tokens: tuple[str, ...]) -> Any:
    """Return a message, or a part of one, with the tokens in its texts marked; keys are not."""
    if isinstance(value, str):
        plain = value.replace(START, "").replace(END, "")
        return _pattern(tokens).sub(f"{START}\\g<0>{END}", plain)
    if isinstance(value, dict):
        return {key: marked(item, tokens) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [marked(item, tokens) for item in value]
    return value


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered conversation whose messages were `marked`, without those that the
    tokenizer adds. Raises UnmarkableToken.
    """
    tokens = tuple(tokenizer.added_tokens_encoder)
    pieces = _marked_pattern(tokens).split(text)
    newline = tokenizer.encode(_NEWLINE, add_special_tokens=False)
    ids: list[int] = tokenizer.encode(pieces[0], add_special_tokens=False)
    for number, piece in enumerate(pieces[1:], start=1):
        if not piece:  # a torn marker, or nothing between two
            continue
        as_text = number % 2 == 1
        found = _encode_within(tokenizer, piece, newline, as_text=as_text)
        if as_text and tokenizer.convert_tokens_to_ids(piece) in found:
            raise UnmarkableToken(f"{piece!r} in the messages cannot be told from a control token")
        ids += found
    return ids


def _encode_within(
    tokenizer: PreTrainedTokenizerBase, piece: str, newline: list[int], *, as_text: bool
) -> list[int]:
    """Encode a piece from within a text. After a newline, which goes again: SentencePiece puts a
    space before the beginning of a text.
    """

    def encode(text: str) -> list[int]:
        if as_text:
            return _without_added_tokens(tokenizer, text)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    ids = encode(_NEWLINE + piece)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The backend's normaliser, pre-tokeniser and model, without what it looks for before them."""
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    splits = [text]
    if backend.pre_tokenizer is not None:
        splits = [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for split in splits for token in backend.model.tokenize(split)]


@lru_cache(maxsize=16)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the tokens, in any case; of two the longer."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)


@lru_cache(maxsize=16)
def _marked_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """A marked token, in a group, or a marker that has lost its other."""
    return re.compile(f"{START}({_pattern(tokens).pattern}){END}|[{START}{END}]", re.IGNORECASE)


@lru_cache(maxsize=16)
def _literal_text(template: str) -> str:
    """Everything that the template writes of its own: its text and its constants."""
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    texts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    constants = (node.value for node in tree.find_all(jinja2.nodes.Const))
    return "\0".join(texts | {value for value in constants if isinstance(value, str)})
