"""The serving process: uvicorn, signals, orderly and disorderly ends.

SIGTERM, SIGINT   drain: not ready at once, running requests may finish, exit code 0
the same again    end running requests now
SIGHUP            read the tenants file and the deltas directory again
engine dead       end running requests, exit code 1
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import uvicorn

from server.api.app import create_admin_app, create_app
from server.api.context import Api
from server.api.keeping import apply_documents
from server.api.reload import reload_tenants
from server.api.spans import Tracer
from server.engine.types import EngineClient
from server.errors import ConfigError, Draining, EngineDead, ServeError
from server.fleet.store import FleetStore
from server.ledger.audited import audited
from server.metrics.series import Metrics
from server.process.listen import listen, urls
from server.process.listeners import Listeners
from server.process.protocol import BoundedProtocol
from server.process.unsent import UnsentWatch
from server.process.watch import watch_deltas
from server.settings import Settings
from server.tenants.directory import Directory

if TYPE_CHECKING:  # SQLAlchemy is imported where there is a ledger only
    from server.ledger.ledger import Ledger

WATCH_S = 0.5
LAST_EVENT_S = 2.0  # for the final error events to leave
ENGINE_STOP_S = 15.0

log = logging.getLogger(__name__)
T = TypeVar("T")


class RunnableEngine(EngineClient, Protocol):
    """An engine that this process starts and stops."""

    def start(self) -> None: ...
    async def shutdown(self, drain_timeout_s: float) -> None: ...


class Server(uvicorn.Server):
    """uvicorn without its signal handling, for which `Control` has ours, and with a watch over
    answers that nobody reads.
    """

    def __init__(
        self, config: uvicorn.Config, unsent: UnsentWatch | None = None, name: str = "the server"
    ) -> None:
        super().__init__(config)
        self._unsent = unsent or UnsentWatch()
        self._name = name

    async def on_tick(self, counter: int) -> bool:
        self._unsent.tick(self.server_state.connections)  # type: ignore[arg-type]
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None, "see `run`"
        listen(sockets)
        await super().startup(sockets)
        log.info("%s listens on %s", self._name, ", ".join(urls(sockets)))


class Control:
    """Decides when the server ends, and with which exit code."""

    def __init__(self, api: Api, server: Server) -> None:
        self._engine = api.engine
        self._api = api
        self._ledger = api.ledger
        self._open_requests = api.open_requests
        self._server = server
        self._drain_s = api.settings.drain_timeout_s
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.exit_code = 0

    def install(self) -> None:
        """Take over the process's signals; for the main thread."""
        for name in ("SIGTERM", "SIGINT"):
            _on_signal(name, self.stop)
        _on_signal("SIGHUP", self.rescan)

    def stop(self) -> None:
        """Drain; when already draining, end now."""
        if self._draining:
            log.warning("a second signal came; the server ends its running requests now")
            self._start(self._end(Draining("The server is shutting down.", retry_after_s=5)))
            return
        log.info(
            "the server drains: it admits nobody more and finishes %d requests",
            len(self._open_requests),
        )
        self._admit_nobody()
        self._start(self._drain())

    def rescan(self) -> None:
        """Read the tenants file and the deltas directory again, beside the loop."""
        self._start(self._reload_tenants())
        self._start(self._rescan())

    async def watch(self) -> None:
        """End the process when the engine, once alive, no longer is."""
        while not self._engine.is_alive():
            await asyncio.sleep(WATCH_S)
        while self._engine.is_alive():
            await asyncio.sleep(WATCH_S)
        if self._server.should_exit:
            return
        log.critical("the engine has died; the process exits")
        self.exit_code = 1
        self._admit_nobody()
        await self._end(EngineDead("The engine has stopped; the server restarts."))

    def _admit_nobody(self) -> None:
        self._draining = True
        self._engine.drain()

    async def _drain(self) -> None:
        if not await self._open_requests.wait_idle(self._drain_s):
            log.warning(
                "draining ran out of time; the server ends %d requests", len(self._open_requests)
            )
        await self._end(Draining("The server is shutting down.", retry_after_s=5))

    async def _end(self, error: ServeError) -> None:
        self._open_requests.fail_all(error)
        await self._open_requests.wait_idle(LAST_EVENT_S)
        self._server.should_exit = True

    async def _rescan(self) -> None:
        try:
            with audited(self._ledger, "signal", "rescan", "deltas"):
                await asyncio.to_thread(self._engine.rescan)
            log.info(
                "the server read the deltas directory again and knows %d models",
                len(self._engine.models()),
            )
        except Exception:
            log.exception("the rescan failed; the server keeps the names it knew")

    async def _reload_tenants(self) -> None:
        try:
            await reload_tenants(self._api, "signal")
        except ConfigError as error:
            log.error("%s", error.message)
        except Exception:
            log.exception("the tenants file could not be read again")

    def _start(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)  # the loop itself keeps weak references only
        task.add_done_callback(self._tasks.discard)


def _on_signal(name: str, action: Callable[[], None]) -> None:
    """Call `action` in the running loop on a signal, if this system has it."""
    number = getattr(signal, name, None)
    if number is None:
        return
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(number, action)
    except NotImplementedError:  # a loop that cannot wait for signals
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(action))


def run_in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end in uvloop: a streamed token costs less CPU there.

    Where there is none (it has no build for Windows), asyncio's own loop serves.
    """
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


async def run(
    engine: RunnableEngine,
    settings: Settings,
    metrics: Metrics,
    bound: Listeners,
    directory: Directory | None = None,
    ledger: Ledger | None = None,
    tracer: Tracer | None = None,
    fleet: FleetStore | None = None,
) -> int:
    """Serve until told to stop; return the exit code.

    directory  the tenants; None: there are no keys
    ledger     entered, and to be left when this has returned: then every request has ended
    tracer     likewise
    fleet      likewise; None: it is kept in memory
    """
    app = create_app(engine, settings, metrics, directory, ledger, tracer, fleet)
    api: Api = app.state.api
    server = Server(uvicorn_config(app, settings), UnsentWatch(metrics.unsent_bytes.set))
    control = Control(api, server)
    control.install()
    engine.start()
    # What is there now stays: the collector need not look through it again, which takes it up to a
    # second and holds up every stream.
    gc.collect()
    gc.freeze()
    tasks = [asyncio.create_task(control.watch())]
    if settings.watch_deltas and settings.deltas is not None:
        tasks.append(asyncio.create_task(watch_deltas(settings.deltas, engine.rescan)))
    try:
        await apply_documents(api)
        api.registrar.resume()
        async with _admin_routes(api, bound):
            await server.serve(bound.main)
    finally:
        for task in tasks:
            task.cancel()
        api.registrar.close()
        await _stop_engine(engine)
        await api.limiter.store.close()
    return control.exit_code


@asynccontextmanager
async def _admin_routes(api: Api, bound: Listeners) -> AsyncIterator[None]:
    """Serve the admin routes meanwhile, if there is a key for them."""
    if bound.admin_key is None:
        yield
        return
    app = create_admin_app(api, bound.admin_key)
    server = Server(uvicorn_config(app, api.settings), name="the admin listener")
    serving = asyncio.create_task(server.serve(bound.admin))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def uvicorn_config(app: object, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's settings: our bounds on headers, no access log of its own, and of its other
    log lines those that something is wrong: ours tell the rest.
    """
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="debug" if settings.log_level == "debug" else "warning",
        server_header=False,
        timeout_graceful_shutdown=3,  # draining came before; this is for idle connections
    )


async def _stop_engine(engine: RunnableEngine) -> None:
    try:
        async with asyncio.timeout(ENGINE_STOP_S):
            await engine.shutdown(0.0)
    except TimeoutError:
        log.error("the engine did not stop within %g s", ENGINE_STOP_S)
