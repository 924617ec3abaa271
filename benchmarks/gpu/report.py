"""Markdown to the terminal and, line by line, to a file: a run that is cut off loses nothing."""

from __future__ import annotations

from pathlib import Path


class Report:
    """Appends to `path`; every line is written out before the next is measured."""

    def __init__(self, path: Path | None) -> None:
        self._stream = None if path is None else path.open("a")

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        if self._stream is not None:
            self._stream.write(text + "\n")
            self._stream.flush()

    def table(self, title: str, *columns: str) -> None:
        """Begin a table; the first column is text, the others are numbers."""
        self.line(f"\n### {title}\n")
        self.row(*columns)
        self.row("---", *["---:"] * (len(columns) - 1))

    def row(self, *cells: object) -> None:
        self.line("| " + " | ".join(str(cell) for cell in cells) + " |")
