"""``impart reconstruct``: base and delta become a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.common import (
    BaseArg,
    BaseRevision,
    DeltaArg,
    Overwrite,
    Quiet,
    look_at,
    progress_bar,
    reporting,
    silence_libraries,
)


@reporting
def reconstruct(
    base: BaseArg,
    delta: DeltaArg,
    out: Annotated[Path, typer.Argument(help="Directory to write the model to.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16; default: the fine-tune's own."),
    ] = None,
    base_revision: BaseRevision = None,
    max_shard_size_mb: Annotated[int, typer.Option(min=1, help="Split weights here.")] = 5000,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write BASE + DELTA to OUT as an ordinary Hugging Face model."""
    look_at(base, deltas=[delta], out=out, overwrite=overwrite)
    from compressor.checkpoint.hub import with_revision
    from compressor.export.reconstruct import reconstruct as run

    silence_libraries()
    with progress_bar(quiet) as progress:
        run(
            with_revision(base, base_revision, "--base-revision"),
            delta,
            out,
            dtype=dtype,
            overwrite=overwrite,
            max_shard_bytes=max_shard_size_mb * 1_000_000,
            progress=progress,
        )
    if not quiet:
        typer.echo(f"{out}: written")
