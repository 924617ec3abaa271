"""Host memory to slots on a copy stream, through a small ring of pinned memory.

A copy from pageable memory blocks the thread and cannot overlap with kernels; pinning a whole delta
costs as much as copying it. So pieces go through pinned buffers: while one is on the bus the next
is filled. The engine's stream never waits: a slot is shown only once its `Upload` is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
CPU_CHUNK_BYTES = 1 << 20  # nothing to overlap with
RING = 3
Transfer = tuple[Tensor, Tensor]  # (place on the device, values on the host)


class Uploader(Protocol):
    """What the loader needs of one."""

    def ready(self) -> Ready: ...
    def copy(self, transfers: Sequence[Transfer], after: Ready | None = None) -> Upload: ...
    def abandon(self) -> None: ...


class Ready:
    """A point in the engine's stream. Work queued before it (making room) comes before a copy."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self.event = event


class Upload:
    """Copies under way. On a CPU they are done when made."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    def done(self) -> bool:
        """Whether every copy has arrived; never waits."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block this thread (a loader's, not the engine's) until they have."""
        if self._event is not None:
            self._event.synchronize()


class SlotUploader:
    """For one loader thread at a time. Targets must be read by no step until the upload is done."""

    def __init__(
        self, device: torch.device, chunk_bytes: int | None = None, ring: int = RING
    ) -> None:
        self._cuda = device.type == "cuda"
        if chunk_bytes is None:
            chunk_bytes = CHUNK_BYTES if self._cuda else CPU_CHUNK_BYTES
        self._buffers = [
            torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(ring)
        ]
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._free: list[torch.cuda.Event | None] = [None] * ring
        self._turn = itertools.cycle(range(ring))

    def ready(self) -> Ready:
        """Call on the engine's thread once the targets' memory is made: its zeros come first."""
        if self._stream is None:
            return Ready()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Ready(event)

    def copy(self, transfers: Sequence[Transfer], after: Ready | None = None) -> Upload:
        """Copy each ``(target on the device, source on the host)``; equal shapes and dtypes.

        after  what the engine's stream must have done before the first byte is written
        """
        if self._stream is not None and after is not None and after.event is not None:
            self._stream.wait_event(after.event)
        for target, source in transfers:
            assert target.shape == source.shape, (target.shape, source.shape)
            assert target.dtype == source.dtype, (target.dtype, source.dtype)
            if source.numel():
                self._copy_one(target, source)
        if self._stream is None:
            return Upload(None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return Upload(event)

    def abandon(self) -> None:
        """Wait for copies under way, whoever asked for them: their targets may go after this."""
        if self._stream is not None:
            self._stream.synchronize()

    def _copy_one(self, target: Tensor, source: Tensor) -> None:
        """Split along the first axes until a piece fits a buffer."""
        n_bytes = source.numel() * source.element_size()
        capacity = self._buffers[0].numel()
        if n_bytes > capacity and len(source) == 1:
            self._copy_one(target[0], source[0])
            return
        if n_bytes > capacity:
            per_row = n_bytes // len(source)
            step = max(1, capacity // per_row)
            for start in range(0, len(source), step):
                self._copy_one(target[start : start + step], source[start : start + step])
            return
        self._send(target, source, n_bytes)

    def _send(self, target: Tensor, source: Tensor, n_bytes: int) -> None:
        place = next(self._turn)
        free = self._free[place]
        if free is not None:
            free.synchronize()
        staged = self._buffers[place][:n_bytes].view(source.dtype).view(source.shape)
        staged.copy_(source)
        if self._stream is None:
            target.copy_(staged)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(staged, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._free[place] = event
