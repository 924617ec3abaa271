"""Names and digests: which variants exist, read from the deltas directory.

A variant's name is its folder's name; its identity is the digest of its bytes. `rescan` compares
digests, so a changed artifact is a new variant under the old name: requests already running keep
the digest they were opened with.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from compressor.artifact.reader import read_config, read_digest
from compressor.errors import ArtifactError, WrongBase
from compressor.readable import is_forbidden

log = logging.getLogger(__name__)
WEIGHTS = "delta.safetensors"
N_NAMED = 5  # of the variants that cannot be served, in one line
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class RegisteredDelta:
    """One discovered artifact. `error` is set if it cannot be served (safe to show)."""

    name: str
    path: Path
    digest: str
    n_bytes: int
    codec: str
    fidelity: dict[str, object]
    created_s: int
    error: str | None = None


class DeltaRegistry:
    """Name -> artifact. `rescan` is the only writer; readers see one whole map or the next."""

    def __init__(
        self, root: Path | None, base_identity: str, reserved: frozenset[str] = frozenset()
    ) -> None:
        self._root = root
        self._base_identity = base_identity
        self._reserved = reserved
        self._by_name: dict[str, RegisteredDelta] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> RegisteredDelta | None:
        return self._by_name.get(name)

    def with_digest(self, digest: str | None) -> list[RegisteredDelta]:
        """Servable artifacts that claim to have these bytes, under whatever names they have now."""
        servable = (d for d in self._by_name.values() if d.error is None)
        return [d for d in servable if d.digest == digest]

    def all(self) -> list[RegisteredDelta]:
        return sorted(self._by_name.values(), key=lambda d: d.name)

    def rescan(self) -> None:
        """Read the directory again. A bad artifact is listed with its error, never hidden."""
        if self._root is None:
            return
        with self._lock:
            found: dict[str, RegisteredDelta] = {}
            for path in sorted(self._root.iterdir()):
                if not path.is_dir() or path.name.startswith("."):
                    continue
                found[path.name] = self._read(path)
            self._by_name = found
        log_found(self._root, found.values())

    def _read(self, path: Path) -> RegisteredDelta:
        old = self._by_name.get(path.name)
        digest = ""
        try:
            if not NAME_PATTERN.fullmatch(path.name) or path.name in self._reserved:
                raise _Refused("its folder name cannot be served as a model name; rename it")
            digest = read_digest(path)
            if old is not None and old.digest == digest and old.error is None:
                return old
            config = read_config(path)
            if is_forbidden(path / WEIGHTS):
                raise _Refused(
                    f"{WEIGHTS} may not be read by the server's user; "
                    "allow it (chmod a+r) or run the server as the owner"
                )
            if config.base.identity != self._base_identity:
                raise WrongBase("it was made for another base")
            return RegisteredDelta(
                name=path.name,
                path=path,
                digest=digest,
                n_bytes=sum(f.stat().st_size for f in path.iterdir() if f.is_file()),
                codec=config.codec,
                fidelity=dict(config.fidelity),
                created_s=int(time.time()),
            )
        except (ArtifactError, OSError, _Refused) as error:
            return RegisteredDelta(
                path.name, path, digest, 0, "", {}, int(time.time()), error=_shown(error)
            )


def log_found(root: Path, deltas: Collection[RegisteredDelta]) -> None:
    """Say how many variants there are, and in one more line which cannot be served and why."""
    refused = [delta for delta in deltas if delta.error]
    log.info("%d of %d variants in %s can be served", len(deltas) - len(refused), len(deltas), root)
    if refused:
        named = [f"{delta.name} ({delta.error})" for delta in refused[:N_NAMED]]
        rest = len(refused) - len(named)
        more = f"; and {rest} more, which GET /v1/deltas lists" if rest else ""
        log.error("variants cannot be served: %s%s", "; ".join(named), more)


class _Refused(Exception):
    """The artifact is fine but this server cannot serve it."""


def _shown(error: Exception) -> str:
    return str(error) if isinstance(error, _Refused) else safe_reason(error)


def unusable(name: str, error: Exception) -> str:
    """What a client reads of a variant whose artifact cannot be used, found when it was opened or
    when its weights were read.
    """
    return (
        f"`{name}` cannot be served: {safe_reason(error)}; "
        "an operator must compress or copy it again"
    )


def safe_reason(error: Exception) -> str:
    """Why an artifact cannot be used, as a client may read it: no paths."""
    if isinstance(error, WrongBase):  # its own message names the other base, maybe by its path
        return "WrongBase: it was made for another base model; compress it against this one"
    if isinstance(error, OSError):
        return f"it cannot be read ({error.strerror})"
    return f"{type(error).__name__}: {error}"
