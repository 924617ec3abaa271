"""``impart certify``: an artifact that is there gets a fidelity certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.common import BaseArg, DeltaArg, look_at, reporting, silence_libraries


@reporting
def certify(
    base: BaseArg,
    finetuned: Annotated[
        str, typer.Argument(help="The full fine-tune: directory or Hub id.", metavar="FINETUNED")
    ],
    delta: DeltaArg,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Your own prompts (.txt, .jsonl, .parquet); they are then in the artifact. "
            "Default: general ones that come with the package."
        ),
    ] = None,
) -> None:
    """Record in DELTA what FINETUNED says to a few prompts; its digest changes."""
    look_at(base, finetuned, deltas=[delta])
    from compressor.artifact.wording import certified
    from compressor.compress.certify import add_certificate

    silence_libraries()
    made = add_certificate(base, finetuned, delta, prompts)
    typer.echo(f"{delta}: certified, {certified(made.certificate)}")
    if made.was_signed:
        typer.echo("its signature was of the old digest and is gone: sign it again")
    typer.echo(f"digest {made.digest} (it was {made.old_digest})")
