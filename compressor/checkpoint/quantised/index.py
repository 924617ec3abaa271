"""A quantised checkpoint as the dense one it stands for: names, dtypes and shapes.

Headers and ``config.json`` are all that is read, before anything else is done with the checkpoint:
a form that does not fit together is refused here. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from compressor.checkpoint.folder import read_model_config
from compressor.checkpoint.headers import FLOATS, TensorIndex, stored_tensors
from compressor.checkpoint.quantised.forms import Form
from compressor.checkpoint.quantised.integers import find_awq, find_gptq
from compressor.checkpoint.quantised.parts import FLOAT8, Parts
from compressor.checkpoint.quantised.scaled import (
    find_bitsandbytes,
    find_compressed,
    find_fp8,
    find_mxfp4,
)
from compressor.checkpoint.quantised.settings import Quantisation, quantisation_of
from compressor.errors import CheckpointError

Find = Callable[[Parts, Quantisation], Iterator[tuple[str, Form]]]
_FINDERS: dict[str, Find] = {
    "fp8": find_fp8,
    "fbgemm_fp8": find_fp8,
    "gptq": find_gptq,
    "awq": find_awq,
    "compressed-tensors": find_compressed,
    "bitsandbytes": find_bitsandbytes,
    "mxfp4": find_mxfp4,
}
_CODES = (*FLOAT8, "F8_E8M0", "I8", "U8", "F4")  # never a dense model's matrices


class DenseIndex(TensorIndex):
    """Tensors as the dense model has them. Of those in `forms`, no file has the bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: dict[str, Form] = {}


def dense_index(stored: TensorIndex, quantisation: Quantisation, owner: str) -> DenseIndex:
    """Describe the dense model. Raises CheckpointError for tensors that do not fit together.

    owner  names the checkpoint in messages
    """
    parts = Parts(stored, owner)
    dense = DenseIndex()
    for name, form in _FINDERS[quantisation.method](parts, quantisation):
        if name in dense.forms:
            raise CheckpointError(
                f"{owner}: tensor {name} is quantised twice; save the model again"
            )
        dense.forms[name] = form
    left = {name: tensor for name, tensor in stored.items() if name not in parts.taken}
    for name, tensor in left.items():
        if name in dense.forms:
            raise CheckpointError(
                f"{owner}: tensor {name} is stored quantised and as it is; save the model again"
            )
        if tensor.dtype in _CODES and len(tensor.shape) > 1:
            raise parts.wrong(name, f"is stored as {tensor.dtype} without what belongs to it")
    dense |= left
    for name, form in dense.forms.items():
        some = next(iter(stored.values()))
        n_bytes = math.prod(form.shape) * FLOATS[quantisation.dtype]
        dense[name] = replace(
            some, dtype=quantisation.dtype, shape=form.shape, offset=0, n_bytes=n_bytes
        )
    return dense


def dense_tensors(path: Path) -> TensorIndex:
    """The tensors of a model directory as the dense model has them; only headers are read."""
    quantisation = quantisation_of(read_model_config(path))
    stored = stored_tensors(path)
    return stored if quantisation is None else dense_index(stored, quantisation, path.name)
