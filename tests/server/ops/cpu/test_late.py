"""Products made before their kernel follow it when it comes, and when it goes again."""

from __future__ import annotations

import torch

from server.ops.cpu.blockdiag import NumbaBlockDiag
from server.ops.cpu.kernels import NumbaKernels
from server.ops.cpu.late import LateBlockDiag
from server.ops.kernels import TorchKernels
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import SlotSegments


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
    if "blockdiag" in kernels.in_use:
        assert isinstance(late.current, NumbaBlockDiag)
    torch.testing.assert_close(computed(), wanted)
    kernels.adopt(former)
    assert torch.equal(computed(), wanted)
    kernels.settle()
    assert kernels.state == "uncompiled"
