"""The report as one HTML page: no scripts, no requests, every text of a file escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressor import __version__
from compressor.artifact.inspection import Inspection
from compressor.artifact.wording import ERROR_MEANS, choice, measured, plain_settings, unknown
from compressor.measure.comparison import Estimate
from compressor.measure.evaluation import Evaluation, Part
from compressor.printable import printable
from compressor.report.data import Report
from compressor.report.plots import N_COLOURS, bytes_plot, layers_plot, quality_plot, spectrum_plot


@dataclass(frozen=True, slots=True)
class Grid:
    """One table of text. `numeric` are the columns aligned to the right."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    numeric: frozenset[int]


def render(report: Report) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("compressor.report", ""), autoescape=True)
    environment.filters["printable"] = printable
    evaluations = [v.evaluation for v in report.variants if v.evaluation is not None]
    names = [variant.name for variant in report.variants]
    has_layers = bool(evaluations and evaluations[0].layers)
    # Markup only around SVG of our own making, in which matplotlib has escaped all text.
    plots: dict[str, Any] = {
        "bytes": Markup(bytes_plot(report)),  # noqa: S704
        "layers": Markup(layers_plot(report)) if has_layers else None,  # noqa: S704
        "quality": Markup(quality_plot(report)) if len(evaluations) > 1 else None,  # noqa: S704
        "spectra": [
            {"kind": found.kind, "svg": Markup(spectrum_plot(found, names))}  # noqa: S704
            for found in report.spectra
        ],
    }
    tables: dict[str, Any] = {
        "summary": _summary(report),
        "identities": [_identity(v.inspection) for v in report.variants],
        "quality": [
            _quality(variant.name, variant.evaluation)
            for variant in report.variants
            if variant.evaluation is not None
        ],
        "layers": _parts("layer", report, [e.layers for e in evaluations]) if has_layers else None,
        "kinds": _parts("kind", report, [e.kinds for e in evaluations]) if has_layers else None,
        "bytes": _bytes(report),
        "spectra": _spectra(report),
    }
    return environment.get_template("report.html.jinja").render(
        title=f"{printable(report.finetuned)}, as a delta of {printable(report.base)}",
        report=report,
        version=__version__,
        n_colours=N_COLOURS,
        n_layer_texts=evaluations[0].n_layer_texts if evaluations else 0,
        plots=plots,
        tables=tables,
    )


def _summary(report: Report) -> Grid:
    head = [
        "delta",
        "codec",
        "bytes",
        "ratio",
        "KL, nats per token",
        "same top token",
        "perplexity",
    ]
    rows = []
    for variant in report.variants:
        inspection, evaluation = variant.inspection, variant.evaluation
        row = [variant.name, inspection.config.codec]
        row += [f"{inspection.n_bytes:,}", f"{inspection.ratio:.2f}"]
        if evaluation is not None:
            measured = evaluation.variant
            row += [_estimate(measured.kl), _share(measured.top1_agreement)]
            row += [f"{measured.perplexity:.4g}"]
        rows.append(row)
    if not any(variant.evaluation for variant in report.variants):
        head = head[:4]
    else:
        rows += _controls(report)
    return Grid("What each delta takes, and gives", head, rows, frozenset(range(2, 7)))


def _controls(report: Report) -> list[list[str]]:
    evaluation = next(v.evaluation for v in report.variants if v.evaluation is not None)
    size = report.variants[0].inspection.config.finetuned_bytes
    return [
        [name, "", f"{n_bytes:,}", ratio, _estimate(measured.kl), _share(measured.top1_agreement),
         f"{measured.perplexity:.4g}"]
        for name, n_bytes, ratio, measured in (
            ("the fine-tune itself", size, "1.00", evaluation.finetuned),
            ("the base, no delta", 0, "", evaluation.base),
        )
    ]  # fmt: skip


def _identity(inspection: Inspection) -> Grid:
    config = inspection.config
    asked = f" ({config.ratio_requested:g} asked for)" if config.ratio_requested else ""
    rows = [
        ["digest", inspection.digest],
        ["fine-tune", f"{config.finetuned}, {config.finetuned_bytes:,} bytes"],
        ["base", f"{config.base.name_or_path}, {config.base.n_parameters:,} parameters"],
        ["base identity", config.base.identity],
        ["codec", config.codec],
        ["settings", plain_settings(config.options)],
        *([name, told] for name, told in choice(config)),
        ["seed", str(config.seed)],
        ["ratio", f"{inspection.ratio:.2f}{asked}"],
        ["tensors", f"{len(config.tensors)} stored, {len(config.unchanged)} as in the base"],
        ["made by", config.created_by],
    ]
    rows += [["recorded when made", line] for line in measured(config.fidelity)]
    if rest := unknown(config.fidelity):
        rows.append(["also recorded", plain_settings(rest)])
    if (error := inspection.mean_error()) is not None:
        rows.append(["relative error", f"{error:.3g} ({ERROR_MEANS})"])
    return Grid("Identity and settings", ["", ""], rows, frozenset())


def _quality(name: str, evaluation: Evaluation) -> Grid:
    columns = (evaluation.finetuned, evaluation.variant, evaluation.base)
    rows = [
        ["KL from the fine-tune, nats per token", *(_estimate(c.kl) for c in columns)],
        ["most likely token agrees", *(_share(c.top1_agreement) for c in columns)],
        ["next token right in one of the two only", *(_share(c.token_flips) for c in columns)],
        ["perplexity", *(f"{c.perplexity:.4g}" for c in columns)],
    ]
    if evaluation.variant.exact_match is not None:
        rows.append(["answers word for word", *(f"{c.exact_match:.1%}" for c in columns)])
        flips = [f"{c.answer_flips:.1%}" for c in columns]
        rows.append(["answers right in one of the two only", *flips])
    if evaluation.changes_kept is not None:
        kept = f"{evaluation.changes_kept:.2%}"
        rows.append(["changes of the most likely token kept", "100.00%", kept, "0.00%"])
    caption = f"{name}: {evaluation.n_texts} texts, {evaluation.n_tokens:,} predicted tokens"
    return Grid(caption, ["", "fine-tune", "with the delta", "base"], rows, frozenset({1, 2, 3}))


def _parts(what: str, report: Report, columns: Sequence[tuple[Part, ...]]) -> Grid:
    head, rows = [what], [[part.name] for part in columns[0]]
    names = [v.name for v in report.variants if v.evaluation is not None]
    for name, parts in zip(names, columns, strict=True):
        prefix = f"{name}: " if len(names) > 1 else ""
        head += [f"{prefix}bytes", f"{prefix}KL, only this compressed"]
        head += [f"{prefix}KL, all but this"] if what == "kind" else []
        for row, part in zip(rows, parts, strict=True):
            row += [f"{part.n_bytes:,}", _estimate(part.only)]
            row += [_estimate(part.all_but)] if part.all_but is not None else []
    caption = f"KL by {what}, nats per token, with its standard error"
    return Grid(caption, head, rows, frozenset(range(1, len(head))))


def _bytes(report: Report) -> Grid:
    tables = [variant.inspection.groups() for variant in report.variants]
    groups = list(dict.fromkeys(group for table in tables for group in table))
    totals = [variant.inspection.n_bytes for variant in report.variants]

    def cells(sizes: list[int]) -> list[str]:
        return [
            text
            for size, total in zip(sizes, totals, strict=True)
            for text in (f"{size:,}", f"{size / total:.1%}")
        ]

    rows = [[group, *cells([table.get(group, 0) for table in tables])] for group in groups]
    rows.append(["total", *cells(totals)])
    head = ["group"]
    for variant in report.variants:
        prefix = f"{variant.name}: " if len(report.variants) > 1 else ""
        head += [f"{prefix}bytes", f"{prefix}share"]
    return Grid("Bytes by group", head, rows, frozenset(range(1, len(head))))


def _spectra(report: Report) -> Grid:
    head = ["type", "matrix", "largest", "share of energy in it", "Frobenius norm"]
    for variant in report.variants:
        prefix = f"{variant.name}: " if len(report.variants) > 1 else "kept: "
        head += [f"{prefix}largest", f"{prefix}norm"]
    rows = []
    for found in report.spectra:
        curve = found.finetuned
        row = [found.kind, found.tensor, f"{curve.sigma[0]:.3g}"]
        row += [f"{curve.strongest_share:.1%}", f"{curve.total**0.5:.3g}"]
        for kept in found.kept:
            row += [f"{kept.sigma[0]:.3g}", f"{kept.total**0.5:.3g}"]
        rows.append(row)
    return Grid("Singular values", head, rows, frozenset(range(2, len(head))))


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.mean:.3g} ± {estimate.standard_error:.1g}"


def _share(estimate: Estimate) -> str:
    return f"{estimate.mean:.2%} ± {estimate.standard_error:.2%}"
