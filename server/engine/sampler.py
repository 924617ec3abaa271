"""Logits -> token ids: penalties and bias ours, the filters transformers' own.

Rows with the same filter settings are filtered together. Every request may bring its seed: its
noise then comes from its own generator, so its text does not depend on who shares the batch.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.request import Request
from server.engine.types import SamplingParams, TokenLogprob, TopLogprob

GREEDY_BELOW = 1e-5  # temperatures below this are greedy, as in vLLM


@dataclass(slots=True)
class Sampled:
    """One row's outcome; `failed` if the logits were not finite."""

    token_id: int
    logprob: TokenLogprob | None = None
    failed: bool = False


@dataclass(slots=True)
class Sampler:
    """Keeps the generators of seeded requests."""

    _generators: dict[str, torch.Generator] = field(default_factory=dict)

    def forget(self, request: Request) -> None:
        self._generators.pop(request.request_id, None)

    def sample(self, requests: list[Request], logits: Tensor) -> list[Sampled]:
        """Choose one token per row: logits [R, V] any float -> R outcomes."""
        logits = logits.float()
        mask_foreign_ids_(logits, [r.variant.vocab_size for r in requests])
        finite = logits.amax(-1).isfinite().tolist()
        raw = logits.clone() if any(r.params.logprobs is not None for r in requests) else logits
        self._adjust_(logits, requests)
        chosen = self._choose(logits, requests, finite)
        return [
            Sampled(token, self._logprob(request, raw[row], token), failed=not finite[row])
            for row, (request, token) in enumerate(zip(requests, chosen, strict=True))
        ]

    def _logprob(self, request: Request, row: Tensor, token: int) -> TokenLogprob | None:
        if request.params.logprobs is None:
            return None
        return token_logprob(request, torch.log_softmax(row, -1), token)

    def _adjust_(self, logits: Tensor, requests: list[Request]) -> None:
        for row, request in enumerate(requests):
            params = request.params
            if params.repetition_penalty != 1.0:
                penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
                seen = torch.tensor([request.tokens], device=logits.device)
                logits[row] = penalty(seen, logits[row : row + 1])[0]
            if params.presence_penalty or params.frequency_penalty:
                _penalise_(logits[row], request)
            for token_id, bias in params.logit_bias:
                logits[row, token_id] += bias
            if request.n_output < params.min_tokens:
                banned = [*request.variant.text.eos_token_ids, *params.stop_token_ids]
                logits[row, [i for i in banned if i < logits.shape[1]]] = float("-inf")

    def _choose(self, logits: Tensor, requests: list[Request], finite: list[bool]) -> list[int]:
        tokens = logits.argmax(-1).tolist()
        groups: dict[tuple[float, int, float, float], list[int]] = defaultdict(list)
        for row, request in enumerate(requests):
            p = request.params
            if p.temperature >= GREEDY_BELOW and finite[row]:
                groups[(p.temperature, p.top_k, p.top_p, p.min_p)].append(row)
        for rows in groups.values():
            scores = _warpers(requests[rows[0]].params)(None, logits[rows])
            probs = torch.softmax(scores, -1)
            noise = torch.stack([self._noise(requests[row], probs.shape[1]) for row in rows])
            # argmax(p / Exp(1)) draws from p: the exponential race.
            drawn = (probs / noise.to(probs.device)).argmax(-1).tolist()
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
        return [int(t) for t in tokens]

    def _noise(self, request: Request, n: int) -> Tensor:
        generator = None
        if request.params.seed is not None:
            if request.request_id not in self._generators:
                generator = torch.Generator().manual_seed(request.params.seed)
                self._generators[request.request_id] = generator
            generator = self._generators[request.request_id]
        return torch.empty(n).exponential_(generator=generator).clamp_(min=1e-20)


def mask_foreign_ids_(logits: Tensor, vocab_sizes: list[int]) -> None:
    """Ids past a variant's own vocabulary get -inf: ``logits [R, V]``."""
    for row, size in enumerate(vocab_sizes):
        if size < logits.shape[1]:
            logits[row, size:] = float("-inf")


def token_logprob(request: Request, logprobs: Tensor, token: int) -> TokenLogprob:
    """The chosen token's log probability and the k best: ``logprobs [V]``, before penalties."""
    text = request.variant.text
    k = request.params.logprobs or 0
    best = torch.topk(logprobs, min(k, len(logprobs))) if k else None
    top: tuple[TopLogprob, ...] = ()
    if best is not None:
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = tuple(TopLogprob(i, text.token_text(i), v) for i, v in pairs)
    return TokenLogprob(token, text.token_text(token), float(logprobs[token]), top)


def _penalise_(row: Tensor, request: Request) -> None:
    """OpenAI's penalties over the generated tokens: ``row [V]``."""
    generated = request.tokens[len(request.prompt_ids) :]
    if not generated:
        return
    counts = torch.bincount(torch.tensor(generated, device=row.device), minlength=len(row))
    p = request.params
    row -= p.presence_penalty * (counts > 0) + p.frequency_penalty * counts


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers
