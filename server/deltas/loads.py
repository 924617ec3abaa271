"""A load on its way from disk into a slot: one class for each of its stages.

`LoadJob`, `LoadDecoded` (in host memory), `LoadCopied` (in its slot); from anywhere, `LoadFailed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from compressor.artifact.reader import Artifact
from server.deltas.failures import Failure, failure_of
from server.deltas.parameter import Mode, StagedParameter
from server.deltas.room import Room
from server.deltas.slots import Slot


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What to load.

    read     runs on a reader's thread and returns the verified weights
    reject   is told if they cannot be used, so that `read` need not read them for the next who asks
    n_bytes  of the artifact
    """

    key: str
    name: str
    mode: Mode
    read: Callable[[], Artifact]
    reject: Callable[[Failure], None] = field(default=lambda _: None, compare=False)
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LoadDecoded:
    """Decoded in host memory.

    n_bytes   that it will take of the device's
    artifact  whose weights are to be reconstructed
    read_s    what reading and decoding took; None: it was there already
    """

    job: LoadJob
    parameters: tuple[StagedParameter, ...]
    n_bytes: int
    started: float
    artifact: Artifact | None = None
    read_s: float | None = None


@dataclass(frozen=True, slots=True)
class LoadCopied:
    """Copied into its slot, and its weights reconstructed if its mode says so.

    room     where it was copied, if that is not open to steps yet
    started  when it was given its slot
    """

    decoded: LoadDecoded
    slot: Slot
    started: float
    room: Room | None = None
    weights: Any = None


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """`name` is one of those that wait for these bytes: what each of them is told names its own."""

    key: str
    name: str
    failure: Failure
    slot: Slot | None = None


@dataclass(frozen=True, slots=True)
class Happening:
    """What happened to a variant, for whoever watches the loader.

    seconds  reading and decoding took ("host"), copying into a slot ("device"), or all of it
             ("ready"; "failed" until then)
    """

    kind: Literal["loading", "host", "device", "ready", "failed", "evicted"]
    key: str
    seconds: float | None = None
    reason: str = ""


LoaderMessage = LoadDecoded | LoadCopied | LoadFailed


def failed_load(job: LoadJob, error: Exception, slot: Slot | None = None) -> LoadFailed:
    """What a load that ended with `error` leaves, in `slot` if it had one already."""
    return LoadFailed(job.key, job.name, failure_of(error), slot)
