"""Where a variant may come from: a place, in one spelling, and the prefixes that operators allow.

A place is text that somebody sends, and what it leads to must be what its prefix says: it is
compared as segments after everything with a second meaning was refused (`..`, `//`, escapes, user
names, queries), and local paths after links were followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from server.errors import ConfigError, Forbidden, InvalidRequest

SCHEMES = ("file", "hf", "s3", "gs", "az", "https", "http")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@\w[\w./-]*)?")
_REVISION = re.compile(r"\w[\w./-]{0,127}")
_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()+,;=:@ -]+")
MAX_CHARS = 2048


@dataclass(frozen=True, slots=True)
class Place:
    """scheme, then segments: a host or bucket first, of a local path none.

    revision  branch, tag or commit, on the Hub
    """

    scheme: str
    segments: tuple[str, ...]
    revision: str | None = None

    @property
    def path(self) -> str:
        """What follows the scheme's two slashes; of a local folder its path."""
        return ("/" if self.scheme == "file" else "") + "/".join(self.segments)

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.scheme}://{self.path}{revision}"

    def is_within(self, prefix: Place) -> bool:
        return (
            self.scheme == prefix.scheme
            and self.segments[: len(prefix.segments)] == prefix.segments
        )


def parse_place(text: str, revision: str | None = None) -> Place:
    """Read ``/folder``, ``org/name[@revision]`` or a URL. Raises InvalidRequest."""
    if not text or len(text) > MAX_CHARS:
        raise _unclear(f"it is not 1 to {MAX_CHARS} characters long")
    if "://" not in text:
        text = f"hf://{text}" if _HUB_ID.fullmatch(text) else f"file://{text}"
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        raise _unclear(f"its scheme is none of {', '.join(SCHEMES)}")
    if scheme == "hf":
        rest, _, named = rest.partition("@")
        if named and revision is not None and named != revision:
            raise _unclear("it names a revision, and `revision` another one")
        revision = named or revision
    if revision is not None and (scheme != "hf" or not _is_revision(revision)):
        raise InvalidRequest(
            "`revision` is the branch, tag or commit of a Hub id.", param="revision"
        )
    return Place(scheme, _segments(scheme, rest), revision)


def _segments(scheme: str, rest: str) -> tuple[str, ...]:
    if scheme == "file":
        if not rest.startswith("/"):
            raise _unclear("a local folder is named by its whole path")
        rest = rest[1:]
    segments = rest.removesuffix("/").split("/")
    if segments == [""] and scheme == "file":
        return ()
    for segment in segments:
        if segment in ("", ".", ".."):
            raise _unclear("it has a segment that is empty, `.` or `..`")
        if not _SEGMENT.fullmatch(segment):
            raise _unclear("it has characters that are not plain: escapes, queries, wildcards")
    if scheme != "file":
        segments[0] = _host(scheme, segments[0])
    return tuple(segments)


def _host(scheme: str, host: str) -> str:
    if "@" in host:
        raise _unclear("it has a user name or a key; give those to the server's environment")
    if scheme not in ("http", "https"):
        return host
    try:
        parts = urlsplit(f"{scheme}://{host}")
        port = parts.port
    except ValueError:
        raise _unclear("its host is none") from None
    usual = {"http": 80, "https": 443}[scheme]
    name = (parts.hostname or "").rstrip(".")
    return name if port in (None, usual) else f"{name}:{port}"


def _is_revision(text: str) -> bool:
    return bool(_REVISION.fullmatch(text)) and ".." not in text


def _unclear(why: str) -> InvalidRequest:
    return InvalidRequest(f"The source cannot be used: {why}.", param="source")


class Allowed:
    """The places that the operator's prefixes allow, and nothing else."""

    def __init__(self, prefixes: Sequence[str], roots: Sequence[Path] = ()) -> None:
        """roots: local folders that are allowed without being named as such."""
        places = [parse_place(prefix) for prefix in prefixes]
        places += [parse_place(str(root.absolute())) for root in roots]
        self._prefixes = [_resolved(place) for place in places]

    def place(self, source: str, revision: str | None = None) -> Place:
        """Return the place that a source names. Raises InvalidRequest, Forbidden."""
        place = _resolved(parse_place(source, revision))
        if not self.allows(place):
            raise Forbidden(
                "The source is at no place that this server may take variants from: see "
                "--allow-source."
            )
        if place.scheme == "hf" and len(place.segments) != 2:
            raise _unclear("a Hub id is org/name")
        return place

    def allows(self, place: Place) -> bool:
        return any(place.is_within(prefix) for prefix in self._prefixes)

    def allows_path(self, path: str) -> bool:
        """Whether a local file, its links followed, lies at an allowed place."""
        segments = tuple(part for part in os.path.realpath(path).split("/") if part)
        return self.allows(Place("file", segments))


def allowed_of(prefixes: Sequence[str], roots: Sequence[Path]) -> Allowed:
    """Return what the settings allow. Raises ConfigError."""
    try:
        return Allowed(prefixes, roots)
    except InvalidRequest as error:
        raise ConfigError(f"an --allow-source cannot be used: {error.message}") from None


def _resolved(place: Place) -> Place:
    """Where links lead, of a local path."""
    if place.scheme != "file":
        return place
    segments = tuple(part for part in os.path.realpath(place.path).split("/") if part)
    return Place("file", segments)
