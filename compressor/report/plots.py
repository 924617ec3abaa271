"""Plots of the report as SVG that follows the page: its text, its colours, light or dark.

matplotlib draws in placeholder colours, which become CSS variables. An SVG of a few kilobytes a
plot was chosen over plotly because plotly's script alone is megabytes; and a page without any
script can forbid scripts altogether.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compressor.errors import InputError
from compressor.printable import printable
from compressor.report.data import Report, SpectrumOfType

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_COLOURS = 6
MARKERS = "osD^vP"

_TEXT, _GRID = "#010101", "#020202"
_SERIES = tuple(f"#0300{index:02x}" for index in range(N_COLOURS))
_CSS = {_TEXT: "currentColor", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(_SERIES)
}
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from files: a dollar sign is a dollar sign
    "text.usetex": False,
    "font.size": 10,
    "axes.unicode_minus": False,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": _TEXT,
    "text.color": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
}


def spectrum_plot(found: SpectrumOfType, names: Sequence[str]) -> str:
    """One type of tensor: the fine-tune's singular values and what each delta keeps."""

    def draw(axes: Axes) -> None:
        axes.loglog(found.finetuned.index, found.finetuned.sigma, color=_TEXT, lw=1.6)
        for index, curve in enumerate(found.kept):
            points = [(i, s) for i, s in zip(curve.index, curve.sigma, strict=True) if s > 0]
            if points:
                axes.loglog(*zip(*points, strict=True), color=_colour(index), lw=1.3, ls="--")
        top = max((c.sigma[0] for c in (found.finetuned, *found.kept)), default=0.0)
        if top > 0:
            axes.set_ylim(top * 1e-4, top * 2)
        _plain_ticks(axes, (1.0,))
        axes.set_xlabel("component")
        axes.set_ylabel("singular value")

    del names
    return _svg(draw, (3.6, 2.6), f"spectrum {found.kind}")


def bytes_plot(report: Report) -> str:
    """Bytes by group, a bar for each delta."""
    tables = [variant.inspection.groups() for variant in report.variants]
    groups = sorted(
        {group for table in tables for group in table},
        key=lambda group: max(table.get(group, 0) for table in tables),
    )

    largest = max(max(table.values()) for table in tables)
    unit, name = (1e6, "megabytes") if largest >= 1e6 else (1e3, "kilobytes")

    def draw(axes: Axes) -> None:
        height = 0.8 / len(tables)
        for index, table in enumerate(tables):
            places = [k + height * ((len(tables) - 1) / 2 - index) for k in range(len(groups))]
            sizes = [table.get(group, 0) / unit for group in groups]
            axes.barh(places, sizes, height * 0.92, color=_colour(index))
        axes.set_yticks(range(len(groups)), [short(group) for group in groups])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(name)

    rows = len(groups) * max(1.0, 0.45 * len(tables))
    return _svg(draw, (7.2, 0.9 + 0.3 * rows), "bytes")


def layers_plot(report: Report) -> str:
    """KL when only one layer is compressed, with standard errors; zeros are left out."""
    measured = [v.evaluation for v in report.variants if v.evaluation is not None]
    labels = [part.name for part in measured[0].layers]

    def draw(axes: Axes) -> None:
        for index, evaluation in enumerate(measured):
            shift = 0.16 * (index - (len(measured) - 1) / 2)
            points = [
                (k + shift, part.only.mean, _error(part.only.standard_error))
                for k, part in enumerate(evaluation.layers)
                if part.only.mean > 0
            ]
            if points:
                x, y, error = zip(*points, strict=True)
                axes.errorbar(x, y, error, fmt=MARKERS[index % 6], ms=4, lw=1, color=_colour(index))
        if any(part.only.mean > 0 for evaluation in measured for part in evaluation.layers):
            axes.set_yscale("log", nonpositive="clip")
            _plain_ticks(axes, (1.0, 3.0))
        step = max(1, len(labels) // 40)
        axes.set_xticks(
            range(0, len(labels), step),
            [_layer_label(name) for name in labels[::step]],
            rotation=90,
        )
        axes.set_ylabel("KL, nats per token")

    return _svg(draw, (7.2, 3.4), "layers")


def quality_plot(report: Report) -> str:
    """KL and agreement against the true ratio."""
    points = [
        (variant.inspection.ratio, variant.evaluation.variant.kl)
        for variant in report.variants
        if variant.evaluation is not None
    ]

    def draw(axes: Axes) -> None:
        for index, (ratio, kl) in enumerate(points):
            axes.errorbar(
                [ratio], [kl.mean], [_error(kl.standard_error)], fmt=MARKERS[index % 6], ms=7,
                color=_colour(index),
            )  # fmt: skip
        if all(kl.mean > 0 for _, kl in points):
            axes.set_yscale("log", nonpositive="clip")
            _plain_ticks(axes, (1.0, 2.0, 5.0))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.set_xlabel("fine-tune bytes / bytes of the whole artifact")
        axes.set_ylabel("KL, nats per token")

    return _svg(draw, (7.2, 3.2), "quality")


def short(text: str, length: int = 34) -> str:
    """Untrusted text of bounded length, without control characters."""
    shown = printable(text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def _plain_ticks(axes: Axes, steps: tuple[float, ...]) -> None:
    """Label logarithmic axes with plain numbers, at these multiples of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=steps, numticks=12))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())


def _colour(index: int) -> str:
    return _SERIES[index % N_COLOURS]


def _error(standard_error: float) -> float:
    return standard_error if standard_error == standard_error else 0.0  # NaN: a single text


def _layer_label(name: str) -> str:
    last = name.rpartition(".")[2]
    return last if last.isdigit() else short(last, 16)


def _svg(draw: Any, size: tuple[float, float], name: str) -> str:
    """Draw on new axes and return an ``<svg>`` element to be put into a page."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "impart report draws with matplotlib; install it: pip install 'impart-serve[report]'"
        ) from error
    settings: Any = _SETTINGS | {"svg.hashsalt": name}  # ids differ between plots
    with mpl.rc_context(settings):
        figure: Figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _embeddable(out.getvalue())


def _embeddable(svg: str) -> str:
    """Drop the prologue and fixed size, and put CSS in the place of the placeholder colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"^<svg ([^>]*)>", _without_size, svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every plot, and nothing refers to them
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px sans-serif", svg)
    for colour, css in _CSS.items():
        svg = svg.replace(colour, css)
    return svg


def _without_size(match: re.Match[str]) -> str:
    kept = re.sub(r'(?:width|height|xmlns:xlink|version)="[^"]*" ?', "", match[1])
    return f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true" {kept}>'
