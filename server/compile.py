"""``impart-serve compile``: compile the CPU kernels ahead, at installation or in an image's build.

A first start then need not, nor that of another environment or container on the same kind of CPU
that finds the folder: see `server.ops.cpu.compile`.
"""

from __future__ import annotations

import typer

from compressor.usable_cpus import set_thread_defaults
from server.process import logs
from server.process.early_stop import Stopped, stop_signals

FAILED = 1


def compile_app() -> typer.Typer:
    """Return the command line of the subcommand."""
    line = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    line.command()(compile_ahead)
    return line


def compile_ahead() -> None:
    """Compile the CPU kernels for this machine's kind of CPU, and compare each with torch.

    They go to NUMBA_CACHE_DIR, else to impart-serve in the user's cache. What lies there already is
    left alone. A GPU's kernels are compiled on the GPU at the first start.

    Exit codes: 0 all kernels are ready, 1 some are not: torch does their work, slower.
    """
    logs.configure("info", "plain")
    set_thread_defaults(None)
    try:
        with stop_signals():
            raise typer.Exit(_compile())
    except Stopped as stopped:
        typer.echo(f"impart-serve compile: {stopped.name} stopped it; it can go on later", err=True)
        raise typer.Exit(FAILED) from None


def _compile() -> int:
    # Here, because they import torch and numba: --help should answer at once.
    from server.ops.cpu.check import usable_kernels, wanted_kernels
    from server.ops.cpu.compile import cache_folder, is_kept
    from server.ops.cpu.features import host_target

    folder, target = cache_folder(), host_target()
    if folder is None or not is_kept(folder):
        typer.echo(
            "impart-serve compile: the folder for compiled kernels cannot be written; "
            "set NUMBA_CACHE_DIR to one that can",
            err=True,
        )
        return FAILED
    wanted = wanted_kernels(target)
    usable = usable_kernels()
    typer.echo(f"{len(usable)} of {len(wanted)} CPU kernels for {target} are ready in {folder}")
    return FAILED if len(usable) < len(wanted) else 0
