"""Load a model with transformers, its weights dequantised once if they are stored quantised.

Weights come through `Checkpoint`, so a model has the values, bit for bit, that a delta was made
against. Everything else is transformers' own loading: names, merged experts, ties, buffers.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.folder import read_model_config
from compressor.checkpoint.layout import transformers_config
from compressor.checkpoint.model_class import language_model
from compressor.checkpoint.quantised.settings import quantisation_of
from compressor.errors import CheckpointError

_OF_FILES = ("local_files_only", "use_safetensors")


def load_causal_lm(path: Path, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Return a transformers language model on the CPU.

    dtype    None: as stored
    options  for ``from_pretrained``

    Raises what ``from_pretrained`` raises, and CheckpointError where weights are not all there, or
    quantised ones more than the model has, or values are beyond what float16 can hold.
    """
    model = _load(path, dtype, options)
    if dtype == torch.float16:
        _check_range(path, model)
    return model


def _check_range(path: Path, model: Any) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{path}: tensor {name} has a value beyond what float16 can hold (65504); take "
                "another dtype (--dtype bfloat16)"
            )


def _load(path: Path, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
    if quantisation_of(read_model_config(path)) is not None:
        return _load_dequantised(path, dtype, options)
    chosen = "auto" if dtype is None else dtype
    kind, config = language_model(transformers_config(path))
    model, found = kind.from_pretrained(
        path, config=config, dtype=chosen, output_loading_info=True, **options
    )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{path}: the files hold no tensor {missing[0]}, which transformers would start at "
            f"random ({len(missing)} in all); give the whole checkpoint, saved from inside any "
            "wrapper"
        )
    return model


def _load_dequantised(path: Path, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
    kind, config = language_model(transformers_config(path))
    with Checkpoint(path) as checkpoint:
        lock = Lock()
        weights = {name: _Unread(checkpoint, name, lock) for name in checkpoint.tensors}
        stored = next(iter(weights.values())).dtype if dtype is None else dtype
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=stored,
            **{key: value for key, value in options.items() if key not in _OF_FILES},
            output_loading_info=True,
        )
    for what, names in (("is missing from", "missing_keys"), ("is no part of", "unexpected_keys")):
        if found[names]:
            first = min(found[names])
            raise CheckpointError(
                f"{checkpoint.name}: tensor {first} {what} the model; download it again"
            )
    return model


class _Unread:
    """A tensor that transformers reads when its turn comes, as it does with safetensors' slices.

    One at a time is dequantised, whatever the number of threads that ask.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, lock: Lock) -> None:
        self._checkpoint, self._name, self._lock = checkpoint, name, lock
        self.shape = checkpoint.tensors[name].shape
        self.dtype = checkpoint.dtype(name)

    def __getitem__(self, _: object) -> Tensor:
        with self._lock:
            return self._checkpoint.read_rows(self._name)
