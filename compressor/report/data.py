"""What `impart report` shows: spectra, bytes, and evaluations of one or several deltas."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compressor.artifact.inspection import Inspection, check, inspect_artifact
from compressor.artifact.reader import Artifact
from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.pairing import TensorPair, pair_tensors
from compressor.codecs import MatrixSource
from compressor.encoders.sources import TensorSource
from compressor.encoders.svd import spectrum, tall
from compressor.errors import InputError
from compressor.measure.evaluation import Evaluation, Evaluator, group_by
from compressor.measure.samples import Sample
from compressor.progress import Progress

_LARGEST_MATRIX = 1 << 26  # elements; beyond, a spectrum takes minutes and gigabytes
_POINTS = 120  # of a spectrum that are kept: evenly spaced in the logarithm of the index
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Curve:
    """Singular values by index, from 1; a sample of them."""

    index: tuple[int, ...]
    sigma: tuple[float, ...]
    total: float

    @property
    def strongest_share(self) -> float:
        """Share of the squared Frobenius norm in the strongest component."""
        return self.sigma[0] ** 2 / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class SpectrumOfType:
    """One matrix standing for all of its type: that of the middle layer.

    kind  the tensor's name with ``*`` for layer numbers
    kept  of what each delta keeps of it, in the order of the deltas
    """

    kind: str
    tensor: str
    finetuned: Curve
    kept: tuple[Curve, ...]


@dataclass(frozen=True, slots=True)
class ReportedDelta:
    """One delta. `evaluation` is None without texts."""

    name: str
    inspection: Inspection
    evaluation: Evaluation | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything on the page, unescaped.

    left_out  tensor types without a spectrum because their matrices are too large
    """

    base: str
    finetuned: str
    data: str | None
    variants: tuple[ReportedDelta, ...]
    spectra: tuple[SpectrumOfType, ...]
    left_out: tuple[str, ...]


class Samples(Protocol):
    """Makes the samples once the fine-tune's directory is known."""

    def __call__(self, tuned: Path) -> list[Sample]: ...


def make_report(
    base: str,
    tuned: str,
    deltas: Sequence[Path],
    samples: Samples | None,
    data: str | None,
    layer_texts: int,
    progress: Progress,
) -> Report:
    """Gather a report. samples: what to evaluate on, None for the parts that need no texts."""
    names = _names(deltas)
    with Checkpoint(base) as base_files, Checkpoint(tuned) as tuned_files:
        artifacts = [check(delta, base) for delta in deltas]
        spectra, left_out = _spectra(base_files, tuned_files, artifacts, progress)
        evaluations: list[Evaluation | None] = [None] * len(deltas)
        if samples is not None:
            evaluator = Evaluator(base_files, tuned_files, samples(tuned_files.path), progress)
            evaluations = [
                evaluator.evaluate(artifact, layers=True, layer_samples=layer_texts)
                for artifact in artifacts
            ]
        variants = tuple(
            ReportedDelta(name, inspect_artifact(delta), evaluation)
            for name, delta, evaluation in zip(names, deltas, evaluations, strict=True)
        )
        return Report(base_files.name, tuned_files.name, data, variants, spectra, left_out)


def _names(deltas: Sequence[Path]) -> list[str]:
    names = [delta.resolve().name for delta in deltas]
    if len(set(names)) == len(names):
        return names
    if len({delta.resolve() for delta in deltas}) < len(deltas):
        raise InputError("the same delta is given twice")
    return ["/".join(delta.resolve().parts[-2:]) for delta in deltas]


def _spectra(
    base: Checkpoint, tuned: Checkpoint, artifacts: Sequence[Artifact], progress: Progress
) -> tuple[tuple[SpectrumOfType, ...], tuple[str, ...]]:
    pairs = {pair.name: pair for pair in pair_tensors(base, tuned).pairs if pair.is_matrix}
    types = group_by(pairs, lambda name: _NUMBER.sub("*", name.removesuffix(".weight")))
    found, left_out = [], []
    for done, (kind, members) in enumerate(types.items()):
        progress("spectra", done, len(types))
        pair = pairs[members[len(members) // 2]]
        if pair.base_shape[0] * pair.base_shape[1] > _LARGEST_MATRIX:
            left_out.append(kind)
            continue
        exact = _curve(pair.name, DeltaSource(base, tuned, pair))
        kept = (_curve(pair.name, TensorSource(_kept(artifact, pair))) for artifact in artifacts)
        found.append(SpectrumOfType(kind, pair.name, exact, tuple(kept)))
    progress("spectra", len(types), len(types))
    return tuple(found), tuple(left_out)


def _kept(artifact: Artifact, pair: TensorPair) -> Tensor:
    """What a delta holds of ``dW [m, n]``, dense; zeros if it holds nothing."""
    m, n = pair.base_shape
    dense = torch.zeros(m, n)
    for delta in artifact.tensors:
        if delta.name == pair.name:
            for term in delta.terms:
                dense += term.to_dense()
    return dense


def _curve(name: str, source: MatrixSource) -> Curve:
    sigma = spectrum(name, tall(source)[0]).sigma
    chosen = log_spaced(len(sigma), _POINTS)
    return Curve(
        index=tuple(i + 1 for i in chosen),
        sigma=tuple(float(sigma[i]) for i in chosen),
        total=float(sigma.square().sum()),
    )


def log_spaced(size: int, points: int) -> list[int]:
    """Return at most `points` indices below `size`, denser at the beginning; both ends are in."""
    if size <= points:
        return list(range(size))
    steps: Iterable[float] = (size ** (k / (points - 1)) for k in range(points))
    return sorted({min(size - 1, round(step) - 1) for step in steps} | {size - 1})
