"""Token ids -> text, one id at a time: together the same text as decoding all ids at once.

`push` returns one piece for every id whose text is settled by now, oldest first. Within a character
that is split over several ids nothing is settled; then the last of them has the character and those
before it have "". All pieces of a text, and what `flush` adds, make up the text.

The text goes on where the prompt's ends: a space between them is kept, and a character that the
prompt only begins comes whole with the id that completes it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from server.text.byte_run import UNREADABLE, ByteRun, Settled
from server.text.vocabulary import Vocabulary

MAX_CHARACTER_BYTES = 4
MAX_SPLIT_TOKENS = 16  # that wait because each ends within a character


class TextStream(Protocol):
    """See the module's docstring."""

    def push(self, token_id: int) -> list[str]: ...

    def peek(self, token_id: int) -> str:
        """Return the piece that `push` would give this id, "" for a part of a character."""
        ...

    def flush(self, *, at_end: bool = True) -> list[str]:
        """Return the pieces of the ids that wait.

        at_end  whether no more will come: then bytes that are no whole character show as unreadable
        """
        ...


def text_stream(
    vocabulary: Vocabulary, *, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()
) -> TextStream:
    """Return the stream of what follows the prompt."""
    kind = ByteStream if vocabulary.is_byte_level else DecodedStream
    return kind(vocabulary, skip_special_tokens, prompt_ids)


class ByteStream:
    """For byte-level tokenizers: the tokens' bytes, decoded as they come."""

    def __init__(
        self, vocabulary: Vocabulary, skip_special_tokens: bool, prompt_ids: Sequence[int]
    ) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # of ids that wait
        self._n_waiting = 0
        self._decoder.decode(self._last_bytes(prompt_ids))

    def push(self, token_id: int) -> list[str]:
        self._held += self._decoder.decode(self._bytes(token_id))
        if self._waits():
            self._n_waiting += 1
            return []
        return self._settled()

    def peek(self, token_id: int) -> str:
        state = self._decoder.getstate()
        text = self._decoder.decode(self._bytes(token_id))
        waits = self._waits()
        self._decoder.setstate(state)
        return "" if waits else self._held + text

    def flush(self, *, at_end: bool = True) -> list[str]:
        self._held += self._decoder.decode(b"", final=True) if at_end else ""
        if not self._n_waiting:  # what is left was begun by the prompt
            return [self._held] if self._held else []
        self._n_waiting -= 1
        return self._settled()

    def _settled(self) -> list[str]:
        pieces = [*[""] * self._n_waiting, self._held]
        self._held, self._n_waiting = "", 0
        return pieces

    def _waits(self) -> bool:
        """Whether the last id ends within a character."""
        return bool(self._decoder.getstate()[0]) and self._n_waiting < MAX_SPLIT_TOKENS

    def _bytes(self, token_id: int) -> bytes:
        if not self._vocabulary.is_shown(token_id, skip_special_tokens=self._skip):
            return b""
        return self._vocabulary.token_bytes(token_id) or b""

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The last bytes of a text, enough for the beginning of a character."""
        found = b""
        for token_id in reversed(token_ids):
            if len(found) >= MAX_CHARACTER_BYTES:
                break
            found = self._bytes(token_id) + found
        return found[-MAX_CHARACTER_BYTES:]


class DecodedStream:
    """For every other tokenizer: what its decoder makes of an id after the one before it.

    context  the last id, if it is not one of byte fallback, whose bytes would join with later ones;
             where ids may end within a character, enough of them for a whole one
    run      bytes of byte fallback that follow each other, and what each of them shows
    """

    def __init__(
        self, vocabulary: Vocabulary, skip_special_tokens: bool, prompt_ids: Sequence[int]
    ) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._started = False  # something came before: the next id does not begin the text
        self._context: list[int] = []
        self._split: list[int] = []  # ids whose text ends within a character: see `may_split`
        self._run = ByteRun()
        self._before: list[int] = []  # what was last decoded before other ids, and its length
        self._n_before = 0
        self._begin_after(prompt_ids)

    def push(self, token_id: int) -> list[str]:
        if not self._is_shown(token_id):
            return self._run.pass_over()
        byte = self._vocabulary.byte_of.get(token_id)
        if byte is not None:
            return self._settled(self._run.push(byte, token_id))
        pieces = self._end_run()
        text = self._text_of([*self._split, token_id])
        if self._waits(text):
            self._split.append(token_id)
            return pieces
        pieces += [*[""] * len(self._split), text]
        known = [*self._context, *self._split] if self._vocabulary.may_split else []
        self._context = [*known, token_id][-2 * MAX_CHARACTER_BYTES :]
        self._split, self._started = [], True
        return pieces

    def peek(self, token_id: int) -> str:
        if not self._is_shown(token_id):
            return ""
        byte = self._vocabulary.byte_of.get(token_id)
        if byte is not None:
            return self._run.peek(byte)
        within_run = self._run.is_open
        text = self._text_of([*self._split, token_id], within_run=within_run)
        return "" if self._waits(text) else text

    def flush(self, *, at_end: bool = True) -> list[str]:
        pieces = self._end_run(at_end=at_end)
        if self._split:
            text = self._text_of(self._split)
            text = text if at_end else text.rstrip(UNREADABLE)
            pieces += [*[""] * (len(self._split) - 1), text]
            self._context, self._split = self._split, []
        return pieces

    def _waits(self, text: str) -> bool:
        splits = self._vocabulary.may_split and len(self._split) < MAX_SPLIT_TOKENS
        return splits and text.endswith(UNREADABLE)

    def _is_shown(self, token_id: int) -> bool:
        return self._vocabulary.is_shown(token_id, skip_special_tokens=self._skip)

    def _end_run(self, *, at_end: bool = True) -> list[str]:
        return self._settled(self._run.end(at_end=at_end)) if self._run.is_open else []

    def _settled(self, run: Settled | None) -> list[str]:
        """Take a run of bytes that is settled as the decoder shows it."""
        if run is None:
            return []
        pieces = run.pieces
        if run.token_ids:  # they are whole characters; the first of a text may lose its space
            pieces = _distributed(self._text_of(run.token_ids), pieces)
        self._context, self._started = [], True
        return pieces

    def _text_of(self, token_ids: list[int], *, within_run: bool = False) -> str:
        """What these ids add to the text before them."""
        before: list[int] = []
        if self._started or within_run:
            anchor = self._vocabulary.anchor
            before = [] if anchor is None else [anchor]
            before += [] if within_run else self._context
        if before != self._before:
            text = self._vocabulary.decode(before)
            text = text.rstrip(UNREADABLE) if self._vocabulary.may_split else text
            self._before, self._n_before = before, len(text)
        return self._vocabulary.decode([*before, *token_ids])[self._n_before :]

    def _begin_after(self, prompt_ids: Sequence[int]) -> None:
        """Take over the prompt's last shown id, and the bytes of a character it only begins."""
        byte_of, run = self._vocabulary.byte_of, list[int]()
        for token_id in reversed(prompt_ids):
            if not self._is_shown(token_id):
                continue
            self._started = True
            if token_id in byte_of and not self._context:
                run.append(token_id)
                continue
            if not run:
                self._context.insert(0, token_id)
            if not self._vocabulary.may_split or len(self._context) >= 2 * MAX_CHARACTER_BYTES:
                break
        run.reverse()
        self._run.begin(run, bytes(byte_of[token_id] for token_id in run))


def _distributed(text: str, pieces: list[str]) -> list[str]:
    """Return the pieces with the letters of `text`, which may have lost some at its beginning."""
    found = []
    for piece in reversed(pieces):
        n_chars = min(len(piece), len(text))
        found.append(text[len(text) - n_chars :])
        text = text[: len(text) - n_chars]
    return found[::-1]
