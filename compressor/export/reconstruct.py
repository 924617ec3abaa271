"""Turn base + delta back into an ordinary Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.artifact.identity import base_identity
from compressor.artifact.reader import Artifact, read_artifact
from compressor.checkpoint.companions import copy_companions
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.folder import resolve
from compressor.checkpoint.layout import Layout, Parameter, read_layout
from compressor.checkpoint.outputs import check_dtype, check_output
from compressor.checkpoint.pairing import stored_dtype
from compressor.checkpoint.settings import with_changes
from compressor.checkpoint.writer import (
    DTYPES,
    MAX_SHARD_BYTES,
    Outgoing,
    published,
    write_model,
)
from compressor.codecs import TensorDelta
from compressor.errors import WrongShape
from compressor.progress import Progress, silent


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
    check_dtype(dtype)
    check_output(out, [base, delta])
    with Checkpoint(base) as checkpoint:
        artifact = read_artifact(resolve(delta), base_identity=base_identity(checkpoint.path))
        layout = read_layout(checkpoint.path).with_untied(artifact.config.base.untied)
        tensors = _outgoing(checkpoint, layout, artifact, dtype)
        with published(out, overwrite) as folder:
            config = _config(checkpoint, artifact, dtype)
            write_model(folder, layout, tensors, config, progress or silent, max_shard_bytes)
            dropped = artifact.config.finetuned_details.get("dropped_files", [])
            copy_companions(checkpoint.path, folder, artifact.aux, dropped)
    return Path(out)


def _outgoing(
    base: Checkpoint, layout: Layout, artifact: Artifact, dtype: str | None
) -> list[Outgoing]:
    """List every parameter of the fine-tune, to be made when it is written."""
    keys = layout.keys(base.tensors, base.name)
    deltas = {delta.name: delta for delta in artifact.tensors}
    if unknown := sorted(deltas.keys() - layout.parameters.keys()):
        raise WrongShape(f"{unknown[0]}: the base has no parameter of that name")
    own = str(artifact.config.finetuned_details.get("dtype", artifact.config.base.dtype))
    general = DTYPES.get(dtype or own, torch.float32)
    outgoing = []
    for name, parameter in layout.parameters.items():
        delta, key = deltas.get(name), keys[name]
        if parameter.integral:
            chosen = stored_dtype(base, key, parameter)
        elif dtype is not None:
            chosen = general
        elif delta is None:
            usual = DTYPES.get(artifact.config.base.dtype)
            chosen = _kept_dtype(base.dtype(key), usual, general)
        else:
            chosen = general if delta.exact is None or delta.terms else delta.exact.values.dtype
        outgoing.append(_plan_one(base, key, parameter, delta, chosen))
    return outgoing


def _kept_dtype(
    stored: torch.dtype, usual: torch.dtype | None, general: torch.dtype
) -> torch.dtype:
    """The dtype of a tensor that the fine-tune left alone: the fine-tune's, but float32 stays where
    the base keeps it among tensors of fewer bits (routing, decays), for its values need it.

    usual  of the base's tensors
    """
    return stored if stored == torch.float32 != usual else general


def _plan_one(
    base: Checkpoint,
    key: str,
    parameter: Parameter,
    delta: TensorDelta | None,
    dtype: torch.dtype,
) -> Outgoing:
    shape = base.tensors[key].shape
    if delta is None:
        return Outgoing(parameter.name, dtype, shape, partial(_copied, base, key))
    if not parameter.takes(delta):
        raise WrongShape(
            f"{parameter.name}: the delta is for shape {list(delta.base_shape)}, the base has "
            f"{list(parameter.shape)}"
        )
    if delta.shape != delta.base_shape:
        shape = delta.shape[::-1] if delta.transposed else delta.shape
    return Outgoing(parameter.name, dtype, shape, partial(_merged, base, key, delta))


def _copied(base: Checkpoint, key: str) -> Iterator[Tensor]:
    yield base.read_stored(key)


def _merged(base: Checkpoint, key: str, delta: TensorDelta) -> Iterator[Tensor]:
    yield delta.applied_to_stored(base.read_stored(key))


def _config(base: Checkpoint, artifact: Artifact, dtype: str | None) -> dict[str, Any]:
    """config.json of the fine-tune: the base's with what the fine-tune changed."""
    details = artifact.config.finetuned_details
    changes: dict[str, Any] = details.get("config", {})
    config = {key: value for key, value in base.config.items() if key != "torch_dtype"}
    own = details.get("dtype", artifact.config.base.dtype)
    if artifact.config.base.untied:
        changes = changes | _untying(config)
    return with_changes(config, changes) | {"dtype": dtype or own}


def _untying(config: dict[str, Any]) -> dict[str, Any]:
    """What unties the weights of a model with this config.json."""
    text = config.get("text_config")
    inner = {"text_config": {"tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {"tie_word_embeddings": False, **inner}
