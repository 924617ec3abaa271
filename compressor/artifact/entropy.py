"""Entropy coding of an artifact's tensors into the frames of `coded_file`.

Parts that are distributed alike stand together: by the group of the byte table, then by name (the
codes of all of one group's matrices, their scales, ...). zstd's Huffman stage takes what order 0
has to give (a few tens of bytes of table in 128 KiB), its matches what repeats: rows of tokens that
the fine-tune never met. One level, one thread a frame: same tensors, same bytes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO

import torch

from compressor import safetensors_header
from compressor.artifact.coded_file import FRAME_BYTES, INDEX, MAX_EXPANSION, coder
from compressor.artifact.tensor_file import (
    METADATA,
    Stored,
    header_text,
)
from compressor.atomic import new_file
from compressor.usable_cpus import usable_cpus

# Measured on artifacts of all codecs: 17 bits find what larger windows do
# (benchmarks/notes/compression.md).
_LEVEL, _WINDOW_LOG = 19, 17
_MAX_THREADS = 4

Chunk = bytes | memoryview


@dataclass(frozen=True, slots=True)
class CodedTensors:
    """What a coded ``delta.safetensors`` came to.

    n_bytes      of the file
    coded_bytes  by group, without the index
    is_readable  whether a reader will take so much expansion for honest
    """

    n_bytes: int
    coded_bytes: dict[str, int]
    is_readable: bool


@dataclass(slots=True)
class Tally:
    """Bytes by group, before and after."""

    raw: dict[str, int] = field(default_factory=dict)
    coded: dict[str, int] = field(default_factory=dict)

    def add(self, group: str, n_raw: int, n_coded: int) -> None:
        self.raw[group] = self.raw.get(group, 0) + n_raw
        self.coded[group] = self.coded.get(group, 0) + n_coded


def code_tensors(
    tensors: Mapping[str, Stored],
    group_of: Callable[[str], str],
    read: Callable[[str], Iterator[Chunk]],
    path: Path | None,
) -> CodedTensors:
    """Write a coded ``delta.safetensors`` to `path`, which must not exist; None only counts.

    tensors   by their keys in delta.safetensors
    group_of  a key's group in the byte table
    read      the bytes of one of them

    The header stands before the frames but tells their sizes: the room it can need at most is
    known by their number, and what it does not need is filled with spaces.
    """
    headers = code_headers(tensors, group_of)
    tally, sizes = Tally(), [len(headers.index)]
    with _stream(path) as stream:
        stream.write(bytes(headers.room_bytes))
        stream.write(headers.index)
        pieces = ((group, chain.from_iterable(map(read, run))) for group, run in headers.runs)
        for frame in coded_frames(pieces, tally):
            sizes.append(len(frame))
            stream.write(frame)
        stream.seek(0)
        stream.write(_header(sizes, headers.room_bytes))
    total = sum(sizes)
    n_raw = headers.index_raw_bytes + sum(tally.raw.values())
    return CodedTensors(headers.room_bytes + total, tally.coded, n_raw <= MAX_EXPANSION * total)


@dataclass(frozen=True, slots=True)
class CodedHeaders:
    """What stands before the coded data of some tensors.

    runs             keys of parts that are coded together, each with its group
    room_bytes       of the file's own header: the most that it can come to
    index            the frame of the tensors' header
    index_raw_bytes  of that before coding
    """

    runs: list[tuple[str, list[str]]]
    room_bytes: int
    index: bytes
    index_raw_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes on disk."""
        return self.room_bytes + len(self.index)


def code_headers(tensors: Mapping[str, Stored], group_of: Callable[[str], str]) -> CodedHeaders:
    """The headers of a coded file; of the data only the sizes matter. See `code_tensors`."""
    keys = sorted(tensors, key=lambda key: (*_run_of(key, group_of), _index_of(key), key))
    runs = [
        (group, list(run))
        for (group, _), run in groupby(keys, key=lambda key: _run_of(key, group_of))
    ]
    text = header_text({key: tensors[key] for key in keys}, METADATA)
    index = code_frame(text)
    n_raw = [sum(tensors[key].n_bytes for key in run) for _, run in runs]
    room = len(_header([len(index), *_largest_frames(n_raw)]))
    return CodedHeaders(runs, room, index, len(text))


def coded_frames(runs: Iterable[tuple[str, Iterable[Chunk]]], tally: Tally) -> Iterator[bytes]:
    """Yield the frames of runs of data, each with its group, and count them in `tally`."""
    n_threads = min(_MAX_THREADS, usable_cpus().cpus)
    pending: deque[tuple[str, int, Future[bytes]]] = deque()
    with ThreadPoolExecutor(n_threads, thread_name_prefix="zstd") as pool:

        def oldest() -> bytes:
            group, n_raw, future = pending.popleft()
            frame = future.result()
            tally.add(group, n_raw, len(frame))
            return frame

        for group, chunks in runs:
            for piece in _pieces(chunks):
                pending.append((group, len(piece), pool.submit(code_frame, piece)))
                if len(pending) > 2 * n_threads:
                    yield oldest()
        while pending:
            yield oldest()


def code_frame(raw: bytes | bytearray) -> bytes:
    """Return one frame that declares its size. Raises InputError if the coder is not installed."""
    zstandard = coder()
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, window_log=_WINDOW_LOG, write_content_size=True, write_checksum=False
    )
    frame: bytes = zstandard.ZstdCompressor(compression_params=parameters).compress(raw)
    return frame


def part_name(key: str) -> str:
    """The part that a key of delta.safetensors ends with: codes, scales, exact, ..."""
    return key.rpartition(".")[2]


def _run_of(key: str, group_of: Callable[[str], str]) -> tuple[str, str]:
    return group_of(key), part_name(key)


def _index_of(key: str) -> int:
    return int(key.partition(".")[0])


def _pieces(chunks: Iterable[Chunk]) -> Iterator[bytes]:
    """The same bytes, `FRAME_BYTES` at a time."""
    gathered = bytearray()
    for chunk in chunks:
        for start in range(0, len(chunk), FRAME_BYTES):
            gathered += chunk[start : start + FRAME_BYTES]
            if len(gathered) >= FRAME_BYTES:
                yield bytes(gathered[:FRAME_BYTES])
                del gathered[:FRAME_BYTES]
    if gathered:
        yield bytes(gathered)


def _largest_frames(n_raw: Iterable[int]) -> Iterator[int]:
    """At most so large are the frames of runs of so many bytes: zstd adds 1/256 and a few bytes."""
    for n_bytes in n_raw:
        for start in range(0, n_bytes, FRAME_BYTES):
            piece = min(FRAME_BYTES, n_bytes - start)
            yield piece + (piece >> 8) + 64


def _header(sizes: list[int], room: int = 0) -> bytes:
    """The beginning of a file with frames of these sizes, the index first."""
    places, start = {}, 0
    for name, size in zip((INDEX, *map(str, range(len(sizes)))), sizes, strict=False):
        places[name] = Stored(torch.uint8, (size,), start, start + size)
        start += size
    return safetensors_header.framed(header_text(places, METADATA), room)


@contextmanager
def _stream(path: Path | None) -> Iterator[BinaryIO]:
    """A new file, flushed to disk in the end, or nothing at all."""
    if path is None:
        with open(os.devnull, "wb") as stream:
            yield stream
    else:
        with new_file(path) as stream:
            yield stream
