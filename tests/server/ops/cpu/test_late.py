"""Products made before their kernel follow it when it comes, and when it goes again."""

from __future__ import annotations

import torch

from server.ops.cpu.blockdiag import NumbaBlockDiag
from server.ops.cpu.kernels import NumbaKernels
from server.ops.cpu.late import LateBlockDiag, LateTerms
from server.ops.kernels import TorchKernels
from server.ops.linear import TorchLinear
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import SlotSegments
from server.ops.torch_terms import TorchTerms
from tests.server.ops.cpu.test_panel_terms import (
    OUTPUTS,
    PLACES,
    SEGMENTS,
    M,
    N,
    filled,
    head,
    mapping_of,
    random,
    some_rows,
)
from tests.server.ops.test_blockdiag import make


def test_late_blocks_are_computed_by_the_kernels_of_the_moment() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = PackedBlocks(
        torch.randint(0, 256, (1, 2, 4, 8), generator=generator, dtype=torch.uint8),
        torch.rand((1, 2, 8), generator=generator).half(),
        torch.ones(1, 1),
        (16,),
        16,
        4,
    )
    kernels = NumbaKernels(usable=(), awaited=True)
    late = kernels.blockdiag(blocks)
    assert isinstance(late, LateBlockDiag)
    x = torch.randn((3, 16), generator=generator)
    segments = SlotSegments(torch.tensor([[0, 1, 3]]), 1, 2)

    def computed() -> torch.Tensor:
        y = torch.zeros(3, 16)
        late.add_([y], x, segments)
        return y

    wanted = torch.zeros(3, 16)
    TorchKernels().blockdiag(blocks).add_([wanted], x, segments)
    assert torch.equal(computed(), wanted)
    former = kernels.adopt(NumbaKernels(parallel=kernels.parallel))
    assert kernels.state == "compiling"  # a trial: `settle` ends it
    if "widened" in kernels.in_use:
        assert isinstance(late.current, NumbaBlockDiag)
    torch.testing.assert_close(computed(), wanted)
    kernels.adopt(former)
    torch.testing.assert_close(computed(), wanted)
    kernels.settle()
    assert kernels.state == "uncompiled"


def test_late_terms_are_added_by_the_kernels_of_the_moment() -> None:
    weight, x, rows = random(OUTPUTS, N), random(33, N, seed=1), mapping_of(SEGMENTS)
    terms = [make(6, (M,), N, 4), head(4, 4), some_rows(9, 2)]
    kernels = NumbaKernels(usable=(), awaited=True)
    late = kernels.joined_terms(kernels.linear(weight), OUTPUTS, torch.float32)
    assert isinstance(late, LateTerms)
    filled(late, terms)
    wanted = filled(TorchTerms(TorchLinear(weight)), terms).product(x, rows)
    assert torch.equal(late.product(x, rows), wanted)
    former = kernels.adopt(NumbaKernels(parallel=kernels.parallel))
    late.use(kernels.linear(weight))
    scale = float(wanted.abs().max())
    torch.testing.assert_close(late.product(x, rows), wanted, rtol=0, atol=1e-5 * scale)
    for slot in PLACES:  # told to both
        late.hide(terms[0], slot)
    fewer = filled(TorchTerms(TorchLinear(weight)), terms[1:]).product(x, rows)
    torch.testing.assert_close(late.product(x, rows), fewer, rtol=0, atol=1e-5 * scale)
    kernels.adopt(former)
    late.use(TorchLinear(weight))
    assert torch.equal(late.product(x, rows), fewer)
