"""Write a Hugging Face model directory, tensor by tensor, complete or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.atomic import RunLock, publish_directory, recover_directory
from compressor.checkpoint.files import DTYPE_NAMES, INTEGER_DTYPES
from compressor.checkpoint.files import DTYPES as STORED_DTYPES
from compressor.checkpoint.headers import slice_name
from compressor.checkpoint.layout import Layout
from compressor.errors import InputError, OutputError
from compressor.progress import Progress
from compressor.safetensors_header import framed, header_json

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_SHARD_BYTES = 5_000_000_000  # as transformers splits
_CODES = {dtype: code for code, dtype in (STORED_DTYPES | INTEGER_DTYPES).items()}


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


def narrowed(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return float values in `dtype`, or whole numbers in a dtype of those.

    Raises InputError naming the tensor, the value and the remedy where a finite value would become
    infinite: beyond 65504 in float16. (NaN and infinities that are there already stay.)
    """
    cast = values.to(dtype)
    if not dtype.is_floating_point:
        return cast
    if torch.finfo(dtype).max >= torch.finfo(values.dtype).max or bool(cast.isfinite().all()):
        return cast
    lost = cast.isinf() & values.isfinite()
    if bool(lost.any()):
        worst = values[lost][values[lost].abs().argmax()]
        wider = "bfloat16 or float32" if dtype is torch.float16 else "float32"
        raise InputError(
            f"{name}: the value {float(worst):.6g} is beyond what {DTYPE_NAMES[dtype]} can hold "
            f"({torch.finfo(dtype).max:.6g}) and would become infinite; write {wider} (--dtype, or "
            "out_dtype of a recipe)"
        )
    return cast


@contextmanager
def published(out: str | Path, overwrite: bool, marker: str = "config.json") -> Iterator[Path]:
    """Yield a folder to fill, which becomes `out` if the block succeeds and vanishes if not.

    overwrite  replace a directory that is there, if it holds a file called `marker`

    Raises OutputError if `out` exists, is being written by another run, or cannot be written.
    """
    final = Path(os.path.abspath(out))
    staged = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with RunLock(final):
            recover_directory(final)
            _check_output(final, overwrite, marker)
            shutil.rmtree(staged, ignore_errors=True)
            try:
                staged.mkdir()
                yield staged
                _flush(staged)
                publish_directory(staged, final)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot write {final}: {error.strerror or error}") from error


def write_model(
    folder: Path,
    layout: Layout,
    tensors: Sequence[Outgoing],
    config: dict[str, Any],
    progress: Progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights and ``config.json``.

    tensors  one per parameter of `layout`, in ``[out, in]`` order turned as the checkpoint has it
    """
    stored = _as_stored(layout, tensors)
    total, done = sum(tensor.n_bytes for tensor in stored), 0
    for tensor in write_weights(folder, stored, max_shard_bytes):
        done += tensor.n_bytes
        progress("write", done, total)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _as_stored(layout: Layout, tensors: Sequence[Outgoing]) -> list[Outgoing]:
    """Give tensors the names the base's checkpoint has, and stack experts as it does."""
    by_name = {tensor.name: tensor for tensor in tensors}
    whole_of = {
        slice_name(name, index): name
        for name, count in layout.stacked.items()
        for index in range(count)
    }
    stored: list[Outgoing] = []
    done: set[str] = set()
    for tensor in tensors:
        name = whole_of.get(tensor.name, tensor.name)
        if name in done:
            continue
        done.add(name)
        parts = [tensor]
        shape = tensor.shape
        if name in layout.stacked:
            count = layout.stacked[name]
            parts = [by_name[slice_name(name, index)] for index in range(count)]
            shape = (count, *shape)
        load = _Chained(tuple(parts))
        stored.append(Outgoing(layout.stored_name(name), tensor.dtype, shape, load))
    return stored


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
    entries = ((t.name, _CODES[t.dtype], t.shape, t.n_bytes) for t in tensors)
    with file.open("wb") as stream:
        stream.write(framed(header_json(entries, {"format": "pt"})))
        for tensor in tensors:
            for piece in tensor.load():
                values = narrowed(piece, tensor.dtype, tensor.name).contiguous()
                stream.write(values.reshape(-1).view(torch.uint8).numpy().data)
            yield tensor


class _Chained:
    """The parts of several tensors, one after the other."""

    def __init__(self, tensors: tuple[Outgoing, ...]) -> None:
        self._tensors = tensors

    def __call__(self) -> Iterator[Tensor]:
        return chain.from_iterable(tensor.load() for tensor in self._tensors)


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _check_output(out: Path, overwrite: bool, marker: str) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OutputError(f"{out} exists; remove it or ask for it to be overwritten")
    if not (out / marker).is_file():
        raise OutputError(f"{out} exists and holds no {marker}; not overwritten")
