"""``impart push`` and ``impart pull``: artifacts to the Hub and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.common import DeltaArg, Overwrite, look_at, reporting, silence_libraries


@reporting
def push(
    delta: DeltaArg,
    target: Annotated[str, typer.Argument(help="hf://org/name, or hf://org/name@branch.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a repository that is made; else left alone."),
    ] = None,
) -> None:
    """Verify DELTA and put it into a repository of the Hub, model card and all, in one commit."""
    look_at(deltas=[delta])
    from compressor.export.publish import push_artifact

    silence_libraries()
    pushed = push_artifact(delta, target, private=private)
    typer.echo(f"{target}: {pushed.n_bytes:,} bytes, {pushed.url}")
    for note in pushed.notes:
        typer.echo(note)
    typer.echo(f"digest {pushed.digest}")


@reporting
def pull(
    source: Annotated[str, typer.Argument(help="hf://org/name, or hf://org/name@revision.")],
    out: Annotated[Path, typer.Argument(help="Directory to put the artifact into.")],
    overwrite: Overwrite = False,
) -> None:
    """Fetch an artifact from the Hub and verify every byte of it before it is seen at OUT."""
    from compressor.export.publish import pull_artifact

    silence_libraries()
    digest = pull_artifact(source, out, overwrite=overwrite)
    typer.echo(f"{out}: fetched and verified")
    typer.echo(f"digest {digest}")
