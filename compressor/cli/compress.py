"""``impart compress``: a fine-tune becomes a delta artifact."""

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
        typer.Option(help="auto, blockdiag (the quick one), impart, impart-qt or lowrank."),
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
    ignore_config: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting of config.json that may differ from the base's, which is then used "
            "(repeatable; recorded in the artifact).",
            metavar="KEY",
        ),
    ] = None,
    difference_from: Annotated[
        str | None,
        typer.Option(
            help="What BASE was quantised from (directory, Hub id, Hub id@revision), if FINETUNED "
            "was made from that: the difference is taken from these weights and applied to BASE.",
            metavar="ORIGINAL",
        ),
    ] = None,
    certificate: Annotated[
        bool,
        typer.Option(
            "--certificate/--no-certificate",
            help="Record what the fine-tune says to a few prompts, so that a server can check what "
            "it serves.",
        ),
    ] = True,
    certificate_prompts: Annotated[
        Path | None,
        typer.Option(help="Your own prompts for the certificate; they are then in the artifact."),
    ] = None,
    base_revision: BaseRevision = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit, if FINETUNED is a Hub id.")
    ] = None,
    base_name: BaseName = None,
    adapter_name: AdapterName = None,
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
    models = [base, finetuned] if difference_from is None else [base, finetuned, difference_from]
    look_at(*models, files=[calibration, certificate_prompts], out=out, overwrite=overwrite)
    from compressor.checkpoint.folder import resolve
    from compressor.checkpoint.hub import with_revision
    from compressor.compress.options import Options
    from compressor.compress.pipeline import compress as run
    from compressor.errors import InputError
    from compressor.peft.config import is_adapter
    from compressor.peft.importer import import_adapter

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
        ignore_config=tuple(ignore_config or ()),
        difference_from=difference_from,
        certificate=certificate,
        certificate_prompts=certificate_prompts,
    )
    with progress_bar(quiet) as progress:
        base_dir = resolve(with_revision(base, base_revision, "--base-revision"))
        tuned_dir = resolve(with_revision(finetuned, revision))
        if is_adapter(tuned_dir) and difference_from is not None:
            raise InputError(
                f"--difference-from is for full fine-tunes; {finetuned} is an adapter, which is a "
                "difference already: leave the option out"
            )
        if is_adapter(tuned_dir):
            summary = import_adapter(
                base_dir, tuned_dir, out, options, progress, adapter_name=adapter_name
            )
        elif adapter_name is not None:
            raise InputError(f"--adapter-name is for adapters; {finetuned} is a full fine-tune")
        else:
            summary = run(base_dir, tuned_dir, out, options, progress)
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
