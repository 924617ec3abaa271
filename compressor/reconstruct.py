"""Turn base + delta back into an ordinary Hugging Face model directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.artifact import Artifact, read_artifact
from compressor.atomic import RunLock, publish_directory, recover_directory
from compressor.checkpoint import Checkpoint, resolve
from compressor.codecs import TensorDelta
from compressor.companions import copy_companions
from compressor.errors import InputError, OutputError, WrongShape
from compressor.identity import base_identity
from compressor.layout import Parameter, read_layout
from compressor.weights import Outgoing, write_weights

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_SHARD_BYTES = 5_000_000_000  # as transformers splits

Progress = Callable[[str, int, int], None]


def reconstruct(
    base: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write the fine-tune that `delta` describes to `out`, as transformers loads it.

    base, delta  directories or Hub ids (``org/name@revision``)
    dtype        ``float32``, ``float16`` or ``bfloat16`` for all weights; default: the fine-tune's
                 own (and for tensors stored exactly, the dtype they are stored in)

    Weights are ``W_base + dW`` computed in float32 and rounded once. Raises WrongBase for any
    other base, and the other errors of `read_artifact`; then nothing appears at `out`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    with Checkpoint(base) as checkpoint:
        artifact = read_artifact(resolve(delta), base_identity=base_identity(checkpoint.path))
        tensors = _outgoing(checkpoint, artifact, dtype)
        with _published(Path(os.path.abspath(out)), overwrite) as folder:
            total, done = sum(tensor.n_bytes for tensor in tensors), 0
            for tensor in write_weights(folder, tensors, max_shard_bytes):
                done += tensor.n_bytes
                (progress or _silent)("write", done, total)
            config = _config(checkpoint, artifact, dtype)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            dropped = artifact.config.finetuned_details.get("dropped_files", [])
            copy_companions(checkpoint.path, folder, artifact.aux, dropped)
    return Path(out)


@contextmanager
def _published(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `out` if the block succeeds and vanishes if not."""
    staged = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with RunLock(out):
            recover_directory(out)
            _check_output(out, overwrite)
            shutil.rmtree(staged, ignore_errors=True)
            try:
                staged.mkdir()
                yield staged
                _flush(staged)
                publish_directory(staged, out)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _check_output(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OutputError(f"{out} exists; remove it or ask for it to be overwritten")
    if not (out / "config.json").is_file():
        raise OutputError(f"{out} exists and is not a model directory; not overwritten")


def _outgoing(base: Checkpoint, artifact: Artifact, dtype: str | None) -> list[Outgoing]:
    """List every parameter of the fine-tune, to be made when it is written."""
    layout = read_layout(base.path)
    keys = layout.keys(base.tensors, base.name)
    deltas = {delta.name: delta for delta in artifact.tensors}
    if unknown := sorted(deltas.keys() - layout.parameters.keys()):
        raise WrongShape(f"{unknown[0]}: the base has no parameter of that name")
    own = str(artifact.config.finetuned_details.get("dtype", artifact.config.base.dtype))
    general = DTYPES.get(dtype or own, torch.float32)
    outgoing = []
    for name, parameter in layout.parameters.items():
        delta = deltas.get(name)
        chosen = general
        if dtype is None and delta is not None and delta.exact is not None and not delta.terms:
            chosen = delta.exact.values.dtype
        outgoing.append(_plan_one(base, keys[name], parameter, delta, chosen))
    return outgoing


def _plan_one(
    base: Checkpoint,
    key: str,
    parameter: Parameter,
    delta: TensorDelta | None,
    dtype: torch.dtype,
) -> Outgoing:
    if delta is None:
        shape = base.tensors[key].shape
        return Outgoing(parameter.name, dtype, shape, partial(base.rows, key))
    if delta.transposed != parameter.transposed or delta.base_shape != parameter.shape:
        raise WrongShape(
            f"{parameter.name}: the delta is for shape {list(delta.base_shape)}, the base has "
            f"{list(parameter.shape)}"
        )
    shape = delta.shape[::-1] if delta.transposed else delta.shape
    return Outgoing(parameter.name, dtype, shape, partial(_merged, base, key, delta))


def _merged(base: Checkpoint, key: str, delta: TensorDelta) -> Tensor:
    stored = base.rows(key)
    merged = delta.merge(stored.T if delta.transposed else stored)
    return merged.T if delta.transposed else merged


def _config(base: Checkpoint, artifact: Artifact, dtype: str | None) -> dict[str, Any]:
    """config.json of the fine-tune: the base's with what the fine-tune changed."""
    details = artifact.config.finetuned_details
    changes: dict[str, Any] = details.get("config", {})
    config = {key: value for key, value in base.config.items() if key != "torch_dtype"}
    own = details.get("dtype", artifact.config.base.dtype)
    return config | changes | {"dtype": dtype or own}


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total
