"""Read a Hugging Face safetensors checkpoint lazily: single file or sharded, local or from the Hub.

Bytes are fetched with ``pread`` into buffers of our own rather than through a memory map, so the
memory of a run is what it holds and not whatever the kernel has mapped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from compressor.checkpoint.folder import read_model_config, resolve, weight_files
from compressor.checkpoint.headers import StoredTensor, TensorIndex, read_header, split_slice
from compressor.checkpoint.hub import cached_ref
from compressor.checkpoint.quantised.index import DenseIndex, dense_index
from compressor.checkpoint.quantised.settings import dense_config, quantisation_of
from compressor.checkpoint.quantised.values import dequantise
from compressor.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGER_DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
# What only tensors of quantised weights are stored in.
_FLOAT8_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_CHUNK_BYTES = 8 << 20

Piece = tuple[str, int, int]
"""A tensor, and which of its rows: first, and first that is none of them."""


class TensorFiles:
    """Tensors in one or several safetensors files. Use as a context manager, or `close` it.

    name     what to call them in messages and records
    tensors  every tensor by its name in the files
    n_bytes  size of the files on disk
    """

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        self.name = name
        self.tensors = TensorIndex()
        for file in files:
            for key, tensor in read_header(file).items():
                if key in self.tensors:
                    raise CheckpointError(
                        f"{name}: tensor {key} is in two shards; save the model again with "
                        "save_pretrained"
                    )
                self.tensors[key] = tensor
        self.n_bytes = sum(file.stat().st_size for file in files)
        self._fds: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype; refuses integers, float8 and the like."""
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.name}: tensor {name} is stored as {stored.dtype}; only "
                f"{', '.join(DTYPES)} can be read. Convert the model to bfloat16 first"
            )
        return DTYPES[stored.dtype]

    def read_rows(self, name: str, row_start: int = 0, row_end: int | None = None) -> Tensor:
        """Return rows ``[row_start, row_end)`` in the stored dtype (all of it by default)."""
        return self._rows(self.tensors[name], self.dtype(name), row_start, row_end)

    def integer_dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype; refuses floats."""
        stored = self.tensors[name]
        if stored.dtype not in INTEGER_DTYPES:
            raise CheckpointError(
                f"{self.name}: tensor {name} is stored as {stored.dtype}, and the architecture has "
                "whole numbers there; save the model again with transformers"
            )
        return INTEGER_DTYPES[stored.dtype]

    def read_stored(self, name: str) -> Tensor:
        """Return a whole tensor of floats or of whole numbers in its stored dtype."""
        stored = self.tensors[name]
        if stored.dtype in INTEGER_DTYPES:
            return self._rows(stored, self.integer_dtype(name), 0, None)
        return self.read_rows(name)

    def _rows(
        self, stored: StoredTensor, dtype: torch.dtype, row_start: int, row_end: int | None
    ) -> Tensor:
        if not stored.shape:
            return self._read(stored, 0, 1, dtype).reshape(())
        width = math.prod(stored.shape[1:])
        end = stored.shape[0] if row_end is None else row_end
        flat = self._read(stored, row_start * width, (end - row_start) * width, dtype)
        return flat.reshape(end - row_start, *stored.shape[1:])

    def slice(
        self, name: str, row_start: int, row_end: int, col_start: int, col_end: int
    ) -> Tensor:
        """Return a block of a 2-D tensor as stored (not turned round), as new float32.

        Whole rows are read a few MiB at a time and cut: with rows of a few pages, seeking
        inside them saves the disk nothing.
        """
        n = self.tensors[name].shape[1]
        out = torch.empty(row_end - row_start, col_end - col_start, dtype=torch.float32)
        step = max(1, _CHUNK_BYTES // (4 * n))
        for start in range(row_start, row_end, step):
            end = min(start + step, row_end)
            out[start - row_start : end - row_start] = self.read_rows(name, start, end)[
                :, col_start:col_end
            ]
        return out

    def oriented_rows(self, name: str, row_start: int, row_end: int, transposed: bool) -> Tensor:
        """Return rows of a tensor in ``[out, in]`` orientation; float32 if it is `transposed`."""
        if not transposed:
            return self.read_rows(name, row_start, row_end)
        return self.slice(name, 0, self.tensors[name].shape[0], row_start, row_end).T

    def _read(self, stored: StoredTensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
        if count == 0:
            return torch.empty(0, dtype=dtype)
        buffer = bytearray(count * dtype.itemsize)
        view = memoryview(buffer)
        position = stored.offset + first * dtype.itemsize
        while view:
            n_read = _read_at(self._fd(stored.file), view[:_CHUNK_BYTES], position)
            if n_read == 0:
                raise CheckpointError(
                    f"{stored.file} became shorter while it was read; run again once it is whole"
                )
            view = view[n_read:]
            position += n_read
        return torch.frombuffer(buffer, dtype=dtype)

    def _fd(self, file: Path) -> int:
        if file not in self._fds:
            try:
                self._fds[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
        return self._fds[file]


def _read_at(descriptor: int, view: memoryview, position: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], position)
    data = os.pread(descriptor, len(view), position)  # macOS before 11
    view[: len(data)] = data
    return len(data)


class Checkpoint(TensorFiles):
    """One model, given by its directory or its Hub id, ``org/name`` or ``org/name@revision``.

    Weights that are stored quantised are read as the dense model's: `tensors`, `config` and what is
    read are as if it had been saved so, in the dtype that ``config.json`` says. The matrix that was
    read last is kept.

    path           the local directory
    config         the parsed ``config.json``, without what it says of quantised weights
    name           the directory's name, or the Hub id without a revision
    revision       the commit, if it came from the Hub
    quantisation   how the weights are stored, or None
    stored         the tensors as the files have them
    stored_config  ``config.json`` as it is
    """

    def __init__(self, path: str | Path) -> None:
        self.path = resolve(path)
        self.stored_config = read_model_config(self.path)
        self.config = dense_config(self.stored_config)
        ref = cached_ref(self.path)
        self.revision = ref.revision if ref else None
        super().__init__(ref.repo if ref else self.path.resolve().name, weight_files(self.path))
        self.stored = self.tensors
        self.quantisation = quantisation_of(self.stored_config)
        self._last: tuple[str, Tensor] | None = None
        self._pieces: dict[str, list[Piece]] = {}
        if self.quantisation is not None:
            self.tensors = dense_index(self.stored, self.quantisation, self.name)

    def compose(self, name: str, pieces: Sequence[Piece]) -> None:
        """Let `name`, which is not listed, be the rows of `pieces` one below the other."""
        first = self.tensors[pieces[0][0]]
        n_rows = sum(end - start for _, start, end in pieces)
        width = math.prod(first.shape[1:])
        for key, start, end in pieces:
            piece = self.tensors[key]
            fits = len(piece.shape) == 2 and piece.shape[1] == width
            if not fits or piece.dtype != first.dtype or not 0 <= start < end <= piece.shape[0]:
                raise CheckpointError(
                    f"{self.name}: tensor {key} of shape {list(piece.shape)} does not fit beside "
                    f"{pieces[0][0]}, of shape {list(first.shape)}, in {name}; save the model "
                    "again with save_pretrained"
                )
        n_bytes = n_rows * (first.n_bytes // first.shape[0])
        self._pieces[name] = list(pieces)
        self.tensors.composed[name] = replace(
            first, shape=(n_rows, width), offset=0, n_bytes=n_bytes
        )

    def _composed_rows(self, name: str, row_start: int, row_end: int | None) -> Tensor:
        n_rows, width = self.tensors[name].shape
        stop = n_rows if row_end is None else row_end
        parts, place = [torch.empty(0, width, dtype=self.dtype(name))], 0
        for key, start, end in self._pieces[name]:
            first, last = max(row_start - place, 0), min(stop - place, end - start)
            if first < last:
                parts.append(self.read_rows(key, start + first, start + last))
            place += end - start
        return torch.cat(parts)

    def read_rows(self, name: str, row_start: int = 0, row_end: int | None = None) -> Tensor:
        if name in self._pieces:
            return self._composed_rows(name, row_start, row_end)
        if not isinstance(self.tensors, DenseIndex):
            return super().read_rows(name, row_start, row_end)
        whole, member = split_slice(name)
        if whole not in self.tensors.forms:
            return super().read_rows(name, row_start, row_end)
        self.tensors[name]  # refuses a matrix that is not there
        last = self._last
        if last is None or last[0] != name:
            form = self.tensors.forms[whole]
            last = name, dequantise(form, self._stored_rows, self.dtype(name), name, member)
            self._last = last
        return last[1][row_start:row_end].clone()

    def _stored_rows(self, name: str, row_start: int, row_end: int | None) -> Tensor:
        stored = self.stored[name]
        return self._rows(
            stored, (DTYPES | INTEGER_DTYPES | _FLOAT8_DTYPES)[stored.dtype], row_start, row_end
        )
