"""Adding, replacing and removing variants while the server serves.

One change of a name at a time. Whoever asks for the same change meanwhile waits for the same work,
for another one is refused. The work goes on when whoever asked has left, and begins again at the
next start if the server ended meanwhile: a document of kind "fetch" says so until it is done.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from server.errors import (
    ArtifactRefused,
    BodyTooLarge,
    Conflict,
    ModelNotFound,
    ServeError,
    SourceNotFound,
)
from server.fleet.adapters import AdapterImport
from server.fleet.fetch import digest_of, fetch_delta, read_sums
from server.fleet.files import PlaceFiles
from server.fleet.folder import ManagedFolder, managed_path, remove, telling_full
from server.fleet.names import ServedNames
from server.fleet.place import Allowed, Place, allowed_of
from server.fleet.store import FleetStore
from server.fleet.unpack import unpack_upload
from server.setting_kinds import size_text
from server.settings import Settings

log = logging.getLogger(__name__)
VARIANT, FETCH = "variant", "fetch"
N_WORKERS = 4
WRITE_BYTES = 4 << 20
T = TypeVar("T")
Source = dict[str, str | None]  # of a document: where a variant came from


@dataclass(frozen=True, slots=True)
class Registration:
    """What came of a change: the digest served now, and whether it was not before."""

    digest: str
    is_new: bool


@dataclass(frozen=True, slots=True)
class Delivery:
    """What is wanted under a name.

    replace  also where another digest is served under it now
    """

    name: str
    place: Place
    replace: bool = False


class Registrar:
    """Event loop only, but for what it does on its own threads.

    folder     None: this server has no place for variants of its own
    max_bytes  of one artifact
    keep_s     for how long a request may still load what has lost its name
    is_alias   whether an operator has pointed this name to variants already
    """

    def __init__(
        self,
        names: ServedNames,
        store: FleetStore,
        folder: ManagedFolder | None,
        allowed: Allowed,
        imports: AdapterImport,
        *,
        max_bytes: int,
        keep_s: float,
        is_alias: Callable[[str], bool],
    ) -> None:
        self._names = names
        self._store = store
        self._folder = folder
        self._allowed = allowed
        self._imports = imports
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._is_alias = is_alias
        self._changes: dict[str, tuple[object, asyncio.Task[Registration]]] = {}
        self._pool = ThreadPoolExecutor(N_WORKERS, "registrar")

    def order(
        self, name: str, source: str, revision: str | None = None, *, replace: bool = False
    ) -> Delivery:
        """Check what is asked for. Raises InvalidRequest, Forbidden, Conflict."""
        place = self._allowed.place(source, revision)
        self._check_name(name)
        return Delivery(name, place, replace)

    def begin(self, order: Delivery) -> asyncio.Task[Registration]:
        """Begin to bring a variant from its place, or join who does. Raises Conflict.

        The task raises ServeError.
        """
        return self._change(order.name, order, lambda: self._fetch(order))

    async def upload(self, name: str, body: AsyncIterator[bytes]) -> Registration:
        """Serve the artifact in a tar that is being sent, in place of what has the name now.

        Raises Conflict, BodyTooLarge, ArtifactRefused, StorageFull.
        """
        self._check_name(name)
        path = self._own_folder.upload(name)
        try:
            await self._receive(path, body)
            key = secrets.token_hex(4)  # never the same change
            return await asyncio.shield(self._change(name, key, lambda: self._adopt(name, path)))
        finally:
            await self._run(remove, path)

    async def remove(self, name: str) -> None:
        """Stop serving a name; requests that have begun end on what they began with.

        Raises ModelNotFound, Conflict.
        """
        if name in self._changes:
            raise Conflict(f"`{name}` is being fetched or replaced; wait until that is done.")
        never_came = self._names.withdraw(name)
        if self._names.owner(name) is None:
            if not never_came:
                raise ModelNotFound(f"The model `{name[:200]}` does not exist.", param="model")
            return
        self._check_name(name)
        await self._run(self._retire, name)

    def resume(self) -> None:
        """Begin again what an earlier run of the server had begun."""
        for name, body in self._store.all(FETCH).items():
            try:
                order = self.order(name, body["source"], body["revision"], replace=body["replace"])
                self.begin(order)
            except ServeError as error:
                log.error("the fetch of %s cannot go on: %s", name, error)
                self._store.delete(FETCH, name, "server")

    def close(self) -> None:
        """Begin nothing more; what runs is begun again at the next start."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- of one name, one at a time ----------------------------------------------------------------

    def _change(
        self, name: str, key: object, work: Callable[[], Registration]
    ) -> asyncio.Task[Registration]:
        if name in self._changes:
            known, task = self._changes[name]
            if known != key:
                raise Conflict(f"`{name}` is being fetched or replaced; wait until that is done.")
            return task
        task = asyncio.create_task(self._worked(name, work))
        self._changes[name] = (key, task)
        task.add_done_callback(lambda done: self._done(name, done))
        return task

    async def _worked(self, name: str, work: Callable[[], Registration]) -> Registration:
        try:
            return await self._run(work)
        except Exception as error:
            says = error.message if isinstance(error, ServeError) else "the log has details"
            self._failed(name, says)
            raise

    def _failed(self, name: str, says: str) -> None:
        """List why it never came, unless something else is served under the name."""
        self._names.withdraw(name)
        if self._names.owner(name) is None:
            self._names.announce(name, "failed", says)

    def _done(self, name: str, task: asyncio.Task[Registration]) -> None:
        del self._changes[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            unforeseen = None if isinstance(error, ServeError) else error
            log.error("%s could not be registered: %s", name, error, exc_info=unforeseen)

    async def _run(self, work: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *given)

    def _check_name(self, name: str) -> None:
        """Raises Conflict."""
        if self._folder is None:
            raise Conflict("This server keeps no variants of its own: it has no --state-dir.")
        if self._is_alias(name):
            raise Conflict(f"`{name}` is an alias. Choose another name, or delete the alias first.")
        if self._names.is_reserved(name):
            raise Conflict(
                "No variant can have this name: it is the base's, or not 1 to 128 letters, digits, "
                "`.`, `_` and `-` that begin with a letter or digit."
            )
        if self._names.owner(name) == "deltas":
            raise Conflict(
                f"`{name}` is a folder in --deltas, which only its owner changes: do it there, and "
                "have the server rescan."
            )

    @property
    def _own_folder(self) -> ManagedFolder:
        assert self._folder is not None, "see `_check_name`"
        return self._folder

    # -- on threads --------------------------------------------------------------------------------

    def _fetch(self, order: Delivery) -> Registration:
        place = order.place
        source = {"source": f"{place.scheme}://{place.path}", "revision": place.revision}
        self._store.put(FETCH, order.name, {**source, "replace": order.replace})
        try:
            self._names.announce(order.name, "fetching")
            return self._fetched(order, source)
        finally:
            self._store.delete(FETCH, order.name, "server")

    def _fetched(self, order: Delivery, source: Source) -> Registration:
        files = PlaceFiles(order.place, self._allowed)
        raw = read_sums(files)
        if raw is None:
            return self._imported(order, source, files)
        if self._is_served(order.name, digest_of(raw)):
            return self._unchanged(order.name)
        self._check_free(order)
        staged = fetch_delta(files, raw, order.name, self._own_folder, self._max_bytes)
        return self._publish(order.name, staged, source)

    def _imported(self, order: Delivery, source: Source, files: PlaceFiles) -> Registration:
        """Serve a PEFT adapter by an artifact that is made of it, once for the same bytes."""
        name, folder = order.name, self._own_folder
        fetched = self._imports.fetch(files, name, folder, self._max_bytes)
        if fetched is None:
            raise SourceNotFound(f"{order.place} has no delta and no adapter.", param="source")
        adapter, digest = fetched
        try:
            known = (self._store.get(VARIANT, name) or {}).get("adapter")
            if known == digest and self._names.digest(name) is not None:
                return self._unchanged(name)
            self._check_free(order)
            made = self._imports.convert(adapter)
            return self._publish(name, made, {**source, "adapter": digest})
        finally:
            remove(adapter.parent)

    def _check_free(self, order: Delivery) -> None:
        if self._names.digest(order.name) is not None and not order.replace:
            raise Conflict(
                f"`{order.name}` is another variant; delete it first, or ask with `replace`."
            )

    def _unchanged(self, name: str) -> Registration:
        digest = self._names.digest(name)
        assert digest is not None, "whoever calls this has seen it served"
        self._names.withdraw(name)
        return Registration(digest, is_new=False)

    def _is_served(self, name: str, digest: str) -> bool:
        return self._names.digest(name) == digest

    def _adopt(self, name: str, tar: Path) -> Registration:
        staged = self._own_folder.staging(name, secrets.token_hex(4))
        try:
            unpack_upload(tar, staged)
        except BaseException:
            remove(staged)
            raise
        return self._publish(name, staged, {"source": None, "revision": None})

    def _publish(self, name: str, staged: Path, source: Source) -> Registration:
        """Serve what was staged, if it is good: from here on nothing is fetched again."""
        self._names.announce(name, "verifying")
        try:
            digest = self._names.verify(staged)
        except ArtifactRefused:
            remove(staged)
            raise
        if self._is_served(name, digest):
            remove(staged)
            return self._unchanged(name)
        with telling_full():
            moved = self._own_folder.publish(staged, name)
        self._names.reread(name, moved)
        self._drop_later(moved)
        body = {"pinned": False, "ttl_s": None, **(self._store.get(VARIANT, name) or {})}
        body.pop("adapter", None)
        self._store.put(VARIANT, name, {**body, **source, "registered_at": time.time()})
        return Registration(digest, is_new=True)

    def _retire(self, name: str) -> None:
        moved = self._own_folder.retire(name)
        self._names.reread(name, moved)
        self._store.delete(VARIANT, name)
        self._drop_later(moved)

    def _drop_later(self, path: Path | None) -> None:
        """Remove a folder when no request can need it any more; the next start would as well."""
        if path is None:
            return
        timer = threading.Timer(self._keep_s, self._drop, (path,))
        timer.daemon = True
        timer.start()

    def _drop(self, path: Path) -> None:
        self._names.forget(path)
        remove(path)

    async def _receive(self, path: Path, body: AsyncIterator[bytes]) -> None:
        """Write what comes to a file, in large pieces."""
        folder = self._own_folder
        # Twice: the tar and what is in it lie side by side for a while.
        room = await self._run(folder.room_bytes) // 2
        pending, n_bytes = bytearray(), 0
        async for piece in body:
            n_bytes += len(piece)
            if n_bytes > self._max_bytes:
                raise BodyTooLarge(
                    f"The artifact exceeds {size_text(self._max_bytes)}: see --max-artifact-bytes."
                )
            if n_bytes > room:
                folder.refuse(2 * n_bytes)
            pending += piece
            if len(pending) >= WRITE_BYTES:
                await self._run(_append, path, pending)
                pending = bytearray()
        await self._run(_append, path, pending)


def _append(path: Path, piece: bytearray) -> None:
    with telling_full(), path.open("ab") as file:
        file.write(piece)


def registrar_of(
    settings: Settings, names: ServedNames, store: FleetStore, is_alias: Callable[[str], bool]
) -> Registrar:
    """Return the registrar that the settings describe. Raises ConfigError."""
    path = managed_path(settings.state_dir)
    roots = [] if settings.deltas is None else [settings.deltas]
    return Registrar(
        names,
        store,
        None if path is None else ManagedFolder(path, settings.disk_budget_bytes),
        allowed_of(settings.allow_sources, roots),
        AdapterImport(settings.base),
        max_bytes=settings.max_artifact_bytes,
        keep_s=settings.request_timeout_s,
        is_alias=is_alias,
    )
