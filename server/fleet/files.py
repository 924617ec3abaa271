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
        with _in_our_words(self._place), self._system.open(self._path(name), "rb") as file:
            if start:
                file.seek(start)
            left = None if end is None else end - start
            while left is None or left > 0:
                piece: bytes = file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
                if not piece:
                    return
                left = None if left is None else left - len(piece)
                yield piece

    def _path(self, name: str) -> str:
        path = f"{self._root}/{name}"
        if self._place.scheme == "file" and not self._allowed.allows_path(path):
            raise Forbidden("A file of the source is a link to elsewhere: see --allow-source.")
        return path


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
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise SourceNotFound(f"{place} has no such variant.", param="source") from error
    except PermissionError as error:
        raise SourceNotFound(
            f"{place} may not be read with the credentials of this server.", param="source"
        ) from error
    except Exception as error:
        if _is_missing(error):
            raise SourceNotFound(f"{place} has no such variant.", param="source") from error
        raise SourceUnreachable(
            f"{place.scheme} does not answer ({type(error).__name__}). Try again later.",
            retry_after_s=RETRY_S,
        ) from error


def _is_missing(error: Exception) -> bool:
    """What the Hub, and web servers, answer where nothing is."""
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status in (401, 403, 404, 410)
