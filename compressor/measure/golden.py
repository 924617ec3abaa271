"""Golden prompts: what the fine-tune says to a few prompts, and how near base and delta come.

They are recorded when a delta is made and travel with it as its certificate, so that a server can
check on the machine, the kernels and the batch that it has that it serves the fine-tune.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.artifact.certificate import (
    MAX_PROMPT_TOKENS,
    Certificate,
    GoldenPrompt,
    rounded_log_probs,
)
from compressor.checkpoint.files import Checkpoint
from compressor.codecs import TensorDelta
from compressor.errors import CheckpointError, InputError
from compressor.measure.comparison import kl_per_token, padded
from compressor.measure.continuation import continued
from compressor.measure.samples import Sample, load_tokenizer, read_samples
from compressor.measure.swapped_model import SwappedModel
from compressor.measure.texts import built_in_texts

BUILT_IN, OWN = "built-in", "own"

_PROMPTS = 8
_BEGINNING_TOKENS = 16  # of a built-in text: what follows is the fine-tune's own
_ANSWER_TOKENS = 16
_MAX_OWN_TOKENS = 256
_CPU_PARAMETERS = 1_500_000_000
_DIGITS = 4  # significant


@dataclass(frozen=True, slots=True)
class Golden:
    """What is known before there is a delta.

    base_kl, base_agreement  of the base at the same tokens, as `Certificate` has them
    """

    texts: str
    dtype: str
    prompts: tuple[GoldenPrompt, ...]
    base_kl: float
    base_agreement: float

    def certificate(self, created_by: str, outcome: Outcome) -> Certificate:
        """The certificate of the delta that came to this."""
        return Certificate(
            created_by=created_by,
            texts=self.texts,
            dtype=self.dtype,
            kl_per_token=outcome.kl,
            top1_agreement=outcome.agreement,
            base_kl_per_token=self.base_kl,
            base_top1_agreement=self.base_agreement,
            prompts=tuple(
                replace(prompt, delta=found)
                for prompt, found in zip(self.prompts, outcome.log_probs, strict=True)
            ),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Some weights at the fine-tune's tokens: log probabilities by prompt, and means over all."""

    log_probs: tuple[tuple[float, ...], ...]
    kl: float
    agreement: float


class Recorder:
    """The models of one pair, run over golden prompts; none is in memory between two calls.

    own  texts to take prompts from instead of the built-in ones, as `read_samples` has them

    Raises CheckpointError if the fine-tune cannot be run here, InputError if `own` cannot be used.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, own: Path | None = None) -> None:
        if reason := why_not_runnable(tuned):
            raise CheckpointError(reason)
        self._base, self._tuned = base, tuned
        tokenizer = load_tokenizer(tuned.path, "a certificate")
        prompts = built_in_prompts(tokenizer) if own is None else own_prompts(own, tokenizer)
        model = SwappedModel(base, tuned)
        self.names = frozenset(model.names)
        answers = _answers(model.module, prompts, tokenizer.eos_token_id)
        self._samples = [
            Sample((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        self._answers = torch.tensor([token for answer in answers for token in answer])
        self._reference = self._log_probs(model)
        model.use(dict.fromkeys(model.names, "base"))
        of_base = self._outcome(model)
        self.golden = Golden(
            texts=BUILT_IN if own is None else OWN,
            dtype=str(next(model.module.parameters()).dtype).removeprefix("torch."),
            prompts=tuple(
                GoldenPrompt(tuple(prompt), tuple(answer), tuned_ones, (), base_ones)
                for prompt, answer, tuned_ones, base_ones in zip(
                    prompts, answers, self._chosen(self._reference), of_base.log_probs, strict=True
                )
            ),
            base_kl=of_base.kl,
            base_agreement=of_base.agreement,
        )

    def measure(self, deltas: Mapping[str, TensorDelta]) -> Outcome:
        """Run the fine-tune with these deltas in place of its own difference."""
        model = SwappedModel(self._base, self._tuned)
        model.set_variant(deltas)
        model.use(dict.fromkeys(model.names, "variant"))
        return self._outcome(model)

    @torch.inference_mode()
    def _log_probs(self, model: SwappedModel) -> Tensor:
        """Float32 ``[N, V]`` of all tokens of all answers, in order."""
        module = model.module
        ids, mask, wanted = (tensor.to(module.device) for tensor in padded(self._samples))
        logits: Tensor = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[wanted].float().log_softmax(-1).cpu()

    def _outcome(self, model: SwappedModel) -> Outcome:
        ours = self._log_probs(model)
        kl = float(kl_per_token(self._reference, ours).mean().clamp(min=0))
        same = float((ours.argmax(-1) == self._answers).double().mean())
        return Outcome(self._chosen(ours), _rounded(kl), _rounded(same))

    def _chosen(self, log_probs: Tensor) -> tuple[tuple[float, ...], ...]:
        """The log probabilities of the answers' tokens, by prompt."""
        found = log_probs.gather(1, self._answers[:, None])[:, 0]
        parts = torch.split(found, [sum(sample.counted) for sample in self._samples])
        return tuple(rounded_log_probs(part.tolist()) for part in parts)


@torch.inference_mode()
def _answers(model: Any, prompts: Sequence[Sequence[int]], eos: int | None) -> list[list[int]]:
    """The most likely tokens after each prompt, up to the end of text, which counts."""
    found: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:  # together: each step reads all weights
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        beginnings = [prompts[i] for i in alike]
        own = continued(model, beginnings, eos=eos, n_tokens=_ANSWER_TOKENS, sampled=False)
        found.update(zip(alike, own, strict=True))
    return [found[i] for i in range(len(prompts))]


def why_not_runnable(tuned: Checkpoint) -> str:
    """Say why the fine-tune cannot be run here, as far as its size tells; empty if it can."""
    n_parameters = sum(math.prod(tensor.shape) for tensor in tuned.tensors.values())
    if not torch.cuda.is_available() and n_parameters > _CPU_PARAMETERS:
        return f"{tuned.name} has {n_parameters:,} parameters, too many to run without a GPU"
    return ""


def built_in_prompts(tokenizer: Any) -> list[list[int]]:
    """Beginnings of built-in texts, half of them as a user's words where there is a template."""
    texts = built_in_texts()
    chosen = [texts[i * len(texts) // _PROMPTS] for i in range(_PROMPTS)]
    prompts = [tokenizer(text).input_ids[:_BEGINNING_TOKENS] for text in chosen]
    if getattr(tokenizer, "chat_template", None):
        for i in range(0, _PROMPTS, 2):
            prompts[i] = _as_chat(tokenizer, prompts[i]) or prompts[i]
    return [prompt for prompt in prompts if prompt]


def own_prompts(file: Path, tokenizer: Any) -> list[list[int]]:
    """The first prompts of a file of prompts and answers, or beginnings of its texts."""
    prompts = []
    for sample in read_samples(file, tokenizer, limit=_PROMPTS, max_tokens=MAX_PROMPT_TOKENS):
        given = sample.counted.index(True) if sample.is_answer else _BEGINNING_TOKENS
        prompts.append(list(sample.ids[:given][-_MAX_OWN_TOKENS:]))
    if not all(prompts):
        raise InputError(f"{file}: a prompt of a certificate needs a token; leave empty ones out")
    return prompts


def _as_chat(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """A user's message in the fine-tune's template; empty if that does not render it."""
    from jinja2 import TemplateError

    words = tokenizer.decode(ids, skip_special_tokens=True)
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError):
        return []
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found[:MAX_PROMPT_TOKENS]


def _rounded(value: float) -> float:
    """To a few significant digits: what is beyond depends on the machine's thread count."""
    return float(f"{value:.{_DIGITS}g}")
