"""Entropy coding of an artifact's tensors into the frames of `coded_file`.

Parts that are distributed alike stand together: by the group of the byte table, then by name (the
codes of all of one group's matrices, their scales, ...). zstd's Huffman stage takes what order 0
has to give (a few tens of bytes of table in 128 KiB), its matches what repeats: rows of tokens that
the fine-tune never met. One level, one thread a frame: same tensors, same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path

import torch

from compressor.artifact.coded_file import FRAME_BYTES, INDEX, MAX_EXPANSION, coder
from compressor.artifact.tensor_file import (
    METADATA,
    Stored,
    header_bytes,
    header_text,
)
from compressor.atomic import write_new
from compressor.usable_cpus import usable_cpus

# Measured on artifacts of all codecs: 17 bits find what larger windows do
# (benchmarks/notes/compression.md).
_LEVEL, _WINDOW_LOG = 19, 17
_MAX_THREADS = 4

Chunk = bytes | memoryview


@dataclass(frozen=True, slots=True)
class CodedTensors:
    """Frames written to `path`, index first, and what they will be behind.

    header  of delta.safetensors
    raw_bytes, coded_bytes  by group, without the index
    is_readable  whether a reader will take so much expansion for honest
    """

    path: Path
    header: bytes
    n_bytes: int
    raw_bytes: dict[str, int]
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
    path: Path,
) -> CodedTensors:
    """Write the frames of `tensors` to `path`.

    tensors   by their keys in delta.safetensors
    group_of  a key's group in the byte table
    read      the bytes of one of them
    """
    keys = sorted(tensors, key=lambda key: (*_run_of(key, group_of), _index_of(key), key))
    text = header_text({key: tensors[key] for key in keys}, METADATA)
    index = code_frame(text)
    tally, sizes = Tally(), [len(index)]

    def frames() -> Iterator[Chunk]:
        yield index
        runs = (
            (group, chain.from_iterable(map(read, run)))
            for (group, _), run in groupby(keys, key=lambda key: _run_of(key, group_of))
        )
        for frame in coded_frames(runs, tally):
            sizes.append(len(frame))
            yield frame

    path.unlink(missing_ok=True)
    total = write_new(path, frames(), sync=False)
    header = header_bytes(_places(sizes), METADATA)
    readable = len(text) + sum(tally.raw.values()) <= MAX_EXPANSION * total
    return CodedTensors(path, header, len(header) + total, tally.raw, tally.coded, readable)


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


def _places(sizes: list[int]) -> dict[str, Stored]:
    places, start = {}, 0
    for name, size in zip((INDEX, *map(str, range(len(sizes)))), sizes, strict=False):
        places[name] = Stored(torch.uint8, (size,), start, start + size)
        start += size
    return places
