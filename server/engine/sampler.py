"""Logits -> token ids: penalties and bias ours, the filters transformers' own.

Rows with the same filter settings are filtered together. Every request may bring its seed: its
noise then comes from its own generator, so its text does not depend on who shares the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.request import Request, TokenScore
from server.engine.types import SamplingParams
from server.errors import GenerationFailed

GREEDY_BELOW = 1e-5  # temperatures below this are greedy, as in vLLM


@dataclass(slots=True)
class Sampled:
    """One row's outcome; `error` says why this row has none."""

    token_id: int = -1
    score: TokenScore | None = None
    error: Exception | None = None


@dataclass(slots=True)
class Sampler:
    """Keeps the generators of seeded requests."""

    _generators: dict[str, torch.Generator] = field(default_factory=dict)

    def forget(self, request: Request) -> None:
        self._generators.pop(request.request_id, None)

    def sample(self, requests: list[Request], logits: Tensor) -> list[Sampled]:
        """Choose one token per row: logits [R, V] any float -> R outcomes.

        What goes wrong for one row (not finite, a processor raises) is that row's outcome.
        """
        logits = logits.float()
        mask_foreign_ids_(logits, [r.variant.vocab_size for r in requests])
        outcomes = [
            Sampled() if finite else Sampled(error=_not_finite(request))
            for request, finite in zip(requests, logits.amax(-1).isfinite().tolist(), strict=True)
        ]
        raw = logits.clone() if any(r.params.logprobs is not None for r in requests) else logits
        for row, request in enumerate(requests):
            with _failing(outcomes[row]):
                _adjust_(logits[row], request)
        best = _best(logits)
        for row, outcome in enumerate(outcomes):
            outcome.token_id = best[row]
        self._draw(logits, requests, outcomes)
        for row, request in enumerate(requests):
            if request.params.logprobs is not None:
                with _failing(outcomes[row]):
                    logprobs = torch.log_softmax(raw[row], -1)
                    token = outcomes[row].token_id
                    outcomes[row].score = token_score(request, logprobs, token)
        return outcomes

    def _draw(self, logits: Tensor, requests: list[Request], outcomes: list[Sampled]) -> None:
        """Replace the best token of rows with a temperature by a random one."""
        groups: dict[tuple[float, int, float, float], list[int]] = defaultdict(list)
        for row, request in enumerate(requests):
            p = request.params
            if p.temperature >= GREEDY_BELOW and outcomes[row].error is None:
                groups[(p.temperature, p.top_k, p.top_p, p.min_p)].append(row)
        for rows in groups.values():
            with _failing(*(outcomes[row] for row in rows)):
                scores = _warpers(requests[rows[0]].params)(None, logits[rows])
                probs = torch.softmax(scores, -1)
                noise = torch.stack([self._noise(requests[row], probs.shape[1]) for row in rows])
                # argmax(p / Exp(1)) draws from p: the exponential race.
                drawn = (probs / noise.to(probs.device)).argmax(-1).tolist()
                for row, token in zip(rows, drawn, strict=True):
                    outcomes[row].token_id = int(token)

    def _noise(self, request: Request, width: int) -> Tensor:
        """[width]; as many random numbers as the variant has tokens, however wide the batch is."""
        generator = None
        if request.params.seed is not None:
            if request.request_id not in self._generators:
                generator = torch.Generator().manual_seed(request.params.seed)
                self._generators[request.request_id] = generator
            generator = self._generators[request.request_id]
        n = min(request.variant.vocab_size, width)
        own = torch.empty(n).exponential_(generator=generator).clamp_(min=1e-20)
        return own if n == width else F.pad(own, (0, width - n), value=1.0)


def _best(logits: Tensor) -> list[int]:
    """The first largest of every row: ``logits [R, V]`` float32."""
    if logits.device.type == "cpu":  # numpy's is vectorised, torch's takes ten times as long
        return logits.numpy().argmax(-1).tolist()  # type: ignore[no-any-return]
    best: list[int] = logits.argmax(-1).tolist()
    return best


@contextmanager
def _failing(*outcomes: Sampled) -> Iterator[None]:
    """An exception in the block becomes the error of these rows."""
    try:
        yield
    except Exception as error:
        for outcome in outcomes:
            outcome.error = outcome.error or error


def _not_finite(request: Request) -> GenerationFailed:
    return GenerationFailed(f"`{request.variant.name}` produced logits that are not finite")


def _adjust_(row: Tensor, request: Request) -> None:
    """Penalties, biases and banned stop tokens of one request: ``row [V]``."""
    params = request.params
    if params.repetition_penalty != 1.0:
        penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        seen = torch.tensor([request.tokens], device=row.device)
        row.copy_(penalty(seen, row.unsqueeze(0))[0])
    if params.presence_penalty or params.frequency_penalty:
        _penalise_(row, request)
    for token_id, bias in params.logit_bias:
        row[token_id] += bias
    if request.n_output < params.min_tokens:
        eos = () if params.ignore_eos else request.variant.text.eos_token_ids
        banned = [i for i in (*eos, *params.stop_token_ids) if i < len(row)]
        row[banned] = float("-inf")


def mask_foreign_ids_(logits: Tensor, vocab_sizes: list[int]) -> None:
    """Ids past a variant's own vocabulary get -inf: ``logits [R, V]``."""
    for row, size in enumerate(vocab_sizes):
        if size < logits.shape[1]:
            logits[row, size:] = float("-inf")


def token_score(request: Request, logprobs: Tensor, token: int) -> TokenScore:
    """The chosen token's log probability and the k best: ``logprobs [V]``, before penalties."""
    k = request.params.logprobs or 0
    top: tuple[tuple[int, float], ...] = ()
    if k:
        best = torch.topk(logprobs, min(k, len(logprobs)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenScore(token, float(logprobs[token]), top)


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
