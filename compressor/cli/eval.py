"""``impart eval``: how far a delta is from its fine-tune, on the user's own text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compressor.cli.common import (
    BaseArg,
    DeltaArg,
    Quiet,
    look_at,
    progress_bar,
    reporting,
    silence_libraries,
)
from compressor.printable import printable
from compressor.progress import Progress

if TYPE_CHECKING:
    from compressor.measure.comparison import Comparison, Estimate
    from compressor.measure.evaluation import Evaluation, Part

TunedArg = Annotated[
    str, typer.Argument(help="The full fine-tune: directory or Hub id.", metavar="FINETUNED")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        help="Texts: .txt (one a line), or .jsonl or .parquet with text, prompt and completion, or "
        "messages; default: general texts that come with the package."
    ),
]
BUILT_IN = "built-in texts"
MaxTexts = Annotated[int, typer.Option(min=1, help="Use so many texts of the file.")]
MaxTokens = Annotated[int, typer.Option(min=2, help="Cut each text to so many tokens.")]
LayerTexts = Annotated[int, typer.Option(min=1, help="Texts for the tables by layer and kind.")]


@reporting
def evaluate(
    base: BaseArg,
    finetuned: TunedArg,
    delta: DeltaArg,
    data: DataOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also KL when only one layer is compressed.")
    ] = False,
    max_texts: MaxTexts = 512,
    max_tokens: MaxTokens = 512,
    layer_texts: LayerTexts = 64,
    max_kl: Annotated[
        float | None, typer.Option(min=0.0, help="Exit with status 1 if the KL is larger.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure DELTA against FINETUNED: KL, agreement, flips, perplexity, by layer if asked."""
    look_at(base, finetuned, deltas=[delta])
    silence_libraries()
    with progress_bar(quiet or as_json) as progress:
        (evaluation,) = run_evaluation(
            base, finetuned, [delta], data, max_texts, max_tokens, layer_texts if layers else 0,
            progress,
        )  # fmt: skip
    name = BUILT_IN if data is None else data.name
    if as_json:
        typer.echo(json.dumps(evaluation.to_json() | {"data": name}, indent=2))
    else:
        width = None if sys.stdout.isatty() else 120
        print_evaluation(evaluation, name, Console(width=width, highlight=False))
    kl = evaluation.variant.kl.mean
    if max_kl is not None and not kl <= max_kl:
        typer.echo(f"impart: KL {kl:.4g} is above --max-kl {max_kl:g}", err=True)
        raise typer.Exit(1)


def run_evaluation(
    base: str,
    finetuned: str,
    deltas: list[Path],
    data: Path | None,
    max_texts: int,
    max_tokens: int,
    layer_texts: int,
    progress: Progress,
) -> list[Evaluation]:
    """Evaluate each delta; layer_texts 0: without the tables by layer."""
    from compressor.artifact.inspection import check
    from compressor.checkpoint.files import Checkpoint
    from compressor.errors import InputError
    from compressor.measure.evaluation import Evaluator
    from compressor.measure.samples import load_tokenizer, read_samples
    from compressor.peft.config import is_adapter

    if is_adapter(finetuned):
        raise InputError(
            f"{finetuned} is a LoRA adapter; merge it into the base (merge_and_unload, "
            "save_pretrained) to evaluate against it"
        )
    with Checkpoint(base) as base_files, Checkpoint(finetuned) as tuned_files:
        artifacts = [check(delta, base) for delta in deltas]
        tokenizer = load_tokenizer(tuned_files.path)
        samples = read_samples(data, tokenizer, limit=max_texts, max_tokens=max_tokens)
        evaluator = Evaluator(base_files, tuned_files, samples, progress)
        return [
            evaluator.evaluate(artifact, layers=layer_texts > 0, layer_samples=layer_texts or 1)
            for artifact in artifacts
        ]


def print_evaluation(evaluation: Evaluation, data: str, console: Console) -> None:
    """Print the tables of `impart eval`."""
    variant, base, tuned = evaluation.variant, evaluation.base, evaluation.finetuned
    columns = ("fine-tune", "with the delta", "base")
    title = f"{printable(data)}: {evaluation.n_texts} texts, {evaluation.n_tokens:,} tokens"
    table = Table("", *columns, title=escape(title))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in comparison_rows(tuned, variant, base):
        table.add_row(name, *values)
    console.print(table)
    if evaluation.changes_kept is not None:
        console.print(
            f"Where base and fine-tune find another token most likely, the delta sides with the "
            f"fine-tune in {evaluation.changes_kept:.2%}."
        )
    if evaluation.layers:
        console.print(_part_table("layer", evaluation.layers))
        console.print(_part_table("kind", evaluation.kinds))
        console.print(f"by layer and kind: the first {evaluation.n_layer_texts} texts")


def comparison_rows(*columns: Comparison) -> list[tuple[str, list[str]]]:
    """Rows of text for the given columns; what was not measured in any is left out."""

    def row(name: str, form: Any, field: str) -> tuple[str, list[str]]:
        return name, [form(getattr(column, field)) for column in columns]

    rows = [
        row("KL from the fine-tune, nats per token", with_error, "kl"),
        row("most likely token agrees", share_with_error, "top1_agreement"),
        row("next token right in one of the two only", share_with_error, "token_flips"),
        row("perplexity", "{:.4g}".format, "perplexity"),
    ]
    if columns[0].exact_match is not None:
        rows.append(row("answers word for word", "{:.1%}".format, "exact_match"))
        rows.append(row("answers right in one of the two only", "{:.1%}".format, "answer_flips"))
    return rows


def with_error(estimate: Estimate) -> str:
    """``mean +- standard error`` to three digits."""
    return f"{estimate.mean:.3g} ± {estimate.standard_error:.1g}"


def share_with_error(estimate: Estimate) -> str:
    """The same of a share, in percent."""
    return f"{estimate.mean:.2%} ± {estimate.standard_error:.2%}"


def _part_table(what: str, parts: tuple[Part, ...]) -> Table:
    table = Table(what, "bytes", "KL, only this compressed")
    if with_rest := any(part.all_but is not None for part in parts):
        table.add_column("KL, all but this")
    for column in table.columns[1:]:
        column.justify = "right"
    for part in parts:
        cells = [part.name, f"{part.n_bytes:,}", with_error(part.only)]
        if with_rest:
            cells.append("" if part.all_but is None else with_error(part.all_but))
        table.add_row(*cells)
    return table
