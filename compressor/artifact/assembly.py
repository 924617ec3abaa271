"""``delta.safetensors`` put together out of staged tensors, entropy coded where that pays.

The bytes go straight to where they stay. Without a path they are only counted, by doing the same:
no size is ever estimated from anything but bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.artifact.config import TensorEntry
from compressor.artifact.entropy import code_headers, code_tensors
from compressor.artifact.staging import StagedTensor
from compressor.artifact.tensor_file import METADATA, Stored, header_bytes, storage_order
from compressor.atomic import write_new

GroupOf = Callable[[TensorEntry, bool], str]
"""(tensor, whether of its exact rows) -> group in the byte table."""


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """What ``delta.safetensors`` came to.

    n_bytes  of the file
    raw, stored  by group of the byte table, before coding and as on disk; without headers
    is_coded  whether the file is entropy coded
    """

    n_bytes: int
    raw: dict[str, int]
    stored: dict[str, int]
    is_coded: bool

    @property
    def header_bytes(self) -> int:
        """Of all headers as on disk."""
        return self.n_bytes - sum(self.stored.values())


def assemble(
    tensors: Sequence[StagedTensor],
    group_of: GroupOf,
    path: Path | None,
    *,
    coded: bool,
    always: bool = False,
) -> TensorBytes:
    """Write ``delta.safetensors`` to `path`, which must not exist, or only count if it is None.

    coded   entropy code, unless that does not pay or a reader would not take it for honest
    always  code whatever comes of it
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    final, group = _final(ordered, group_of)

    def read(key: str) -> Iterator[bytes]:
        index, _, inner = key.partition(".")
        return ordered[int(index)].chunks(inner)

    raw = Counter[str]()
    for key, stored in final.items():
        raw[group(key)] += stored.n_bytes
    table = dict(sorted(raw.items()))
    header = header_bytes(final, METADATA)
    n_plain = len(header) + sum(table.values())
    if coded:
        found = code_tensors(final, group, read, path)
        if always or (found.is_readable and found.n_bytes < n_plain):
            return TensorBytes(found.n_bytes, table, found.coded_bytes, True)
        if path is not None:
            path.unlink()
    if path is not None:
        write_new(path, _plain_chunks(header, final, read))
    return TensorBytes(n_plain, table, table, False)


def headers_bytes(tensors: Sequence[StagedTensor], group_of: GroupOf, *, coded: bool) -> int:
    """Bytes of all headers of ``delta.safetensors`` with these tensors, whose data is not read."""
    final, group = _final(sorted(tensors, key=lambda tensor: tensor.name), group_of)
    return code_headers(final, group).n_bytes if coded else len(header_bytes(final, METADATA))


def _final(
    ordered: Sequence[StagedTensor], group_of: GroupOf
) -> tuple[dict[str, Stored], Callable[[str], str]]:
    """The parts by their keys in the file, and the group of a key."""

    def group(key: str) -> str:
        index, _, inner = key.partition(".")
        return group_of(ordered[int(index)].entry, inner == "exact")

    final = {
        f"{index}.{key}": stored
        for index, tensor in enumerate(ordered)
        for key, stored in tensor.parts.items()
    }
    return final, group


def _plain_chunks(
    header: bytes, final: dict[str, Stored], read: Callable[[str], Iterator[bytes]]
) -> Iterator[bytes]:
    yield header
    for key in storage_order(final):
        yield from read(key)
