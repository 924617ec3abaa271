"""The files of one place, read in pieces: a local folder, the Hub, an object store, a web server.

Each through fsspec, whose libraries for object stores are extras of ours. Errors of all of them
become two: nothing is there, or it does not answer now.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from server.errors import Forbidden, ServeError, SourceNotFound, SourceUnreachable
from server.fleet.place import Allowed, Place

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CHUNK_BYTES = 4 << 20
RETRY_S = 30
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
EXTRAS = {  # module, extra, by scheme
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}


class PlaceFiles:
    """Blocking. Raises SourceNotFound, SourceUnreachable, Forbidden.

    allowed  what local links may lead to
    """

    def __init__(self, place: Place, allowed: Allowed) -> None:
        self._place = place
        self._allowed = allowed
        with _in_our_words(place):
            self._system, self._root = _opened(place)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None if there is none."""
        try:
            with _in_our_words(self._place):
                return int(self._system.size(self._path(name)))
        except SourceNotFound:
            return None

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield a file's bytes from `start` on, up to `end`."""
        with _in_our_words(self._place), self._opened(self._path(name)) as file:
            _skip(file, start)
            left = None if end is None else end - start
            while left is None or left > 0:
                piece: bytes = file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
                if not piece:
                    return
                left = None if left is None else left - len(piece)
                yield piece

    def _opened(self, path: str) -> Any:
        if self._place.scheme not in ("http", "https"):
            return self._system.open(path, "rb")
        has_ranges = self._system.info(path).get("partial", False)
        return self._system.open(path, "rb", **({} if has_ranges else {"block_size": 0}))

    def _path(self, name: str) -> str:
        path = f"{self._root}/{name}"
        if self._place.scheme == "file" and not self._allowed.allows_path(path):
            raise Forbidden("A file of the source is a link to elsewhere: see --allow-source.")
        return path


def _skip(file: Any, n_bytes: int) -> None:
    """Go to where reading begins; a web server that has no ranges sends what lies before, too."""
    if n_bytes == 0:
        return
    try:
        file.seek(n_bytes)
    except ValueError:
        while n_bytes and (piece := file.read(min(n_bytes, CHUNK_BYTES))):
            n_bytes -= len(piece)


def _opened(place: Place) -> tuple[AbstractFileSystem, str]:
    """A file system without a memory, and the folder in it."""
    import fsspec

    if place.scheme in EXTRAS:
        _check_extra(*EXTRAS[place.scheme])
    if place.scheme == "hf":
        return _hub(place)
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if place.scheme in ("http", "https"):
        options["client_kwargs"] = {"trace_configs": [_no_redirects()]}
        return fsspec.filesystem(place.scheme, **options), str(place)
    return fsspec.filesystem(place.scheme, **options), place.path


def _hub(place: Place) -> tuple[AbstractFileSystem, str]:
    """The files of the commit that the revision means now."""
    from huggingface_hub import HfApi, HfFileSystem

    repo = place.path
    commit = HfApi().repo_info(repo, revision=place.revision).sha
    return HfFileSystem(skip_instance_cache=True), f"{repo}@{commit}"


def _check_extra(module: str, extra: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError:
        raise Forbidden(
            f"This server cannot read that kind of source: install impart-serve[{extra}]."
        ) from None


def _no_redirects() -> Any:
    """What makes aiohttp refuse them: a server at an allowed place does not choose another."""
    import aiohttp

    async def refuse(*_: object) -> None:
        raise Forbidden("The source redirects to another place; name that, if it is allowed.")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse)
    return trace


@contextmanager
def _in_our_words(place: Place) -> Iterator[None]:
    try:
        yield
    except ServeError:
        raise
    except Exception as error:
        raise _in_one_word(place, _reason(error)) from error


def _reason(error: Exception) -> Exception:
    """What was wrong: fsspec says of every failure of a web server that there is no such file."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) else error


def _in_one_word(place: Place, error: Exception) -> ServeError:
    if isinstance(error, ServeError):
        return error
    if isinstance(error, PermissionError):
        says = f"{place} may not be read with the credentials of this server."
        return SourceNotFound(says, param="source")
    if isinstance(error, _MISSING) or _status(error) in (401, 403, 404, 410):
        return SourceNotFound(f"{place} has no such variant.", param="source")
    return SourceUnreachable(
        f"{place.scheme} does not answer ({type(error).__name__}). Try again later.",
        retry_after_s=RETRY_S,
    )


def _status(error: Exception) -> int | None:
    """What the Hub, or a web server, has answered."""
    response = getattr(error, "response", None)
    found: int | None = getattr(error, "status", None) or getattr(response, "status_code", None)
    return found
