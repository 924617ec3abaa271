"""``impart-serve`` and ``python -m server``: settings -> engine -> HTTP server."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import cast

import typer
from prometheus_client import disable_created_metrics

from compressor.usable_cpus import set_thread_defaults
from server.cli import app
from server.errors import ConfigError
from server.metrics.series import Metrics
from server.process import logs
from server.settings import Settings

CONFIG_EXIT_CODE = 2


def serve(settings: Settings) -> None:
    """Run the server; ends the process with its exit code."""
    try:
        logs.configure(settings.log_level, settings.log_format)
        exit_code = _serve(settings)
    except ConfigError as error:
        typer.echo(f"impart-serve: {error.message}", err=True)
        raise typer.Exit(CONFIG_EXIT_CODE) from None
    logging.shutdown()
    sys.stdout.flush()
    # A thread that hangs (a dead engine's) must not keep the process from ending.
    os._exit(exit_code)


def _serve(settings: Settings) -> int:
    set_thread_defaults(settings.torch_threads)
    # Here, because they import torch: `--help` and wrong flags should answer at once.
    from server.engine.llm_engine import LLMEngine
    from server.process.run import RunnableEngine, run, run_in_loop

    # A second series for each counter and histogram that nobody reads; the call has no types.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = Metrics()
    engine = LLMEngine.from_settings(settings, metrics)
    metrics.watch(engine, settings.max_variants_per_step)
    # The engine takes the Variant its own `open` returned; the protocol says any VariantHandle.
    return run_in_loop(run(cast(RunnableEngine, engine), settings, metrics))


def main() -> None:
    """Console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the locale cannot print is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    app(serve)()


if __name__ == "__main__":
    main()
