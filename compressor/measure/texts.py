"""Calibration texts: the user's own file, or a small general set that comes with the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from compressor.errors import InputError

MAX_TEXTS = 512
MAX_TEXT_TOKENS = 512

_COLUMN = "text"


def load_texts(path: Path | None, limit: int = MAX_TEXTS) -> list[str]:
    """Return up to `limit` texts of a file (see `read_texts`), or for None of the built-in set.

    The built-in set is general: prose, instructions, dialogue, code, tables, several languages.
    Texts like those the fine-tune will answer serve it better.
    """
    return read_texts(path, limit) if path is not None else built_in_texts()[:limit]


def built_in_texts() -> list[str]:
    """Return the 90 short texts shipped with the package."""
    stored = files("compressor.measure").joinpath("default_texts.jsonl")
    return [json.loads(line)[_COLUMN] for line in stored.read_text("utf-8").splitlines()]


def texts_digest(texts: Sequence[str]) -> str:
    """Name a set of texts: SHA-256, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file of texts. Raises InputError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error


def read_texts(file: Path, limit: int = MAX_TEXTS) -> list[str]:
    """Read up to `limit` texts: one a line, ``.jsonl`` with a ``text`` field each, or ``.parquet``
    with a ``text`` column. Blank ones are skipped.
    """
    read = _parquet_texts if file.suffix == ".parquet" else _line_texts
    texts = [text for text in read(file, limit) if text.strip()]
    if not texts:
        raise InputError(f"{file} holds no text to calibrate on")
    return texts[:limit]


def _line_texts(file: Path, limit: int) -> Iterator[str]:
    del limit
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_text(file, number, line) if file.suffix == ".jsonl" else line


def _parquet_texts(file: Path, limit: int) -> Iterator[str]:
    found = 0
    for number, record in parquet_records(file, (_COLUMN,), limit):
        value = record[_COLUMN]
        if value is not None:
            text = _text(file, number, value)
            yield text
            found += bool(text.strip())
        if found >= limit:
            return


def parquet_columns(file: Path) -> list[str]:
    """Return the names of a Parquet file's columns; InputError if it cannot be read."""
    with _parquet(file) as table:
        return list(table.schema_arrow.names)


def parquet_records(
    file: Path, columns: Sequence[str], batch: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield row numbers, from 1, and rows, of which only `columns` are read.

    Batch by batch, so that a large file is read only as far as it is needed.
    """
    number = 0
    with _parquet(file) as table:
        for column in columns:
            if column not in table.schema_arrow.names:
                raise InputError(
                    f'{file} has no column "{column}", only {", ".join(table.schema_arrow.names)}'
                )
        for rows in table.iter_batches(batch_size=max(1, batch), columns=list(columns)):
            for record in rows.to_pylist():
                number += 1
                yield number, record


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            f"{file}: reading Parquet needs pyarrow; pip install 'impart-serve[parquet]', or give "
            ".jsonl or .txt"
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            yield table
    except (OSError, ArrowException) as error:
        raise InputError(f"{file} cannot be read as Parquet: {error}") from error


def _text(file: Path, number: int, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f'{file}, row {number}: column "{_COLUMN}" does not hold strings')
    return value


def _json_text(file: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{file}, line {number}: expected an object with "text"') from error
    if not isinstance(text, str):
        raise InputError(f'{file}, line {number}: "text" is not a string')
    return text
