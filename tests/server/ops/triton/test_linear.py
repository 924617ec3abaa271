"""Weight-only linear and the quantisers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.ops.quantize import (
    QuantizedWeight,
    linear_reference,
    quantize_float8,
    quantize_int8,
)
from server.ops.triton.linear import linear_
from tests.server.ops.triton.helpers import assert_guard_intact, generator, guarded


def by_elements(x: Tensor, weight: QuantizedWeight) -> Tensor:
    values = weight.values.double() * weight.scales.double().unsqueeze(1)
    out = torch.zeros(len(x), len(values), dtype=torch.float64)
    for row in range(len(x)):
        for column in range(len(values)):
            out[row, column] = (x[row].double() * values[column]).sum()
    return out


@pytest.mark.parametrize(("rows", "m", "n"), [(1, 64, 128), (5, 70, 150), (70, 20, 33)])
def test_linear_int8_equals_sums_over_elements(rows: int, m: int, n: int) -> None:
    weight = quantize_int8(torch.randn(m, n, generator=generator(0)))
    x = torch.randn(rows, n, generator=generator(1))
    y, whole = guarded(rows, m, 2, torch.float32)
    y.fill_(float("nan"))
    linear_(y, x, weight)
    want = by_elements(x, weight)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear_reference(x, weight).double(), want, rtol=1e-5, atol=1e-4)
    assert_guard_intact(whole, rows, m)


def test_quantize_int8_is_within_half_a_step_and_keeps_zero_rows() -> None:
    w = torch.randn(6, 50, generator=generator(0))
    w[3] = 0
    weight = quantize_int8(w)
    step = w.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((weight.dense(torch.float32) - w).abs() <= step * 0.5001).all())
    assert bool((weight.dense(torch.float32)[3] == 0).all())
    assert weight.values.dtype == torch.int8


def test_quantize_float8_is_within_its_relative_step() -> None:
    w = torch.randn(6, 50, generator=generator(0))
    weight = quantize_float8(w)
    error = (weight.dense(torch.float32) - w).abs()
    smallest = w.abs().amax(dim=1, keepdim=True) / 448 * 2.0**-9  # below: subnormal steps
    assert bool((error <= w.abs() * 2.0**-4 + smallest).all())


def test_integers_survive_bfloat16() -> None:
    values = torch.arange(-127, 128, dtype=torch.int8)
    assert torch.equal(values.to(torch.bfloat16).to(torch.int8), values)
