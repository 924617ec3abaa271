"""``delta.safetensors`` with its tensors entropy coded.

A valid safetensors file of one-dimensional ``U8`` tensors, each one zstd frame:

    index      the JSON header that the tensors would have as they are (of format version 2: 1)
    0, 1, ...  runs of at most `FRAME_BYTES` of the data that this header describes, in order

A frame may end anywhere, inside a tensor too. In the data, parts that are distributed alike stand
together (`entropy.code_tensors`), which is all that the reader needs not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from compressor.artifact.tensor_file import (
    MAX_HEADER_BYTES,
    VERSION_KEY,
    Stored,
    TensorFile,
    parse_header,
)
from compressor.errors import Corrupt, InputError, TooLarge, UnsupportedVersion

INDEX = "index"
FRAME_BYTES = 1 << 20
MAX_EXPANSION = 64  # of the whole file; what compresses better is stored as it is
_WINDOW_BYTES = 1 << 20


def coder() -> Any:
    """Return the module `zstandard`. It is imported when something coded is first read or written:
    artifacts that are stored as they are need no coder, nor do machines that only know those.

    Raises InputError if it is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            "entropy coded artifacts need zstandard; install it: pip install zstandard"
        ) from error
    return zstandard


def decode_frames(
    file: TensorFile, n_threads: int = 1, what: str = "delta.safetensors"
) -> TensorFile:
    """Return the tensors that a coded file holds.

    Raises as `parse_tensor_file` of the index; beyond that Corrupt for frames that do not decode to
    what they declare or to what the index describes, TooLarge for frames, or all of them together,
    that would expand beyond the limits. Nothing is decoded before the sizes that all frames declare
    are within the limits.
    """
    frames = _frames(file.tensors, what)
    coded = {key: file.data[stored.start : stored.end] for key, stored in frames.items()}
    sizes = {key: _raw_bytes(key, frame, what) for key, frame in coded.items()}
    if sum(sizes.values()) > MAX_EXPANSION * len(file.data):
        raise TooLarge(f"{what}: decodes to more than {MAX_EXPANSION} times its size")
    index = _expand(INDEX, coded.pop(INDEX), sizes.pop(INDEX), what)
    data = bytearray(sum(sizes.values()))
    view = memoryview(data)
    starts = dict(zip(sizes, _running_sum(list(sizes.values())), strict=True))

    def fill(key: str) -> None:
        start, size = starts[key], sizes[key]
        view[start : start + size] = _expand(key, coded[key], size, what)

    if n_threads == 1:
        for key in coded:
            fill(key)
    else:
        with ThreadPoolExecutor(n_threads, "zstd") as pool:
            for _ in pool.map(fill, coded):  # zstd lets go of the interpreter lock
                pass
    inner = parse_header(index, view, f"{what}, decoded")
    version = file.metadata.get(VERSION_KEY)
    if inner.metadata.get(VERSION_KEY) != ("1" if version == "2" else version):
        raise UnsupportedVersion(f"{what}: the index is of another version")
    return inner


def _frames(tensors: Mapping[str, Stored], what: str) -> dict[str, Stored]:
    """The index and the frames in their order; there is nothing else."""
    names = [INDEX, *map(str, range(len(tensors) - 1))]
    if set(names) != set(tensors):
        raise Corrupt(f"{what}: expected {INDEX} and frames numbered from 0")
    for key, stored in tensors.items():
        if stored.dtype != torch.uint8 or len(stored.shape) != 1:
            raise Corrupt(f"{what}: frame {key!r:.20} is not a row of bytes")
    return {name: tensors[name] for name in names}


def _raw_bytes(key: str, frame: memoryview, what: str) -> int:
    """The size a frame declares, within the limit for its kind."""
    zstandard = coder()
    try:
        size: int = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise Corrupt(f"{what}: frame {key} does not decode") from error
    if size <= 0:
        raise Corrupt(f"{what}: frame {key} does not declare its size")
    limit = MAX_HEADER_BYTES if key == INDEX else FRAME_BYTES
    if size > limit:
        raise TooLarge(f"{what}: frame {key} declares {size} bytes, the limit is {limit}")
    return size


def _expand(key: str, frame: memoryview, size: int, what: str) -> bytes:
    zstandard = coder()
    try:
        raw: bytes = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompress(
            frame, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise Corrupt(f"{what}: frame {key} does not decode") from error
    if len(raw) != size:
        raise Corrupt(f"{what}: frame {key} decodes to {len(raw)} bytes, not {size}")
    return raw


def _running_sum(sizes: list[int]) -> list[int]:
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts
