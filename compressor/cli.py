"""The ``impart`` command: compress, inspect, verify, reconstruct.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 bad input or any other
error of ours, 130 interrupted.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from compressor import __version__
from compressor.commands import eval as eval_command
from compressor.commands import export as export_command
from compressor.commands import import_adapter as import_command
from compressor.commands import merge as merge_command
from compressor.commands import report as report_command
from compressor.commands.common import (
    BaseArg,
    BaseName,
    BaseRevision,
    DeltaArg,
    Overwrite,
    Quiet,
    progress_bar,
    reporting,
    silence_libraries,
)

app = typer.Typer(
    name="impart",
    help="Compress full fine-tunes of one base model to small deltas.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the locale cannot print is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="impart")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"impart-serve {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress full fine-tunes of one base model to small deltas, and turn them back."""


@app.command()
@reporting
def compress(
    base: BaseArg,
    finetuned: Annotated[
        str,
        typer.Argument(help="Full fine-tune or PEFT LoRA: directory or Hub id[@revision]."),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write the artifact to.")],
    codec: Annotated[
        str,
        typer.Option(
            help="auto, blockdiag (the quick one: runs nothing), impart, impart-qt or lowrank."
        ),
    ] = "auto",
    ratio: Annotated[
        float | None,
        typer.Option(help="Fine-tune bytes / bytes of the whole artifact; 32 if nothing is given."),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="auto: bytes of the whole artifact, instead of a ratio.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="auto: KL in nats per token not to exceed, instead of a ratio."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits a value (blockdiag: 2, 3, 4, 8, 16; lowrank).")
    ] = None,
    head_fraction: Annotated[
        float | None,
        typer.Option(help="blockdiag: share of the bytes for a dense low-rank head, 0 for none."),
    ] = None,
    head_bits: Annotated[int | None, typer.Option(help="blockdiag: bits of the head.")] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="impart, impart-qt: share of components dropped beforehand."),
    ] = None,
    c: Annotated[
        float | None,
        typer.Option("--c", help="impart, impart-qt: weight of importance (C of the paper)."),
    ] = None,
    block_rows: Annotated[
        int | None, typer.Option(help="impart, impart-qt: rows that share their components.")
    ] = None,
    gptq: Annotated[
        bool,
        typer.Option(
            "--gptq", help="impart-qt: GPTQ on the --calibration texts (default: built-in ones)."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Same inputs and seed give identical bytes.")] = 0,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Texts to measure KL on, and for auto to choose by (.txt, .jsonl, .parquet)."
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune/--no-tune",
            help="auto with --calibration: tune norms and biases on texts it does not measure on.",
        ),
    ] = True,
    entropy: Annotated[
        str, typer.Option(help="Entropy coding on disk: zstd (more quality a byte) or none.")
    ] = "zstd",
    device: Annotated[str, typer.Option(help="Where to encode: cpu or cuda.")] = "cpu",
    base_revision: BaseRevision = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit, if FINETUNED is a Hub id.")
    ] = None,
    base_name: BaseName = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Take up a killed run of the same command where it stopped, or start afresh; "
            "the bytes are the same.",
        ),
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Compress FINETUNED, a full fine-tune of BASE, into the delta artifact OUT."""
    from compressor.checkpoint import resolve
    from compressor.hub import with_revision
    from compressor.importer import import_adapter
    from compressor.peft_config import is_adapter
    from compressor.pipeline import Options
    from compressor.pipeline import compress as run

    silence_libraries()
    given = {
        "bits": bits,
        "head_fraction": head_fraction,
        "head_bits": head_bits,
        "beta": beta,
        "C": c,
        "block_rows": block_rows,
        "gptq": gptq or None,
    }
    options = Options(
        codec=codec,
        codec_options={name: value for name, value in given.items() if value is not None},
        ratio=ratio,
        max_bytes=max_bytes,
        max_kl=max_kl,
        device=device,
        entropy=entropy,
        seed=seed,
        overwrite=overwrite,
        resume=resume,
        base_name=base_name,
        calibration=calibration,
        tune=tune,
    )
    with progress_bar(quiet) as progress:
        base_dir = resolve(with_revision(base, base_revision, "--base-revision"))
        tuned_dir = resolve(with_revision(finetuned, revision))
        make = import_adapter if is_adapter(tuned_dir) else run
        summary = make(base_dir, tuned_dir, out, options, progress)
    if quiet:
        return
    typer.echo(
        f"{summary.path}: {summary.n_bytes:,} bytes, ratio {summary.ratio:.2f}, "
        f"{summary.n_tensors} tensors, {summary.n_unchanged} unchanged"
    )
    for note in summary.notes:
        typer.echo(note)
    if summary.fidelity:
        typer.echo(
            f"KL {summary.fidelity['kl_per_token']:.4g} nats per token, "
            f"top-1 agreement {summary.fidelity['top1_agreement']:.2%}"
        )
    typer.echo(f"digest {summary.digest}")


@app.command()
@reporting
def inspect(
    delta: DeltaArg,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
) -> None:
    """Show what an artifact is: bytes by group, true ratio, codec, base, fidelity."""
    from compressor.inspection import inspect_artifact, print_inspection

    inspection = inspect_artifact(delta)
    if as_json:
        typer.echo(json.dumps(inspection.to_json(), indent=2))
    else:
        width = None if sys.stdout.isatty() else 160
        print_inspection(inspection, Console(width=width, highlight=False), with_tensors=tensors)


@app.command()
@reporting
def verify(
    delta: DeltaArg,
    base: Annotated[
        str | None, typer.Option(help="Also check that it was made for this base.")
    ] = None,
    base_revision: BaseRevision = None,
) -> None:
    """Check every byte of an artifact, and with --base that it fits that model."""
    from compressor.hub import with_revision
    from compressor.inspection import check, describe_stored

    if base is not None:
        silence_libraries()
        base = with_revision(base, base_revision, "--base-revision")
    artifact = check(delta, base)
    fits = f", fits {base}" if base else ""
    typer.echo(f"{delta}: ok, {describe_stored(artifact)}{fits}")
    typer.echo(f"digest {artifact.digest}")


@app.command()
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
    from compressor.hub import with_revision
    from compressor.reconstruct import reconstruct as run

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


app.command("eval")(eval_command.evaluate)
app.command("report")(report_command.report)
app.command("merge")(merge_command.merge)
app.command("export")(export_command.export)
app.command("import")(import_command.import_adapter)
