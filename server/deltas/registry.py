"""Names and digests: which variants exist, read from the deltas directory and the managed one.

A variant's name is its folder's name; its identity is the digest of its bytes. `rescan` compares
digests, so a changed artifact is a new variant under the old name: requests already running keep
the digest they were opened with. Of two folders of one name the operator's own, in `--deltas`, is
served; the one that this server manages is listed with that as its error.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from compressor.artifact.reader import (
    DeltaConfig,
    OpenedArtifact,
    check_bytes,
    describe_artifact,
    read_digest,
)
from compressor.artifact.signature import PublicKey, why_not_vouched
from compressor.errors import ArtifactError, Unreadable, UnsupportedTensor
from server.deltas.failures import SOON_S, Failed, Failure, Refused, failure_of
from server.deltas.fingerprint import Fingerprint, fingerprint_of
from server.errors import DeltasUnreadable

log = logging.getLogger(__name__)
N_NAMED = 5  # of the variants that cannot be served, in one line
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# What a name without a folder to be served from is doing; "hidden": another folder has its name.
Stage = Literal["fetching", "verifying", "failed", "hidden"]
_COMING = {
    stage: Failure(f"it is being {done}", "try again later", SOON_S)
    for stage, done in (("fetching", "fetched"), ("verifying", "verified"))
}
_HIDDEN = "(in state_dir)"  # no model can have a name with a space
_UNUSABLE = (ArtifactError, UnsupportedTensor, OSError, MemoryError, Refused)


@dataclass(frozen=True, slots=True)
class RegisteredDelta:
    """One discovered artifact. `failure` is set if it cannot be served, `seen` is then what its
    directory looked like, and `stage` where it is not yet one.
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
    stage: Stage | None = None

    @property
    def error(self) -> str | None:
        """Why it cannot be served; safe to show."""
        return None if self.failure is None else self.failure.reason


class _Names:
    """One whole map, and what is looked for in it.

    retired  that have no name any more
    """

    def __init__(
        self, by_name: dict[str, RegisteredDelta], retired: Collection[RegisteredDelta] = ()
    ) -> None:
        self.by_name = by_name
        self.in_order = sorted(by_name.values(), key=lambda delta: delta.name)
        self.failed = [delta for delta in self.in_order if delta.failure is not None]
        self.by_digest: dict[str, list[RegisteredDelta]] = {}
        for delta in (*self.in_order, *retired):
            if delta.failure is None:
                self.by_digest.setdefault(delta.digest, []).append(delta)


class DeltaRegistry:
    """Name -> artifact. Readers see one whole map or the next.

    root     the operator's folder
    managed  what was fetched, uploaded or converted for this server
    check    of what an artifact changes; it is listed with the UnsupportedTensor that this raises
    signers  keys of which one must have signed an artifact; none: nobody must
    """

    def __init__(
        self,
        root: Path | None,
        base_identity: str,
        reserved: frozenset[str] = frozenset(),
        check: Callable[[DeltaConfig], None] = lambda config: None,
        managed: Path | None = None,
        signers: Collection[PublicKey] = (),
    ) -> None:
        self._roots = [folder for folder in (root, managed) if folder is not None]
        self._managed = managed
        self._base_identity = base_identity
        self._reserved = reserved
        self._check = check
        self._found: dict[str, RegisteredDelta] = {}
        self._announced: dict[str, RegisteredDelta] = {}
        self._retired: dict[Path, RegisteredDelta] = {}
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

    def is_reserved(self, name: str) -> bool:
        """Whether no variant may have this name."""
        return name in self._reserved or not NAME_PATTERN.fullmatch(name)

    def is_managed(self, delta: RegisteredDelta) -> bool:
        """Whether this server made the folder."""
        return self._managed is not None and delta.path.parent == self._managed

    def rescan(self) -> None:
        """Read the directories again. A bad artifact is listed with its error, never hidden.

        Raises DeltasUnreadable, and then knows what it knew.
        """
        with self._lock:
            found: dict[str, RegisteredDelta] = {}
            for path in (path for root in self._roots for path in _folders(root)):
                name = shown(path.name)
                if name in found:
                    found[f"{name} {_HIDDEN}"] = self._hidden(path)
                else:
                    found[name] = self._read(path)
            self._show(found)
        if self._roots:
            log_found(self._roots[0], found.values())

    def reread(self, name: str, moved_to: Path | None = None) -> None:
        """Read one name's folders again, which may have come or gone.

        moved_to  where the folder is that was served until now: a request that was opened on it,
                  and whose weights are not loaded yet, finds them there until `forget`
        """
        with self._lock:
            old = self._found.get(name)
            if moved_to is not None and old is not None and old.failure is None:
                self._retired[moved_to] = replace(old, path=moved_to)
            there = [root / name for root in self._roots if (root / name).is_dir()]
            names = (name, f"{name} {_HIDDEN}")
            found = {other: delta for other, delta in self._found.items() if other not in names}
            for path in there[:1]:
                found[name] = self._read(path)
            for path in there[1:]:
                found[names[1]] = self._hidden(path)
            self._announced.pop(name, None)
            self._show(found)

    def announce(self, name: str, stage: Stage, failure: Failure | None = None) -> None:
        """List a name that has no folder yet; what is served under it meanwhile stays so.

        failure  what came of it instead
        """
        assert self._managed is not None, "see `server.fleet.registrar`"
        coming = RegisteredDelta(
            name=name,
            path=self._managed / name,
            digest="",
            n_bytes=0,
            codec="",
            fidelity={},
            created_s=int(time.time()),
            failure=failure or _COMING[stage],
            stage=stage,
        )
        with self._lock:
            self._announced[name] = coming
            self._show(self._found)

    def withdraw(self, name: str) -> bool:
        """List an announced name no more; return whether it was one."""
        with self._lock:
            was_announced = self._announced.pop(name, None) is not None
            self._show(self._found)
        return was_announced

    def forget(self, path: Path) -> None:
        """No request needs a folder any more that `reread` was told of."""
        with self._lock:
            self._retired.pop(path, None)
            self._show(self._found)

    def verified(self, path: Path) -> OpenedArtifact:
        """Check all of a folder that is not served yet, each byte of it. Raises Failed."""
        try:
            check_bytes(path)
            described = describe_artifact(path, base_identity=self._base_identity)
            self._check(described.config)
            self._check_signed(path, described.digest)
        except _UNUSABLE as error:
            raise Failed(failure_of(error)) from error
        return described

    def _show(self, found: dict[str, RegisteredDelta]) -> None:
        self._found = found
        self._names = _Names(self._announced | found, self._retired.values())

    def _hidden(self, path: Path) -> RegisteredDelta:
        why = Refused("a folder of this name is in the deltas directory, and is served; rename one")
        failed = self._failed(path, "", None, why, None)
        return replace(failed, name=f"{failed.name} {_HIDDEN}", stage="hidden")

    def refresh(self, failed: RegisteredDelta) -> RegisteredDelta:
        """What a delta that could not be served is now: read again only if its files changed."""
        if failed.stage is not None:
            return failed
        if failed.seen is not None and fingerprint_of(failed.path) == failed.seen:
            return failed
        with self._lock:
            now = self.get(failed.name)
            if now is not failed:  # somebody else was here
                return now or failed
            fresh = self._read(failed.path)
            self._show(self._found | {failed.name: fresh})
        return fresh

    def _read(self, path: Path) -> RegisteredDelta:
        old = self._found.get(shown(path.name))
        if old is not None and old.path != path:
            old = None
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
        except _UNUSABLE as error:
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
