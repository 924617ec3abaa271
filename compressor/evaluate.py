"""How far a delta is from the fine-tune it stands for: on the whole, and tensor by tensor.

The fine-tune runs over the samples once; what it says is kept as the input of its output layer (a
few kilobytes a token instead of a row of the vocabulary). Each comparison is then one pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.artifact import Artifact
from compressor.checkpoint import Checkpoint
from compressor.draft import group_of
from compressor.evaluate_model import SwappedModel, Weights, batches
from compressor.evaluate_samples import Sample
from compressor.fidelity import kl_per_token
from compressor.layout import read_layout

Progress = Callable[[str, int, int], None]

LAYER_SAMPLES = 64  # what the tables by layer and by kind run over, unless told otherwise

_LAYER = re.compile(r"(.*?\.\d+)\.")
_DIGITS = 5  # significant; what is beyond depends on the machine's thread count


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over predicted tokens, and its standard error over texts (NaN for a single text)."""

    mean: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One set of weights against the fine-tune.

    kl              KL(fine-tune || these weights), nats per token
    top1_agreement  how often both find the same token most likely
    token_flips     how often one of the two predicts the text's own next token and the other not
                    (Dutta et al., 2024, arXiv 2407.09141)
    perplexity      of the texts
    exact_match     share of answers that greedy decoding gives word for word; None without prompts
    answer_flips    share of answers right in one of the two only; None without prompts
    """

    kl: Estimate
    top1_agreement: Estimate
    token_flips: Estimate
    perplexity: float
    exact_match: float | None
    answer_flips: float | None


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


@dataclass(frozen=True, slots=True)
class _Outputs:
    """What weights say of every counted token: float32, int64, float32 and bool ``[N]``."""

    kl: Tensor
    top: Tensor
    loss: Tensor
    right: Tensor


class Reference:
    """A fine-tune's predictions over samples, to compare other weights of `model` with."""

    def __init__(self, model: SwappedModel, samples: Sequence[Sample]) -> None:
        self._model, self.samples = model, samples
        self._batches = list(batches(samples))
        order = [index for batch in self._batches for index in batch]
        counts = [sum(samples[index].counted[1:]) for index in order]
        self._text = torch.tensor(order).repeat_interleave(torch.tensor(counts))
        self._targets = torch.cat([_targets(samples[index]) for index in order])
        model.use({})
        with torch.inference_mode():
            model.check_head(samples[order[0]])
            self._hidden = [model.hidden(self._samples(batch)) for batch in self._batches]
        self.own = self._run(self._hidden)

    @property
    def n_tokens(self) -> int:
        """Tokens measured."""
        return len(self._targets)

    def outputs(self) -> _Outputs:
        """Run the model with the weights it has now."""
        with torch.inference_mode():
            return self._run([self._model.hidden(self._samples(b)) for b in self._batches])

    def kl(self) -> Estimate:
        """KL of the weights that the model has now."""
        return self._estimate(self.outputs().kl)

    def compare(self, ours: _Outputs) -> Comparison:
        """Summarise `ours` against the fine-tune."""
        has_answers = any(sample.is_answer for sample in self.samples)
        right, theirs = self._answers(ours.right), self._answers(self.own.right)
        return Comparison(
            kl=self._estimate(ours.kl),
            top1_agreement=self._estimate((ours.top == self.own.top).float()),
            token_flips=self._estimate((ours.right != self.own.right).float()),
            perplexity=math.exp(min(float(ours.loss.double().mean()), 700.0)),
            exact_match=float(right.double().mean()) if has_answers else None,
            answer_flips=float((right != theirs).double().mean()) if has_answers else None,
        )

    def changes_kept(self, base: _Outputs, ours: _Outputs) -> float | None:
        """Share of the fine-tune's changes to the base's most likely tokens that `ours` makes."""
        changed = base.top != self.own.top
        if not bool(changed.any()):
            return None
        return float((ours.top == self.own.top)[changed].double().mean())

    def _samples(self, batch: Sequence[int]) -> list[Sample]:
        return [self.samples[index] for index in batch]

    @torch.inference_mode()
    def _run(self, hidden: Sequence[Tensor]) -> _Outputs:
        found: list[list[Tensor]] = []
        start = 0
        for ours, theirs in zip(hidden, self._hidden, strict=True):
            logits = self._model.logits(ours)
            reference = self._model.logits(theirs, finetuned=True)
            for q, p in zip(logits, reference, strict=True):
                target = self._targets[start : start + len(q)].to(q.device)
                start += len(q)
                loss = torch.nn.functional.cross_entropy(q, target, reduction="none")
                kl = torch.zeros_like(loss) if ours is theirs else kl_per_token(p, q)
                top = q.argmax(-1)
                found.append([kl.cpu(), top.cpu(), loss.cpu(), (top == target).cpu()])
        return _Outputs(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _estimate(self, values: Tensor) -> Estimate:
        """Mean over tokens; the error from the linearised ratio of sums over texts."""
        n = len(self.samples)
        zeros = torch.zeros(n, dtype=torch.float64)
        total = zeros.index_add(0, self._text, values.double())
        count = zeros.index_add(0, self._text, torch.ones_like(values, dtype=torch.float64))
        mean = float(total.sum() / count.sum())
        if n < 2:
            return Estimate(mean, math.nan)
        square = float(((total - mean * count) ** 2).sum()) * n / (n - 1)
        return Estimate(mean, math.sqrt(square) / float(count.sum()))

    def _answers(self, right: Tensor) -> Tensor:
        """Whether all counted tokens of a text are right: what greedy decoding then gives."""
        wrong = torch.zeros(len(self.samples), dtype=torch.int64)
        return wrong.index_add(0, self._text, (~right).long()) == 0


class Evaluator:
    """Evaluates any number of deltas of one fine-tune over the same samples."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        samples: Sequence[Sample],
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress or _silent
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
        self._model.set_variant(artifact.tensors)
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
            finetuned=reference.compare(reference.own),
            changes_kept=reference.changes_kept(self._base, ours),
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


def _targets(sample: Sample) -> Tensor:
    return torch.tensor(
        [
            token
            for token, counted in zip(sample.ids[1:], sample.counted[1:], strict=True)
            if counted
        ]
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total
