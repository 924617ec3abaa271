"""Which tensors safetensors files hold and where they lie: their headers, read without torch."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from compressor.checkpoint.folder import weight_files
from compressor.errors import CheckpointError
from compressor.safetensors_header import (
    LENGTH_BYTES,
    BadHeader,
    HeaderEntry,
    parse_header,
    parse_length,
)

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # what weights are read in, and bytes of an element
INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ITEM_BYTES = FLOATS | INTEGERS | {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_SLICE = re.compile(r"(?P<name>.+)\[(?P<index>0|[1-9][0-9]{0,5})\]")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: ``n_bytes`` from ``offset`` in `file`, row-major."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class TensorIndex(dict[str, StoredTensor]):
    """Tensors by name. Of a 3-D tensor ``X``, ``X[i]`` is the matrix ``i``, though not listed; nor
    are those in `composed`, which are made of rows of others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.composed: dict[str, StoredTensor] = {}

    def __missing__(self, key: str) -> StoredTensor:
        if key in self.composed:
            return self.composed[key]
        match = _SLICE.fullmatch(key)
        if match is None or match["name"] not in self:
            raise KeyError(key)
        whole, index = self[match["name"]], int(match["index"])
        if len(whole.shape) != 3 or index >= whole.shape[0]:
            raise CheckpointError(
                f"{whole.file}: tensor {match['name']} has shape {list(whole.shape)}; "
                f"config.json asks for a matrix number {index} in it; correct config.json"
            )
        n_bytes = whole.n_bytes // whole.shape[0]
        offset = whole.offset + index * n_bytes
        return StoredTensor(whole.file, whole.dtype, whole.shape[1:], offset, n_bytes)


def slice_name(name: str, index: int) -> str:
    """Name of one matrix of a 3-D tensor."""
    return f"{name}[{index}]"


def split_slice(name: str) -> tuple[str, int | None]:
    """Name of the 3-D tensor and the number of the matrix in it, if `name` is of one."""
    match = _SLICE.fullmatch(name)
    return (match["name"], int(match["index"])) if match else (name, None)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name. Raises CheckpointError if it is not whole."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = parse_length(stream.read(LENGTH_BYTES))
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - LENGTH_BYTES):
                raise CheckpointError(
                    f"{file} is not a complete safetensors file; download it again"
                )
            header = parse_header(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except BadHeader as error:
        raise CheckpointError(
            f"{file} is not a safetensors file ({error}); download it again"
        ) from error
    data = LENGTH_BYTES + length
    tensors = {name: _stored(file, name, entry, data) for name, entry in header.tensors.items()}
    for name, tensor in tensors.items():
        if tensor.offset + tensor.n_bytes > size:
            raise CheckpointError(
                f"{file} is cut short: tensor {name} lies beyond its end; download it again"
            )
    return tensors


def _stored(file: Path, name: str, entry: HeaderEntry, data_start: int) -> StoredTensor:
    n_bytes = entry.end - entry.start
    known = _ITEM_BYTES.get(entry.dtype)
    if known is not None and math.prod(entry.shape) * known != n_bytes:
        raise CheckpointError(
            f"{file} is not a safetensors file: size and shape of {name} disagree; "
            "download it again"
        )
    return StoredTensor(file, entry.dtype, entry.shape, data_start + entry.start, n_bytes)


def stored_tensors(path: Path) -> TensorIndex:
    """All tensors of a model directory, as its files have them; only headers are read."""
    found = TensorIndex()
    for file in weight_files(path):
        found |= read_header(file)
    return found
