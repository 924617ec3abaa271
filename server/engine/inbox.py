"""Commands for the engine's thread, from any other."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable

log = logging.getLogger(__name__)
Command = Callable[[], None]


class Inbox:
    """Commands are run in the order they came."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def put(self, command: Command) -> None:
        """From any thread."""
        self._queue.put(command)

    def empty(self) -> bool:
        return self._queue.empty()

    def run(self, wait_s: float | None) -> None:
        """Run what there is; wait for a first one if there is nothing, not with None.

        What these commands put here themselves is left for the next time, so that work of many
        parts can let a step run after each.
        """
        try:
            command = self._queue.get(block=wait_s is not None, timeout=wait_s)
        except queue.Empty:
            return
        n_more = self._queue.qsize()
        command()
        for _ in range(n_more):  # nobody else takes any
            self._queue.get_nowait()()

    def run_last(self) -> None:
        """Run what there is, whatever fails: nobody will come back."""
        while True:
            try:
                self._queue.get_nowait()()
            except queue.Empty:
                return
            except Exception:
                log.exception("a command failed while the engine was dying")
