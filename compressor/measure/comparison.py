"""How one model's predictions differ from a reference's: the one definition of every measure.

KL, top-1 agreement, flips, perplexity and exact match, from log-probabilities that the caller
supplies for each batch of samples: of two models in memory, of hidden states that were kept, or of
one model whose weights are exchanged. Exact match needs no generation: greedy decoding gives the
gold answer and stops if and only if, gold answer given, every one of its tokens and the end are the
most likely ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.measure.samples import Sample

BATCH_TOKENS = 1024  # of padded input; bounds what is in memory

# Of the samples of a batch: float32 log-probabilities [t, V] of every counted token, in order, in
# one or several parts; a reference's parts are as long as those it is compared with.
LogProbs = Callable[["SampleBatch"], Iterable[Tensor]]


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """Samples of like length that run together. indices: their places among all samples."""

    number: int
    indices: tuple[int, ...]
    samples: tuple[Sample, ...]


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
class Outputs:
    """What weights say of every counted token, and the reference: all ``[N]``.

    kl, loss                float32
    top, reference_top      int64: the most likely token
    right, reference_right  bool: whether that is the text's own next token
    """

    kl: Tensor
    loss: Tensor
    top: Tensor
    right: Tensor
    reference_top: Tensor
    reference_right: Tensor


class Comparer:
    """Compares weights with a reference over samples.

    reference  is asked again for each comparison, so that the caller decides what is kept
    """

    def __init__(self, samples: Sequence[Sample], reference: LogProbs) -> None:
        self.samples = list(samples)
        self.batches = [
            SampleBatch(number, tuple(indices), tuple(self.samples[index] for index in indices))
            for number, indices in enumerate(batches(self.samples))
        ]
        self._reference = reference
        order = [index for batch in self.batches for index in batch.indices]
        counts = torch.tensor([n_predicted(self.samples[index]) for index in order])
        self._text = torch.tensor(order).repeat_interleave(counts)
        self._targets = torch.cat([_targets(self.samples[index]) for index in order])

    @property
    def n_tokens(self) -> int:
        """Tokens measured."""
        return len(self._targets)

    @torch.inference_mode()
    def outputs_of(self, ours: LogProbs | None) -> Outputs:
        """Run everything once. None: the reference itself, whose KL is zero."""
        found: list[list[Tensor]] = []
        start = 0
        for batch in self.batches:
            theirs = self._reference(batch)
            parts = ((p, None) for p in theirs) if ours is None else _paired(theirs, ours(batch))
            for p, q in parts:
                targets = self._targets[start : start + len(p)].to(p.device)
                start += len(p)
                found.append([part.cpu() for part in _token_outputs(p, q, targets)])
        return Outputs(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def compare(self, ours: Outputs) -> Comparison:
        """Summarise `ours` against the reference."""
        has_answers = any(sample.is_answer for sample in self.samples)
        right, theirs = self.answers(ours.right), self.answers(ours.reference_right)
        return Comparison(
            kl=self.estimate(ours.kl),
            top1_agreement=self.estimate(ours.top == ours.reference_top),
            token_flips=self.estimate(ours.right != ours.reference_right),
            perplexity=math.exp(min(float(ours.loss.double().mean()), 700.0)),
            exact_match=float(right.double().mean()) if has_answers else None,
            answer_flips=float((right != theirs).double().mean()) if has_answers else None,
        )

    def estimate(self, values: Tensor) -> Estimate:
        """Mean of ``[N]`` over tokens; the error from the linearised ratio of sums over texts."""
        n = len(self.samples)
        zeros = torch.zeros(n, dtype=torch.float64)
        total = zeros.index_add(0, self._text, values.double())
        count = zeros.index_add(0, self._text, torch.ones_like(values, dtype=torch.float64))
        mean = float(total.sum() / count.sum())
        if n < 2:
            return Estimate(mean, math.nan)
        square = float(((total - mean * count) ** 2).sum()) * n / (n - 1)
        return Estimate(mean, math.sqrt(square) / float(count.sum()))

    def answers(self, right: Tensor) -> Tensor:
        """By sample, whether all counted tokens are right: bool ``[N]`` to ``[len(samples)]``."""
        wrong = torch.zeros(len(self.samples), dtype=torch.int64)
        return wrong.index_add(0, self._text, (~right).long()) == 0


def kl_per_token(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``KL(p || q)`` in nats: float32 log-probabilities ``[T, V]`` twice -> ``[T]``.

    Where one knows fewer tokens than the other, both are conditioned on those that both know.
    """
    if log_p.shape[1] != log_q.shape[1]:
        width = min(log_p.shape[1], log_q.shape[1])
        log_p, log_q = log_p[:, :width].log_softmax(-1), log_q[:, :width].log_softmax(-1)
    return torch.einsum("tv,tv->t", log_p.exp(), log_p - log_q)


def n_predicted(sample: Sample) -> int:
    """Return how many tokens of it are measured."""
    return sum(sample.counted[1:])


def batches(samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Yield indices of samples of like length, at most `BATCH_TOKENS` padded tokens a batch."""
    waiting: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: len(samples[i].ids)):
        if waiting and len(samples[index].ids) * (len(waiting) + 1) > BATCH_TOKENS:
            yield waiting
            waiting = []
        waiting.append(index)
    if waiting:
        yield waiting


def padded(samples: Sequence[Sample], skip: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a model runs over, padded on the right.

    skip  tokens that all samples begin with and that the model has seen already

    ids     int64 ``[B, T]``
    mask    int64 ``[B, skip + T]``: 1 where there is a token, the skipped ones included
    wanted  bool ``[B, T]``: the positions whose next token is counted
    """
    width = max(len(sample.ids) for sample in samples) - skip
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    mask = torch.zeros(len(samples), skip + width, dtype=torch.int64)
    wanted = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, sample in enumerate(samples):
        rest = len(sample.ids) - skip
        ids[row, :rest] = torch.tensor(sample.ids[skip:])
        mask[row, : len(sample.ids)] = 1
        wanted[row, : rest - 1] = torch.tensor(sample.counted[skip + 1 :])
    return ids, mask, wanted


def _paired(
    theirs: Iterable[Tensor], ours: Iterable[Tensor]
) -> Iterable[tuple[Tensor, Tensor | None]]:
    return zip(theirs, ours, strict=True)


def _token_outputs(p: Tensor, q: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
    """The fields of `Outputs` for some tokens."""
    reference_top = p.argmax(-1)
    ours, top = (p, reference_top) if q is None else (q, q.argmax(-1))
    kl = torch.zeros_like(p[:, 0]) if q is None else kl_per_token(p, q)
    known = targets.clamp(max=ours.shape[1] - 1)
    loss = -ours.gather(1, known[:, None])[:, 0]
    loss = loss.masked_fill(known != targets, math.inf)  # a token the model does not have
    return kl, loss, top, top == targets, reference_top, reference_top == targets


def _targets(sample: Sample) -> Tensor:
    return torch.tensor(sample.ids[1:])[torch.tensor(sample.counted[1:])]
