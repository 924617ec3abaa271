"""Tune the vectors that are stored exactly so that the variant says what the fine-tune says.

Norm weights and biases are stored in any case: at no byte more they can be other than the
fine-tune's, and make up for some of what the matrices lost. Adam minimises the sum over sets of
texts of KL(fine-tune || variant) relative to what it was: a set counts by ratios, as everywhere in
`auto`. Texts tuned on are never those measured on; those decide which step is kept, and none is
that makes any set worse. BitDelta tunes its scales so (Liu et al. 2024, arXiv 2402.10193); scales
of rows and of components were tried and gave less (benchmarks/notes/auto.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.artifact.staging import StagedDeltas
from compressor.codecs import DenseRows, TensorDelta
from compressor.measure.comparison import kl_per_token, n_predicted
from compressor.measure.samples import Sample
from compressor.measure.swapped_model import SwappedModel
from compressor.progress import Progress

STEPS = 20
CHECK_EVERY = 10

_TOKENS = 256  # predicted tokens of each set a step
_INPUT_TOKENS = 256  # that one backward pass runs over, padding included
_REFERENCE_TEXTS = 8  # the fine-tune runs over so many at once
_RATE = 0.01  # of a vector's mean magnitude, a step; it falls to zero
_LEAST = 1e-3  # of that magnitude: a bias may be all zeros
_MEANS = (0.9, 0.99)  # Adam's, of gradients and of their squares
_FORGET = 0.1  # of the running mean of a set's KL, a step

_Known = tuple[Sample, Tensor]  # with the fine-tune's hidden states [t, H] at the counted tokens


@dataclass(frozen=True, slots=True)
class Tuned:
    """Deltas as they would be stored after `steps` of `of`."""

    steps: int
    deltas: StagedDeltas
    of: int = 0


class Tuner:
    """Tunes deltas of one fine-tune.

    model  float32; its weights are the fine-tune's again after each call
    texts  by set; what is tuned on
    """

    def __init__(
        self, model: SwappedModel, texts: Mapping[str, Sequence[Sample]], seed: int = 0
    ) -> None:
        self._model, self._seed = model, seed
        self._parameters: dict[str, Tensor] = dict(model.module.named_parameters())
        model.use({})
        self._texts = {name: self._with_targets(samples) for name, samples in texts.items()}

    @property
    def n_tokens(self) -> dict[str, int]:
        """Predicted tokens by set."""
        return {
            name: sum(n_predicted(sample) for sample, _ in known)
            for name, known in self._texts.items()
        }

    def run(
        self,
        deltas: StagedDeltas,
        kl: Mapping[str, float],
        progress: Progress,
        visit: Callable[[Tuned], None],
    ) -> None:
        """Take `STEPS` steps; `visit` sees every `CHECK_EVERY`-th and may use the model.

        kl  of the sets before: what each is divided by at first
        """
        exact = {name: vector for name, delta in deltas.items() if (vector := _vector(delta))}
        if not exact:
            return
        values = {name: rows.values.float() for name, rows in exact.items()}
        paces = {name: float(v.abs().mean()) + _LEAST for name, v in values.items()}
        draws = {name: _draw(known, self._seed) for name, known in self._texts.items()}
        usual = dict(kl)
        with self._only_trainable(list(exact)) as vectors:
            groups = [
                {"params": [part], "lr": _RATE * paces[name], "of": name}
                for name, part in vectors.items()
            ]
            adam = torch.optim.Adam(groups, betas=_MEANS)
            for step in range(STEPS):
                progress("tune", step, STEPS)
                if step % CHECK_EVERY == 0:
                    self._load(deltas, values)
                for group in adam.param_groups:
                    group["lr"] = _RATE * paces[group["of"]] * (1 - step / STEPS)
                for name, draw in draws.items():
                    now = self._descend(next(draw), 1 / max(usual[name], 1e-9))
                    usual[name] += _FORGET * (now - usual[name])
                adam.step()
                adam.zero_grad()
                if (step + 1) % CHECK_EVERY == 0:
                    values = {name: part.detach().clone() for name, part in vectors.items()}
                    visit(Tuned(step + 1, _stored(deltas, exact, values), STEPS))
        self._model.use({})
        progress("tune", STEPS, STEPS)

    @contextmanager
    def _only_trainable(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The named parameters; within it no gradient of any other is computed."""
        needed = {name: parameter.requires_grad for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in names)
        try:
            yield {name: self._parameters[name] for name in names}
        finally:
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(needed[name])
                parameter.grad = None

    @torch.no_grad()
    def _load(self, deltas: Mapping[str, TensorDelta], values: Mapping[str, Tensor]) -> None:
        """Give the model the deltas, with the vectors at `values`."""
        self._model.set_variant(deltas)
        self._model.use(dict.fromkeys(self._model.names, "variant"))
        for name, vector in values.items():
            self._parameters[name].copy_(vector)

    def _descend(self, known: Sequence[_Known], weight: float) -> float:
        """Add the gradient of `weight` times the mean KL; return the KL.

        A few texts at a time: what a backward pass keeps grows with the tokens, counted or not.
        """
        n_tokens = sum(n_predicted(sample) for sample, _ in known)
        total = 0.0
        for part in _pieces(known):
            kl = self._kl(part) / n_tokens
            (weight * kl).backward()  # type: ignore[no-untyped-call]
            total += float(kl.detach())
        return total

    def _kl(self, known: Sequence[_Known]) -> Tensor:
        """Sum of the KL of the model as it is now over the counted tokens, with its graph."""
        wanted = torch.cat([hidden for _, hidden in known])
        with torch.enable_grad():
            ours = self._model.logits(self._model.hidden([sample for sample, _ in known]))
            theirs = self._model.logits(wanted, finetuned=True)
            parts = [
                kl_per_token(p.detach().log_softmax(-1), q.log_softmax(-1))
                for p, q in zip(theirs, ours, strict=True)
            ]
            return torch.cat(parts).sum()

    @torch.no_grad()
    def _with_targets(self, samples: Sequence[Sample]) -> list[_Known]:
        """Each sample with the fine-tune's hidden states ``[t, H]`` at its counted tokens."""
        samples = sorted(
            (sample for sample in samples if n_predicted(sample)), key=lambda s: len(s.ids)
        )
        found: list[_Known] = []
        for start in range(0, len(samples), _REFERENCE_TEXTS):
            group = samples[start : start + _REFERENCE_TEXTS]
            counts = [n_predicted(sample) for sample in group]
            hidden = torch.split(self._model.hidden(group), counts)
            found += zip(group, hidden, strict=True)
        return found


def _vector(delta: TensorDelta) -> DenseRows | None:
    """The whole vector that `delta` stores exactly, if it is one."""
    exact = delta.exact
    is_whole = exact is not None and exact.values.ndim == 1 and exact.row_start == 0
    return exact if is_whole and not delta.terms else None


def _stored(
    deltas: StagedDeltas, exact: Mapping[str, DenseRows], values: Mapping[str, Tensor]
) -> StagedDeltas:
    """The deltas with the vectors at `values`, in their own dtypes."""
    return deltas.with_changes(
        {
            name: replace(
                deltas[name], exact=DenseRows(0, value.cpu().to(exact[name].values.dtype))
            )
            for name, value in values.items()
        }
    )


def _pieces(known: Sequence[_Known]) -> Iterator[list[_Known]]:
    """Cut into runs of at most `_INPUT_TOKENS` padded tokens, or one text."""
    piece: list[_Known] = []
    for item in sorted(known, key=lambda one: len(one[0].ids)):
        if piece and len(item[0].ids) * (len(piece) + 1) > _INPUT_TOKENS:
            yield piece
            piece = []
        piece.append(item)
    yield piece


def _draw(known: Sequence[_Known], seed: int) -> Iterator[list[_Known]]:
    """Endlessly, samples of `_TOKENS` predicted tokens or a few more; all before any returns."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[_Known] = []
    while True:
        batch, n_tokens = [], 0
        while n_tokens < _TOKENS:
            if not waiting:
                order = torch.randperm(len(known), generator=generator)
                waiting = [known[index] for index in order.tolist()]
            batch.append(waiting.pop())
            n_tokens += n_predicted(batch[-1][0])
        yield batch
