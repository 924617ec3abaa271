"""What the subcommands share: arguments, one-line errors, progress bars."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from compressor.errors import ImpartError
from compressor.printable import printable
from compressor.progress import Progress

P = ParamSpec("P")
R = TypeVar("R")

BaseArg = Annotated[
    str, typer.Argument(help="Base model: directory or Hub id[@revision].", metavar="BASE")
]
BaseName = Annotated[
    str | None, typer.Option(help="What to call the base in the artifact, e.g. its Hub id.")
]
BaseRevision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit, if BASE is a Hub id.")
]
DeltaArg = Annotated[Path, typer.Argument(help="Delta artifact directory.", metavar="DELTA")]
AdapterName = Annotated[
    str | None, typer.Option(help="Which adapter, if the file holds several (default, reference).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """Turn an error of ours into one line on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except ImpartError as error:
            typer.echo("impart: error: " + printable(" ".join(str(error).split())), err=True)
            raise typer.Exit(2) from error

    return wrapped


def look_at(
    *models: str,
    deltas: Iterable[Path] = (),
    files: Iterable[Path | None] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Say what is wrong with paths before torch is imported.

    models     models, adapters and deltas; Hub ids are left to whoever fetches them
    files      single files that are read too
    out        where the result goes: nothing that is read may be touched by it
    """
    from compressor.artifact.files import open_directory, read_checksums
    from compressor.checkpoint.folder import look_at_folder
    from compressor.checkpoint.hub import parse_ref
    from compressor.checkpoint.outputs import check_free, check_output

    for model in models:
        if os.path.lexists(model) or parse_ref(model) is None:
            look_at_folder(model)
    for delta in deltas:
        with open_directory(delta) as directory:
            read_checksums(directory)
    if out is not None:
        check_output(out, [*models, *deltas], [file for file in files if file is not None])
        check_free(out, overwrite=overwrite)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """Yield a callback that draws bars on stderr, or nothing when that is no terminal."""
    console = Console(stderr=True)
    columns: tuple[Any, ...] = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", justify="right"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console, disable=quiet or not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if not total:  # nothing to do, which is all of it
                done = total = 1
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def silence_libraries() -> None:
    """Their warnings and bars are about loading models; ours say what matters here."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
