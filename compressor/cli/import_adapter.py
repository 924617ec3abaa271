"""``impart import``: a PEFT LoRA or DoRA adapter becomes a delta artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.common import (
    AdapterName,
    BaseArg,
    BaseName,
    BaseRevision,
    Overwrite,
    Quiet,
    look_at,
    progress_bar,
    reporting,
    silence_libraries,
)
from compressor.errors import InputError


@reporting
def import_adapter(
    base: BaseArg,
    adapter: Annotated[
        str, typer.Argument(help="PEFT adapter: directory or Hub id[@revision].", metavar="ADAPTER")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write the artifact to.")],
    ratio: Annotated[
        float, typer.Option(help="DoRA, IA3: base matrix bytes / bytes for its rescaled rows.")
    ] = 32.0,
    bits: Annotated[int, typer.Option(help="DoRA, IA3: bits a value of the rescaled rows.")] = 4,
    exact: Annotated[
        bool, typer.Option("--exact", help="DoRA, IA3: store the layers whole instead, in float32.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Recorded in the artifact.")] = 0,
    base_revision: BaseRevision = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit, if ADAPTER is a Hub id.")
    ] = None,
    base_name: BaseName = None,
    adapter_name: AdapterName = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Turn a PEFT adapter of BASE into a delta: LoRA exactly, DoRA and IA3 with a stated error."""
    look_at(base, adapter, out=out, overwrite=overwrite)
    from compressor.artifact.reader import read_config
    from compressor.checkpoint.folder import resolve
    from compressor.checkpoint.hub import with_revision
    from compressor.compress.options import Options
    from compressor.peft.config import is_adapter
    from compressor.peft.importer import import_adapter as run

    silence_libraries()
    folder = resolve(with_revision(adapter, revision))
    if not is_adapter(folder):
        raise InputError(
            f"{adapter} holds no adapter_config.json; a full fine-tune is for impart compress"
        )
    base_dir = resolve(with_revision(base, base_revision, "--base-revision"))
    options = Options(
        codec="blockdiag",
        codec_options={"bits": bits},
        ratio=ratio,
        seed=seed,
        overwrite=overwrite,
        base_name=base_name,
    )
    with progress_bar(quiet) as progress:
        summary = run(
            base_dir, folder, out, options, progress, exact=exact, adapter_name=adapter_name
        )
    if quiet:
        return
    typer.echo(f"{out}: {summary.n_bytes:,} bytes, {summary.n_unchanged} tensors unchanged")
    for note in summary.notes:
        typer.echo(note)
    lossy = [entry for entry in read_config(out).tensors if entry.error]
    if lossy:
        worst = max(lossy, key=lambda entry: entry.error or 0.0)
        mean = sum(entry.error or 0.0 for entry in lossy) / len(lossy)
        typer.echo(
            f"rescaled rows: relative error of the difference {mean:.3f} on average over "
            f"{len(lossy)} layers, {worst.error:.3f} at worst ({worst.name}); a lower --ratio or "
            "--exact gives less"
        )
    typer.echo(f"digest {summary.digest}")
