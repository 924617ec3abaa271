"""Tokens of byte fallback that follow each other.

The tokenizer's decoder reads such a run as a whole: one wrong byte makes all of them unreadable, so
that nothing of it is certain until another token comes.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

UNREADABLE = "\ufffd"
# Whole characters of a run this long are shown before it ends, so that a script without tokens of
# its own is streamed; only a wrong byte after them could tell the difference.
MAX_RUN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Settled:
    """Pieces of ids; token_ids are those of whole characters, none if the bytes are unreadable."""

    pieces: list[str]
    token_ids: list[int]


class ByteRun:
    """Bytes of byte fallback that follow each other: readable together, or none of them is.

    waiting    for each id since the last that was settled: its piece, None for one without a place
               in the text
    token_ids  of the bytes in `waiting`, after those that the prompt brought
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._reset()

    def _reset(self) -> None:
        self._decoder.reset()
        self._waiting: list[str | None] = []
        self._token_ids: list[int] = []
        self._n_brought = 0
        self._is_unreadable = False
        self.is_open = False

    def begin(self, token_ids: Sequence[int], run: bytes) -> None:
        """Take over the run that a prompt ends with."""
        try:
            self._decoder.decode(run)
        except UnicodeDecodeError:
            self._is_unreadable = self.is_open = True
            return
        self._n_brought = len(self._decoder.getstate()[0])
        self.is_open = self._n_brought > 0
        self._token_ids = list(token_ids[len(token_ids) - self._n_brought :])

    def push(self, byte: int, token_id: int) -> Settled | None:
        """Add a byte; return what is settled by it."""
        self.is_open = True
        if self._is_unreadable:
            return Settled([UNREADABLE], [])
        self._token_ids.append(token_id)
        try:
            self._waiting.append(self._decoder.decode(bytes([byte])))
        except UnicodeDecodeError:
            self._waiting.append("")
            settled = self._unreadable()
            self._reset()
            self._is_unreadable = self.is_open = True
            return settled
        if len(self._token_ids) >= MAX_RUN_BYTES and self._is_whole():
            return self.end()
        return None

    def pass_over(self) -> list[str]:
        """An id without a place in the text does not end the run; its piece waits with others."""
        if not self._waiting:
            return [""]
        self._waiting.append(None)
        return []

    def peek(self, byte: int) -> str:
        """What the byte would show: the character that it completes."""
        if self._is_unreadable:
            return UNREADABLE
        state = self._decoder.getstate()
        try:
            return self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            return UNREADABLE
        finally:
            self._decoder.setstate(state)

    def end(self, *, at_end: bool = True) -> Settled:
        """No byte follows: return what waits. Without `at_end` the beginning of a character at the
        end makes nothing unreadable, and is left out.
        """
        n_left = len(self._decoder.getstate()[0])
        if n_left and at_end:
            settled = self._unreadable()
        else:
            n_whole = max(0, len(self._token_ids) - n_left)
            settled = Settled([one or "" for one in self._waiting], self._token_ids[:n_whole])
        self._reset()
        return settled

    def _is_whole(self) -> bool:
        return not self._decoder.getstate()[0]

    def _unreadable(self) -> Settled:
        pieces = ["" if piece is None else UNREADABLE for piece in self._waiting]
        if pieces:
            pieces[0] = UNREADABLE * self._n_brought + pieces[0]
        return Settled(pieces, [])
