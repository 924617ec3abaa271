"""``impart export``: a delta in the form other tools read."""

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
from compressor.errors import InputError


@reporting
def export(
    base: BaseArg,
    delta: DeltaArg,
    out: Annotated[Path, typer.Argument(help="Directory to write to.")],
    to: Annotated[str, typer.Option(help="hf, peft or mergekit.")],
    rank: Annotated[int | None, typer.Option(help="peft: rank of the factors (64).")] = None,
    modules: Annotated[
        str | None,
        typer.Option(help="peft: linear (default), or all: lm_head, embeddings and norms too."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="peft: texts to measure on what the factors lose.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: as it was.")
    ] = None,
    base_revision: BaseRevision = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write BASE + DELTA as a Hugging Face model, a PEFT LoRA or for mergekit."""
    look_at(base, deltas=[delta], files=[calibration], out=out, overwrite=overwrite)
    from compressor.checkpoint.hub import with_revision
    from compressor.export.mergekit import export_mergekit
    from compressor.export.reconstruct import reconstruct
    from compressor.peft.export import export_peft

    if to not in ("hf", "peft", "mergekit"):
        raise InputError(f"--to must be hf, peft or mergekit, got {to}")
    if modules not in (None, "linear", "all"):
        raise InputError(f"--modules must be linear or all, got {modules}")
    given = {"--rank": rank, "--modules": modules, "--calibration": calibration}
    extra = [key for key, value in given.items() if value is not None]
    if extra and to != "peft":
        raise InputError(f"{extra[0]} is for --to peft")
    silence_libraries()
    base = with_revision(base, base_revision, "--base-revision")
    with progress_bar(quiet) as progress:
        if to == "hf":
            reconstruct(base, delta, out, dtype=dtype, overwrite=overwrite, progress=progress)
        elif to == "mergekit":
            export_mergekit(base, delta, out, dtype=dtype, overwrite=overwrite, progress=progress)
        else:
            made = export_peft(
                base,
                delta,
                out,
                rank=64 if rank is None else rank,
                modules="all" if modules == "all" else "linear",
                dtype=dtype,
                calibration=calibration,
                overwrite=overwrite,
                progress=progress,
            )
            typer.echo(f"impart: warning: {made.warning()}", err=True)
    if not quiet:
        typer.echo(f"{out}: written")
