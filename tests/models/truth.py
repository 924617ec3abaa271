"""What transformers itself answers: the oracle of the matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

N_TOKENS = 12
# Of a log probability. Equal computations differ by 1e-5, a wrong mask or norm by 1e-1 and more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Answer:
    """A greedy continuation.

    margins   by how much each token's log probability leads the second best; empty if not known
    instead   as right: transformers' own forward pass without a cache, where `generate` parts from
              it (a cache of a definition that drops or keeps one place too many, say)
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...] = ()
    instead: Answer | None = None

    def difference(self, found: Answer) -> str | None:
        """What is different in `found`; None if nothing is, but for a tie and what follows it."""
        if self.instead is not None and self.instead.difference(found) is None:
            return None
        for i, (right, token) in enumerate(zip(self.tokens, found.tokens, strict=False)):
            gap = abs(self.logprobs[i] - found.logprobs[i])
            if token != right:
                if self.margins[i] < TOLERANCE:
                    return None
                return f"token {i} is {token}, not {right} (it leads by {self.margins[i]:.2g})"
            if not gap <= TOLERANCE:
                return f"log probability {i} is off by {gap:.2g}"
        if len(found.tokens) != len(self.tokens):
            return f"{len(found.tokens)} tokens, not {len(self.tokens)}"
        return None


class Oracle:
    """A saved model as transformers runs it: eager attention, float32."""

    def __init__(self, path: Path) -> None:
        """Raises whatever transformers raises."""
        (named,) = AutoConfig.from_pretrained(path).architectures
        loaded = getattr(transformers, named).from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        self.model: PreTrainedModel = loaded[0].eval()
        self.missing_keys = sorted(loaded[1]["missing_keys"])
        self.model.generation_config = GenerationConfig()  # nothing ends an answer early
        self.notes: list[str] = []

    @torch.no_grad()
    def answer(self, prompt: list[int]) -> Answer:
        """`generate` with its cache, or where that fails, forward passes over everything; a note
        where the two differ.
        """
        try:
            cached = self._generated(prompt)
        except Exception as error:
            self._note(f"transformers' own generate fails ({type(error).__name__})")
            return self._without_cache(prompt)
        if self._in_one_pass(prompt, cached).difference(cached) is not None:
            whole = self._without_cache(prompt)
            if whole.difference(cached) is not None:
                self._note("transformers' own generate parts from its forward pass without a cache")
                return replace(cached, instead=whole)
            self._note("it is not causal: a token's scores depend on later ones")
        return cached

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _without_cache(self, prompt: list[int]) -> Answer:
        tokens = list(prompt)
        steps = []
        for _ in range(N_TOKENS):
            logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            steps.append(logits.float())
            tokens.append(int(logits.argmax()))
        return _answer(tokens[len(prompt) :], steps)

    def _in_one_pass(self, prompt: list[int], answer: Answer) -> Answer:
        """The scores of an answer's tokens in a forward pass over prompt and answer."""
        ids = torch.tensor([[*prompt, *answer.tokens[:-1]]])
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        return _answer([int(step.argmax()) for step in logits], list(logits.float()))

    def _generated(self, prompt: list[int]) -> Answer:
        ids = torch.tensor([prompt])
        config = GenerationConfig(
            max_new_tokens=N_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        tokens = made.sequences[0, len(prompt) :].tolist()
        return _answer(tokens, [step[0].float() for step in made.logits])


def _answer(tokens: list[int], steps: list[torch.Tensor]) -> Answer:
    logprobs, margins = [], []
    for token, logits in zip(tokens, steps, strict=True):
        scores = logits.log_softmax(-1)
        best = scores.topk(2).values
        logprobs.append(float(scores[token]))
        margins.append(float(best[0] - best[1]))
    return Answer(tuple(tokens), tuple(logprobs), tuple(margins))
