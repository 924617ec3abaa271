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
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

START, END = "\U000f0000", "\U000f0001"
_MARKED = re.compile(f"{START}([^{START}{END}]*){END}|[{START}{END}]")
_NEWLINE = "\n"
_KEY_CHARS = 2
_MAX_TEMPLATES = 16


class UnmarkableToken(ValueError):
    """The tokenizer makes a control token of its plain letters."""


class ControlTokens:
    """What is to be marked in the content of messages: some of a tokenizer's added tokens, found
    in any case.

    Texts are looked up by their first two characters and their length: a regular expression of
    100,000 alternatives takes seconds to make, and tries one after the other at each place.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self._one_case = _OneCase()
        self._tokens = frozenset(filter(None, map(self._folded, tokens)))
        lengths: dict[str, set[int]] = defaultdict(set)
        for token in self._tokens:
            lengths[token[:_KEY_CHARS]].add(len(token))
        self._lengths = {key: sorted(found, reverse=True) for key, found in lengths.items()}
        firsts = "".join(map(re.escape, sorted({key[0] for key in lengths})))
        self._begin = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def __contains__(self, text: str) -> bool:
        return self._folded(text) in self._tokens

    def mark(self, value: Any) -> Any:
        """Return a message, or a part of one, with the tokens in its texts marked; keys are not."""
        if isinstance(value, str):
            return "".join(self._pieces(value.replace(START, "").replace(END, "")))
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def _pieces(self, text: str) -> Iterator[str]:
        folded, done = self._folded(text), 0
        for found in self._begin.finditer(folded):
            at = found.start()
            end = self._end(folded, at) if at >= done else None
            if end is not None:
                yield from (text[done:at], START, text[at:end], END)
                done = end
        yield text[done:]

    def _end(self, folded: str, at: int) -> int | None:
        """Where the longest token that begins here ends."""
        for key in (folded[at : at + _KEY_CHARS], folded[at]):
            for length in self._lengths.get(key, ()):
                if folded[at : at + length] in self._tokens:
                    return at + length
        return None

    def _folded(self, text: str) -> str:
        """The text in one case, a character for each."""
        return text.lower() if text.isascii() else text.translate(self._one_case)


class ControlTokensByTemplate:
    """The control tokens of one tokenizer, which differ by the template: found out once for each,
    for the library makes an object of every added token whenever it is asked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._by_template: OrderedDict[str, ControlTokens] = OrderedDict()

    def of(self, template: str) -> ControlTokens:
        """Special tokens, and other added tokens that the template itself writes. White space is
        ordinary text even where it is an added token.
        """
        if template not in self._by_template:
            written = literal_text(template)
            self._by_template[template] = ControlTokens(
                token.content
                for token in self._added
                if token.special or (token.content in written and not token.content.isspace())
            )
            while len(self._by_template) > _MAX_TEMPLATES:
                self._by_template.popitem(last=False)
        return self._by_template[template]

    @cached_property
    def _added(self) -> list[AddedToken]:
        return list(self._tokenizer.added_tokens_decoder.values())


class _OneCase(dict[int, int]):
    """For `str.translate`: letters that any change of case makes equal become one, those that it
    makes several stay.
    """

    def __missing__(self, code: int) -> int:
        changed = chr(code).upper()
        changed = changed.lower() if len(changed) == 1 else chr(code)
        self[code] = ord(changed) if len(changed) == 1 else code
        return self[code]


def encode_marked(
    tokenizer: PreTrainedTokenizerBase, text: str, control: ControlTokens
) -> list[int]:
    """Token ids of a rendered conversation whose messages were marked, without those that the
    tokenizer adds. Raises UnmarkableToken.
    """
    pieces = _MARKED.split(text)
    newline = tokenizer.encode(_NEWLINE, add_special_tokens=False)
    ids: list[int] = tokenizer.encode(pieces[0], add_special_tokens=False)
    for number, piece in enumerate(pieces[1:], start=1):
        if not piece:  # a torn marker, or nothing between two
            continue
        as_text = number % 2 == 1 and piece in control
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


def literal_text(template: str) -> str:
    """Everything that the template writes of its own: its text and its constants."""
    tree = _compile_jinja_template(template).environment.parse(template)
    texts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    constants = (node.value for node in tree.find_all(jinja2.nodes.Const))
    return "\0".join(texts | {value for value in constants if isinstance(value, str)})
