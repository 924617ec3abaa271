"""Everything the quality benchmark compares: by name, how to install a variant and count bytes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.baselines import BASELINES, Baseline, Matrix
from compressor.artifact.config import CODER
from compressor.artifact.reader import Artifact, read_artifact
from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.groups import group_of
from compressor.checkpoint.pairing import TensorPair, is_unchanged, pair_tensors, to_store
from compressor.codecs import DenseRows, TensorDelta
from compressor.compress.options import NO_CODER, Options
from compressor.compress.pipeline import compress
from compressor.encoders.codec import make_encoder
from compressor.errors import InputError

# Short names of the codecs' settings; any other is written ``codec:option=value,option=value``.
PRESETS = {
    "blockdiag-2": "blockdiag:bits=2",
    "blockdiag-3": "blockdiag:bits=3",
    "blockdiag-4": "blockdiag:bits=4",
    "blockdiag-2-head": "blockdiag:bits=2,head_fraction=0.25",
    "blockdiag-4-head": "blockdiag:bits=4,head_fraction=0.25",
    "impart": "impart",
    "impart-qt": "impart-qt",
    "impart-qt-gptq": "impart-qt:gptq=true",
    "lowrank": "lowrank:bits=16",
}
AUTO = "auto"  # chooses codec and settings itself, within `compress`
AUTO_TASK = "auto-task"  # the same, shown texts of the task
_UNSEEDED = (AUTO, "blockdiag", "lowrank")  # draw nothing


class Size(NamedTuple):
    """Bytes of a whole variant, companion files included, and the fine-tune's bytes over them."""

    n_bytes: int
    ratio: float


class Variant:
    """One model in memory that each variant's weights are written to, `dtype` when it runs."""

    def __init__(self, base: Path, dtype: torch.dtype) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
        self._base = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.model: PreTrainedModel = model.to(dtype)

    def install(self, deltas: Iterable[TensorDelta]) -> None:
        """Make the model base + deltas, whatever it was before."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                rows = self._base[name].shape[0]
                parameter[:rows] = self._base[name]
            for delta in deltas:
                self._add(delta)

    def _add(self, delta: TensorDelta) -> None:
        stored = self._base[delta.name]
        merged = delta.reconstruct((stored.T if delta.transposed else stored).float())
        has_added = delta.shape[0] > delta.base_shape[0]
        if has_added and self.model.get_parameter(delta.name).shape[0] < delta.shape[0]:
            self.model.resize_token_embeddings(merged.shape[0], mean_resizing=False)
        parameter = self.model.get_parameter(delta.name)
        parameter.copy_(merged.T if delta.transposed else merged)


class Pair:
    """A base and its fine-tune, opened and compared once. Use as a context manager."""

    def __init__(self, base: Path, finetuned: Path) -> None:
        self.base, self.finetuned = base, finetuned
        self._base_files, self._tuned_files = Checkpoint(base), Checkpoint(finetuned)
        self.finetuned_bytes = self._tuned_files.n_bytes
        found = (
            to_store(
                self._tuned_files,
                tensor,
                unchanged=is_unchanged(self._base_files, self._tuned_files, tensor),
            )
            for tensor in pair_tensors(self._base_files, self._tuned_files).pairs
        )
        self.tensors = [tensor for tensor in found if tensor is not None]
        self._surroundings: dict[float, int] = {}

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self._base_files.close()
        self._tuned_files.close()

    def matrix(self, tensor: TensorPair) -> Matrix:
        """Describe a tensor for the baselines."""
        is_vocabulary = group_of(tensor) in ("embeddings", "lm_head")
        return Matrix(tensor.name, tensor.matrix_shape, is_vocabulary)

    def delta(self, tensor: TensorPair) -> Tensor:
        """Return ``dW`` float32 ``[m, n]``."""
        m, n = tensor.matrix_shape
        return DeltaSource(self._base_files, self._tuned_files, tensor).block(0, m, 0, n)

    def exact(self, tensor: TensorPair) -> DenseRows | None:
        """Rows that are stored exactly."""
        if tensor.exact_start is None:
            return None
        rows = self._tuned_files.read_rows(tensor.tuned_key, tensor.exact_start)
        return DenseRows(tensor.exact_start, rows)

    def surroundings_bytes(self, ratio: float) -> int:
        """Bytes of an artifact of this pair that hold no tensor: names, settings, tokenizer, card.
        Nothing of the baselines is entropy coded, and neither is this.

        Those of a real one, `blockdiag` at 16 bits, which has the fewest parts a tensor; every
        baseline is charged as much.
        """
        if ratio not in self._surroundings:
            options = Options(codec_options={"bits": 16}, ratio=ratio, entropy=NO_CODER)
            artifact = self.compress(options)
            stored = sum(_payload_bytes(delta) for delta in artifact.tensors)
            self._surroundings[ratio] = artifact.n_bytes - stored
        return self._surroundings[ratio]

    def compress(self, options: Options) -> Artifact:
        """Write an artifact to disk, read it back as a server would, and drop the files."""
        with tempfile.TemporaryDirectory(prefix="quality-") as folder:
            compress(self.base, self.finetuned, Path(folder) / "delta", options)
            return read_artifact(Path(folder) / "delta")


class Method(Protocol):
    """A way to compress that the benchmark measures."""

    @property
    def draws(self) -> bool:
        """Whether the seed changes anything."""
        ...

    @property
    def fixed_ratio(self) -> float | None:
        """The nominal ratio of a method that has only one, else None."""
        ...

    def install(self, variant: Variant, pair: Pair, ratio: float, seed: int) -> Size:
        """Compress, restore into `variant`, count. Raises BudgetError."""
        ...


@dataclass(frozen=True, slots=True)
class CodecMethod:
    """A codec of this project, through its artifact on disk."""

    codec: str
    options: dict[str, Any]
    calibration: Path | None = None
    entropy: str = NO_CODER
    fixed_ratio: None = None

    @property
    def draws(self) -> bool:
        return self.codec not in _UNSEEDED

    def install(self, variant: Variant, pair: Pair, ratio: float, seed: int) -> Size:
        """The bytes are those of the directory."""
        options = Options(
            codec=self.codec,
            codec_options=self.options,
            ratio=ratio,
            seed=seed,
            calibration=self.calibration,
            entropy=self.entropy,
        )
        artifact = pair.compress(options)
        variant.install(artifact.tensors)
        return Size(artifact.n_bytes, pair.finetuned_bytes / artifact.n_bytes)


@dataclass(frozen=True, slots=True)
class BaselineMethod:
    """A published method, reconstructed in memory."""

    name: str
    baseline: Baseline

    @property
    def draws(self) -> bool:
        return self.baseline.draws

    @property
    def fixed_ratio(self) -> float | None:
        return self.baseline.fixed_ratio

    def install(self, variant: Variant, pair: Pair, ratio: float, seed: int) -> Size:
        """The bytes are those of the stored parts, exact rows and `surroundings_bytes`."""
        total = pair.surroundings_bytes(ratio)
        if self.baseline.keeps_vectors:
            total += sum(tensor.exact_bytes for tensor in pair.tensors)
        matrices = [tensor for tensor in pair.tensors if tensor.is_encoded]
        budget = pair.finetuned_bytes / ratio - total
        plans = self.baseline.plan([pair.matrix(tensor) for tensor in matrices], budget)
        planned = {tensor.name: plan for tensor, plan in zip(matrices, plans, strict=True)}
        sizes: list[int] = []

        def deltas() -> Iterator[TensorDelta]:
            for tensor in pair.tensors:
                terms: tuple[Any, ...] = ()
                if (plan := planned.get(tensor.name)) is not None:
                    name = tensor.name
                    encoded = self.baseline.encode(name, pair.delta(tensor), plan, seed)
                    sizes.append(encoded.n_bytes)
                    terms = (_Restored(encoded.dense),)
                exact = pair.exact(tensor) if self.baseline.keeps_vectors else None
                if terms or exact:
                    yield _delta(tensor, terms, exact)

        variant.install(deltas())
        total += sum(sizes)
        return Size(total, pair.finetuned_bytes / total)


def make_method(text: str, calibration: Path | None = None) -> Method:
    """Return the method called `text`: a baseline, a preset, ``codec:option=value,...`` or auto.

    calibration  texts of the task, which only `AUTO_TASK` is shown

    Values are JSON where they parse, else text. Tensors are entropy coded for `AUTO` and where
    ``entropy=zstd`` is among the options: other methods are compared without, as published. Raises
    InputError for what does not exist.
    """
    if text == AUTO_TASK:
        if calibration is None:
            raise InputError(f"{AUTO_TASK} needs texts of the task: give --calibration")
        return CodecMethod(AUTO, {}, calibration, entropy=CODER)
    if text in BASELINES:
        return BaselineMethod(text, BASELINES[text])
    codec, _, rest = PRESETS.get(text, text).partition(":")
    options = dict(_option(part) for part in rest.split(",") if part)
    entropy = options.pop("entropy", CODER if codec == AUTO else NO_CODER)
    if codec != AUTO:
        make_encoder(codec, **options)
    return CodecMethod(codec, options, entropy=entropy)


def _option(part: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise InputError(f"{part!r} is not option=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@dataclass(frozen=True, slots=True)
class _Restored:
    """As much of a term as `TensorDelta.merge` needs."""

    dense: Tensor

    def to_dense(self) -> Tensor:
        return self.dense


def _delta(pair: TensorPair, terms: tuple[Any, ...], exact: DenseRows | None) -> TensorDelta:
    return TensorDelta(pair.name, pair.shape, pair.base_shape, pair.transposed, terms, exact)


def _payload_bytes(delta: TensorDelta) -> int:
    parts = [part for term in delta.terms for part in term.tensors().values()]
    if delta.exact is not None:
        parts.append(delta.exact.values)
    return sum(part.nbytes for part in parts)
