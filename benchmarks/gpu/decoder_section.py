"""Steps of the kernels and cuBLAS alone (`Decoder`): the bound of what the engine can reach."""

from __future__ import annotations

import torch

from benchmarks.gpu.cases import BLOCK_TOKENS, even_segments
from benchmarks.gpu.decoder import random_decoder
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.predict import step_expected_ms
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Codec
from benchmarks.gpu.timing import copy_bandwidth, percentile, seconds_of, timed
from server.engine.step.static_buffers import DecodeRow
from server.engine.step.static_step import StaticStep
from server.ops.triton.blockdiag import PREFILL_ROWS
from server.ops.triton.segments import segment_arrays


def kv_blocks_per_row(plan: Plan) -> int:
    return -(-plan.context // BLOCK_TOKENS) + 1


def rows_for(plan: Plan, batch: int, variants: int, at: int) -> list[DecodeRow]:
    """`batch` sequences of length `at`, shared evenly by `variants` variants (0: base only)."""
    per_row = kv_blocks_per_row(plan)
    slots = [-1] * batch
    for segment in even_segments(batch, variants) if variants else []:
        slots[segment.start : segment.end] = [segment.slot] * (segment.end - segment.start)
    rows = []
    for i, slot in enumerate(slots):
        kv_blocks = list(range(i * per_row, i * per_row + -(-at // BLOCK_TOKENS)))
        cache_row = kv_blocks[(at - 1) // BLOCK_TOKENS] * BLOCK_TOKENS + (at - 1) % BLOCK_TOKENS
        rows.append(DecodeRow(i % plan.shape.vocab, at - 1, cache_row, kv_blocks, at, slot))
    return rows


def steps(plan: Plan, report: Report, codec: Codec) -> bool:
    """Captured decode steps with 0 .. k variants against base only and the floor."""
    bandwidth = copy_bandwidth(plan)
    most = max(rows for rows, _ in plan.mixes)
    n_kv_blocks = most * kv_blocks_per_row(plan)
    decoder = random_decoder(
        plan.shape, codec, max(plan.variants), n_kv_blocks, plan.device, plan.dtype
    )
    step = StaticStep(
        decoder, max_rows=most, max_kv_blocks=kv_blocks_per_row(plan), device=plan.device
    )
    report.table(
        f"Kernels' decoder, bf16 base, {codec.name}, {plan.context} tokens of context",
        *("variants", "rows", "step ms", "expected ms", "/ floor", "base only / this"),
    )
    base: dict[int, float] = {}
    for rows, k in plan.mixes:
        batch = rows_for(plan, rows, k, plan.context)
        run = lambda batch=batch: step.run(batch).argmax(-1).tolist()  # type: ignore[misc] # noqa: E731
        run()
        seconds = percentile(seconds_of(run, plan.n_steps), 0.5)
        base.setdefault(rows, seconds)
        needed = plan.shape.base_bytes() + k * plan.shape.delta_bytes(codec)
        floor = (needed + plan.shape.kv_bytes(rows * plan.context)) / bandwidth
        report.row(
            *(k, rows, f"{seconds * 1e3:.2f}"),
            f"{step_expected_ms(plan.shape, codec, rows, k):.2f}",
            *(f"{seconds / floor:.2f}", f"{base[rows] / seconds:.2f}"),
        )
    prefill(plan, report, codec)
    return True


def prefill(plan: Plan, report: Report, codec: Codec) -> None:
    """Linears of a prefill chunk, base only and with one or two variants (attention not in it)."""
    decoder = random_decoder(plan.shape, codec, 2, 1, plan.device, plan.dtype)
    x = plan.place.randn(plan.prefill_rows, plan.shape.hidden)
    report.table(
        f"Prefill of {plan.prefill_rows} tokens, linears alone, {codec.name}",
        *("variants", "ms", "/ base only"),
    )
    base = 0.0
    for k in (0, 1, 2):
        parts = even_segments(plan.prefill_rows, k) if k else []
        where = segment_arrays(parts, PREFILL_ROWS, plan.device) if k else None
        with torch.inference_mode():
            run = lambda w=where: decoder.linears(x, w)  # type: ignore[misc] # noqa: E731
            seconds = timed(run, plan.device)
        base = base or seconds
        report.row(k, f"{seconds * 1e3:.2f}", f"{seconds / base:.2f}")
