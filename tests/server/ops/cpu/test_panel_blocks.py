"""Block-diagonal deltas inside the base's product, against float64 loops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.ops.cpu.blockdiag import BlockDiagKernel, NumbaBlockDiag
from server.ops.cpu.linear import LinearKernel, PanelLinear
from server.ops.cpu.parallel import Parallel
from server.ops.linear import BlockShare, LinearOp
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import RowMapping, Segment
from tests.server.ops.test_blockdiag import dense, make

CPU = torch.device("cpu")
# s, outputs of each matrix, inputs: blocks that fill whole byte rows and ones that do not, pieces
# of a panel from one output to all 48, one block for all.
SHAPES = [
    (4, (64,), 48),
    (16, (96, 32, 32), 256),
    (5, (50, 23, 7), 38),
    (3, (200,), 96),
    (1, (40,), 70),
    (6, (6, 130), 6),
]
SEGMENTS = ((-1, 3), (0, 1), (2, 21), (1, 6), (-1, 2))
PLACES = frozenset({(0, 2), (1, 0), (2, 1)})
PLACE_OF = torch.tensor([3, 1, 2, 0], dtype=torch.int32)


@pytest.fixture(scope="module")
def kernels() -> tuple[LinearKernel, BlockDiagKernel]:
    parallel = Parallel()
    return LinearKernel(parallel), BlockDiagKernel(parallel)


def mapping_of(segments: tuple[tuple[int, int], ...]) -> RowMapping:
    found, start = [], 0
    for slot, n in segments:
        found.append(Segment(slot, start, start + n))
        start += n
    return RowMapping(found, CPU)


def packed(
    s: int, sizes: tuple[int, ...], n: int, bits: int, place_of: Tensor = PLACE_OF
) -> PackedBlocks:
    return replace(make(s, sizes, n, bits), place_of=place_of)


def slot_map(places: Iterable[tuple[int, int]]) -> Tensor:
    found = torch.zeros(4, dtype=torch.int32)
    for slot, place in places:
        found[slot] = place + 1
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def wanted(x: Tensor, weight: Tensor, share: BlockShare, blocks: PackedBlocks) -> Tensor:
    """In float64."""
    y = x.double() @ weight.double().T
    whole = [torch.cat(dense(blocks, place)) for place in range(3)]
    for t, place in enumerate(share.rows.held_rows(share.present).tolist()):
        if place >= 0:
            y[t, share.first : share.first + sum(share.sizes)] += whole[place] @ x[t].double()
    return y


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("s", "sizes", "n"), SHAPES)
@pytest.mark.parametrize("first", [0, 37])
def test_joined_product_equals_float64_rounded_once(
    kernels: tuple[LinearKernel, BlockDiagKernel],
    s: int,
    sizes: tuple[int, ...],
    n: int,
    bits: int,
    first: int,
) -> None:
    blocks = packed(s, sizes, n, bits)
    weight, mapping = random(first + sum(sizes) + 5, n), mapping_of(SEGMENTS)
    x = random(mapping.n_rows, n, seed=1)
    op = NumbaBlockDiag(kernels[1], blocks)
    share = BlockShare(op, sizes, first, mapping, PLACES)
    want = wanted(x, weight, share, blocks)
    got = PanelLinear(kernels[0], weight).with_blocks(x, [share])
    largest = x.double().abs() @ weight.double().abs().T
    bound = want.abs() * 2**-8 + (largest + want.abs().max()) * 2**-19
    assert bool(((got.double() - want).abs() <= bound).all())


def test_joined_product_of_several_sets_equals_one_after_the_other(
    kernels: tuple[LinearKernel, BlockDiagKernel],
) -> None:
    weight, mapping = random(120, 48), mapping_of(SEGMENTS)
    x = random(mapping.n_rows, 48, seed=1)
    shares = [
        BlockShare(
            NumbaBlockDiag(kernels[1], packed(s, sizes, 48, bits, slot_map(at))),
            sizes,
            first,
            mapping,
            frozenset(at),
        )
        for s, sizes, bits, first, at in (
            (4, (64, 56), 4, 0, {(0, 0)}),
            (6, (56,), 3, 64, {(1, 1), (2, 0)}),
            (3, (64,), 8, 0, {(2, 2)}),  # not joined: too many bits
        )
    ]
    op = PanelLinear(kernels[0], weight)
    got = op.with_blocks(x, shares).float()
    apart = LinearOp.with_blocks(op, x, shares).float()
    torch.testing.assert_close(got, apart, rtol=0.02, atol=0.02 * float(apart.abs().max()))
    assert not torch.equal(apart, op(x).float())


def test_joined_rows_result_does_not_depend_on_the_batch(
    kernels: tuple[LinearKernel, BlockDiagKernel],
) -> None:
    op = PanelLinear(kernels[0], random(160, 256))
    deltas = NumbaBlockDiag(kernels[1], packed(16, (96, 32, 32), 256, 4))

    def product(x: Tensor, *segments: tuple[int, int]) -> Tensor:
        share = BlockShare(deltas, (96, 32, 32), 0, mapping_of(segments), PLACES)
        return op.with_blocks(x, [share])

    x = random(230, 256, seed=1)
    whole = product(x, (-1, 4), (1, 203), (2, 23))
    for row in (4, 5, 7, 8, 11, 12, 190, 206):
        assert torch.equal(product(x[row : row + 1], (1, 1))[0], whole[row])
        assert torch.equal(product(x[row - 1 : row + 2], (0, 1), (1, 1), (-1, 1))[1], whole[row])


@pytest.mark.parametrize("s", [4, 5])  # inputs read where they lie, and copied
def test_joined_row_of_infinities_spoils_no_other_row(
    kernels: tuple[LinearKernel, BlockDiagKernel], s: int
) -> None:
    deltas = NumbaBlockDiag(kernels[1], packed(s, (50,), 48, 4))
    op, mapping = PanelLinear(kernels[0], random(50, 48)), mapping_of(SEGMENTS)
    x = random(mapping.n_rows, 48, seed=1)
    share = BlockShare(deltas, (50,), 0, mapping, PLACES)
    clean = op.with_blocks(x, [share])
    for bad in (3, 9, 26):
        spoilt = x.clone()
        spoilt[bad, :7] = float("inf")
        got = op.with_blocks(spoilt, [share])
        others = torch.arange(mapping.n_rows) != bad
        assert torch.equal(got[others], clean[others])
        assert not bool(got[bad].isfinite().any())
