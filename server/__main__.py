"""``impart-serve`` and ``python -m server``: settings -> engine -> HTTP server.

``impart-serve compile`` compiles the CPU kernels ahead (`server.compile`), ``impart-serve keys``
makes keys for tenants (`server.tenants.cli`), ``impart-serve usage`` shows what was used
(`server.usage`).

Mistakes come first: settings, the address and the files are looked at before torch is imported.
Exit codes: 0 asked to stop, 1 the engine died, 2 the settings are wrong.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, cast

import typer

from compressor.usable_cpus import set_thread_defaults
from server.cli import app
from server.compile import compile_app
from server.errors import ConfigError
from server.fleet.place import allowed_of
from server.fleet.store import FleetStore
from server.process import logs
from server.process.early_stop import Stopped, stop_signals
from server.process.inputs import located
from server.process.listeners import Listeners, listeners
from server.process.tracing import traces
from server.settings import Settings
from server.tenants.cli import keys_app
from server.tenants.directory import Directory, directory_of
from server.tenants.limits import limiter_of
from server.usage import usage_app

if TYPE_CHECKING:
    from server.ledger.ledger import Ledger
    from server.process.otel import OtelTracer

CONFIG_EXIT_CODE = 2

log = logging.getLogger("server")


def serve(settings: Settings) -> None:
    """Run the server; ends the process with its exit code."""
    try:
        with stop_signals():
            exit_code = _prepare_and_serve(settings)
    except ConfigError as error:
        typer.echo(f"impart-serve: {error.message}", err=True)
        raise typer.Exit(CONFIG_EXIT_CODE) from None
    except Stopped as stopped:
        log.info("%s came before the server was ready; the process ends", stopped.name)
        raise typer.Exit(0) from None
    logging.shutdown()
    sys.stdout.flush()
    # A thread that hangs (a dead engine's) must not keep the process from ending.
    os._exit(exit_code)


def _prepare_and_serve(settings: Settings) -> int:
    logs.configure(settings.log_level, settings.log_format)
    directory = directory_of(settings)
    limiter_of(settings)  # a store that cannot be used is found out now
    with (
        listeners(settings, has_keys=directory.has_keys) as bound,
        _opened_ledger(settings) as ledger,
        traces(os.environ) as tracer,
        _opened_fleet(settings) as fleet,
    ):
        return _serve(located(settings), directory, bound, ledger, tracer, fleet)


def _opened_fleet(settings: Settings) -> AbstractContextManager[FleetStore]:
    allowed_of(settings.allow_sources, [])  # a mistake in it is found out now
    return closing(FleetStore(settings.state_dir))


def _opened_ledger(settings: Settings) -> AbstractContextManager[Ledger | None]:
    """The ledger, if there is to be one: only then its libraries are imported."""
    if settings.state_dir is None and settings.ledger_url is None:
        return nullcontext()
    from server.ledger.ledger import open_ledger

    return open_ledger(settings)


def _serve(
    settings: Settings,
    directory: Directory,
    bound: Listeners,
    ledger: Ledger | None,
    tracer: OtelTracer | None,
    fleet: FleetStore,
) -> int:
    set_thread_defaults(settings.torch_threads)
    # Here, because they import torch and fastapi: what comes before should answer at once.
    from prometheus_client import disable_created_metrics

    from server.engine.llm_engine import LLMEngine
    from server.metrics.series import Metrics
    from server.process.run import RunnableEngine, run, run_in_loop

    # A second series for each counter and histogram that nobody reads; the call has no types.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = Metrics()
    engine = LLMEngine.from_settings(settings, metrics)
    metrics.watch(engine, settings.max_resident_variants)
    if ledger is not None:
        metrics.watch_ledger(ledger)
    # The engine takes the Variant its own `open` returned; the protocol says any VariantHandle.
    return run_in_loop(
        run(
            cast(RunnableEngine, engine), settings, metrics, bound, directory, ledger, tracer, fleet
        )
    )


def main() -> None:
    """Console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the locale cannot print is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    commands = {"compile": compile_app, "keys": keys_app, "usage": usage_app}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands:
        commands[name]()(args=sys.argv[2:], prog_name=f"impart-serve {name}")
    app(serve)()


if __name__ == "__main__":
    main()
