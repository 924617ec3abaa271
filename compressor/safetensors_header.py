"""The header of a safetensors file, read strictly and written: the only place that knows its bytes.

A file is the header's length (u64, little-endian), the header (a JSON object), and the tensors'
bytes. The header maps ``__metadata__`` to texts by name, and every tensor's name to its ``dtype``,
``shape`` and ``data_offsets``, ``[start, end)`` in what follows the header.

The safetensors library (0.8.0) was measured against this on hostile files and is not used to read
them. It takes headers of up to 100 MB and has no smaller limit: a shape of 49 million ones is
accepted with a peak of 2.2 GB of memory, 7.5 million entries of metadata with 1.7 GB, each after
many seconds. It keeps the last of two tensors of one name, accepts any number of dimensions, fields
it does not know, and empty tensors whose other sizes have no bound. Holes, overlaps, cut files and
sizes that overflow it refuses as we do.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LENGTH_BYTES = 8
METADATA_KEY = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_DIMENSIONS = 8
_MAX_SIZE = 1 << 62
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


class BadHeader(ValueError):
    """The header is not one; the text says why, without naming the file."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor: its dtype as files spell it, its shape, and its bytes ``[start, end)``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its tensors. Nothing is known of whether its data agree."""

    metadata: dict[str, str]
    tensors: dict[str, HeaderEntry]


def parse_length(start: bytes | memoryview) -> int:
    """Return the header's length from a file's first `LENGTH_BYTES`. Raises BadHeader."""
    if len(start) < LENGTH_BYTES:
        raise BadHeader("shorter than its own header")
    (length,) = struct.unpack("<Q", start[:LENGTH_BYTES])
    return int(length)


def parse_header(text: bytes) -> Header:
    """Parse a header's JSON: every key once, no unknown fields, sizes that are whole numbers.

    Raises BadHeader. The caller knows which dtypes there are and how large the data is.
    """
    record = _load(text)
    metadata = record.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadHeader("metadata must map text to text")
    return Header(metadata, {name: _parse_entry(name, entry) for name, entry in record.items()})


def header_json(
    tensors: Iterable[tuple[str, str, Iterable[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """Return the JSON of tensors that stand one after another: name, dtype, shape and bytes."""
    record: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    position = 0
    for name, dtype, shape, n_bytes in tensors:
        offsets = [position, position + n_bytes]
        record[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += n_bytes
    return json.dumps(record, separators=(",", ":")).encode()


def framed(text: bytes, n_bytes: int = 0) -> bytes:
    """Return a file's beginning: length and header, padded so that the data is aligned to 8.

    n_bytes  what it is at least to come to, a multiple of 8
    """
    text += b" " * max(-len(text) % 8, n_bytes - LENGTH_BYTES - len(text))
    return struct.pack("<Q", len(text)) + text


def _load(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            raise BadHeader("a tensor occurs twice in the header")
        return record

    try:
        record = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if _HALF_CHARACTER.search(text):
            json.dumps(record, ensure_ascii=False).encode("utf-8")  # fails if not in a pair
    except BadHeader:
        raise
    except (ValueError, RecursionError) as error:
        raise BadHeader("the header does not parse") from error
    if not isinstance(record, dict):
        raise BadHeader("the header is not an object")
    return record


def _parse_entry(name: str, entry: Any) -> HeaderEntry:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise _bad_entry(name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets):
        raise _bad_entry(name)
    if len(offsets) != 2 or offsets[0] > offsets[1] or len(shape) > _MAX_DIMENSIONS:
        raise _bad_entry(name)
    return HeaderEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _bad_entry(name: str) -> BadHeader:
    return BadHeader(f"the header's entry of {name!r:.80} does not parse")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < _MAX_SIZE
        for size in value
    )
