"""What the HTTP layer sees and asks of variants while the server serves. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

EventKind = Literal[
    "fetching", "verifying", "registered", "replaced", "removed",
    "loading", "host", "ready", "failed", "evicted",
    "pinned", "unpinned", "missed",
]  # fmt: skip
Tier = Literal["host", "device"]


@dataclass(frozen=True, slots=True)
class VariantEvent:
    """Something that happened to a variant.

    seconds  what a load took; None: that does not apply
    n_missed  events that a reader lost who took too few ("missed" only)
    """

    kind: EventKind
    name: str
    digest: str | None
    time_s: float  # unix
    seconds: float | None = None
    reason: str = ""
    n_missed: int = 0


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """One load that ended, well or not: `error` says why not."""

    time_s: float  # unix, of its end
    tier: Tier
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class VariantDetail:
    """What the engine knows of one variant beside its `ModelInfo`.

    n_users      requests that hold it now
    last_used_s  unix, None: not since it was loaded
    loads        of its digest, newest first
    """

    finetuned_bytes: int = 0
    n_users: int = 0
    last_used_s: float | None = None
    loads: tuple[LoadRecord, ...] = ()


class VariantControl(Protocol):
    """What administrators do with variants; `name` is as in requests. Raises ModelNotFound, and
    what is wrong with a variant. Event loop only; every coroutine may be cancelled.
    """

    has_host_tier: bool

    def detail(self, name: str, tenant: str | None = None) -> VariantDetail:
        """Of a tenant's own use only, if one is named."""
        ...

    async def capacity(self, names: Sequence[str]) -> dict[str, Any]:
        """Say how memory is shared out and whether these fit: see `server.engine.capacity`."""
        ...

    async def load(self, name: str) -> None:
        """Return when it is in device memory."""
        ...

    async def prefetch(self, name: str) -> None:
        """Return when it is in host memory, or on the device. Raises Conflict without a tier."""
        ...

    async def unload(self, name: str, *, force: bool = False) -> None:
        """Return when it is in neither memory. Raises Conflict while it is pinned or, without
        `force`, in use; with it nobody gets it any more, and it goes when its last request ends.
        """
        ...

    def expire_after(self, ttls: Mapping[str, float]) -> None:
        """Unload these when nobody has used them for so many seconds; no others."""
        ...

    def tell(self, kind: EventKind, name: str) -> None:
        """Tell readers of events what was done to a variant."""
        ...

    def events(
        self, may_see: Callable[[str], bool], keep_alive_s: float
    ) -> AsyncGenerator[VariantEvent | None]:
        """Yield what happens from now on to variants that the reader may see; None now and then
        where nothing does. Ends when the server drains.
        """
        ...
