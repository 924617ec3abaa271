"""The format of products: what a CPU is fast in, with the stored values, within the budget."""

from __future__ import annotations

import sys

import pytest
import torch

from server.ops import precision
from server.ops.cpu.features import Target
from server.ops.precision import Cpu, cpu_precision, host_cpu

SLOW, FAST = Cpu("znver3", has_bf16_products=False), Cpu("znver4", has_bf16_products=True)


@pytest.mark.parametrize(
    ("stored", "cpu", "expected"),
    [
        (torch.bfloat16, SLOW, torch.float32),
        (torch.bfloat16, FAST, torch.bfloat16),
        (torch.float16, SLOW, torch.float32),
        (torch.float16, FAST, torch.float32),  # bfloat16 would change the values
        (torch.float32, SLOW, torch.float32),
        (torch.float32, FAST, torch.float32),
    ],
)
def test_cpu_precision_is_what_the_cpu_is_fast_in(
    stored: torch.dtype, cpu: Cpu, expected: torch.dtype
) -> None:
    found = cpu_precision(stored, 100, 400, cpu)
    assert found.dtype is expected
    assert found.warning is None


def test_cpu_precision_past_the_budget_keeps_what_is_stored_and_warns() -> None:
    found = cpu_precision(torch.bfloat16, 101, 400, SLOW)
    assert found.dtype is torch.bfloat16
    assert found.warning is not None
    assert "--widened-weights-bytes" in found.warning


@pytest.mark.parametrize(
    ("features", "fast"),
    [
        ({"avx2", "fma"}, False),
        ({"avx512f", "avx512bw"}, False),
        ({"avx512f", "avx512bf16"}, True),
        ({"avx512f", "amx-bf16"}, True),
        ({"neon"}, False),
        ({"neon", "bf16"}, True),
    ],
)
def test_target_multiplies_bfloat16_fast_where_it_has_units(
    features: set[str], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target("t", "n", frozenset(features))
    monkeypatch.setattr(sys, "platform", "linux")
    assert target.has_bf16_products is fast
    monkeypatch.setattr(sys, "platform", "darwin")
    assert target.has_bf16_products is False


def test_host_cpu_without_numba_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    cpu = host_cpu()
    assert not cpu.has_bf16_products
    assert "no bfloat16 units" in cpu.description
