"""Texts that the fine-tune writes itself: the nearest thing to its task where no text is given.

Tokens drawn at temperature 1 from the fine-tune (as in LLM-QAT, Liu et al. 2023, arXiv 2305.17888),
after three kinds of beginnings: the first token of a text, an empty chat, and the first words of
the built-in texts. What follows them is in the fine-tune's manner: one that was trained to answer
in JSON answers anything in JSON. What it does only after prompts of its own task it does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compressor.measure.continuation import continued
from compressor.measure.samples import Sample
from compressor.measure.texts import built_in_texts
from compressor.progress import Progress, silent, within

SELF = "self-written"

_NEW_TOKENS = 24
_EACH = 16  # texts after an empty beginning or chat
_PREFIX_TOKENS = 16
_MARK = "\u2063impart\u2063"  # what no template holds


def self_written(
    model: Any, tokenizer: Any, progress: Progress = silent, seed: int = 0
) -> list[Sample]:
    """Return texts drawn from `model`; what it was given to begin with does not count.

    model  a Hugging Face causal language model with the fine-tune's weights
    """
    samples = []
    groups = _beginnings(tokenizer)
    with torch.random.fork_rng(devices=()), torch.inference_mode():
        torch.manual_seed(seed)
        for index, beginnings in enumerate(groups):
            share = within(progress, SELF, index / len(groups), (index + 1) / len(groups))
            samples += _continue(model, tokenizer, beginnings, share)
    return samples


def _beginnings(tokenizer: Any) -> list[list[list[int]]]:
    """Beginnings of equal length together."""
    found = []
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else _eos(tokenizer)
    if first is not None:
        found.append([[first]] * _EACH)
    if chat := _empty_chat(tokenizer):
        found.append([chat] * _EACH)
    prefixes = [tokenizer(text).input_ids[:_PREFIX_TOKENS] for text in built_in_texts()]
    whole = [prefix for prefix in prefixes if len(prefix) == _PREFIX_TOKENS]
    found.append(whole[:: max(1, len(whole) // (2 * _EACH))])
    return [group for group in found if group]


def _empty_chat(tokenizer: Any) -> list[int]:
    """The chat template up to where the user's words go; empty if there is none that renders."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return []
    messages = [{"role": "user", "content": _MARK}]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError):
        return []
    before, mark, _ = text.partition(_MARK)
    ids: list[int] = tokenizer(before, add_special_tokens=False).input_ids if mark else []
    return ids


def _continue(
    model: Any, tokenizer: Any, beginnings: Sequence[Sequence[int]], progress: Progress
) -> list[Sample]:
    progress(SELF, 0, _NEW_TOKENS)
    answers = continued(
        model,
        beginnings,
        eos=_eos(tokenizer),
        n_tokens=_NEW_TOKENS,
        sampled=True,
        tell=lambda n: progress(SELF, n, _NEW_TOKENS),
    )
    progress(SELF, _NEW_TOKENS, _NEW_TOKENS)  # also where all texts ended before
    return [
        Sample((*given, *own), (False,) * len(given) + (True,) * len(own))
        for given, own in zip(beginnings, answers, strict=True)
    ]


def _eos(tokenizer: Any) -> int | None:
    eos: int | None = tokenizer.eos_token_id
    return eos
