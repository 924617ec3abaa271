"""The predictions for a GPU: consistent with each other, and those that the README prints."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.predict import (
    SERVED,
    Card,
    kernel_table,
    memory_table,
    resident_bytes,
    step_expected_ms,
    step_floor_ms,
    step_table,
)
from benchmarks.gpu.scope import FULL
from benchmarks.gpu.shapes import LLAMA_8B

README = Path(__file__).resolve().parents[3] / "benchmarks/gpu/README.md"


def test_readme_holds_every_predicted_row() -> None:
    lines = README.read_text().splitlines()
    for row in (*step_table(), *kernel_table(), *memory_table()):
        predicted = row.rstrip(" |")  # measured columns come last, and may have been filled in
        assert any(line.startswith(predicted) for line in lines), predicted


def test_ratios_without_scales_are_those_named() -> None:
    assert all(16 * codec.n_blocks == ratio * codec.bits for ratio, codec in SERVED.items())
    linears = sum(group.n * sum(group.sizes) for group in LLAMA_8B.groups()) * LLAMA_8B.layers
    for ratio, codec in SERVED.items():
        without = 2 * linears / ratio
        assert without < LLAMA_8B.delta_bytes(codec) < 1.1 * without


def test_steps_are_expected_above_their_floor_and_more_variants_cost_more() -> None:
    for codec in SERVED.values():
        times = []
        for k in (0, 1, 8, 32):
            times.append(step_expected_ms(LLAMA_8B, codec, FULL.batch, k))
            assert times[-1] > step_floor_ms(LLAMA_8B, codec, FULL.batch, k)
        assert times == sorted(times)


def test_memory_table_fits_the_card() -> None:
    card = Card(total_bytes=80e9)
    *_, row = memory_table(card)
    counts = [int(cell) for cell in row.strip("| ").split("|")[2:]]
    for count, ratio in zip(counts, (32, 64, 128), strict=True):
        slots = 1.25 * count * resident_bytes(LLAMA_8B, SERVED[ratio])
        used = LLAMA_8B.resident_base_bytes_8bit() + LLAMA_8B.kv_bytes(65536) + slots
        assert used + card.other_bytes <= card.total_bytes
