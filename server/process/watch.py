"""The deltas directory is read again when something in it has changed, without a signal.

Whoever copies a folder into it takes a while: it is looked at once nothing has changed for a
second. A folder that is not whole even then is listed with its error, never served, and read again
with the next change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from watchfiles import awatch
from watchfiles._rust_notify import WatchfilesRustInternalError

from server.errors import DeltasUnreadable

SETTLE_MS = 1000
LONGEST_MS = 30_000  # of changes that never pause

log = logging.getLogger(__name__)


async def watch_deltas(
    folder: Path, rescan: Callable[[], None], *, settle_ms: int = SETTLE_MS
) -> None:
    """Rescan after each change, until cancelled; where the system cannot watch, say so and end."""
    try:
        changes = awatch(folder, watch_filter=None, step=settle_ms, debounce=LONGEST_MS)
        async for _ in changes:
            await _rescan(rescan)
    except (OSError, WatchfilesRustInternalError) as error:
        log.warning(
            "the deltas directory cannot be watched (%s); the server reads it again on SIGHUP and "
            "POST /v1/deltas/rescan only",
            error,
        )


async def _rescan(rescan: Callable[[], None]) -> None:
    try:
        await asyncio.to_thread(rescan)
    except DeltasUnreadable as error:
        log.error("%s", error.message)
    except Exception:
        log.exception("the rescan failed; the server keeps the names it knew")
