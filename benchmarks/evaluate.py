"""How far a model in memory is from its fine-tune, measured fast for one variant after another.

The measures are `compressor.measure.comparison`'s. The fine-tune runs over the samples once, in
float32; its distribution at every position that counts is kept, so that each variant costs one
pass of its own. What all samples begin with runs once a model.
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
from compressor.measure.comparison import Comparer, LogProbs, SampleBatch, padded
from compressor.measure.samples import Sample, completion_sample

_CHUNK = 64  # predictions whose logits are computed at once: they stay near the processor


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
    return [completion_sample(item.prompt, item.answer, tokenizer) for item in items]


def text_samples(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> list[Sample]:
    """Plain texts, cut at `max_tokens`; every position counts."""
    encoded = (tuple(tokenizer(text).input_ids[:max_tokens]) for text in texts)
    return [Sample(ids, (True,) * len(ids)) for ids in encoded if len(ids) > 1]


class Reference(Comparer):
    """The fine-tune's predictions over samples.

    It must compute logits as lm_head(hidden) with nothing after it (no soft capping); ValueError
    otherwise. Takes 4 bytes a predicted token and entry of the vocabulary.
    """

    def __init__(self, finetuned: PreTrainedModel, samples: Sequence[Sample]) -> None:
        super().__init__(samples, lambda batch: self._kept[batch.number])
        self._prefix = common_prefix(samples)
        check_head(finetuned, self.samples[0])
        run = self._runner(finetuned)
        self._kept = [list(run(batch)) for batch in self.batches]
        self.correct = self._correct(self.outputs_of(None).right)

    def distance(self, model: PreTrainedModel) -> Distance:
        """Compare `model` on the same samples."""
        outputs = self.outputs_of(self._runner(model))
        found = self.compare(outputs)
        return Distance(found.kl.mean, found.top1_agreement.mean, self._correct(outputs.right))

    def _correct(self, right: Tensor) -> tuple[bool, ...]:
        return tuple(self.answers(right).tolist())

    def _runner(self, model: PreTrainedModel) -> LogProbs:
        """Log-probabilities from float32 logits, whatever the model's dtype."""
        head = model.get_output_embeddings()
        weight = head.weight.float()
        bias = None if getattr(head, "bias", None) is None else head.bias.float()
        cache = prefix_cache(model, self._prefix)

        def run(batch: SampleBatch) -> Iterator[Tensor]:
            hidden = hidden_states(model, batch.samples, len(self._prefix), cache)
            for part in hidden.float().split(_CHUNK):
                with torch.no_grad():
                    yield F.linear(part, weight, bias).log_softmax(-1)

        return run


def common_prefix(samples: Sequence[Sample]) -> tuple[int, ...]:
    """What all prompts begin with; at least one token of each prompt is left."""
    first, last = min(s.ids for s in samples), max(s.ids for s in samples)
    longest = min(sample.counted.index(True, 1) for sample in samples) - 1
    n = 0
    while n < longest and first[n] == last[n]:
        n += 1
    return first[:n]


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
    """Input of the lm_head for every counted token, sample after sample: ``[N, d]``.

    cache  holds the `n_prefix` tokens that all samples begin with; it is not changed
    """
    ids, mask, wanted = padded(batch, n_prefix)
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
