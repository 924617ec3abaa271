"""``impart report``: one HTML page about one or several deltas of a fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.common import (
    BaseArg,
    Overwrite,
    Quiet,
    look_at,
    progress_bar,
    reporting,
    silence_libraries,
)
from compressor.cli.eval import LayerTexts, MaxTexts, MaxTokens, TunedArg


@reporting
def report(
    base: BaseArg,
    finetuned: TunedArg,
    deltas_and_out: Annotated[
        list[Path], typer.Argument(metavar="DELTA... OUT.html", help="Deltas, then the page.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Texts, as for impart eval; without: no KL on the page.")
    ] = None,
    max_texts: MaxTexts = 128,
    max_tokens: MaxTokens = 512,
    layer_texts: LayerTexts = 32,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write OUT.html: spectra, bytes, KL by layer, quality against size. One file, no scripts."""
    from compressor.errors import InputError, OutputError

    *deltas, out = deltas_and_out
    if not deltas or out.suffix.lower() not in (".html", ".htm"):
        raise InputError("give one or more delta directories and, last, the page: OUT.html")
    if out.exists() and not out.is_file():
        raise OutputError(f"{out} is no file; choose another page")
    look_at(base, finetuned, deltas=deltas, files=[data], out=out, overwrite=overwrite)

    from compressor.atomic import replace_file
    from compressor.measure.samples import Sample, load_tokenizer, read_samples
    from compressor.peft.config import is_adapter
    from compressor.report.data import make_report
    from compressor.report.html import render

    if is_adapter(finetuned):
        raise InputError(f"{finetuned} is a LoRA adapter; merge it into the base first")

    def samples(tuned: Path) -> list[Sample]:
        assert data is not None
        return read_samples(data, load_tokenizer(tuned), limit=max_texts, max_tokens=max_tokens)

    silence_libraries()
    with progress_bar(quiet) as progress:
        found = make_report(
            base, finetuned, deltas, samples if data else None, data.name if data else None,
            layer_texts, progress,
        )  # fmt: skip
        page = render(found)
    replace_file(out, page.encode())
    if not quiet:
        typer.echo(f"{out}: {len(page.encode()):,} bytes")
