"""Streams, events and copies from pinned memory, with the order that a GPU promises and no more.

Kernels run at once, but a copy on a stream of its own waits until somebody waits for it, and a
pinned buffer is in use until then: whoever shows the data or reuses the buffer too early is found.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


class SimulationError(RuntimeError):
    """What CUDA would refuse, or answer with wrong data."""


@dataclass(eq=False)
class Stream:
    """Copies from pinned memory, in the order they were issued.

    issued   how many there were
    pending  (number, copy) of those that have not run
    reading  (number, pinned memory) of those that nobody on the host has waited for
    arriving  (number, copy) of those to the host that nobody there has waited for
    """

    device: object = None
    issued: int = 0
    pending: list[tuple[int, Callable[[], object]]] = field(default_factory=list)
    reading: list[tuple[int, Tensor]] = field(default_factory=list)
    arriving: list[tuple[int, Callable[[], object]]] = field(default_factory=list)

    def run_pending(self, last: int | None = None) -> None:
        """What the stream's next operation, or an event after copy `last`, finds done."""
        while self.pending and (last is None or self.pending[0][0] <= last):
            self.pending.pop(0)[1]()

    def host_waited(self, last: int | None = None) -> None:
        """The host knows that copies up to `last` are done."""
        self.run_pending(last)
        self.reading = [] if last is None else [r for r in self.reading if r[0] > last]
        while self.arriving and (last is None or self.arriving[0][0] <= last):
            self.arriving.pop(0)[1]()

    synchronize = host_waited

    def wait_stream(self, other: Stream) -> None:
        other.run_pending()

    def wait_event(self, event: Event) -> None:
        event.stream.run_pending(event.last)


@dataclass(eq=False)
class Event:
    """A point in a stream. The first `query` after `record` finds copies before it unfinished."""

    gpu: Streams
    enable_timing: bool = False
    stream: Stream = field(default_factory=Stream)
    last: int = 0
    _asked: bool = False
    _at: float = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream, self._asked = stream or self.gpu.current(), False
        self.last, self._at = self.stream.issued, time.perf_counter()

    def query(self) -> bool:
        under_way = any(number <= self.last for number, _ in self.stream.reading)
        if under_way and not self._asked:
            self._asked = True
            return False
        self.stream.host_waited(self.last)
        return True

    def synchronize(self) -> None:
        self.gpu.host_waits("Event.synchronize")
        self.stream.host_waited(self.last)

    def elapsed_time(self, end: Event) -> float:
        return max(1e-3, 1e3 * (end._at - self._at))


class Streams:
    """The streams of one device: a current one for every thread."""

    def __init__(self) -> None:
        self.default = Stream()
        self._local = threading.local()
        self._all = [self.default]

    def current(self) -> Stream:
        return getattr(self._local, "stream", self.default)

    def make(self, device: object = None) -> Stream:
        self._all.append(Stream(device))
        return self._all[-1]

    def enter(self, stream: Stream) -> Stream:
        """Make it this thread's; returns the one before."""
        before = self.current()
        self._local.stream = stream
        return before

    def host_waits(self, why: str) -> None:
        """Overridden: what a capturing thread must not do."""

    def copy_from_pinned(self, copy: Callable[[], object], source: Tensor) -> None:
        """Issue an asynchronous copy on the current stream."""
        stream = self.current()
        stream.issued += 1
        stream.reading.append((stream.issued, source))
        stream.pending.append((stream.issued, copy))

    def copy_to_pinned(self, copy: Callable[[], object]) -> None:
        """Likewise to the host, where nothing has arrived until it waits for it."""
        stream = self.current()
        stream.issued += 1
        stream.arriving.append((stream.issued, copy))

    def check_unread(self, pinned: Tensor) -> None:
        """Raises SimulationError if a copy that nobody has waited for may still read this."""
        own = pinned.untyped_storage().data_ptr()
        for stream in self._all:
            if any(t.untyped_storage().data_ptr() == own for _, t in stream.reading):
                raise SimulationError("pinned memory is written to while a copy may still read it")

    def synchronize(self) -> None:
        for stream in self._all:
            stream.host_waited()
