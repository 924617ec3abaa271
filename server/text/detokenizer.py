"""Token ids -> text as a client may see it, incrementally, and stop strings.

Text that could be the beginning of a stop string is held back until it is known not to be one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from server.text.text_stream import TextStream


@dataclass(slots=True)
class Detokenizer:
    """Incremental decoder of one request.

    held     decoded but not yet shown
    settled  the pieces of text of the ids that the last call settled, oldest first
    """

    stream: TextStream
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    held: str = ""
    stopped_by: str | None = None
    settled: list[str] = field(default_factory=list)
    _may_stop: list[bool] = field(default_factory=list)  # of ids that wait

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        """Add one token; return the text that may be shown. Sets `stopped_by` on a stop string."""
        self._may_stop.append(check_stop)
        self.settled = self.stream.push(token_id)
        return self._take(self.settled)

    def finish(self) -> str:
        """Return what is still held, incomplete UTF-8 shown as the tokenizer's decode shows it."""
        self.settled = [] if self.stopped_by is not None else self.stream.flush()
        return self._take(self.settled) + self._show(len(self.held))

    def _take(self, pieces: list[str]) -> str:
        for piece in pieces:
            if self.stopped_by is not None:
                break
            self.held += piece
            may_stop = self._may_stop.pop(0) if self._may_stop else False
            if may_stop and piece and self._cut_at_stop(len(piece)):
                return self._show(len(self.held))
        return self._show(len(self.held) - self._possible_stop_length())

    def _show(self, n_chars: int) -> str:
        shown, self.held = self.held[:n_chars], self.held[n_chars:]
        return shown

    def _cut_at_stop(self, n_new: int) -> bool:
        """Find the earliest stop string that ends in the new text; cut the text there."""
        best: tuple[int, str] | None = None
        for stop in self.stop:
            at = self.held.find(stop, max(0, len(self.held) - n_new - len(stop) + 1))
            if at >= 0 and (best is None or at < best[0]):
                best = (at, stop)
        if best is None:
            return False
        at, self.stopped_by = best
        self.held = self.held[: at + len(self.stopped_by) if self.include_stop else at]
        return True

    def _possible_stop_length(self) -> int:
        """Length of the longest tail of `held` that begins a stop string."""
        longest = 0
        for stop in self.stop:
            for n in range(min(len(stop) - 1, len(self.held)), longest, -1):
                if self.held.endswith(stop[:n]):
                    longest = n
                    break
        return longest
