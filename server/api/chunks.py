"""Pieces of a stream as bytes.

Most pieces of a choice differ in their text only. Their frame is rendered once, by the code that
renders every other piece, and cut where the text goes.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from server.api import sse
from server.api.reply import Choice, Envelope, Reply, usage_of
from server.engine.types import OutputChunk


@dataclass(slots=True)
class ChunkWriter:
    """Renders what one streamed answer says of its choices."""

    reply: Reply
    envelope: Envelope
    _frames: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # by choice

    def render(self, choice: Choice, chunk: OutputChunk) -> bytes:
        """Count the chunk and return its events; no bytes if there is nothing to show."""
        choice.count(chunk)
        if self._is_plain(choice, chunk):
            head, tail = self._frames.get(choice.index) or self._frame(choice)
            return head + sse.encode_json(chunk.text) + tail
        pieces = self.reply.opening(choice) if choice.n_chunks == 1 else []
        piece = self.reply.piece(choice, chunk)
        if piece is not None:
            pieces.append(piece)
        body = self.reply.body
        usage = usage_of([choice], 1) if body.continuous_usage else None
        return b"".join(
            sse.frame(self.envelope.wrap([one], usage, with_usage=body.include_usage))
            for one in pieces
        )

    def _is_plain(self, choice: Choice, chunk: OutputChunk) -> bool:
        """Whether the text is all that is new."""
        return (
            bool(chunk.text)
            and chunk.finish_reason is None
            and not chunk.logprobs
            and choice.n_chunks > 1
            and not self.reply.body.continuous_usage
        )

    def _frame(self, choice: Choice) -> tuple[bytes, bytes]:
        """Return the bytes before and after the text of this choice's plain pieces."""
        mark = uuid.uuid4().hex  # occurs nowhere else
        piece = self.reply.piece(choice, OutputChunk(mark))
        assert piece is not None
        body = self.reply.body
        whole = sse.frame(self.envelope.wrap([piece], None, with_usage=body.include_usage))
        head, _, tail = whole.partition(sse.encode_json(mark))
        self._frames[choice.index] = head, tail
        return head, tail
