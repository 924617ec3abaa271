"""The quality benchmark's rows: the CSV file that holds them, the table and the plot of them.

``python -m benchmarks.quality_report results/intent.csv`` rewrites intent.md and intent.svg.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Self, TextIO

from compressor.errors import InputError


@dataclass(frozen=True, slots=True)
class Row:
    """One measured model; the fields are the columns of the CSV file.

    kl_task, kl_text  nats per token: over gold answers, over text the fine-tune never saw
    flips             share of items whose correctness is not the fine-tune's
    score_se          binomial standard error of `score` over the items
    compress_s, measure_s, cpu_s  seconds on the clock, and of the processor for both together
    threads           0: not recorded
    correct           one digit an item: 1 if greedy decoding gives the gold answer
    note              why the method cannot meet the ratio; then nothing is measured
    """

    pair: str = ""
    method: str = ""
    ratio_asked: float = math.nan
    seed: int = 0
    ratio_true: float = math.nan
    n_bytes: int = 0
    kl_task: float = math.nan
    kl_text: float = math.nan
    agreement: float = math.nan
    agreement_text: float = math.nan
    score: float = math.nan
    score_se: float = math.nan
    flips: float = math.nan
    compress_s: float = math.nan
    measure_s: float = math.nan
    cpu_s: float = math.nan
    threads: int = 1
    dtype: str = ""
    n_items: int = 0
    n_tokens: int = 0
    n_text_tokens: int = 0
    correct: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[str, float, int]:
        """What was measured."""
        return self.method, self.ratio_asked, self.seed

    @property
    def is_control(self) -> bool:
        """Whether this is the fine-tune or the base itself."""
        return self.method in ("fine-tune", "base")


class RowFile:
    """A CSV file of rows that grows. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = read_rows(path) if path.exists() else []

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = self._path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, [field.name for field in fields(Row)])
        if not self.rows:
            self._file.truncate(0)
            self._writer.writeheader()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: tuple[str, float, int]) -> bool:
        return any(row.key == key for row in self.rows)

    def has_method(self, method: str) -> bool:
        """Whether anything of `method` is there."""
        return any(row.method == method for row in self.rows)

    def is_refused(self, method: str, ratio: float) -> bool:
        """Whether `method` is known to be unable to meet `ratio`."""
        return any(row.note and row.key[:2] == (method, ratio) for row in self.rows)

    def check(self, blank: Row) -> None:
        """Refuse to mix rows of different texts: InputError."""
        for row in self.rows:
            for name in ("pair", "dtype", "n_items", "n_tokens", "n_text_tokens"):
                if getattr(row, name) != getattr(blank, name):
                    raise InputError(
                        f"{self._path} holds rows with {name} {getattr(row, name)}, not "
                        f"{getattr(blank, name)}: give another --out, or the options it was "
                        "made with"
                    )

    def add(self, row: Row) -> None:
        """Append a row, on disk at once."""
        self.rows.append(row)
        self._writer.writerow({name: _cell(value) for name, value in asdict(row).items()})
        self._file.flush()


def read_rows(path: Path) -> list[Row]:
    """Read what `RowFile` wrote. Raises InputError."""
    types: dict[str, Callable[[str], object]] = {"str": str, "int": int, "float": float}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        wanted = {field.name: types[str(field.type)] for field in fields(Row)}
        found = reader.fieldnames or []
        if found and set(found) != set(wanted):
            raise InputError(f"{path} has other columns; it was written by another version")
        try:
            return [Row(**{name: wanted[name](row[name]) for name in wanted}) for row in reader]
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} does not parse: {error}") from error


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def grouped(rows: Iterable[Row]) -> dict[tuple[str, float], list[Row]]:
    """Rows by method and ratio asked; controls first, then by ratio, then as measured."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key[:2], []).append(row)
    order = sorted(groups, key=lambda key: (not groups[key][0].is_control, key[1]))
    return {key: groups[key] for key in order}


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
        *("KL task", overview(rows, "kl_task", 4)),
        *("KL text", overview(rows, "kl_text", 3)),
        *("Score", overview(rows, "score", 3)),
        *(drops_table(rows), "Every method and ratio", markdown(rows)),
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
