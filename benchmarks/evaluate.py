"""How far a model is from its fine-tune: KL per token, top-1 agreement, exact-match score.

The fine-tune runs over the texts once; what its lm_head saw is kept (a few kilobytes a token
instead of a row of the vocabulary), so that each variant costs one pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.tasks import Item
from compressor.fidelity import kl_per_token

BATCH_TOKENS = 1024  # of padded input; bounds the logits in memory
GENERATE_BATCH = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one text. Positions from `n_prompt - 1` on predict the answer."""

    ids: tuple[int, ...]
    n_prompt: int


@dataclass(frozen=True, slots=True)
class Distance:
    """Means over tokens. `agreement` is how often the most likely token is the fine-tune's."""

    kl_answer: float
    kl_prompt: float
    agreement: float
    n_answer: int
    n_prompt: int


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
    """Plain texts, cut at `max_tokens`; every position counts as answer."""
    encoded = (tuple(tokenizer(text).input_ids[:max_tokens]) for text in texts)
    return [Sample(ids, 1) for ids in encoded if len(ids) > 1]


class Reference:
    """The fine-tune's predictions over samples, kept as the inputs of its lm_head.

    The fine-tune must compute logits as lm_head(hidden) with nothing after it (no soft capping);
    ValueError otherwise.
    """

    def __init__(self, finetuned: PreTrainedModel, samples: Sequence[Sample]) -> None:
        self.head = finetuned.get_output_embeddings()
        self.batches = list(batches(samples))
        self.hidden: list[Tensor] = []
        for batch in self.batches:
            logits, hidden = forward(finetuned, batch)
            if not self.hidden and not torch.allclose(self._logits(hidden), logits.float()):
                raise ValueError(f"{type(finetuned).__name__} changes the logits after lm_head")
            self.hidden.append(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.head(hidden)
        return logits.float()

    def distance(self, model: PreTrainedModel) -> Distance:
        """Compare `model` on the same samples: KL(fine-tune || model) in nats per token."""
        kl = {True: 0.0, False: 0.0}
        n = {True: 0, False: 0}
        agree = 0
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            theirs = self._logits(hidden)
            ours = forward(model, batch)[0].float()
            theirs, ours = _same_width(theirs, ours)
            per_token = kl_per_token(theirs, ours)
            is_answer = answer_mask(batch)
            for which in (True, False):
                chosen = is_answer if which else ~is_answer
                kl[which] += float(per_token[chosen].double().sum())
                n[which] += int(chosen.sum())
            agree += int((theirs.argmax(-1) == ours.argmax(-1))[is_answer].sum())
        return Distance(
            kl_answer=kl[True] / n[True],
            kl_prompt=kl[False] / n[False] if n[False] else math.nan,
            agreement=agree / n[True],
            n_answer=n[True],
            n_prompt=n[False],
        )


def _same_width(theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """Cut to the shared vocabulary: only the base, as a control, can lack added tokens."""
    width = min(theirs.shape[-1], ours.shape[-1])
    return theirs[..., :width], ours[..., :width]


def batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Similar lengths together, at most BATCH_TOKENS padded tokens each."""
    batch: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids)):
        if batch and (len(batch) + 1) * len(sample.ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def answer_mask(batch: Sequence[Sample]) -> Tensor:
    """Return which predictions are of the answer: bool ``[sum(len - 1)]``, sample after sample."""
    parts = [torch.arange(len(s.ids) - 1) >= s.n_prompt - 1 for s in batch]
    return torch.cat(parts)


def forward(model: PreTrainedModel, batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Logits of every prediction ``[sum(len - 1), V]``, and the lm_head's input for them.

    The lm_head, most of a small model's work, runs on real positions only.
    """
    width = max(len(sample.ids) for sample in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    valid = torch.zeros(len(batch), width, dtype=torch.bool)
    wanted = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        valid[row, : len(sample.ids)] = True
        wanted[row, : len(sample.ids) - 1] = True
    seen: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(args[0][wanted])
        return (seen[0],)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=valid.long(), use_cache=False).logits
    finally:
        hook.remove()
    return logits, seen[0]


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
) -> Score:
    """Greedy answers that equal the gold one, in padded batches of similar prompts."""
    prompts = [tokenizer(item.prompt).input_ids for item in items]
    golds = [tokenizer(item.answer, add_special_tokens=False).input_ids for item in items]
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    right = 0
    for start in range(0, len(order), GENERATE_BATCH):
        chosen = order[start : start + GENERATE_BATCH]
        # An answer longer than the gold one is wrong whatever comes next.
        limit = max(len(golds[i]) for i in chosen) + 2
        answers = generate(model, tokenizer, [prompts[i] for i in chosen], limit)
        right += sum(
            answer.strip() == items[i].answer.strip()
            for i, answer in zip(chosen, answers, strict=True)
        )
    return Score(right / len(items), len(items))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of left-padded prompts, up to EOS."""
    eos: int = tokenizer.eos_token_id
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), eos)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    texts = []
    for row in out[:, width:].tolist():
        end = row.index(eos) if eos in row else len(row)
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts
