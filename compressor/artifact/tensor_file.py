"""``delta.safetensors``: a strict reader of a buffer, and an assembler that streams.

The safetensors layout: u64 little-endian header length, JSON header, data without holes. Written
here with the widest dtypes first, so that every tensor is aligned in the file, and the header
padded with spaces to a multiple of 8 bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from compressor.errors import Corrupt, TooLarge, UnsupportedVersion, WrongShape

MAX_HEADER_BYTES = 8 << 20
VERSION_KEY = "impart_format_version"
VERSION, CODED_VERSION = "1", "2"
METADATA = {"format": "pt", VERSION_KEY: VERSION}
CODED_METADATA = {"format": "pt", VERSION_KEY: CODED_VERSION}

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor's dtype, shape and place in the data, ``[start, end)``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A parsed safetensors buffer. `data` is what follows the header."""

    metadata: dict[str, str]
    tensors: dict[str, Stored]
    data: memoryview

    def tensor(self, key: str) -> Tensor:
        """Return a copy of one tensor, so that nothing keeps the whole buffer alive."""
        stored = self.tensors[key]
        raw = bytearray(self.data[stored.start : stored.end])
        return torch.frombuffer(raw, dtype=stored.dtype).reshape(stored.shape)


def parse_tensor_file(buffer: bytes | bytearray, what: str = "delta.safetensors") -> TensorFile:
    """Parse and check a whole file held in memory.

    Raises Corrupt if it is cut short, does not parse, or has holes, overlaps or trailing bytes;
    TooLarge if the header is beyond `MAX_HEADER_BYTES`; WrongShape if a tensor's size and shape
    disagree; UnsupportedVersion for a dtype that is not ours.
    """
    view = memoryview(buffer)
    if len(view) < 8:
        raise Corrupt(f"{what}: shorter than its own header")
    (length,) = struct.unpack("<Q", view[:8])
    if length > MAX_HEADER_BYTES:
        raise TooLarge(f"{what}: header of {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if 8 + length > len(view):
        raise Corrupt(f"{what}: cut short inside its header")
    return parse_header(bytes(view[8 : 8 + length]), view[8 + length :], what)


def parse_header(text: bytes, data: memoryview, what: str) -> TensorFile:
    """Parse a header's JSON and check that it describes exactly `data`; see `parse_tensor_file`."""
    header = _load_header(text, what)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Corrupt(f"{what}: metadata must map text to text")
    tensors = {key: _parse_stored(key, entry, what) for key, entry in header.items()}
    _check_layout(tensors, len(data), what)
    return TensorFile(metadata, tensors, data)


def header_bytes(tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a file that holds `tensors` in `storage_order`."""
    text = header_text({key: tensors[key] for key in storage_order(tensors)}, metadata)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def header_text(tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str]) -> bytes:
    """Return the JSON that describes `tensors` one after another in the order given."""
    record: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, tensor in tensors.items():
        size = tensor.n_bytes if isinstance(tensor, Stored) else tensor.nbytes
        record[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    return json.dumps(record, separators=(",", ":")).encode()


def storage_order(tensors: Mapping[str, Tensor | Stored]) -> list[str]:
    """Keys by falling element size, otherwise in the order given."""
    return sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)


def tensor_file_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file that holds `tensors`."""
    yield header_bytes(tensors, metadata)
    for key in storage_order(tensors):
        yield raw_bytes(tensors[key])


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row-major, little-endian as the machine is."""
    array = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.data if array.size else memoryview(b"")


def is_storable(dtype: torch.dtype) -> bool:
    """Whether the format has a name for `dtype`."""
    return dtype in _NAMES


def _load_header(text: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            raise Corrupt(f"{what}: a tensor occurs twice in the header")
        return record

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{what}: the header does not parse") from error
    if not isinstance(header, dict):
        raise Corrupt(f"{what}: the header is not an object")
    return header


def _parse_stored(key: str, entry: Any, what: str) -> Stored:
    def corrupt() -> NoReturn:
        raise Corrupt(f"{what}: the header's entry of {key!r:.80} does not parse")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        corrupt()
    shape, offsets, name = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or not isinstance(name, str):
        corrupt()
    if len(offsets) != 2 or offsets[0] > offsets[1] or len(shape) > 8:
        corrupt()
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise UnsupportedVersion(
            f"{what}: {key!r:.80} has dtype {name!r:.20}, not one of {', '.join(_DTYPES)}"
        )
    # Empty tensors have no use here, and their other sizes would have no bound.
    if not 0 < math.prod(shape) * dtype.itemsize == offsets[1] - offsets[0]:
        raise WrongShape(f"{what}: {key!r:.80} has a shape that does not fill its bytes")
    return Stored(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 62
        for size in value
    )


def _check_layout(tensors: Mapping[str, Stored], n_bytes: int, what: str) -> None:
    position = 0
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.end)):
        if stored.start != position:
            raise Corrupt(f"{what}: tensors overlap or leave a hole")
        position = stored.end
    if position != n_bytes:
        raise Corrupt(f"{what}: {n_bytes} bytes of data where the header promises {position}")
