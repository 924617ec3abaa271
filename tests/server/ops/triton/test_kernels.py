"""The engine's interface over the kernels: same results as the torch reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from server.ops.delta import TorchBlockDiag
from server.ops.kernels import Kernels
from server.ops.quantize import quantize_int8
from server.ops.rows import RowPlan
from server.ops.triton.kernels import TritonKernels
from tests.server.ops.triton.helpers import CPU, generator, pack, random_term, segments_of


@pytest.mark.parametrize("counts", [[(-1, 2), (0, 1), (2, 3)], [(0, 2), (2, 21)]])
def test_blockdiag_op_equals_the_torch_op(counts: list[tuple[int, int]]) -> None:
    kernels: Kernels = TritonKernels()
    sizes = (24, 16)
    variants = {s: [random_term((m, 30), 2, 4, s + m) for m in sizes] for s in (0, 2)}
    blocks, _ = pack(variants, 3)
    table = RowPlan(segments_of(counts), CPU).table(frozenset({(0, 0), (2, 2)}))
    rows = sum(n for _, n in counts)
    x = torch.randn(rows, 30, generator=generator(0))
    want, got = torch.zeros(rows, 40), torch.zeros(rows, 40)
    TorchBlockDiag(blocks).add_(want.split(sizes, 1), x, table)
    kernels.blockdiag(blocks).add_(got.split(sizes, 1), x, table)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_int8_linear_op_rounds_the_weight_and_nothing_else() -> None:
    weight = torch.randn(20, 33, generator=generator(0))
    bias = torch.randn(20, generator=generator(1))
    x = torch.randn(3, 33, generator=generator(2))
    op = TritonKernels(int8_base=True).linear(weight)
    rounded = quantize_int8(weight).dense(torch.float32)
    want = x.double() @ rounded.double().T + bias.double()
    torch.testing.assert_close(op(x, bias).double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(op.dense(), rounded)
    assert torch.equal(TritonKernels().linear(weight).dense(), weight)
