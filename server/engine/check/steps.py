"""Sequences through the engine's own steps, with what decoder layers give on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from server.deltas.slots import Slot
from server.engine.request import Request
from server.engine.schedule.scheduled import Scheduled
from server.engine.step.batch import Batch, build_batch
from server.engine.step.runner import Runner
from server.engine.types import SamplingParams
from server.engine.variant import Variant
from server.model.definition import Watch

N_DECODED = 2  # tokens of every sequence that come one by one, after a prompt in two chunks


@dataclass(slots=True)
class Rows:
    """What one sequence got: by place in the model `[T, n]`, and logits by position `[V]`."""

    points: dict[str, Tensor]
    logits: dict[int, Tensor]


@dataclass(slots=True)
class CheckedSequence:
    """Tokens, and the slot of whoever they belong to; None: the base's.

    all_logits  whether those of the whole prompt are wanted, not the last token's alone
    """

    ids: list[int]
    slot: int | None = None
    all_logits: bool = False
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)

    def request(self, kv_blocks: list[int]) -> Request:
        """Of the prompt, with as many KV blocks as all tokens need."""
        logprobs = 0 if self.all_logits else None
        request = Request(
            request_id="self-check",
            variant=cast(Variant, None),  # steps ask a request for its slot only
            prompt_ids=self.ids[:-N_DECODED],
            params=SamplingParams(
                max_tokens=1, logprobs=logprobs, prompt_logprobs=self.all_logits, seed=0
            ),
            deliver=lambda event: None,
            slot=None if self.slot is None else Slot(self.slot, "self-check", 0),
        )
        request.kv_blocks = kv_blocks
        return request

    def rows(self) -> Rows:
        """What it got, after its last step."""
        return Rows({path: torch.cat(parts) for path, parts in self.parts.items()}, self.logits)


def run_steps(runner: Runner, sequences: Sequence[CheckedSequence]) -> list[Rows]:
    """All of them packed in each step. The store must have KV blocks for them from 1 on."""
    for _ in one_by_one(runner, sequences):
        pass
    return [sequence.rows() for sequence in sequences]


def one_by_one(runner: Runner, sequences: Sequence[CheckedSequence]) -> Iterator[int]:
    """As `run_steps`, a step each time it is asked for the next, which it gives the number of."""
    base, watch = runner.base, Watch(runner.base.model)
    block_tokens, n_used = base.store.block_tokens, 1
    requests = []
    for sequence in sequences:
        n_kv_blocks = -(-len(sequence.ids) // block_tokens)
        requests.append(sequence.request(list(range(n_used, n_used + n_kv_blocks))))
        n_used += n_kv_blocks
    owners = {id(request): s for request, s in zip(requests, sequences, strict=True)}
    for turn in range(2 + N_DECODED):
        scheduled = [Scheduled(request, _n_tokens(request, turn)) for request in requests]
        batch = build_batch(scheduled, block_tokens, base.device)
        with watch.watching():
            logits = runner.forward(batch)
        _hand_out(batch, watch.outputs, logits, owners)
        for request in requests:
            request.n_computed += _n_tokens(request, turn)
            if request.n_computed == len(request.tokens) < len(owners[id(request)].ids):
                request.tokens.append(owners[id(request)].ids[request.n_computed])
        yield turn


def kv_blocks_for(sequences: Sequence[CheckedSequence], block_tokens: int) -> int:
    """How many the steps need; the first is nobody's: padding of decode batches reads it."""
    return 1 + sum(-(-len(sequence.ids) // block_tokens) for sequence in sequences)


def _n_tokens(request: Request, turn: int) -> int:
    n_first = len(request.prompt_ids) // 2
    return (n_first, len(request.prompt_ids) - n_first)[turn] if turn < 2 else 1


def _hand_out(
    batch: Batch,
    outputs: dict[str, list[Tensor]],
    logits: Tensor,
    owners: dict[int, CheckedSequence],
) -> None:
    """Give every sequence its own rows of a step."""
    n_rows, start = batch.input_ids.shape[1], 0
    rows = {path: rows_by_sequence(calls, 1, n_rows) for path, calls in outputs.items()}
    for item, wanted in zip(batch.scheduled, batch.outputs, strict=True):
        sequence, first = owners[id(item.request)], item.request.n_computed
        end = start + item.n_tokens
        for path, values in rows.items():
            if values is not None:
                sequence.parts.setdefault(path, []).append(values[0, start:end])
        last = first + item.n_tokens
        for i in range(wanted.n):
            sequence.logits[last - wanted.n + i] = logits[wanted.first + i].clone()
        start = end


def rows_by_sequence(calls: list[Tensor], n_sequences: int, n_rows: int) -> Tensor | None:
    """What a place gave in one forward pass, ``[B, T, n]``; None if not once for every row."""
    parts = []
    for output in calls:
        if output.dim() == 2 and len(output) == n_sequences * n_rows:
            output = output.view(n_sequences, n_rows, -1)
        if output.dim() < 3 or output.shape[-3:-1] != (n_sequences, n_rows):
            return None
        parts.append(output.movedim((-3, -2), (0, 1)).flatten(2))
    return torch.cat(parts, dim=2)
