"""The quality benchmark's rows and the CSV file that holds them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
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
