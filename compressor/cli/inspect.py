"""``impart inspect`` and ``impart verify``: what an artifact is, and whether it is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
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
    signed_by: Annotated[
        list[Path] | None,
        typer.Option(
            help="Also check that one of these public keys signed it (repeatable).",
            metavar="PUBKEYFILE",
        ),
    ] = None,
) -> None:
    """Check every byte of an artifact, and with --base that it fits that model."""
    look_at(*([base] if base else []), deltas=[delta])
    from compressor.artifact.inspection import check, describe_stored
    from compressor.artifact.signature import load_public_key, why_not_vouched
    from compressor.artifact.wording import certified
    from compressor.checkpoint.hub import with_revision
    from compressor.errors import Corrupt

    if base is not None:
        silence_libraries()
        base = with_revision(base, base_revision, "--base-revision")
    keys = [load_public_key(file) for file in signed_by or ()]
    artifact = check(delta, base)
    if keys and (reason := why_not_vouched(delta, artifact.digest, keys)):
        raise Corrupt(f"{delta}: {reason}")
    fits = f", fits {base}" if base else ""
    fits += ", signed" if keys else ""
    typer.echo(f"{delta}: ok, {describe_stored(artifact)}{fits}")
    typer.echo(f"certificate {certified(artifact.certificate)}")
    typer.echo(f"digest {artifact.digest}")
