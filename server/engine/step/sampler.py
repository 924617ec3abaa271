"""Logits -> token ids: penalties and bias ours, the filters transformers' own.

Rows with the same filter settings are filtered together. What is random about a draw is a hash of
the request's noise key, the position and the id (`server.ops.race`): it depends on nobody who
shares the batch, and a request that is preempted, or whose prefix was cached, draws with the same
noise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from server.engine.schedule.scheduled import Scheduled
from server.engine.step.batch import LogitRows
from server.engine.types import SamplingParams, TokenLogprob
from server.errors import GenerationFailed
from server.ops.race import race, row_key, token_hashes


@dataclass(slots=True)
class Sampled:
    """One row's outcome; `error` says why this row has none."""

    token_id: int = -1
    logprob: TokenLogprob | None = None
    error: Exception | None = None


@dataclass(slots=True)
class Sampler:
    """Stateless but for what every draw needs of the ids: their hashes, made once."""

    _hashes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    def sample_chunks(
        self, scheduled: Sequence[Scheduled], outputs: Sequence[LogitRows], logits: Tensor
    ) -> dict[Request, Sampled]:
        """`sample` for the chunks of a step whose last row chooses a token."""
        pairs = [
            (item.request, rows.first + rows.n - 1)
            for item, rows in zip(scheduled, outputs, strict=True)
            if rows.samples
        ]
        if not pairs:
            return {}
        requests = [request for request, _ in pairs]
        chosen = pick_rows(logits, [row for _, row in pairs])
        return dict(zip(requests, self.sample(requests, chosen), strict=True))

    def sample(self, requests: list[Request], logits: Tensor) -> list[Sampled]:
        """Choose one token per row: logits [R, V] any float, unchanged -> R outcomes.

        What goes wrong for one row (not finite, a processor raises) is that row's outcome. Waits
        for the device once, and once for every setting that draws.
        """
        logits = logits.to(torch.float32, copy=True)
        mask_foreign_ids_(logits, [r.variant.vocab_size for r in requests])
        finite = logits.amax(-1).isfinite()
        outcomes = [Sampled() for _ in requests]
        raw = logits.clone() if any(r.params.logprobs is not None for r in requests) else logits
        for row, request in enumerate(requests):
            with _failing(outcomes[row]):
                _adjust_(logits[row], request)
        for outcome, request, best, is_finite in zip(
            outcomes, requests, *_best(logits, finite), strict=True
        ):
            outcome.token_id = best
            if not is_finite:
                outcome.error = _not_finite(request)
        self._draw(logits, requests, outcomes)
        self._score(raw, requests, outcomes)
        return outcomes

    def _score(self, raw: Tensor, requests: list[Request], outcomes: list[Sampled]) -> None:
        """Log probabilities, before penalties, where they are wanted."""
        counts = {i: r.params.logprobs for i, r in enumerate(requests)}
        wanted = {row: k for row, k in counts.items() if k is not None}
        if not wanted:
            return
        scored = [outcomes[row] for row in wanted]
        with _failing(*scored):
            logprobs = torch.log_softmax(raw[list(wanted)], -1)
            tokens = [outcome.token_id for outcome in scored]
            found = token_logprobs(logprobs, tokens, list(wanted.values()))
            for outcome, logprob in zip(scored, found, strict=True):
                outcome.logprob = logprob

    def choose(self, requests: list[Request], logits: Tensor, positions: Sequence[int]) -> Tensor:
        """As `sample` for requests that are all `is_plain`, waiting for nothing: int64 [2, R] on
        the device of ``logits [R, V]``, each row's token and whether it was finite.

        positions  of the new tokens in their sequences: the host may not know the last ones yet
        """
        logits = logits.to(torch.float32, copy=True)
        mask_foreign_ids_(logits, [r.variant.vocab_size for r in requests])
        largest, tokens = logits.max(-1)
        for rows in _by_filters(requests, range(len(requests))):
            chosen = [requests[row] for row in rows]
            at = [positions[row] for row in rows]
            if len(rows) == len(requests):
                tokens = self._drawn(chosen, logits, at)
            else:
                index = _sent(rows, torch.int64, logits.device)
                drawn = self._drawn(chosen, logits.index_select(0, index), at)
                tokens = tokens.index_copy(0, index, drawn)
        return torch.stack([tokens, largest.isfinite().long()])

    def outcomes(self, requests: list[Request], chosen: Tensor) -> list[Sampled]:
        """What `choose` chose, once it is on the host."""
        tokens, finite = chosen.tolist()
        return [
            Sampled(token) if is_finite else Sampled(token, error=_not_finite(request))
            for request, token, is_finite in zip(requests, tokens, finite, strict=True)
        ]

    def _draw(self, logits: Tensor, requests: list[Request], outcomes: list[Sampled]) -> None:
        """Replace the best token of rows with a temperature by a random one."""
        fine = [row for row, outcome in enumerate(outcomes) if outcome.error is None]
        for rows in _by_filters(requests, fine):
            with _failing(*(outcomes[row] for row in rows)):
                chosen = logits if len(rows) == len(requests) else logits[rows]
                drawing = [requests[row] for row in rows]
                positions = [len(request.tokens) for request in drawing]
                drawn = self._drawn(drawing, chosen, positions).tolist()
                for row, token in zip(rows, drawn, strict=True):
                    outcomes[row].token_id = token

    def _drawn(self, requests: list[Request], logits: Tensor, positions: Sequence[int]) -> Tensor:
        """A random token for each row, int64 [R]; all have the same filters."""
        scores = _warpers(requests[0].params)(None, logits)
        keys = [row_key(r.noise_key, at) for r, at in zip(requests, positions, strict=True)]
        return race(scores, _sent(keys, torch.int32, logits.device), self._hashes_of(logits))

    def _hashes_of(self, logits: Tensor) -> Tensor:
        """`token_hashes` for ``logits [R, V]``, made once."""
        n_ids, device = logits.shape[1], logits.device
        if len(self._hashes) < n_ids or self._hashes.device != device:
            self._hashes = token_hashes(n_ids, device)
        return self._hashes[:n_ids]


def is_plain(request: Request) -> bool:
    """Whether choosing its next token takes the logits and its filters, and nothing of what it has
    said so far; and nothing but the token is wanted.
    """
    p = request.params
    return (
        p.logprobs is None
        and p.repetition_penalty == 1.0
        and not (p.presence_penalty or p.frequency_penalty or p.logit_bias)
        and request.n_output >= p.min_tokens
    )


def _by_filters(requests: list[Request], rows: Iterable[int]) -> list[list[int]]:
    """Those of `rows` that draw, together where they have the same filters."""
    groups: dict[tuple[float, int, float, float], list[int]] = defaultdict(list)
    for row in rows:
        p = requests[row].params
        if p.temperature > 0:
            groups[p.temperature, p.top_k, p.top_p, p.min_p].append(row)
    return list(groups.values())


def _sent(
    values: Sequence[int] | Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Numbers on the device, which the host does not wait for."""
    made = torch.tensor(values, dtype=dtype)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


def pick_rows(logits: Tensor, rows: list[int]) -> Tensor:
    """Those rows of ``logits [R, V]``, at least one: a view where they follow each other. A list as
    index would be copied to the device, which the host waits for.
    """
    first, last = rows[0], rows[-1]
    return logits[first : last + 1] if rows == list(range(first, last + 1)) else logits[rows]


def _best(logits: Tensor, finite: Tensor) -> tuple[list[int], list[bool]]:
    """The first largest of every row, and `finite` on the host: ``logits [R, V]`` float32."""
    if logits.device.type == "cpu":  # numpy's is vectorised, torch's takes ten times as long
        return logits.numpy().argmax(-1).tolist(), finite.tolist()
    best, flags = torch.stack([logits.argmax(-1), finite.long()]).tolist()  # one wait
    return best, [flag == 1 for flag in flags]


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


def token_logprobs(
    logprobs: Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprob]:
    """For every row of ``logprobs [R, V]``: the log probability of its token, and the best ones, as
    many as `counts` says.

    One copy from the device, however many rows.
    """
    chosen = torch.tensor(tokens, device=logprobs.device).unsqueeze(1)
    most = min(max(counts), logprobs.shape[1])
    best = torch.topk(logprobs, most)
    values = torch.cat([logprobs.gather(1, chosen), best.values, best.indices.double()], dim=1)
    found = []
    for token, count, (own, *rest) in zip(tokens, counts, values.tolist(), strict=True):
        ids = map(int, rest[most : most + count])
        top = tuple(map(TokenLogprob, ids, rest[:count]))
        found.append(TokenLogprob(token, own, top))
    return found


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
