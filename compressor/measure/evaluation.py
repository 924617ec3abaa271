"""How far a delta is from the fine-tune it stands for: on the whole, and tensor by tensor.

The fine-tune runs over the samples once; what it says is kept as the input of its output layer (a
few kilobytes a token instead of a row of the vocabulary). Each comparison is then one pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.artifact.reader import Artifact
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.groups import group_of
from compressor.checkpoint.layout import read_layout
from compressor.measure.comparison import Comparer, Comparison, Estimate, Outputs, SampleBatch
from compressor.measure.samples import Sample
from compressor.measure.swapped_model import SwappedModel, Weights
from compressor.progress import Progress, silent

LAYER_SAMPLES = 64  # what the tables by layer and by kind run over, unless told otherwise

_LAYER = re.compile(r"(.*?\.\d+)\.")
_DIGITS = 5  # significant; what is beyond depends on the machine's thread count


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors taken together: a layer, or all of one kind.

    only     KL if these alone are the variant's and the rest is the fine-tune's
    all_but  KL if these alone are the fine-tune's and the rest is the variant's; None: not measured
    """

    name: str
    n_bytes: int
    only: Estimate
    all_but: Estimate | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A variant, measured.

    finetuned, base  the two ends, on the same samples: no difference, and no delta at all
    changes_kept     of the tokens where base and fine-tune find another one most likely, the share
                     where the variant sides with the fine-tune; None where there are none
    layers, kinds    by layer and by kind of tensor; empty if not asked for
    """

    n_texts: int
    n_tokens: int
    variant: Comparison
    base: Comparison
    finetuned: Comparison
    changes_kept: float | None
    layers: tuple[Part, ...] = ()
    kinds: tuple[Part, ...] = ()
    n_layer_texts: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers to five digits; NaN becomes null."""
        plain: dict[str, Any] = _rounded(asdict(self))
        return plain


class Reference(Comparer):
    """The fine-tune's predictions over samples, to compare other weights of `model` with."""

    def __init__(self, model: SwappedModel, samples: Sequence[Sample]) -> None:
        super().__init__(samples, self._recall)
        self._model = model
        model.use({})
        with torch.inference_mode():
            model.check_head(self.batches[0].samples[0])
            self._hidden = [model.hidden(batch.samples) for batch in self.batches]

    def outputs(self) -> Outputs:
        """Run the model with the weights it has now."""
        return self.outputs_of(lambda batch: self._model.log_probs(batch.samples))

    def own(self) -> Outputs:
        """Return the fine-tune's, from what is kept."""
        return self.outputs_of(None)

    def kl(self) -> Estimate:
        """KL of the weights that the model has now."""
        return self.estimate(self.outputs().kl)

    def _recall(self, batch: SampleBatch) -> Iterator[Tensor]:
        for logits in self._model.logits(self._hidden[batch.number], finetuned=True):
            yield logits.log_softmax(-1)


class Evaluator:
    """Evaluates any number of deltas of one fine-tune over the same samples."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        samples: Sequence[Sample],
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress or silent
        self._progress("load", 0, 1)
        self._model = SwappedModel(base, tuned)
        self._layout = read_layout(tuned.path)
        self._progress("load", 1, 1)
        self._progress("compare", 0, 3)
        self._reference = Reference(self._model, samples)
        self._progress("compare", 1, 3)
        self._model.use(dict.fromkeys(self._model.names, "base"))
        self._base = self._reference.outputs()
        self._progress("compare", 2, 3)

    def evaluate(
        self, artifact: Artifact, *, layers: bool = False, layer_samples: int = LAYER_SAMPLES
    ) -> Evaluation:
        """Measure a delta of this base and fine-tune; the tables over the first samples only."""
        reference = self._reference
        self._model.set_variant({delta.name: delta for delta in artifact.tensors})
        self._model.use(dict.fromkeys(self._model.names, "variant"))
        ours = reference.outputs()
        self._progress("compare", 3, 3)
        tables: dict[str, Any] = {}
        if layers:
            tables = self._tables(artifact, layer_samples)
        return Evaluation(
            n_texts=len(reference.samples),
            n_tokens=reference.n_tokens,
            variant=reference.compare(ours),
            base=reference.compare(self._base),
            finetuned=reference.compare(reference.own()),
            changes_kept=_changes_kept(self._base, ours),
            **tables,
        )

    def _tables(self, artifact: Artifact, n_samples: int) -> dict[str, Any]:
        reference = self._reference
        if n_samples < len(reference.samples):
            reference = Reference(self._model, reference.samples[:n_samples])
        layers = group_by(self._model.names, layer_of)
        kinds = group_by(self._model.names, lambda name: group_of(self._layout.parameters[name]))
        n_bytes = _bytes_of(artifact)
        done, total = 0, len(layers) + 2 * len(kinds)
        parts: dict[str, list[Part]] = {"layers": [], "kinds": []}
        for table, groups in (("layers", layers), ("kinds", kinds)):
            for name, members in groups.items():
                only = self._kl(reference, members)
                all_but = None
                if table == "kinds":
                    rest = [other for other in self._model.names if other not in members]
                    all_but = self._kl(reference, rest)
                size = sum(n_bytes.get(member, 0) for member in members)
                parts[table].append(Part(name, size, only, all_but))
                done += 1 if all_but is None else 2
                self._progress("layers", done, total)
        self._model.use({})
        return {
            "layers": tuple(parts["layers"]),
            "kinds": tuple(parts["kinds"]),
            "n_layer_texts": len(reference.samples),
        }

    def _kl(self, reference: Reference, names: Iterable[str]) -> Estimate:
        chosen: dict[str, Weights] = dict.fromkeys(names, "variant")
        return reference.kl() if self._model.use(chosen) else Estimate(0.0, 0.0)


def layer_of(name: str) -> str:
    """Return the layer of a parameter, ``model.layers.3``, or its module's name outside layers."""
    match = _LAYER.match(name)
    return match[1] if match else name.rpartition(".")[0] or name


def group_by(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    """Group names by key, in order of first occurrence."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def _bytes_of(artifact: Artifact) -> Mapping[str, int]:
    return {
        delta.name: sum(part.nbytes for term in delta.terms for part in term.tensors().values())
        + (delta.exact.values.nbytes if delta.exact is not None else 0)
        for delta in artifact.tensors
    }


def _changes_kept(base: Outputs, ours: Outputs) -> float | None:
    """Share of the fine-tune's changes to the base's most likely tokens that `ours` makes."""
    changed = base.top != base.reference_top
    if not bool(changed.any()):
        return None
    return float((ours.top == ours.reference_top)[changed].double().mean())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
