"""Quality against true bytes: one line a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality_rows import Row, grouped

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
_MARKERS = "osD^vPX*"
_LARGEST_MB = 24.0  # what is larger (plain integers) is in the table only


class Style(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    line: str


# This project's own codecs are solid, ImPart's dashed, other published ones dotted.
_STYLES = {
    "auto": Style("#d62728", "*", "-"),
    "auto-task": Style("#7f0000", "*", "-"),
    "blockdiag-2": Style("#56b4e9", "o", "-"),
    "blockdiag-3": Style("#0072b2", "s", "-"),
    "blockdiag-4": Style("#08306b", "^", "-"),
    "blockdiag-2-head": Style("#66c2a4", "o", "-"),
    "blockdiag-4-head": Style("#00693e", "^", "-"),
    "impart": Style("#e69f00", "D", "--"),
    "impart-qt": Style("#d55e00", "P", "--"),
    "impart-qt-gptq": Style("#a63603", "*", "--"),
    "lowrank": Style("#000000", "v", ":"),
    "dare": Style("#9467bd", "X", ":"),
    "delta-come": Style("#cc79a7", "s", ":"),
    "lora": Style("#7f7f7f", "v", ":"),
    "bitdelta": Style("#8c564b", "x", ":"),
    "bitdelta-row": Style("#8c564b", "+", ":"),
}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw three panels into `path` (its suffix names the format): both KLs, and the score."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    measured = [row for row in rows if not row.note and row.n_bytes <= _LARGEST_MB * 1e6]
    controls = {row.method: row for row in measured if row.is_control}
    found = dict.fromkeys(row.method for row in measured if not row.is_control)
    methods = sorted(found, key=lambda method: [*_STYLES, method].index(method))
    with mpl.rc_context({"svg.hashsalt": "impart", "font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(13, 6.4), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, field in zip(panels, ("kl_task", "kl_text", "score"), strict=True):
            for index, method in enumerate(methods):
                drawn = _STYLES.get(method) or style(index)
                _line(axes, [row for row in measured if row.method == method], field, drawn)
            _controls(axes, controls, field)
            _sizes(axes, measured)
        panels[0].set_title("KL on the task, nats per token")
        panels[1].set_title("KL on text the fine-tune never saw")
        panels[2].set_title("exact match on the task")
        figure.suptitle(f"{measured[0].pair}: quality against true bytes of the whole artifact")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)


def style(index: int) -> Style:
    """Of a method without a style of its own, the `index`-th of all."""
    n = len(_COLOURS)
    marker = _MARKERS[(index + index // n) % len(_MARKERS)]
    return Style(_COLOURS[index % n], marker, "-" if index < n else "--")


def _line(axes: Any, rows: Sequence[Row], field: str, drawn: Style) -> None:
    points = sorted(
        (
            fmean(row.n_bytes for row in group) / 1e6,
            fmean(getattr(row, field) for row in group),
            [getattr(row, field) for row in group],
        )
        for group in grouped(rows).values()
    )
    label = rows[0].method
    low = [mean - min(values) for _, mean, values in points]
    high = [max(values) - mean for _, mean, values in points]
    axes.errorbar(
        [size for size, _, _ in points],
        [mean for _, mean, _ in points],
        yerr=[low, high],
        color=drawn.colour,
        marker=drawn.marker,
        linestyle=drawn.line,
        label=label,
        markersize=5,
        linewidth=1.3,
        capsize=2,
        elinewidth=0.8,
    )


def _controls(axes: Any, controls: dict[str, Row], field: str) -> None:
    """Scales, and the controls as horizontal lines."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("ratio, and MB of the artifact")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if field == "score":
        # The upper part, where methods differ by a few items, gets most of the height.
        axes.set_yscale("function", functions=(lambda y: y**3, np.cbrt))
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1])
    else:
        axes.set_yscale("log")
    for method, row in controls.items():
        value = getattr(row, field)
        if field == "score" or value > 0:
            axes.axhline(value, color="#444444", linewidth=0.9, linestyle=":")
            axes.annotate(
                method if method == "base" else f"{method} in {row.dtype}",
                (0, value),
                xycoords=("axes fraction", "data"),
                xytext=(3, 2),
                textcoords="offset points",
                fontsize=8,
                color="#444444",
            )


def _sizes(axes: Any, rows: Sequence[Row]) -> None:
    """Mark the sizes at powers of two of the ratio."""
    sized = [row for row in rows if row.n_bytes]
    total = max(row.n_bytes * row.ratio_true for row in sized)
    low, high = min(row.ratio_true for row in sized), max(row.ratio_true for row in sized)
    ratios = [2.0**k for k in range(14) if low / 1.2 < 2.0**k < high * 1.2]
    axes.set_xticks([total / ratio / 1e6 for ratio in ratios])
    axes.set_xticklabels([f"{ratio:g}x\n{total / ratio / 1e6:.2g}" for ratio in ratios])
    axes.minorticks_off()
