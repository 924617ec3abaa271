"""One forward pass: batch -> logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server.engine.schedule.scheduled import Scheduled
from server.engine.step.batch import Batch, LogitRows, build_batch
from server.engine.step.static_buffers import DecodeRow, StaticBatch
from server.engine.step.static_step import StaticStep
from server.errors import ConfigError
from server.model.base import BaseModel, weight_bytes
from server.model.observe import KEEP
from server.model.reconstructed import ReconstructedWeights
from server.ops.attention import AttentionMetadata, DecodeBatch
from server.ops.row_mapping import BASE_SLOT, RowMapping
from server.ops.static_row_mapping import StaticRowMapping
from server.ops.triton.segments import DECODE_ROWS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A step in which every sequence has one new token: for `StaticStep`, sorted by slot.

    last_tokens  the step before's, on the device, if the host does not know them yet
    """

    scheduled: tuple[Scheduled, ...]
    rows: tuple[DecodeRow, ...]
    outputs: tuple[LogitRows, ...]
    last_tokens: Tensor | None = None


@dataclass(slots=True)
class StepCounts:
    """Steps that only decoded, by how they ran."""

    static: int = 0
    eager: int = 0


class Runner:
    """Owns the base model during a step. Without `use_static` every step runs eagerly."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.reconstructed = ReconstructedWeights(base.model, base.parameters)
        self.counts = StepCounts()
        self._static: StaticStep | None = None
        self._seen = replace(base.residency)  # when graphs were last known to be good
        self._told: set[str] = set()

    def stats(self) -> dict[str, int]:
        """Its part of `CoreStats`."""
        return {
            "base_bytes": weight_bytes(self.base.parameters.values()),
            "n_static_steps": self.counts.static,
            "n_eager_decode_steps": self.counts.eager,
        }

    def use_static(self, *, max_rows: int, max_len: int) -> None:
        """Run decode steps of up to `max_rows` sequences, of `max_len` tokens at most, over static
        buffers: as CUDA graphs, or without capture on a CPU. The KV cache must be allocated.

        Not for a base whose definition cannot be in a graph: that runs eagerly, with a warning.
        Raises ConfigError where the kernels need to know the rows in Python.
        """
        base = self.base
        reason = _why_no_graphs(base)
        if reason is not None:
            log.warning("decode steps run without CUDA graphs, slower: %s", reason)
            return
        if not base.kernels.takes_data(base.device):
            raise ConfigError(
                f"the {base.kernels.name} kernels cannot run in graphs on {base.device.type}; "
                "use --enforce-eager or --kernels triton"
            )
        block_tokens, spare = base.store.block_tokens, base.store.n_kv_blocks - 1
        self._static = StaticStep(
            self._static_forward,
            max_rows=max_rows,
            max_kv_blocks=-(-max_len // block_tokens),
            device=base.device,
            padding_row=spare * block_tokens,
        )

    def capture(self) -> None:
        """Capture the graphs of the base alone; those with deltas follow when first needed."""
        if self._static is not None:
            with torch.inference_mode():
                self._static.prepare(with_deltas=(False,))

    def prepare_inputs(self, scheduled: Sequence[Scheduled]) -> Batch | DecodeStep:
        """Lay out a step."""
        block_tokens = self.base.store.block_tokens
        reconstructed = self.reconstructed_in(scheduled)
        if all(_decodes(item) for item in scheduled):
            reason = self._why_eager(scheduled, reconstructed)
            if reason is None:
                return _decode_step(scheduled, block_tokens)
            self.counts.eager += 1
            if self._static is not None and reason not in self._told:
                self._told.add(reason)
                log.warning("decode steps with %s run without a CUDA graph, slower", reason)
        return build_batch(scheduled, block_tokens, self.base.device, reconstructed)

    def reconstructed_in(self, scheduled: Sequence[Scheduled]) -> frozenset[int]:
        """Slots whose reconstructed weights a step of these uses."""
        return self.reconstructed.used_in({item.request.slot_index for item in scheduled})

    def _why_eager(
        self, scheduled: Sequence[Scheduled], reconstructed: frozenset[int]
    ) -> str | None:
        """What keeps these decode rows out of a graph."""
        if self._static is None:
            return "graphs switched off"
        if reconstructed:
            return "reconstructed weights"
        if len(scheduled) > self._static.max_rows:
            return f"more than {self._static.max_rows} sequences"
        eager = self.base.residency.eager
        slots = {item.request.slot_index for item in scheduled} if eager else set()
        return next((eager[slot] for slot in slots if slot in eager), None)

    @torch.inference_mode()
    def forward(self, step: Batch | DecodeStep) -> Tensor:
        """Run the model on packed tokens; return logits ``[R, V]`` of the rows that want them.

        Valid until the next call.
        """
        if isinstance(step, DecodeStep):
            return self._run_static(step.rows, step.last_tokens)
        return self._model(
            step.input_ids,
            step.position_ids,
            step.rows,
            step.output_rows,
            step.attention,
            step.logit_rows,
            step.reconstructed,
        )

    def prepare_inputs_after(
        self, last_tokens: Tensor, sources: Sequence[int], scheduled: tuple[Scheduled, ...]
    ) -> DecodeStep:
        """A step of `scheduled`, whose last tokens are being computed: see `DecodeStep`. They are
        sorted by slot, and have KV blocks for one token more than they know.
        """
        block_tokens, rows = self.base.store.block_tokens, []
        for source, item in zip(sources, scheduled, strict=True):
            rows.append(_decode_row(item, block_tokens, item.request.n_computed + 1, source))
        return DecodeStep(scheduled, tuple(rows), _one_each(len(rows)), last_tokens)

    @property
    def is_static(self) -> bool:
        """Whether decode steps run over static buffers."""
        return self._static is not None

    def is_current(self) -> bool:
        """Whether no array has moved since the last static step: its graph stays."""
        return self._seen.version == self.base.residency.version

    def _run_static(self, rows: Sequence[DecodeRow], last_tokens: Tensor | None) -> Tensor:
        assert self._static is not None
        now, seen = self.base.residency, self._seen
        if now.version != seen.version:
            self._static.forget(
                with_deltas_only=now.vectors == seen.vectors, new_kernels=now.kinds != seen.kinds
            )
            self._seen = replace(now)
        logits = self._static.run(rows, last_tokens)
        if self._static.runs_eagerly(len(rows), rows[-1].slot != BASE_SLOT):
            self.counts.eager += 1
        else:
            self.counts.static += 1
        return logits

    def _static_forward(self, batch: StaticBatch, with_deltas: bool) -> Tensor:
        rows = StaticRowMapping(
            batch.vector_rows - 1,
            batch.table,
            batch.segments.count,
            DECODE_ROWS,
            with_deltas=with_deltas,
        )
        decode = DecodeBatch(rows=batch.rows, kv_blocks=batch.kv_blocks, lengths=batch.lengths)
        metadata = AttentionMetadata(cache_rows=batch.cache_rows, decode=decode, prefill=())
        return self._model(batch.input_ids, batch.position_ids, rows, rows, metadata, 0)

    def _model(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: RowMapping,
        output_rows: RowMapping,
        metadata: AttentionMetadata,
        logits_to_keep: Tensor | int,
        reconstructed: frozenset[int] = frozenset(),
    ) -> Tensor:
        base = self.base
        base.context.rows, base.context.output_rows = rows, output_rows
        base.context.reconstructed = reconstructed
        try:
            with base.store.step(metadata):
                output = base.model(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    use_cache=False,
                    **({KEEP: logits_to_keep} if base.keeps_rows else {}),  # 0: all
                )
        finally:
            base.context.rows = base.context.output_rows = None
            base.context.reconstructed = frozenset()
        logits: Tensor = output.logits[0]
        if base.keeps_rows or not isinstance(logits_to_keep, Tensor):
            return logits
        return logits[logits_to_keep]


def _decodes(item: Scheduled) -> bool:
    """One new token whose logits are wanted, after others that are in the cache."""
    return item.n_tokens == 1 and item.request.n_computed > 0 and item.finishes_known_tokens


def _decode_step(scheduled: Sequence[Scheduled], block_tokens: int) -> DecodeStep:
    ordered = tuple(sorted(scheduled, key=lambda s: s.request.slot_index))
    rows = tuple(_decode_row(item, block_tokens, item.request.n_computed) for item in ordered)
    return DecodeStep(ordered, rows, _one_each(len(rows)))


def _decode_row(item: Scheduled, block_tokens: int, at: int, source: int = 0) -> DecodeRow:
    """The request's token at position `at`, which may not be known yet."""
    request = item.request
    kv_blocks, tokens = request.kv_blocks, request.tokens
    cache_row = kv_blocks[at // block_tokens] * block_tokens + at % block_tokens
    token = tokens[at] if at < len(tokens) else 0
    return DecodeRow(token, at, cache_row, kv_blocks, at + 1, request.slot_index, source)


def _one_each(n_rows: int) -> tuple[LogitRows, ...]:
    return tuple(LogitRows(i, 1, True) for i in range(n_rows))


def _why_no_graphs(base: BaseModel) -> str | None:
    """What of the base no graph can hold."""
    if base.varying_rope is not None:
        return (
            f"the base's {base.varying_rope.kind} rotary embedding looks at the lengths of every "
            "step, which a graph cannot"
        )
    if base.is_intercepted:
        return (
            "the base's definition multiplies queries and keys itself, and makes tensors on the "
            "host while it does, which a graph cannot"
        )
    return None
