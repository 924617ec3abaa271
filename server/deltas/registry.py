"""Names and digests: which variants exist, read from the deltas directory.

A variant's name is its folder's name; its identity is the digest of its bytes. `rescan` compares
digests, so a changed artifact is a new variant under the old name: requests already running keep
the digest they were opened with.

A folder may be a link to one: that is how Kubernetes presents a volume's folders. Whoever may write
to the deltas directory decides what is served anyway. Nothing inside an artifact may be a link.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from compressor.artifact.reader import DeltaConfig, describe_artifact, read_digest
from compressor.artifact.signature import PublicKey, why_not_vouched
from compressor.errors import ArtifactError, Unreadable, UnsupportedTensor
from server.deltas.failures import Failure, Refused, failure_of
from server.deltas.fingerprint import Fingerprint, fingerprint_of
from server.errors import DeltasUnreadable

log = logging.getLogger(__name__)
N_NAMED = 5  # of the variants that cannot be served, in one line
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class RegisteredDelta:
    """One discovered artifact. `failure` is set if it cannot be served, `seen` is then what its
    directory looked like.
    """

    name: str
    path: Path
    digest: str
    n_bytes: int
    codec: str
    fidelity: dict[str, object]
    created_s: int
    finetuned_bytes: int = 0  # of the checkpoint that it stands for, on disk
    failure: Failure | None = None
    seen: Fingerprint | None = None

    @property
    def error(self) -> str | None:
        """Why it cannot be served; safe to show."""
        return None if self.failure is None else self.failure.reason


class _Names:
    """One whole map, and what is looked for in it."""

    def __init__(self, by_name: dict[str, RegisteredDelta]) -> None:
        self.by_name = by_name
        self.in_order = sorted(by_name.values(), key=lambda delta: delta.name)
        self.failed = [delta for delta in self.in_order if delta.failure is not None]
        self.by_digest: dict[str, list[RegisteredDelta]] = {}
        for delta in self.in_order:
            if delta.failure is None:
                self.by_digest.setdefault(delta.digest, []).append(delta)


class DeltaRegistry:
    """Name -> artifact. Readers see one whole map or the next.

    check  of what an artifact changes; it is listed with the UnsupportedTensor that this raises
    signers  keys of which one must have signed an artifact; none: nobody must
    """

    def __init__(
        self,
        root: Path | None,
        base_identity: str,
        reserved: frozenset[str] = frozenset(),
        check: Callable[[DeltaConfig], None] = lambda config: None,
        signers: Collection[PublicKey] = (),
    ) -> None:
        self._root = root
        self._base_identity = base_identity
        self._reserved = reserved
        self._check = check
        self._signers = signers
        self._names = _Names({})
        self._lock = threading.Lock()  # of whoever replaces the map

    def get(self, name: str) -> RegisteredDelta | None:
        return self._names.by_name.get(name)

    def with_digest(self, digest: str | None) -> list[RegisteredDelta]:
        """Servable artifacts that claim to have these bytes, under whatever names they have now."""
        return self._names.by_digest.get(digest or "", [])

    def failed(self) -> list[RegisteredDelta]:
        """Those that cannot be served, by name."""
        return self._names.failed

    def all(self) -> list[RegisteredDelta]:
        return self._names.in_order

    def rescan(self) -> None:
        """Read the directory again. A bad artifact is listed with its error, never hidden.

        Raises DeltasUnreadable, and then knows what it knew.
        """
        if self._root is None:
            return
        with self._lock:
            found = {shown(path.name): self._read(path) for path in _folders(self._root)}
            self._names = _Names(found)
        log_found(self._root, found.values())

    def refresh(self, failed: RegisteredDelta) -> RegisteredDelta:
        """What a delta that could not be served is now: read again only if its files changed."""
        if failed.seen is not None and fingerprint_of(failed.path) == failed.seen:
            return failed
        with self._lock:
            now = self.get(failed.name)
            if now is not failed:  # somebody else was here
                return now or failed
            fresh = self._read(failed.path)
            self._names = _Names(self._names.by_name | {failed.name: fresh})
        return fresh

    def _read(self, path: Path) -> RegisteredDelta:
        old = self.get(shown(path.name))
        seen = fingerprint_of(path)
        digest = ""
        try:
            if not NAME_PATTERN.fullmatch(path.name) or path.name in self._reserved:
                raise Refused("its folder name cannot be served as a model name; rename it")
            if old is not None and old.failure is not None and old.seen == seen is not None:
                return old
            digest = read_digest(path)
            if old is not None and old.digest == digest and old.failure is None:
                return old
            described = describe_artifact(path, base_identity=self._base_identity)
            self._check(described.config)
            self._check_signed(path, described.digest)
        except (ArtifactError, UnsupportedTensor, OSError, MemoryError, Refused) as error:
            return self._failed(path, digest, seen, error, old)
        return RegisteredDelta(
            name=path.name,
            path=path,
            digest=described.digest,
            n_bytes=described.n_bytes,
            codec=described.config.codec,
            fidelity=dict(described.config.fidelity),
            created_s=int(time.time()),
            finetuned_bytes=described.config.finetuned_bytes,
        )

    def _check_signed(self, path: Path, digest: str) -> None:
        """Raises Refused, and what reading the signatures does."""
        if self._signers and (reason := why_not_vouched(path, digest, self._signers)):
            raise Refused(reason)

    def _failed(
        self,
        path: Path,
        digest: str,
        seen: Fingerprint | None,
        error: Exception,
        old: RegisteredDelta | None,
    ) -> RegisteredDelta:
        is_passing = isinstance(error, Unreadable | OSError | MemoryError)
        if is_passing and old is not None and old.failure is None:
            log.warning("delta %s could not be read again: %s", old.name, error)
            return old  # what is known of it may well be true still
        return RegisteredDelta(
            name=shown(path.name),
            path=path,
            # One of another base is known by its digest, as is one whose files are damaged.
            digest=digest,
            n_bytes=0,
            codec="",
            fidelity={},
            created_s=int(time.time()),
            failure=failure_of(error),
            seen=None if is_passing else seen,
        )


def log_found(root: Path, deltas: Collection[RegisteredDelta]) -> None:
    """Say how many variants there are, and in one more line which cannot be served and why."""
    refused = [delta for delta in deltas if delta.failure is not None]
    log.info("%d of %d variants in %s can be served", len(deltas) - len(refused), len(deltas), root)
    if refused:
        named = [f"{delta.name} ({delta.error})" for delta in refused[:N_NAMED]]
        rest = len(refused) - len(named)
        more = f"; and {rest} more, which GET /v1/deltas lists" if rest else ""
        log.error("variants cannot be served: %s%s", "; ".join(named), more)


def shown(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _folders(root: Path) -> list[Path]:
    """Folders in `root`, or links to some, sorted by name. Raises DeltasUnreadable."""
    try:
        with os.scandir(root) as entries:
            names = [e.name for e in entries if not e.name.startswith(".") and _is_folder(e)]
    except OSError as error:
        raise DeltasUnreadable(
            f"The directory of the deltas cannot be read ({error.strerror}); the names known "
            "before are served. An operator must make it readable and rescan.",
            retry_after_s=30,
        ) from error
    return [root / name for name in sorted(names)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # where a link leads cannot be seen: a circle, no permission
        return True  # listed with that as its error
