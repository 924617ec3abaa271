"""From scheduled chunks to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.request import Request
from server.engine.schedule.scheduled import Scheduled
from server.ops.attention import AttentionMetadata, DecodeBatch, PrefillChunk
from server.ops.row_mapping import RowMapping, Segment


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Rows of the logits that belong to one chunk.

    first     index of the chunk's first logit row
    n         how many (all of the chunk's tokens with prompt logprobs, else 0 or 1)
    samples   whether the last of them chooses a new token
    """

    first: int
    n: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one step; T tokens, sorted by slot.

    input_ids [1, T], position_ids [1, T], logit_rows [R] int64 (rows of the hidden states)
    reconstructed: slots whose reconstructed weights this step uses
    """

    scheduled: tuple[Scheduled, ...]
    input_ids: Tensor
    position_ids: Tensor
    attention: AttentionMetadata
    rows: RowMapping
    logit_rows: Tensor
    output_rows: RowMapping
    outputs: tuple[LogitRows, ...]
    reconstructed: frozenset[int] = frozenset()


def default_batch_tokens(device: torch.device) -> int:
    """Enough rows to keep the device's products efficient; more would only delay the streams."""
    return 2048 if device.type == "cuda" else 256


def build_batch(
    scheduled: Sequence[Scheduled],
    block_tokens: int,
    device: torch.device,
    reconstructed: frozenset[int] = frozenset(),
) -> Batch:
    """Lay out the chunks by slot (base first), with what attention, deltas and logits need."""
    ordered = tuple(sorted(scheduled, key=lambda s: s.request.slot_index))
    ids: list[int] = []
    positions: list[int] = []
    cache_rows: list[int] = []
    logit_rows: list[int] = []
    outputs: list[LogitRows] = []
    decode: list[tuple[int, Request]] = []
    prefill: list[PrefillChunk] = []
    for item in ordered:
        request, first = item.request, item.request.n_computed
        start, end = len(ids), len(ids) + item.n_tokens
        ids.extend(request.tokens[first : first + item.n_tokens])
        positions.extend(range(first, first + item.n_tokens))
        cache_rows.extend(_cache_rows(request.kv_blocks, first, item.n_tokens, block_tokens))
        if item.n_tokens == 1 and first > 0:
            decode.append((start, request))
        else:
            used = request.kv_blocks[: -(-(first + item.n_tokens) // block_tokens)]
            prefill.append(PrefillChunk(start, end, first, torch.tensor(used, device=device)))
        wanted = _logit_rows(item, start, end)
        outputs.append(LogitRows(len(logit_rows), len(wanted), item.finishes_known_tokens))
        logit_rows.extend(wanted)
    metadata = AttentionMetadata(
        cache_rows=torch.tensor(cache_rows, device=device),
        decode=_decode_batch(decode, device),
        prefill=tuple(prefill),
    )
    return Batch(
        scheduled=ordered,
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention=metadata,
        rows=_row_mapping([(s.request.slot_index, s.n_tokens) for s in ordered], device),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        output_rows=_row_mapping(
            [(s.request.slot_index, o.n) for s, o in zip(ordered, outputs, strict=True)], device
        ),
        outputs=tuple(outputs),
        reconstructed=reconstructed,
    )


def _cache_rows(kv_blocks: list[int], first: int, n_tokens: int, block_tokens: int) -> list[int]:
    return [
        kv_blocks[p // block_tokens] * block_tokens + p % block_tokens
        for p in range(first, first + n_tokens)
    ]


def _logit_rows(item: Scheduled, start: int, end: int) -> list[int]:
    """Hidden rows whose logits are needed. Prompt logprobs need every row of the prompt once."""
    params = item.request.params
    if params.prompt_logprobs and params.logprobs is not None and item.request.n_output == 0:
        return list(range(start, end))
    return [end - 1] if item.finishes_known_tokens else []


def _decode_batch(decode: list[tuple[int, Request]], device: torch.device) -> DecodeBatch | None:
    if not decode:
        return None
    longest = max(len(r.kv_blocks) for _, r in decode)
    kv_blocks = [r.kv_blocks + [0] * (longest - len(r.kv_blocks)) for _, r in decode]
    return DecodeBatch(
        rows=torch.tensor([row for row, _ in decode], device=device),
        kv_blocks=torch.tensor(kv_blocks, device=device),
        lengths=torch.tensor([r.n_computed + 1 for _, r in decode], device=device),
    )


def _row_mapping(counts: list[tuple[int, int]], device: torch.device) -> RowMapping:
    segments: list[Segment] = []
    end = 0
    for slot, n in counts:
        if n == 0:
            continue
        start, end = end, end + n
        if segments and segments[-1].slot == slot:
            segments[-1] = Segment(slot, segments[-1].start, end)
        else:
            segments.append(Segment(slot, start, end))
    return RowMapping(segments, device)
