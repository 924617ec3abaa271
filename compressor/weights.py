"""Write safetensors files one tensor at a time, split into shards."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor.checkpoint import DTYPES

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor to be written; `load` makes it when its turn comes, in pieces of whole rows."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Iterable[Tensor]]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path, tensors: Sequence[Outgoing], max_shard_bytes: int
) -> Iterator[Outgoing]:
    """Write ``model.safetensors``, or shards with their index; yields each tensor when written."""
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        yield from _write(folder / "model.safetensors", shards[0])
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        yield from _write(folder / file, shard)
        where |= {tensor.name: file for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.n_bytes for tensor in tensors)},
        "weight_map": where,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _split(tensors: Sequence[Outgoing], max_bytes: int) -> list[list[Outgoing]]:
    shards: list[list[Outgoing]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.n_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.n_bytes
    return shards


def _write(file: Path, tensors: Sequence[Outgoing]) -> Iterator[Outgoing]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.n_bytes],
        }
        position += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for piece in tensor.load():
                values = piece.to(tensor.dtype).contiguous()
                stream.write(values.reshape(-1).view(torch.uint8).numpy().data)
            yield tensor
