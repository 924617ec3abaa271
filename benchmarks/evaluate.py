"""How far a model is from its fine-tune: KL per token, top-1 agreement, exact match, flips.

The fine-tune runs over the samples once, in float32; its distribution at every position that
counts is kept, so that each variant costs one pass of its own. What all samples begin with runs
once a model. Exact match needs no generation: greedy decoding gives the gold answer and stops if
and only if, gold answer given, every one of its tokens and the end are the most likely ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.tasks import Item

BATCH_TOKENS = 1024  # of padded input; bounds what is in memory


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one text. Positions from `n_prompt - 1` on predict what counts."""

    ids: tuple[int, ...]
    n_prompt: int

    @property
    def target(self) -> tuple[int, ...]:
        """The tokens predicted."""
        return self.ids[self.n_prompt :]


@dataclass(frozen=True, slots=True)
class Distance:
    """One model against the fine-tune.

    kl         KL(fine-tune || model) in nats, mean over the predicted tokens
    agreement  how often the most likely token is the fine-tune's
    correct    per sample: whether greedy decoding gives its target
    """

    kl: float
    agreement: float
    correct: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Exact-match score and its standard error over items."""

    mean: float
    n: int

    @property
    def standard_error(self) -> float:
        """Binomial."""
        return math.sqrt(self.mean * (1 - self.mean) / self.n)


def task_samples(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[Sample]:
    """Prompt, gold answer and EOS as the fine-tune saw them in training."""
    samples = []
    for item in items:
        prompt = tokenizer(item.prompt).input_ids
        answer = tokenizer(item.answer, add_special_tokens=False).input_ids
        samples.append(Sample((*prompt, *answer, tokenizer.eos_token_id), len(prompt)))
    return samples


def text_samples(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> list[Sample]:
    """Plain texts, cut at `max_tokens`; every position counts."""
    encoded = (tuple(tokenizer(text).input_ids[:max_tokens]) for text in texts)
    return [Sample(ids, 1) for ids in encoded if len(ids) > 1]


class Reference:
    """The fine-tune's predictions over samples.

    It must compute logits as lm_head(hidden) with nothing after it (no soft capping); ValueError
    otherwise. Takes 4 bytes a predicted token and entry of the vocabulary.
    """

    def __init__(self, finetuned: PreTrainedModel, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)
        self.n_tokens = sum(len(sample.target) for sample in samples)
        self._prefix = common_prefix(samples)
        self._batches = list(batches(self.samples))
        check_head(finetuned, self.samples[0])
        self._log_p = [logits.log_softmax(-1) for logits in self._logits(finetuned)]
        self._best = [log_p.argmax(-1) for log_p in self._log_p]
        self.correct = self._correct(self._best)

    def distance(self, model: PreTrainedModel) -> Distance:
        """Compare `model` on the same samples.

        A vocabulary smaller than the fine-tune's (the base's, as a control) counts as it is.
        """
        kl = 0.0
        agree = 0
        bests = []
        references = zip(self._log_p, self._best, strict=True)
        for (log_p, best), logits in zip(references, self._logits(model), strict=True):
            log_q = logits.log_softmax(-1)
            log_p = log_p[:, : log_q.shape[1]]
            kl += float(torch.einsum("tv,tv->t", log_p.exp(), log_p - log_q).double().sum())
            bests.append(log_q.argmax(-1))
            agree += int((bests[-1] == best).sum())
        return Distance(kl / self.n_tokens, agree / self.n_tokens, self._correct(bests))

    def _correct(self, bests: Sequence[Tensor]) -> tuple[bool, ...]:
        """Which samples' targets are the most likely tokens throughout."""
        correct = [False] * len(self.samples)
        for batch, best in zip(self._batches, bests, strict=True):
            start = 0
            for index in batch:
                target = self.samples[index].target
                end = start + len(target)
                correct[index] = tuple(best[start:end].tolist()) == target
                start = end
        return tuple(correct)

    def _logits(self, model: PreTrainedModel) -> Iterator[Tensor]:
        """Float32 logits of every prediction of each batch, ``[sum(len(target)), V]``."""
        head = model.get_output_embeddings()
        weight = head.weight.float()
        bias = None if getattr(head, "bias", None) is None else head.bias.float()
        cache = prefix_cache(model, self._prefix)
        with torch.no_grad():
            for batch in self._batches:
                chosen = [self.samples[index] for index in batch]
                hidden = hidden_states(model, chosen, len(self._prefix), cache)
                yield F.linear(hidden.float(), weight, bias)


def common_prefix(samples: Sequence[Sample]) -> tuple[int, ...]:
    """What all prompts begin with; at least one token of each prompt is left."""
    first, last = min(s.ids for s in samples), max(s.ids for s in samples)
    longest = min(sample.n_prompt for sample in samples) - 1
    n = 0
    while n < longest and first[n] == last[n]:
        n += 1
    return first[:n]


def batches(samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Indices of samples of like length, at most BATCH_TOKENS padded tokens together."""
    batch: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: len(samples[i].ids)):
        if batch and (len(batch) + 1) * len(samples[index].ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def prefix_cache(model: PreTrainedModel, prefix: Sequence[int]) -> DynamicCache | None:
    """Keys and values of `prefix` in a batch of one; None if it is empty."""
    if not prefix:
        return None
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.base_model(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
    return cache


def hidden_states(
    model: PreTrainedModel, batch: Sequence[Sample], n_prefix: int, cache: DynamicCache | None
) -> Tensor:
    """Input of the lm_head for every prediction, sample after sample: ``[sum(len(target)), d]``.

    cache  holds the `n_prefix` tokens that all samples begin with; it is not changed
    """
    width = max(len(sample.ids) for sample in batch) - n_prefix
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), n_prefix + width, dtype=torch.long)
    wanted = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, sample in enumerate(batch):
        rest = sample.ids[n_prefix:]
        ids[row, : len(rest)] = torch.tensor(rest)
        mask[row, : len(sample.ids)] = 1
        wanted[row, sample.n_prompt - 1 - n_prefix : len(rest) - 1] = True
    past: dict[str, Any] = {"use_cache": False}
    if cache is not None:
        mine = copy.deepcopy(cache)
        mine.batch_repeat_interleave(len(batch))
        past = {"past_key_values": mine, "use_cache": True}
    with torch.no_grad():
        hidden: Tensor = model.base_model(input_ids=ids, attention_mask=mask, **past)[0]
    return hidden[wanted]


def check_head(model: PreTrainedModel, sample: Sample) -> None:
    """Refuse a model whose logits are not lm_head(last hidden state)."""
    head: nn.Module = model.get_output_embeddings()
    ids = torch.tensor([sample.ids])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        own = head(model.base_model(input_ids=ids, use_cache=False)[0])
    if not torch.allclose(own, logits):
        raise ValueError(f"{type(model).__name__} changes the logits after lm_head")
