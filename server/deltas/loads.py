"""A load on its way from disk into a slot: one class for each of its stages.

`LoadJob`, `LoadDecoded` (in host memory), `LoadCopied` (in its slot); from anywhere, `LoadFailed`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compressor.artifact.reader import Artifact
from compressor.errors import ArtifactError, UnsupportedTensor
from server.deltas.parameter import Mode, StagedParameter
from server.deltas.registry import unusable
from server.deltas.room import Room
from server.deltas.slots import Slot
from server.errors import DeltaUnusable, ServeError

log = logging.getLogger(__name__)
RETRY_AFTER_S = 30  # an operator may have mended the artifact by then


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What to load. `read` runs on a reader's thread and returns the verified weights."""

    key: str
    name: str
    mode: Mode
    read: Callable[[], Artifact]


@dataclass(frozen=True, slots=True)
class LoadDecoded:
    """Decoded in host memory."""

    job: LoadJob
    parameters: tuple[StagedParameter, ...]
    n_bytes: int
    started: float
    artifact: Artifact | None = None  # whose weights are to be reconstructed


@dataclass(frozen=True, slots=True)
class LoadCopied:
    """Copied into its slot, and its weights reconstructed if its mode says so.

    room  where it was copied, if that is not open to steps yet
    """

    decoded: LoadDecoded
    slot: Slot
    room: Room | None = None
    weights: Any = None


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """`message` is safe to show to clients."""

    key: str
    name: str
    message: str
    slot: Slot | None = None
    retry_after_s: int = RETRY_AFTER_S

    @property
    def error(self) -> DeltaUnusable:
        """What each request that waited for the variant ends with."""
        return DeltaUnusable(self.message, param="model", retry_after_s=self.retry_after_s)


LoaderMessage = LoadDecoded | LoadCopied | LoadFailed


def failed_load(job: LoadJob, error: Exception, slot: Slot | None = None) -> LoadFailed:
    """What a load that ended with `error` leaves, in `slot` if it had one already."""
    retry_after_s = error.retry_after_s if isinstance(error, ServeError) else None
    message = _explain(job.name, error)
    return LoadFailed(job.key, job.name, message, slot, retry_after_s or RETRY_AFTER_S)


def _explain(name: str, error: Exception) -> str:
    if isinstance(error, ServeError):
        return error.message
    if isinstance(error, ArtifactError | OSError):
        return unusable(name, error)
    if isinstance(error, UnsupportedTensor):
        return f"the delta of `{name}` cannot be used: {error}"
    log.exception("loading %s failed", name, exc_info=error)
    return f"the delta of `{name}` could not be loaded; see the server's log"
