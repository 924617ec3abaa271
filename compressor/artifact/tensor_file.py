"""``delta.safetensors``: a strict reader of a buffer, and an assembler that streams.

A safetensors file (`compressor.safetensors_header`) whose data has no holes. Written here with the
widest dtypes first, so that every tensor is aligned in the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor import safetensors_header
from compressor.errors import Corrupt, TooLarge, UnsupportedVersion, WrongShape
from compressor.safetensors_header import LENGTH_BYTES, BadHeader, HeaderEntry

MAX_HEADER_BYTES = 8 << 20
VERSION_KEY = "impart_format_version"
METADATA = {"format": "pt", VERSION_KEY: "3"}

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
    try:
        length = safetensors_header.parse_length(view)
    except BadHeader as error:
        raise Corrupt(f"{what}: {error}") from None
    if length > MAX_HEADER_BYTES:
        raise TooLarge(f"{what}: header of {length} bytes, the limit is {MAX_HEADER_BYTES}")
    end = LENGTH_BYTES + length
    if end > len(view):
        raise Corrupt(f"{what}: cut short inside its header")
    return parse_header(bytes(view[LENGTH_BYTES:end]), view[end:], what)


def parse_header(text: bytes, data: memoryview, what: str) -> TensorFile:
    """Parse a header's JSON and check that it describes exactly `data`; see `parse_tensor_file`."""
    try:
        header = safetensors_header.parse_header(text)
    except BadHeader as error:
        raise Corrupt(f"{what}: {error}") from error
    tensors = {key: _stored(key, entry, what) for key, entry in header.tensors.items()}
    _check_no_holes(tensors, len(data), what)
    return TensorFile(header.metadata, tensors, data)


def header_bytes(tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a file that holds `tensors` in `storage_order`."""
    ordered = {key: tensors[key] for key in storage_order(tensors)}
    return safetensors_header.framed(header_text(ordered, metadata))


def header_text(tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str]) -> bytes:
    """Return the JSON that describes `tensors` one after another in the order given."""
    entries = (
        (
            key,
            _NAMES[tensor.dtype],
            tensor.shape,
            tensor.n_bytes if isinstance(tensor, Stored) else tensor.nbytes,
        )
        for key, tensor in tensors.items()
    )
    return safetensors_header.header_json(entries, metadata)


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


def _stored(key: str, entry: HeaderEntry, what: str) -> Stored:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise UnsupportedVersion(
            f"{what}: {key!r:.80} has dtype {entry.dtype!r:.20}, not one of {', '.join(_DTYPES)}"
        )
    # Empty tensors have no use here, and their other sizes would have no bound.
    if not 0 < math.prod(entry.shape) * dtype.itemsize == entry.end - entry.start:
        raise WrongShape(f"{what}: {key!r:.80} has a shape that does not fill its bytes")
    return Stored(dtype, entry.shape, entry.start, entry.end)


def _check_no_holes(tensors: Mapping[str, Stored], n_bytes: int, what: str) -> None:
    position = 0
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.end)):
        if stored.start != position:
            raise Corrupt(f"{what}: tensors overlap or leave a hole")
        position = stored.end
    if position != n_bytes:
        raise Corrupt(f"{what}: {n_bytes} bytes of data where the header promises {position}")
