"""The base's bfloat16 products against float64."""

from __future__ import annotations

import pytest
import torch

from server.ops.cpu.linear import LinearKernel, PanelLinear
from server.ops.cpu.parallel import Parallel


@pytest.fixture(scope="module")
def kernel() -> LinearKernel:
    return LinearKernel(Parallel())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


# Rows: none (a step that samples nothing), less than one group, ragged ones, several tasks;
# outputs: parts of panels and whole ones.
@pytest.mark.parametrize("n_rows", [0, 1, 7, 8, 33, 250])
@pytest.mark.parametrize(("m", "n"), [(5, 2), (48, 62), (100, 64), (144, 576)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_equals_float64_rounded_once(
    kernel: LinearKernel, n_rows: int, m: int, n: int, has_bias: bool
) -> None:
    weight, x = random(m, n), random(n_rows, n, seed=1)
    bias = random(m, seed=2) if has_bias else None
    wanted = x.double() @ weight.double().T
    if bias is not None:
        wanted += bias.double()
    # Half a unit of bfloat16, and what float32 sums lose of their largest terms.
    bound = wanted.abs() * 2**-8 + (x.double().abs() @ weight.double().abs().T) * 2**-20
    error = (PanelLinear(kernel, weight)(x, bias).double() - wanted).abs()
    assert bool((error <= bound).all())


def test_product_of_strided_rows_equals_that_of_a_copy(kernel: LinearKernel) -> None:
    op = PanelLinear(kernel, random(100, 64))
    wide = random(9, 3 * 64, seed=1)
    assert torch.equal(op(wide[:, 64:128]), op(wide[:, 64:128].contiguous()))
    columns = random(64, 9, seed=2).T
    assert torch.equal(op(columns), op(columns.contiguous()))


def test_a_rows_result_does_not_depend_on_the_other_rows(kernel: LinearKernel) -> None:
    op = PanelLinear(kernel, random(100, 64))
    x = random(300, 64, seed=1)
    whole = op(x)
    assert all(torch.equal(op(x[i : i + 1])[0], whole[i]) for i in (0, 5, 191, 192, 299))


def test_not_a_number_stays_in_its_row(kernel: LinearKernel) -> None:
    x = random(11, 64, seed=1)
    x[4, 3] = float("nan")
    y = PanelLinear(kernel, random(100, 64))(x)
    assert torch.equal(y.isnan().any(1), torch.arange(11) == 4)
    assert bool(y[4].isnan().all())


def test_dense_is_the_weight_bit_for_bit(kernel: LinearKernel) -> None:
    weight = random(100, 64)
    assert torch.equal(PanelLinear(kernel, weight).dense(), weight)
    assert PanelLinear(kernel, weight).dense().is_contiguous()


@pytest.mark.parametrize(("start", "end"), [(0, 100), (0, 1), (40, 70), (48, 96), (99, 100)])
def test_dense_rows_are_those_of_the_weight(kernel: LinearKernel, start: int, end: int) -> None:
    weight = random(100, 64)
    assert torch.equal(PanelLinear(kernel, weight).dense_rows(start, end), weight[start:end])


def test_only_bfloat16_of_an_even_width_is_taken(kernel: LinearKernel) -> None:
    assert not kernel.takes(random(4, 6).float())
    assert not kernel.takes(random(4, 7))
