"""Steps of the kernels and cuBLAS alone (`Decoder`): the bound of what the engine can reach."""

from __future__ import annotations

import torch

from benchmarks.gpu.cases import BLOCK_TOKENS, even_segments
from benchmarks.gpu.decoder import random_decoder
from benchmarks.gpu.predict import step_expected_ms
from benchmarks.gpu.report import Report
from benchmarks.gpu.scope import Scope
from benchmarks.gpu.shapes import Codec
from benchmarks.gpu.timing import copy_bandwidth, percentile, seconds_of, timed
from server.engine.step.static_buffers import DecodeRow
from server.engine.step.static_step import StaticStep
from server.ops.triton.blockdiag import PREFILL_ROWS
from server.ops.triton.segments import segment_arrays


def kv_blocks_per_row(scope: Scope) -> int:
    return -(-scope.context // BLOCK_TOKENS) + 1


def rows_for(scope: Scope, batch: int, variants: int, at: int) -> list[DecodeRow]:
    """`batch` sequences of length `at`, shared evenly by `variants` variants (0: base only)."""
    per_row = kv_blocks_per_row(scope)
    slots = [-1] * batch
    for segment in even_segments(batch, variants) if variants else []:
        slots[segment.start : segment.end] = [segment.slot] * (segment.end - segment.start)
    rows = []
    for i, slot in enumerate(slots):
        kv_blocks = list(range(i * per_row, i * per_row + -(-at // BLOCK_TOKENS)))
        cache_row = kv_blocks[(at - 1) // BLOCK_TOKENS] * BLOCK_TOKENS + (at - 1) % BLOCK_TOKENS
        rows.append(DecodeRow(i % scope.shape.vocab, at - 1, cache_row, kv_blocks, at, slot))
    return rows


def steps(scope: Scope, report: Report, codec: Codec) -> bool:
    """Captured decode steps with 0 .. k variants against base only and the floor."""
    bandwidth = copy_bandwidth(scope)
    most = max(rows for rows, _ in scope.mixes)
    n_kv_blocks = most * kv_blocks_per_row(scope)
    decoder = random_decoder(
        scope.shape, codec, max(scope.variants), n_kv_blocks, scope.device, scope.dtype
    )
    step = StaticStep(
        decoder, max_rows=most, max_kv_blocks=kv_blocks_per_row(scope), device=scope.device
    )
    report.table(
        f"Kernels' decoder, bf16 base, {codec.name}, {scope.context} tokens of context",
        "variants",
        "rows",
        "step ms",
        "expected ms",
        "/ floor",
        "base only / this",
    )
    base: dict[int, float] = {}
    for rows, k in scope.mixes:
        batch = rows_for(scope, rows, k, scope.context)
        run = lambda batch=batch: step.run(batch).argmax(-1).tolist()  # type: ignore[misc] # noqa: E731
        run()
        seconds = percentile(seconds_of(run, scope.n_steps), 0.5)
        base.setdefault(rows, seconds)
        needed = scope.shape.base_bytes() + k * scope.shape.delta_bytes(codec)
        floor = (needed + scope.shape.kv_bytes(rows * scope.context)) / bandwidth
        report.row(
            k,
            rows,
            f"{seconds * 1e3:.2f}",
            f"{step_expected_ms(scope.shape, codec, rows, k):.2f}",
            f"{seconds / floor:.2f}",
            f"{base[rows] / seconds:.2f}",
        )
    prefill(scope, report, codec)
    return True


def prefill(scope: Scope, report: Report, codec: Codec) -> None:
    """Linears of a prefill chunk, base only and with one or two variants (attention not in it)."""
    decoder = random_decoder(scope.shape, codec, 2, 1, scope.device, scope.dtype)
    x = scope.place.randn(scope.prefill_rows, scope.shape.hidden)
    report.table(
        f"Prefill of {scope.prefill_rows} tokens, linears alone, {codec.name}",
        "variants",
        "ms",
        "/ base only",
    )
    base = 0.0
    for k in (0, 1, 2):
        parts = even_segments(scope.prefill_rows, k) if k else []
        where = segment_arrays(parts, PREFILL_ROWS, scope.device) if k else None
        with torch.inference_mode():
            run = lambda w=where: decoder.linears(x, w)  # type: ignore[misc] # noqa: E731
            seconds = timed(run, scope.device)
        base = base or seconds
        report.row(k, f"{seconds * 1e3:.2f}", f"{seconds / base:.2f}")
