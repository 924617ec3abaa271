"""Read a Hugging Face safetensors checkpoint lazily: single file or sharded, local or from the Hub.

Bytes are fetched with ``pread`` into buffers of our own rather than through a memory map, so the
memory of a run is what it holds and not whatever the kernel has mapped.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from compressor.checkpoint.hub import (
    cached_ref,
    fetch_artifact,
    fetch_files,
    fetch_settings,
    parse_ref,
)
from compressor.errors import CheckpointError
from compressor.safetensors_header import (
    LENGTH_BYTES,
    BadHeader,
    HeaderEntry,
    parse_header,
    parse_length,
)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_CHUNK_BYTES = 8 << 20
_SLICE = re.compile(r"(?P<name>.+)\[(?P<index>0|[1-9][0-9]{0,5})\]")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER = "adapter_config.json"
_DELTA = "delta_config.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: ``n_bytes`` from ``offset`` in `file`, row-major."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class TensorIndex(dict[str, StoredTensor]):
    """Tensors by name. Of a 3-D tensor ``X``, ``X[i]`` is the matrix ``i``, though not listed."""

    def __missing__(self, key: str) -> StoredTensor:
        match = _SLICE.fullmatch(key)
        if match is None or match["name"] not in self:
            raise KeyError(key)
        whole, index = self[match["name"]], int(match["index"])
        if len(whole.shape) != 3 or index >= whole.shape[0]:
            raise CheckpointError(
                f"{whole.file}: tensor {match['name']} has shape {list(whole.shape)}; "
                f"config.json asks for a matrix number {index} in it"
            )
        n_bytes = whole.n_bytes // whole.shape[0]
        offset = whole.offset + index * n_bytes
        return StoredTensor(whole.file, whole.dtype, whole.shape[1:], offset, n_bytes)


def slice_name(name: str, index: int) -> str:
    """Name of one matrix of a 3-D tensor."""
    return f"{name}[{index}]"


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
            for key, tensor in _read_header(file).items():
                if key in self.tensors:
                    raise CheckpointError(f"{name}: tensor {key} is in two shards")
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
        stored = self.tensors[name]
        dtype = self.dtype(name)
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
                raise CheckpointError(f"{stored.file} became shorter while it was read")
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

    path      the local directory
    config    the parsed ``config.json``
    name      the directory's name, or the Hub id without a revision
    revision  the commit, if it came from the Hub
    """

    def __init__(self, path: str | Path) -> None:
        self.path = resolve(path)
        self.config = read_model_config(self.path)
        ref = cached_ref(self.path)
        self.revision = ref.revision if ref else None
        super().__init__(ref.repo if ref else self.path.resolve().name, _weight_files(self.path))


def resolve(path: str | Path) -> Path:
    """Return the local directory of a model, adapter or delta given by path or by Hub id.

    From the Hub come the safetensors weights and the files beside them, nothing else.
    """
    local = Path(path)
    if local.is_dir():
        return local
    if local.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds the model")
    ref = parse_ref(str(path))
    if ref is None:
        raise CheckpointError(
            f"{path}: no such directory, and not a Hub id such as org/name or org/name@revision"
        )
    folder = fetch_settings(ref)
    if (folder / _DELTA).is_file():
        return fetch_artifact(ref, folder)
    if (folder / _ADAPTER).is_file():
        fetch_files(ref, folder, ["adapter_model.safetensors"])
    else:
        read_model_config(folder)  # refused before its weights are fetched
        names = _shard_names(folder) if (folder / _INDEX).is_file() else [_SINGLE]
        fetch_files(ref, folder, names)
    return folder


def stored_names(path: Path) -> set[str]:
    """Names of all tensors of a model directory; only headers are read."""
    return {name for file in _weight_files(path) for name in _read_header(file)}


def read_model_config(path: Path) -> dict[str, Any]:
    """Read ``config.json`` and refuse what only remote code or a quantiser could load."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no config.json; not a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    if "auto_map" in config:
        raise CheckpointError(
            f"{file} has auto_map, which asks for code from the model's repository to be run; "
            "only architectures that transformers itself ships are supported"
        )
    if "quantization_config" in config:
        raise CheckpointError(
            f"{file}: the checkpoint is quantised; give the original 16- or 32-bit weights"
        )
    return config


def _weight_files(path: Path) -> list[Path]:
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    if (path / _INDEX).is_file():
        return _sharded_files(path)
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{path} holds {pickled[0]}, a pickle, which can run code when it is read. Convert it "
            f'once where you trust it: python -c "from transformers import AutoModelForCausalLM '
            f"as M, AutoTokenizer as T; d, o = '{path}', '{path}-safetensors'; "
            f"M.from_pretrained(d, dtype='auto').save_pretrained(o); "
            f'T.from_pretrained(d).save_pretrained(o)"'
        )
    raise CheckpointError(f"{path}: neither {_SINGLE} nor {_INDEX} is there")


def _sharded_files(path: Path) -> list[Path]:
    names = _shard_names(path)
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: shard {name} is missing; download the model again")
    return [path / name for name in names]


def _shard_names(path: Path) -> list[str]:
    index = path / _INDEX
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name):
            raise CheckpointError(f"{index} names a shard outside its own directory: {name!r}")
    return names


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = parse_length(stream.read(LENGTH_BYTES))
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - LENGTH_BYTES):
                raise CheckpointError(f"{file} is not a complete safetensors file")
            header = parse_header(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except BadHeader as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
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
    known = DTYPES.get(entry.dtype)
    if known is not None and math.prod(entry.shape) * known.itemsize != n_bytes:
        raise CheckpointError(
            f"{file} is not a safetensors file: size and shape of {name} disagree"
        )
    return StoredTensor(file, entry.dtype, entry.shape, data_start + entry.start, n_bytes)
