"""Log probabilities of ids -> the same with the text, the bytes and the width of each token.

What a token adds to the text is known when its character is whole, so log probabilities wait with
their tokens (`server.text.text_stream`). Alternatives show what they would have added.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.types import TokenLogprob
from server.text.text_stream import TextStream, text_stream
from server.text.vocabulary import Vocabulary


class TokenWords:
    """Words the tokens of one stream. Call `arrive` with each before it is pushed there."""

    def __init__(
        self, vocabulary: Vocabulary, stream: TextStream, *, skip_special_tokens: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._stream = stream
        self._skip = skip_special_tokens
        self._waiting: list[TokenLogprob] = []

    def arrive(self, logprob: TokenLogprob) -> None:
        """Take the log probability of the next token."""
        top = tuple(self._alternative(one) for one in logprob.top)
        self._waiting.append(logprob._replace(top=top))

    def settle(self, pieces: Sequence[str]) -> list[TokenLogprob]:
        """Return the tokens that these pieces belong to, the oldest that wait."""
        waiting = self._waiting[: len(pieces)]
        del self._waiting[: len(pieces)]
        return [self._worded(one, piece) for one, piece in zip(waiting, pieces, strict=False)]

    def end(self) -> list[TokenLogprob]:
        """Return tokens that still wait: they have no place in the text, and show what they are."""
        waiting, self._waiting = self._waiting, []
        return [self._own(one, self._alternative(one)) for one in waiting]

    def _worded(self, one: TokenLogprob, piece: str) -> TokenLogprob:
        token_id = one.token_id
        shown = self._vocabulary.is_shown(token_id, skip_special_tokens=self._skip)
        token = piece if shown else self._vocabulary.name(token_id)
        worded = TokenLogprob(token_id, None, (), token, self._raw(token_id, token), len(piece))
        return self._own(one, worded)

    @staticmethod
    def _own(one: TokenLogprob, worded: TokenLogprob) -> TokenLogprob:
        """Return the token in these words, also where it is its own best alternative."""
        _, _, _, token, raw, n_chars = worded
        top = tuple(
            item._replace(token=token, raw=raw) if item.token_id == one.token_id else item
            for item in one.top
        )
        return one._replace(top=top, token=token, raw=raw, n_chars=n_chars)

    def _alternative(self, one: TokenLogprob) -> TokenLogprob:
        token_id = one.token_id
        if self._vocabulary.is_shown(token_id, skip_special_tokens=self._skip):
            token = self._stream.peek(token_id)
        else:
            token = self._vocabulary.name(token_id)
        return TokenLogprob(token_id, one.logprob, (), token, self._raw(token_id, token))

    def _raw(self, token_id: int, token: str) -> bytes:
        own = self._vocabulary.token_bytes(token_id)
        return token.encode("utf-8", "replace") if own is None else own


def worded_prompt(
    vocabulary: Vocabulary, logprobs: Sequence[TokenLogprob], *, is_whole: bool
) -> tuple[TokenLogprob, ...]:
    """Word the tokens of a prompt, the special ones among them by name and without a width.

    is_whole  whether nothing follows that could complete a character which the prompt only begins
    """
    stream = text_stream(vocabulary, skip_special_tokens=False)
    words = TokenWords(vocabulary, stream, skip_special_tokens=False)
    found: list[TokenLogprob] = []
    for one in logprobs:
        words.arrive(one)
        found += words.settle(stream.push(one.token_id))
    found += words.settle(stream.flush(at_end=is_whole))
    found += words.settle([""] * (len(logprobs) - len(found)))
    return tuple(_by_name(vocabulary, one) for one in found)


def _by_name(vocabulary: Vocabulary, one: TokenLogprob) -> TokenLogprob:
    if vocabulary.is_shown(one.token_id, skip_special_tokens=True):
        return one
    name = vocabulary.name(one.token_id)
    return one._replace(token=name, raw=name.encode("utf-8", "replace"), n_chars=0)
