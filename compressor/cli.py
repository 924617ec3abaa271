"""The ``impart`` command: compress, inspect, verify, reconstruct.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 bad input or any other
error of ours, 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from compressor import __version__
from compressor.errors import ImpartError

P = ParamSpec("P")
R = TypeVar("R")
Report = Callable[[str, int, int], None]

app = typer.Typer(
    name="impart",
    help="Compress full fine-tunes of one base model to small deltas.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

BaseArg = Annotated[str, typer.Argument(help="Base model: directory or Hub id.", metavar="BASE")]
DeltaArg = Annotated[Path, typer.Argument(help="Delta artifact directory.", metavar="DELTA")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="impart")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """Turn an error of ours into one line on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except ImpartError as error:
            typer.echo("impart: error: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(2) from error

    return wrapped


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
        typer.Argument(help="Full fine-tune (directory or Hub id), or a PEFT LoRA directory."),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write the artifact to.")],
    codec: Annotated[str, typer.Option(help="blockdiag, impart or lowrank.")] = "blockdiag",
    ratio: Annotated[
        float, typer.Option(help="Fine-tune bytes / bytes of the whole artifact.")
    ] = 32.0,
    bits: Annotated[
        int | None, typer.Option(help="Bits a value (blockdiag: 2, 3, 4, 8, 16; lowrank).")
    ] = None,
    head_fraction: Annotated[
        float | None,
        typer.Option(help="blockdiag: share of the bytes for a dense low-rank head, 0 for none."),
    ] = None,
    head_bits: Annotated[int | None, typer.Option(help="blockdiag: bits of the head.")] = None,
    beta: Annotated[
        float | None, typer.Option(help="impart: share of components dropped beforehand.")
    ] = None,
    c: Annotated[
        float | None, typer.Option("--c", help="impart: weight of importance (C of the paper).")
    ] = None,
    block_rows: Annotated[
        int | None, typer.Option(help="impart: rows that share their components.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same inputs and seed give identical bytes.")] = 0,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Texts (.txt: one a line; .jsonl: a text field) to measure KL and agreement on."
        ),
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(help="What to call the base in the artifact, e.g. its Hub id.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compress FINETUNED, a full fine-tune of BASE, into the delta artifact OUT."""
    from compressor.importer import import_adapter
    from compressor.peft import is_adapter
    from compressor.pipeline import Options
    from compressor.pipeline import compress as run

    _silence_libraries()
    given = {
        "bits": bits,
        "head_fraction": head_fraction,
        "head_bits": head_bits,
        "beta": beta,
        "C": c,
        "block_rows": block_rows,
    }
    options = Options(
        codec=codec,
        codec_options={name: value for name, value in given.items() if value is not None},
        ratio=ratio,
        seed=seed,
        overwrite=overwrite,
        base_name=base_name,
        calibration=calibration,
    )
    with progress_bar(quiet) as progress:
        if is_adapter(finetuned):
            summary = import_adapter(base, Path(finetuned), out, options, progress)
        else:
            summary = run(base, finetuned, out, options, progress)
    if quiet:
        return
    typer.echo(
        f"{summary.path}: {summary.n_bytes:,} bytes, ratio {summary.ratio:.2f}, "
        f"{summary.n_tensors} tensors, {summary.n_unchanged} unchanged"
    )
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
    from compressor.report import print_report, read_report

    report = read_report(delta)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        width = None if sys.stdout.isatty() else 160
        print_report(report, Console(width=width, highlight=False), with_tensors=tensors)


@app.command()
@reporting
def verify(
    delta: DeltaArg,
    base: Annotated[
        str | None, typer.Option(help="Also check that it was made for this base.")
    ] = None,
) -> None:
    """Check every byte of an artifact, and with --base that it fits that model."""
    from compressor.report import check, describe_stored

    if base is not None:
        _silence_libraries()
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
    max_shard_size_mb: Annotated[int, typer.Option(min=1, help="Split weights here.")] = 5000,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write BASE + DELTA to OUT as an ordinary Hugging Face model."""
    from compressor.reconstruct import reconstruct as run

    _silence_libraries()
    with progress_bar(quiet) as progress:
        run(
            base,
            delta,
            out,
            dtype=dtype,
            overwrite=overwrite,
            max_shard_bytes=max_shard_size_mb * 1_000_000,
            progress=progress,
        )
    if not quiet:
        typer.echo(f"{out}: written")


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Report]:
    """Yield a callback that draws bars on stderr, or nothing when that is no terminal."""
    console = Console(stderr=True)
    columns: tuple[Any, ...] = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _silence_libraries() -> None:
    """Their warnings and bars are about loading models; ours say what matters here."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
