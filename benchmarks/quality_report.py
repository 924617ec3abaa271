"""The quality benchmark's rows: the CSV file that holds them, the table and the plot of them.

``python -m benchmarks.quality_report results/intent.csv`` rewrites intent.md and intent.svg.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.quality_rows import Row, grouped, read_rows


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table, seeds averaged; the range of KL over seeds in brackets."""
    heading = ["method", "asked", "true ratio", "MB", "KL task", "KL text"]
    heading += ["agreement", "score", "flips", "seeds"]
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    for (method, asked), group in grouped(rows).items():
        if group[0].note:
            cells = [method, f"{asked:g}", "not reached", *[""] * (len(heading) - 3)]
        else:
            sizes = ["", "", ""] if group[0].is_control else _sizes(asked, group)
            cells = [
                method,
                *sizes,
                _range([row.kl_task for row in group]),
                _range([row.kl_text for row in group]),
                _mean(group, "agreement"),
                f"{_mean(group, 'score')} ± {_mean(group, 'score_se')}",
                _mean(group, "flips"),
                str(len(group)),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overview(rows: Sequence[Row], field: str, digits: int) -> str:
    """Return one measure as a Markdown table, methods by ratios asked, the mean over seeds.

    A dash where the method cannot meet the ratio, nothing where it was not measured.
    """
    groups = grouped(row for row in rows if not row.is_control)
    ratios = sorted({ratio for _, ratio in groups})
    lines = ["| | " + " | ".join(f"{ratio:g}x" for ratio in ratios) + " |"]
    lines.append("|---|" + "---:|" * len(ratios))
    for method in dict.fromkeys(row.method for row in rows if not row.is_control):
        cells = [_value(groups.get((method, ratio), []), field, digits) for ratio in ratios]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _value(group: Sequence[Row], field: str, digits: int) -> str:
    if not group:
        return ""
    if group[0].note:
        return "-"
    return f"{fmean(getattr(row, field) for row in group):.{digits}f}"


def first_drops(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return per method the lowest ratio at which the score is more than one standard error low.

    Low against the fine-tune in the same dtype, by its standard error; the mean over seeds. None
    if there is no such ratio among those measured. Methods with a single ratio are left out.
    """
    control = next((row for row in rows if row.method == "fine-tune"), None)
    if control is None:
        return {}
    drops: dict[str, float | None] = {}
    measured: dict[str, int] = {}
    for (method, asked), group in grouped(row for row in rows if not row.note).items():
        if group[0].is_control:
            continue
        measured[method] = measured.get(method, 0) + 1
        drops.setdefault(method, None)
        is_low = fmean(row.score for row in group) < control.score - control.score_se
        if is_low and drops[method] is None:
            drops[method] = asked
    return {method: drop for method, drop in drops.items() if measured[method] > 1}


def drops_table(rows: Sequence[Row]) -> str:
    """Return `first_drops` as a Markdown table."""
    lines = ["| method | score first drops by more than one standard error at |", "|---|---:|"]
    for method, ratio in first_drops(rows).items():
        lines.append(f"| {method} | {'no ratio measured' if ratio is None else f'{ratio:g}x'} |")
    return "\n".join(lines)


def _sizes(asked: float, group: Sequence[Row]) -> list[str]:
    n_bytes = fmean(row.n_bytes for row in group)
    true = fmean(row.ratio_true for row in group)
    return [f"{asked:g}", f"{true:.1f}", f"{n_bytes / 1e6:.2f}"]


def _mean(group: Sequence[Row], field: str) -> str:
    return f"{fmean(getattr(row, field) for row in group):.3f}"


def _range(values: Sequence[float]) -> str:
    mean = f"{fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.4f}, {max(values):.4f}]"


def write_report(path: Path) -> str:
    """Write the table and the plot beside the rows in `path`; return the table."""
    from benchmarks.quality_plot import plot

    rows = read_rows(path)
    parts = [
        "KL task",
        overview(rows, "kl_task", 4),
        "KL text",
        overview(rows, "kl_text", 3),
        "Score",
        overview(rows, "score", 3),
        drops_table(rows),
        "Every method and ratio",
        markdown(rows),
    ]
    table = "\n\n".join(parts)
    path.with_suffix(".md").write_text(table + "\n")
    plot(rows, path.with_suffix(".svg"))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the reports of finished or unfinished runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_report")
    parser.add_argument("rows", type=Path, nargs="+", help="CSV files of benchmarks.quality")
    for path in parser.parse_args(argv).rows:
        write_report(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
