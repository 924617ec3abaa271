"""Merge fine-tunes of one base: task arithmetic or TIES over masked task vectors, streamed.

Of every model only some rows of one tensor are in memory at a time (with the `impart` mask, the
factors of one matrix).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.atomic import RunLock
from compressor.checkpoint.companions import copy_companions
from compressor.checkpoint.files import DTYPE_NAMES, Checkpoint
from compressor.checkpoint.layout import Layout, Parameter, read_layout
from compressor.checkpoint.outputs import check_output
from compressor.checkpoint.pairing import CHUNK_ELEMENTS, stored_dtype
from compressor.checkpoint.writer import DTYPES, MAX_SHARD_BYTES, Outgoing, published, write_model
from compressor.compress.options import Options, Summary
from compressor.compress.pipeline import compress
from compressor.errors import InputError, OutputError, UnsupportedTensor
from compressor.merge.config import MergeConfig
from compressor.merge.rules import elect_and_merge, kth_magnitude, trim, weighted_sum
from compressor.merge.vectors import DareVector, ImpartVector, TaskVector, open_vector
from compressor.progress import Progress, silent


def merge(
    config: MergeConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write the merged model to `out` as a Hugging Face directory.

    Computed in float32 and rounded once to ``config.dtype`` (default: the base's dtypes). Same
    inputs and seed give identical bytes. Raises an ImpartError; then nothing appears at `out`.
    """
    check_output(out, config.inputs)
    progress = progress or silent
    with _Merge.open(config) as job, published(out, overwrite) as folder:
        job.find_thresholds(progress)
        tensors = job.outgoing()
        write_model(folder, job.layout, tensors, job.model_config(), progress, max_shard_bytes)
        copy_companions(job.base.path, folder, *job.companions())
    return Path(out)


def merge_to_delta(
    config: MergeConfig,
    out: str | Path,
    options: Options,
    progress: Progress | None = None,
) -> Summary:
    """Merge, and compress the result into the delta artifact `out`.

    The merged model lies beside `out` meanwhile and is removed afterwards: the compressor reads
    it more than once, and measures on it.
    """
    files = [] if options.calibration is None else [options.calibration]
    check_output(out, config.inputs, files)
    final = Path(out).absolute()
    if final.exists() and not options.overwrite and any(final.iterdir()):
        raise OutputError(f"{out} exists; remove it or ask for it to be overwritten")
    scratch = final.with_name(f".{final.name}.merged")
    check_output(scratch, config.inputs, files)
    final.parent.mkdir(parents=True, exist_ok=True)
    with RunLock(scratch):
        try:
            merged = merge(config, scratch / final.name, overwrite=True, progress=progress)
            return compress(config.base, merged, out, options, progress)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@dataclass(slots=True)
class _Merge:
    """One run: the opened models and, once found, TIES' thresholds."""

    config: MergeConfig
    base: Checkpoint
    layout: Layout
    keys: dict[str, str]
    vectors: list[TaskVector]
    thresholds: list[float]

    @classmethod
    @contextmanager
    def open(cls, config: MergeConfig) -> Iterator[_Merge]:
        with ExitStack() as stack:
            base = stack.enter_context(Checkpoint(config.base))
            layout = read_layout(base.path)
            keys = layout.keys(base.tensors, base.name)
            vectors = []
            for index, model in enumerate(config.models):
                vector = open_vector(model.name, base, layout, stack)
                vectors.append(_masked(vector, config, index, layout))
            yield cls(config, base, layout, keys, vectors, [])

    # --- TIES' trimming -------------------------------------------------------------------------

    def find_thresholds(self, progress: Progress) -> None:
        """Find the magnitude each model's elements must have to be kept, over the whole model."""
        if not self.config.trims or self.config.trim_scope != "model":
            return
        total = sum(_size(parameter) for parameter in self.layout.parameters.values())
        for index, model in enumerate(self.config.models):
            progress("trim", index, len(self.vectors))
            density = model.density.at("")
            pieces = partial(self._whole_vector, self.vectors[index])
            self.thresholds.append(_threshold(pieces, density, total))
        progress("trim", len(self.vectors), len(self.vectors))

    def _whole_vector(self, vector: TaskVector) -> Iterator[Tensor]:
        for parameter in self.layout.parameters.values():
            yield from _strips(vector, parameter)

    def _tensor_thresholds(self, parameter: Parameter) -> list[float]:
        if not self.config.trims or self.config.trim_scope == "model":
            return self.thresholds
        return [
            _threshold(
                partial(_strips, vector, parameter),
                model.density.at(parameter.name),
                _size(parameter),
            )
            for vector, model in zip(self.vectors, self.config.models, strict=True)
        ]

    # --- tensors --------------------------------------------------------------------------------

    def outgoing(self) -> list[Outgoing]:
        """List the merged model's tensors, each made when it is written."""
        listed = []
        for name, parameter in self.layout.parameters.items():
            dtype = stored_dtype(self.base, self.keys[name], parameter)
            if self.config.dtype is not None and not parameter.integral:
                dtype = DTYPES[self.config.dtype]
            shape = self.base.tensors[self.keys[name]].shape
            if (grown := self._grown(name)) is not None:
                shape = (shape[0] + len(grown), *shape[1:])
            listed.append(Outgoing(name, dtype, shape, partial(self._merged, parameter)))
        return listed

    def _merged(self, parameter: Parameter) -> Iterator[Tensor]:
        """The merged parameter in pieces of rows; in one piece where the checkpoint is turned."""
        pieces = self._merged_rows(parameter)
        if parameter.transposed:
            yield torch.cat(list(pieces)).T
            return
        yield from pieces
        if (grown := self._grown(parameter.name)) is not None:
            yield grown

    def _merged_rows(self, parameter: Parameter) -> Iterator[Tensor]:
        name = parameter.name
        changed = any(vector.changes(name) for vector in self.vectors)
        if parameter.integral:
            if changed:
                raise UnsupportedTensor(
                    f"{name}: one of the models changes these whole numbers, which have no sum"
                )
            yield self.base.read_stored(self.keys[name])
            return
        thresholds = self._tensor_thresholds(parameter) if changed else []
        for start, end in _row_ranges(parameter):
            key, turned = self.keys[name], parameter.transposed
            rows = self.base.oriented_rows(key, start, end, turned)
            if not changed:
                yield rows
                continue
            deltas = [vector.read_rows(name, start, end) for vector in self.vectors]
            yield rows.float().add_(self._combine(name, deltas, thresholds).mul_(self.config.scale))

    def _combine(self, name: str, deltas: list[Tensor], thresholds: Sequence[float]) -> Tensor:
        weights = [model.weight.at(name) for model in self.config.models]
        mean = self.config.is_mean
        if self.config.method == "ta":
            return weighted_sum(deltas, weights, mean=mean)
        if thresholds:
            deltas = [trim(*pair) for pair in zip(deltas, thresholds, strict=True)]
        return elect_and_merge(deltas, weights, mean=mean)

    # --- vocabulary and files -------------------------------------------------------------------

    def _grown(self, name: str) -> Tensor | None:
        """Rows that one model adds to the base's; two models' would need one vocabulary."""
        found = [rows for vector in self.vectors if (rows := vector.added(name)) is not None]
        if len(found) > 1:
            raise UnsupportedTensor(
                f"{name}: more than one of the models adds rows (tokens) to the base's; merge "
                "models of which at most one has added tokens"
            )
        return found[0] if found else None

    def _growing(self) -> int | None:
        """Index of the model that adds vocabulary."""
        for index, vector in enumerate(self.vectors):
            if any(vector.added(name) is not None for name in self.layout.parameters):
                return index
        return None

    def companions(self) -> tuple[dict[str, bytes], list[str]]:
        """Tokenizer files that replace the base's, and those of the base that are dropped."""
        names = [model.name for model in self.config.models]
        growing = self._growing()
        if self.config.tokenizer is None:
            return ({}, []) if growing is None else self.vectors[growing].companions
        if self.config.tokenizer not in names:
            raise InputError(
                f"tokenizer_source {self.config.tokenizer} is none of {', '.join(names)}"
            )
        return self.vectors[names.index(self.config.tokenizer)].companions

    def model_config(self) -> dict[str, Any]:
        config = {key: value for key, value in self.base.config.items() if key != "torch_dtype"}
        for name, parameter in self.layout.parameters.items():
            if parameter.kind == "embedding" and (grown := self._grown(name)) is not None:
                config["vocab_size"] = parameter.shape[0] + len(grown)
        floats = [name for name, p in self.layout.parameters.items() if not p.integral]
        dtypes = [self.base.dtype(self.keys[name]) for name in floats]
        usual = DTYPE_NAMES[max(set(dtypes), key=dtypes.count)]
        return config | {"dtype": self.config.dtype or usual}


def _masked(vector: TaskVector, config: MergeConfig, index: int, layout: Layout) -> TaskVector:
    density = config.models[index].mask_density
    if config.mask == "dare":
        key = f"dare\0{config.seed}\0{index}"
        return DareVector(vector, key, rescale=config.rescale, density=density)
    if config.mask == "impart":
        return ImpartVector(vector, layout, seed=config.seed + index, density=density)
    return vector


def _threshold(pieces: partial[Iterator[Tensor]], density: float, size: int) -> float:
    """The magnitude of the last element that `density` of `size` elements keeps."""
    if density >= 1:
        return 0.0
    return kth_magnitude(pieces, min(size, max(1, round(density * size))))


def _strips(vector: TaskVector, parameter: Parameter) -> Iterator[Tensor]:
    for start, end in _row_ranges(parameter):
        yield vector.read_rows(parameter.name, start, end)


def _row_ranges(parameter: Parameter) -> Iterator[tuple[int, int]]:
    rows = parameter.shape[0] if parameter.shape else 1
    step = max(1, CHUNK_ELEMENTS * rows // max(1, _size(parameter)))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _size(parameter: Parameter) -> int:
    return math.prod(parameter.shape)
