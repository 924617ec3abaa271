"""The names that are served, as who adds and removes variants sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

Stage = Literal["fetching", "verifying", "failed"]


class ServedNames(Protocol):
    """Any thread may ask; those that read a disk say so."""

    def is_reserved(self, name: str) -> bool:
        """Whether no variant can have this name."""
        ...

    def owner(self, name: str) -> Literal["deltas", "state"] | None:
        """In which folder a name is: the operator's, or this server's own."""
        ...

    def digest(self, name: str) -> str | None:
        """What is served under a name."""
        ...

    def announce(self, name: str, stage: Stage, error: str | None = None) -> None:
        """List a name whose folder is not there yet, or why it never came."""
        ...

    def withdraw(self, name: str) -> bool:
        """List an announced name no more; return whether it was one."""
        ...

    def verify(self, path: Path) -> str:
        """Read every byte of a folder and return its digest, if this server can serve it.

        Raises ArtifactRefused, DeltaUnusable.
        """
        ...

    def reread(self, name: str, moved_to: Path | None = None) -> None:
        """Read a name's folder, which has come or gone, from disk.

        moved_to  where the one is that was served: requests opened on it may still load it
        """
        ...

    def forget(self, path: Path) -> None:
        """Nobody needs a folder any more that `reread` was told of."""
        ...
