"""The base's float32 products with weights held in bfloat16, against float64."""

from __future__ import annotations

import pytest
import torch

from server.ops.cpu.kernels import NumbaKernels
from server.ops.cpu.parallel import Parallel
from server.ops.cpu.widened import TASK_ROWS, WidenedKernel, WidenedLinear


@pytest.fixture(scope="module")
def kernel() -> WidenedKernel:
    return WidenedKernel(Parallel())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def weight_of(m: int, n: int) -> torch.Tensor:
    return random(m, n).bfloat16().float()


# Rows: none (a step that samples nothing), every number that passes are made for, several tasks;
# outputs: part of a panel, whole ones, both.
@pytest.mark.parametrize("n_rows", [0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 150])
@pytest.mark.parametrize(("m", "n"), [(5, 2), (16, 62), (100, 64), (144, 576)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_equals_float64_within_float32_sums(
    kernel: WidenedKernel, n_rows: int, m: int, n: int, has_bias: bool
) -> None:
    weight, x = weight_of(m, n), random(n_rows, n, seed=1)
    bias = random(m, seed=2) if has_bias else None
    wanted = x.double() @ weight.double().T
    if bias is not None:
        wanted += bias.double()
    bound = wanted.abs() * 2**-23 + (x.double().abs() @ weight.double().abs().T) * n * 2**-24
    error = (WidenedLinear(kernel, weight)(x, bias).double() - wanted).abs()
    assert bool((error <= bound).all())


def test_product_of_strided_rows_equals_that_of_a_copy(kernel: WidenedKernel) -> None:
    op = WidenedLinear(kernel, weight_of(100, 64))
    wide = random(9, 3 * 64, seed=1)
    assert torch.equal(op(wide[:, 64:128]), op(wide[:, 64:128].contiguous()))
    columns = random(64, 9, seed=2).T
    assert torch.equal(op(columns), op(columns.contiguous()))


def test_a_rows_result_does_not_depend_on_the_other_rows(kernel: WidenedKernel) -> None:
    op = WidenedLinear(kernel, weight_of(100, 64))
    x = random(2 * TASK_ROWS + 3, 64, seed=1)
    whole = op(x)
    assert all(torch.equal(op(x[i : i + 1])[0], whole[i]) for i in (0, 5, 63, 64, len(x) - 1))
    assert all(torch.equal(op(x[: n + 1]), whole[: n + 1]) for n in range(8))


def test_not_a_number_stays_in_its_row(kernel: WidenedKernel) -> None:
    x = random(11, 64, seed=1)
    x[4, 3] = float("nan")
    y = WidenedLinear(kernel, weight_of(100, 64))(x)
    assert torch.equal(y.isnan().any(1), torch.arange(11) == 4)
    assert bool(y[4].isnan().all())


def test_dense_is_the_weight_bit_for_bit(kernel: WidenedKernel) -> None:
    weight = weight_of(100, 64)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-40, 3e38]).bfloat16().float()
    op = WidenedLinear(kernel, weight)
    assert torch.equal(op.dense(), weight)
    assert torch.equal(op.dense().signbit(), weight.signbit())
    assert op.dense().is_contiguous()


@pytest.mark.parametrize(("start", "end"), [(0, 100), (0, 1), (40, 70), (48, 96), (99, 100)])
def test_dense_rows_are_those_of_the_weight(kernel: WidenedKernel, start: int, end: int) -> None:
    weight = weight_of(100, 64)
    assert torch.equal(WidenedLinear(kernel, weight).dense_rows(start, end), weight[start:end])


def test_only_float32_of_bfloat16_numbers_and_an_even_width_is_taken(
    kernel: WidenedKernel,
) -> None:
    weight = weight_of(4, 6)
    assert kernel.takes(weight)
    assert not kernel.takes(weight.bfloat16())
    assert not kernel.takes(weight_of(4, 7))
    weight[3, 5] += 2**-20
    assert not kernel.takes(weight)


def test_kernels_hold_a_weight_in_bfloat16_only_if_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WidenedKernel, "pays_on", lambda target: True)
    kernels = NumbaKernels(usable={"widened"})
    weight = weight_of(32, 16)
    assert kernels.linear(weight).held_itemsize == 2
    assert kernels.linear(weight + 2**-20).held_itemsize is None
    assert torch.equal(kernels.linear(weight + 2**-20).dense(), weight + 2**-20)
