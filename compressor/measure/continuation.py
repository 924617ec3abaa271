"""What a model says after some beginnings, by transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def continued(
    model: Any,
    beginnings: Sequence[Sequence[int]],
    *,
    eos: int | None,
    n_tokens: int,
    sampled: bool,
    tell: Callable[[int], None] = lambda n: None,
) -> list[list[int]]:
    """Return the tokens after each of `beginnings`, which are of equal length.

    model     a Hugging Face causal language model
    eos       ends a text, and is its last token; None: nothing does
    n_tokens  the most after each
    sampled   at temperature 1 from all tokens, by torch's generator; else the most likely
    tell      is called with how many there are now
    """
    from transformers import GenerationConfig

    n_given = len(beginnings[0])

    def on_token(drawn: Tensor, _: Any) -> Tensor:
        """Called with all tokens ``[B, T]`` after each; asks no text to stop."""
        tell(drawn.shape[1] - n_given)
        return torch.zeros(len(drawn), dtype=torch.bool, device=drawn.device)

    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        **(how if sampled else {"do_sample": False}),
        max_new_tokens=n_tokens,
        eos_token_id=eos,
        pad_token_id=0 if eos is None else eos,
    )
    ids = torch.tensor(beginnings, device=model.device)
    own_config, model.generation_config = model.generation_config, GenerationConfig()
    try:  # its own penalties and beams would stand in for what `config` leaves open
        drawn = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=[on_token],
        )
    finally:
        model.generation_config = own_config
    found = []
    for row in drawn.tolist():
        own = row[n_given:]
        found.append(own[: own.index(eos) + 1] if eos in own else own)
    return found
