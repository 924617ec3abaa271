"""Markdown to the terminal and, line by line, to a file: a run that is cut off loses nothing.

Beside it go facts, one JSON object a line: what the last table sets against the targets, brought
from the processes that measured it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Fact = dict[str, Any]


class Report:
    """Appends to `path`; every line is written out before the next is measured."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        if self._path is not None:
            with self._path.open("a") as stream:
                stream.write(text + "\n")

    def table(self, title: str, *columns: str) -> None:
        """Begin a table; the first column is text, the others are numbers."""
        self.line(f"\n### {title}\n")
        self.row(*columns)
        self.row("---", *["---:"] * (len(columns) - 1))

    def row(self, *cells: object) -> None:
        self.line("| " + " | ".join(str(cell) for cell in cells) + " |")

    def fact(self, kind: str, **values: object) -> None:
        """Note something measured for `facts`."""
        if self._path is not None:
            with facts_path(self._path).open("a") as stream:
                stream.write(json.dumps({"kind": kind, **values}) + "\n")


def facts_path(report: Path) -> Path:
    """Of the facts that belong to a report."""
    return report.with_name(report.name + ".facts")


def facts(report: Path, kind: str) -> list[Fact]:
    """What was noted of one kind, in order."""
    path = facts_path(report)
    lines = path.read_text().splitlines() if path.is_file() else []
    return [fact for fact in map(json.loads, lines) if fact["kind"] == kind]
