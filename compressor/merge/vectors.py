"""Task vectors: what one model changes of the base, row by row, whatever form the model is in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compressor.artifact.identity import identity_of
from compressor.artifact.reader import read_artifact
from compressor.checkpoint.companions import changed_companions, dropped_companions
from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.folder import resolve
from compressor.checkpoint.layout import Layout, Parameter
from compressor.checkpoint.pairing import TensorPair, is_unchanged, pair_tensors
from compressor.codecs import Shape, TensorDelta, Term
from compressor.encoders.codec import make_encoder
from compressor.errors import UnsupportedTensor, WrongShape
from compressor.merge.rules import dare_mask
from compressor.peft.adapter import Adapter
from compressor.peft.config import is_adapter

Companions = tuple[dict[str, bytes], list[str]]


class TaskVector(Protocol):
    """``W - W_base`` of one model.

    companions  the tokenizer files and the like that it brings or drops
    """

    @property
    def companions(self) -> Companions: ...

    def changes(self, name: str) -> bool:
        """Whether any of the base's rows of this parameter differs."""
        ...

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        """Return rows of the difference: float32 ``[end - start, n]`` or ``[end - start]``."""
        ...

    def added(self, name: str) -> Tensor | None:
        """Rows beyond the base's last (added vocabulary), as the model has them, or None."""
        ...


class CheckpointVector:
    """Of a full fine-tune."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self._base, self._tuned = base, tuned
        pairing = pair_tensors(base, tuned)
        _check_untied(tuned.name, pairing.untied)
        self._pairs = {pair.name: pair for pair in pairing.pairs}
        self._source: tuple[str, DeltaSource] | None = None
        changed = changed_companions(base.path, tuned.path)
        self.companions: Companions = (changed, dropped_companions(base.path, tuned.path))

    def changes(self, name: str) -> bool:
        return not is_unchanged(self._base, self._tuned, self._pairs[name])

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        pair = self._pairs[name]
        if len(pair.base_shape) == 2:
            return self._matrix(pair).block(start, end, 0, pair.base_shape[1])
        ours = self._base.read_rows(pair.base_key, start, end)
        return self._tuned.read_rows(pair.tuned_key, start, end).float() - ours.float()

    def added(self, name: str) -> Tensor | None:
        pair = self._pairs[name]
        if pair.shape == pair.base_shape:
            return None
        return self._tuned.read_rows(pair.tuned_key, pair.base_shape[0])

    def _matrix(self, pair: TensorPair) -> DeltaSource:
        """Remembered for the rows of one matrix: a small one is read once."""
        if self._source is None or self._source[0] != pair.name:
            self._source = (pair.name, DeltaSource(self._base, self._tuned, pair))
        return self._source[1]


class DeltaVector:
    """Of a delta artifact or an adapter."""

    def __init__(
        self,
        base: Checkpoint,
        keys: Mapping[str, str],
        deltas: Mapping[str, TensorDelta],
        companions: Companions,
    ) -> None:
        self._base, self._keys, self._deltas = base, keys, deltas
        self.companions = companions

    def changes(self, name: str) -> bool:
        delta = self._deltas.get(name)
        return delta is not None and (bool(delta.terms) or self._start(delta) < delta.base_shape[0])

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        delta = self._deltas.get(name)
        if delta is None:
            return torch.zeros(end - start, *self._base.tensors[self._keys[name]].shape[1:])
        rows = torch.zeros(end - start, *delta.base_shape[1:])
        for term in delta.terms:
            rows += term.dense_rows(torch.arange(start, end))
        first = max(start, self._start(delta))
        if delta.exact is not None and first < end:
            shift = delta.exact.row_start
            last = min(end, shift + len(delta.exact.values))
            ours = self._base.oriented_rows(self._keys[name], first, last, delta.transposed)
            rows[first - start : last - start] = (
                delta.exact.values[first - shift : last - shift].float() - ours.float()
            )
        return rows

    def added(self, name: str) -> Tensor | None:
        delta = self._deltas.get(name)
        if delta is None or delta.exact is None or delta.shape == delta.base_shape:
            return None
        return delta.exact.values[delta.base_shape[0] - delta.exact.row_start :]

    def _start(self, delta: TensorDelta) -> int:
        return delta.base_shape[0] if delta.exact is None else delta.exact.row_start


class DensityOf(Protocol):
    """A density by tensor name."""

    def at(self, name: str) -> float: ...


class DareVector:
    """Another vector with elements dropped at random, the rest rescaled (DARE).

    key  names the draw; it does not depend on how rows are read
    """

    def __init__(self, inner: TaskVector, key: str, *, rescale: bool, density: DensityOf) -> None:
        self._inner, self._key, self._rescale, self._density = inner, key, rescale, density
        self.companions = inner.companions
        self.changes, self.added = inner.changes, inner.added

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        rows = self._inner.read_rows(name, start, end)
        density = self._density.at(name)
        if density >= 1 or not rows.numel():
            return rows
        width = rows.numel() // (end - start)
        mask = dare_mask(f"{self._key}\0{name}", start * width, rows.numel(), density)
        kept = rows * mask.view(rows.shape)
        return kept / density if self._rescale else kept


class ImpartVector:
    """Another vector with each matrix's singular components sparsified by importance.

    The `impart` codec's own allocation and draw, with so many components kept that the share
    `density` of the values remains; vectors are left as they are, and so are expert routers.
    """

    def __init__(
        self,
        inner: TaskVector,
        layout: Layout,
        *,
        seed: int,
        density: DensityOf,
    ) -> None:
        self._inner, self._layout, self._seed, self._density = inner, layout, seed, density
        self._terms: tuple[str, tuple[Term, ...]] = ("", ())
        self.companions = inner.companions
        self.changes, self.added = inner.changes, inner.added

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        parameter = self._layout.parameters[name]
        density = self._density.at(name)
        if density >= 1 or parameter.kind not in ("linear", "embedding"):
            return self._inner.read_rows(name, start, end)
        if not self._inner.changes(name):
            return torch.zeros(end - start, parameter.shape[1])
        if self._terms[0] != name:
            self._terms = (name, self._encode(parameter, density))
        ids = torch.arange(start, end)
        return torch.stack([term.dense_rows(ids) for term in self._terms[1]]).sum(0)

    def _encode(self, parameter: Parameter, density: float) -> tuple[Term, ...]:
        m, n = parameter.shape
        smaller = min(m, n)
        kept = min(max(1, round(density * m * n / (m + n))), smaller)
        usual = make_encoder("impart").options()["beta"]
        beta = max(0.0, min(usual, 1 - kept / smaller))  # no more than leaves `kept` of them
        codec = make_encoder("impart", beta=beta)
        params = codec.fit((m, n), 0.0) | {"kept": kept}
        source = VectorSource(self._inner, parameter.name, (m, n))
        return codec.encode(parameter.name, source, params, self._seed)


class VectorSource:
    """One matrix of a task vector, for the encoders."""

    def __init__(self, vector: TaskVector, name: str, shape: Shape) -> None:
        self._vector, self._name, self.shape = vector, name, shape

    def block(self, row_start: int, row_end: int, col_start: int, col_end: int) -> Tensor:
        """Return a new float32 tensor."""
        return self._vector.read_rows(self._name, row_start, row_end)[:, col_start:col_end].clone()


def open_vector(name: str, base: Checkpoint, layout: Layout, stack: ExitStack) -> TaskVector:
    """Open a full fine-tune, a PEFT adapter or a delta artifact of `base`.

    Raises WrongBase for a delta of another base, and what reading the model raises.
    """
    path = resolve(name)
    keys = layout.keys(base.tensors, base.name)
    if is_adapter(path):
        adapter = stack.enter_context(Adapter(path))
        _check_untied(adapter.name, tuple(adapter.layout(base).borrowed))
        deltas = {delta.name: delta for delta in adapter.deltas(base)}
        return DeltaVector(base, keys, deltas, (changed_companions(base.path, path), []))
    if (path / "delta_config.json").is_file():
        return _open_delta(path, base, layout, keys)
    return CheckpointVector(base, stack.enter_context(Checkpoint(path)))


def _check_untied(name: str, untied: tuple[str, ...]) -> None:
    if untied:
        raise UnsupportedTensor(
            f"{name}: {untied[0]} is tied in the base and has values of its own here, which the "
            "merged model could not hold; merge models that keep it tied"
        )


def _open_delta(
    path: Path, base: Checkpoint, layout: Layout, keys: Mapping[str, str]
) -> DeltaVector:
    artifact = read_artifact(path, base_identity=identity_of(base))
    _check_untied(str(path), artifact.config.base.untied)
    for delta in artifact.tensors:
        parameter = layout.parameters.get(delta.name)
        own = None if parameter is None else (parameter.shape, parameter.transposed)
        if own != (delta.base_shape, delta.transposed):
            raise WrongShape(f"{path}: {delta.name} does not fit the base")
    dropped = list(artifact.config.finetuned_details.get("dropped_files", []))
    deltas = {delta.name: delta for delta in artifact.tensors}
    return DeltaVector(base, keys, deltas, (artifact.aux, dropped))
