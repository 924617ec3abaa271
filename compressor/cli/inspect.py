"""``impart inspect`` and ``impart verify``: what an artifact is, and whether it is whole."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from compressor.cli.common import (
    BaseRevision,
    DeltaArg,
    look_at,
    reporting,
    silence_libraries,
)


@reporting
def inspect(
    delta: DeltaArg,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
) -> None:
    """Show what an artifact is: bytes by group, true ratio, codec, base, fidelity."""
    look_at(deltas=[delta])
    from compressor.artifact.inspection import inspect_artifact, print_inspection

    inspection = inspect_artifact(delta)
    if as_json:
        typer.echo(json.dumps(inspection.to_json(), indent=2))
    else:
        width = None if sys.stdout.isatty() else 160
        print_inspection(inspection, Console(width=width, highlight=False), with_tensors=tensors)


@reporting
def verify(
    delta: DeltaArg,
    base: Annotated[
        str | None, typer.Option(help="Also check that it was made for this base.")
    ] = None,
    base_revision: BaseRevision = None,
) -> None:
    """Check every byte of an artifact, and with --base that it fits that model."""
    look_at(*([base] if base else []), deltas=[delta])
    from compressor.artifact.inspection import check, describe_stored
    from compressor.artifact.wording import certified
    from compressor.checkpoint.hub import with_revision

    if base is not None:
        silence_libraries()
        base = with_revision(base, base_revision, "--base-revision")
    artifact = check(delta, base)
    fits = f", fits {base}" if base else ""
    typer.echo(f"{delta}: ok, {describe_stored(artifact)}{fits}")
    typer.echo(f"certificate {certified(artifact.certificate)}")
    typer.echo(f"digest {artifact.digest}")
