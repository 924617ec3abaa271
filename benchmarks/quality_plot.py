"""Quality against true bytes: one line a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.quality_report import Row, grouped

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
_MARKERS = "osD^vPX*"


class Style(NamedTuple):
    """How a method is drawn: methods of this project are solid, the others dashed."""

    colour: str
    marker: str
    line: str


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw three panels into `path` (its suffix names the format): both KLs, and the score."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    measured = [row for row in rows if not row.note]
    controls = {row.method: row for row in measured if row.is_control}
    methods = list(dict.fromkeys(row.method for row in measured if not row.is_control))
    with mpl.rc_context({"svg.hashsalt": "impart", "font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(12.5, 4.6), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, field in zip(panels, ("kl_task", "kl_text", "score"), strict=True):
            for index, method in enumerate(methods):
                _line(axes, [row for row in measured if row.method == method], field, style(index))
            _controls(axes, controls, field)
        panels[0].set_title("KL to the fine-tune on its task (nats per token)")
        panels[1].set_title("KL to the fine-tune on text it never saw")
        panels[2].set_title("exact match on the task")
        figure.suptitle(f"{measured[0].pair}: quality against true bytes of the whole artifact")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)


def style(index: int) -> Style:
    """Colour, marker and line of the method that comes `index`-th."""
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
    """Scales, the controls as horizontal lines, and ratios along the top."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("MB")
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:.2g}")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for method, row in controls.items():
        value = getattr(row, field)
        if field == "score" or value > 0:
            axes.axhline(value, color="#444444", linewidth=0.9, linestyle=":")
            axes.annotate(
                method,
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 2),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="#444444",
            )
    if field != "score":
        axes.set_yscale("log")
