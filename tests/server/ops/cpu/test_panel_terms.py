"""All terms of all slots inside the base's product, against float64 loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressor.codecs.columns import pack_columns
from server.ops.cpu.joined import NumbaTerms
from server.ops.cpu.linear import LinearKernel, PanelLinear
from server.ops.cpu.parallel import Parallel
from server.ops.cpu.widened import WidenedKernel, WidenedLinear
from server.ops.joined import JoinedTerms, TermArrays
from server.ops.kernels import TorchKernels
from server.ops.linear import LinearOp, TorchLinear
from server.ops.lowrank import PackedLowRank
from server.ops.packed import PackedBlocks, PackedRows
from server.ops.row_mapping import RowMapping, Segment
from server.ops.torch_terms import TorchTerms
from tests.server.ops.test_blockdiag import dense, make

CPU = torch.device("cpu")
SEGMENTS = ((-1, 3), (0, 1), (2, 21), (1, 6), (-1, 2))
PLACES = {0: 2, 1: 0, 2: 1}  # of each slot in all arrays of three places
DTYPES = (torch.bfloat16, torch.float32)
N, M = 48, 130  # inputs, outputs of a matrix; the product has more before and behind
FIRST, OUTPUTS = 37, 180
Kernels = dict[torch.dtype, LinearKernel | WidenedKernel]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    parallel = Parallel()
    return {torch.bfloat16: LinearKernel(parallel), torch.float32: WidenedKernel(parallel)}


def mapping_of(segments: tuple[tuple[int, int], ...]) -> RowMapping:
    found, start = [], 0
    for slot, n in segments:
        found.append(Segment(slot, start, start + n))
        start += n
    return RowMapping(found, CPU)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(n: int) -> Tensor:
    """Float32 of bfloat16 numbers."""
    return random(OUTPUTS, n).bfloat16().float()


def one_block(n: int, m: int, bits: int, seed: int) -> PackedBlocks:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 1 << bits, (3, 1, n, m), dtype=torch.uint8, generator=generator)
    scales = torch.rand(3, 1, m, generator=generator).half()
    return PackedBlocks(pack_columns(raw, bits), scales, torch.full((3, 1), 0.5), (m,), n, bits)


def head(rank: int, bits: int, n: int = N) -> PackedLowRank:
    down, up = one_block(n, rank, bits, rank), one_block(rank, M, bits, rank + 1)
    gains = random(3, rank, seed=rank)
    packed = down.codes[:, 0], down.scales[:, 0], down.units, up.codes[:, 0], gains
    return PackedLowRank(*packed, n=n, bits=bits, make_op=TorchKernels().blockdiag)


def some_rows(count: int, bits: int, n: int = N) -> PackedRows:
    generator = torch.Generator().manual_seed(count)
    index = torch.stack([torch.randperm(M, generator=generator)[:count] for _ in range(3)])
    return PackedRows(one_block(n, count, bits, count), index.sort().values, M)


def change(term: TermArrays, place: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the term adds to M outputs, in float64; what a head shrinks to is rounded once."""
    if isinstance(term, PackedBlocks):
        return x.double() @ dense(term, place)[0].T
    if isinstance(term, PackedRows):
        y = torch.zeros(len(x), M, dtype=torch.float64)
        y[:, term.index[place]] = x.double() @ dense(term.blocks, place)[0].T
        return y
    hidden = (x.double() @ dense(term.down, place)[0].T) * term.gains[place].double()
    up = replace(term.up, scales=torch.ones_like(term.up.scales))
    return hidden.to(dtype).double() @ dense(up, place)[0].T


def wanted(x: Tensor, weight: Tensor, terms: list[TermArrays], rows: RowMapping) -> Tensor:
    y = x.double() @ weight.double().T
    for segment in rows.segments:
        if segment.slot in PLACES:
            part = slice(segment.start, segment.end)
            for term in terms:
                added = change(term, PLACES[segment.slot], x[part], x.dtype)
                y[part, FIRST : FIRST + M] += added
    return y


def filled(joined: JoinedTerms, terms: list[TermArrays]) -> JoinedTerms:
    for term in terms:
        joined.put(term, term, FIRST)
        for slot, place in PLACES.items():
            joined.show(term, slot, place)
    return joined


def product_of(kernels: Kernels, weight: Tensor) -> LinearOp:
    """The base's product by the kernel itself."""
    kernel = kernels[weight.dtype]
    if isinstance(kernel, LinearKernel):
        return PanelLinear(kernel, weight)
    return WidenedLinear(kernel, weight)


def joined_with(
    kernels: Kernels, weight: Tensor, terms: list[TermArrays], *, own: bool = True
) -> JoinedTerms:
    """own: whether the base's product is the kernels' too."""
    linear = product_of(kernels, weight) if own else TorchLinear(weight)
    return filled(NumbaTerms(kernels[weight.dtype], linear, len(weight)), terms)


def term_sets(bits: int) -> dict[str, list[TermArrays]]:
    return {
        "blocks that fill whole byte rows": [make(6, (M,), N, bits)],
        "blocks that do not": [make(5, (M,), N, bits)],
        "one block": [make(1, (M,), N, bits)],
        "heads": [head(rank, bits) for rank in (1, 4, 20, 64)],
        "rows": [some_rows(count, bits) for count in (1, 9, M)],
        "all": [make(4, (M,), N, bits), some_rows(50, bits), head(8, bits), make(5, (M,), N, 2)],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("own", [True, False])
def test_joined_product_equals_float64_rounded_once(
    kernels: Kernels, bits: int, dtype: torch.dtype, own: bool
) -> None:
    weight, mapping = weight_of(N).to(dtype), mapping_of(SEGMENTS)
    x = random(mapping.n_rows, N, seed=1).to(dtype)
    for name, terms in term_sets(bits).items():
        got = joined_with(kernels, weight, terms, own=own).product(x, mapping).double()
        want = wanted(x, weight, terms, mapping)
        largest = x.double().abs() @ weight.double().abs().T + want.abs().max()
        unit = 2**-8 if dtype is torch.bfloat16 else 2**-22
        twice = 1 if own else 2  # the base's product is rounded by itself
        # A head's hidden value may be rounded the other way: sums come in another order.
        slack = largest * (2**-12 if dtype is torch.bfloat16 else 2**-18)
        bound = twice * (want.abs() + largest * (not own)) * unit + slack
        assert bool(((got - want).abs() <= bound).all()), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_product_of_inputs_that_fill_no_byte_row_equals_float64(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    weight, mapping = weight_of(38).to(dtype), mapping_of(SEGMENTS)
    x = random(mapping.n_rows, 38, seed=1).to(dtype)
    terms = [make(3, (M,), 38, 4), some_rows(20, 2, 38), head(6, 4, 38)]
    want = wanted(x, weight, terms, mapping)
    got = joined_with(kernels, weight, terms).product(x, mapping).double()
    assert float((got - want).abs().max()) <= 0.01 * float(want.abs().max())


def test_torch_terms_equal_float64() -> None:
    weight, mapping = random(OUTPUTS, N).double(), mapping_of(SEGMENTS)
    x, terms = random(mapping.n_rows, N, seed=1).double(), term_sets(4)["all"]
    got = filled(TorchTerms(TorchLinear(weight)), terms).product(x, mapping)
    torch.testing.assert_close(got, wanted(x, weight, terms, mapping), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_rows_result_does_not_depend_on_the_batch(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    joined = joined_with(kernels, weight_of(N).to(dtype), term_sets(4)["all"])
    x = random(230, N, seed=1).to(dtype)
    whole = joined.product(x, mapping_of(((-1, 4), (1, 203), (2, 23))))
    for row in (4, 5, 7, 8, 11, 12, 190, 206):
        assert torch.equal(joined.product(x[row : row + 1], mapping_of(((1, 1),)))[0], whole[row])
        three = joined.product(x[row - 1 : row + 2], mapping_of(((0, 1), (1, 1), (-1, 1))))
        assert torch.equal(three[1], whole[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [6, 5])  # inputs read where they lie, and copied
def test_joined_row_of_infinities_spoils_no_other_row(
    kernels: Kernels, s: int, dtype: torch.dtype
) -> None:
    terms: list[TermArrays] = [make(s, (M,), N, 4), head(4, 4), some_rows(9, 2)]
    joined, mapping = (
        joined_with(kernels, weight_of(N).to(dtype), terms),
        mapping_of(SEGMENTS),
    )
    x = random(mapping.n_rows, N, seed=1).to(dtype)
    clean = joined.product(x, mapping)
    for bad in (3, 9, 26):
        spoilt = x.clone()
        spoilt[bad, :7] = float("inf")
        got = joined.product(spoilt, mapping)
        others = torch.arange(mapping.n_rows) != bad
        assert torch.equal(got[others], clean[others])
        assert not bool(got[bad].isfinite().any())


def test_joined_terms_hidden_replaced_and_dropped_are_no_longer_added(
    kernels: Kernels,
) -> None:
    weight, mapping = weight_of(N), mapping_of(SEGMENTS)
    x = random(mapping.n_rows, N, seed=1)
    first, second, other = make(6, (M,), N, 4), head(4, 4), make(4, (M,), N, 4)
    joined = joined_with(kernels, weight, [first, second])
    for slot in PLACES:
        joined.hide(second, slot)
    joined.drop(second)
    joined.put(first, other, FIRST)  # its arrays have grown, say
    got = joined.product(x, mapping)
    assert torch.equal(got, joined_with(kernels, weight, [other]).product(x, mapping))
    for slot in PLACES:
        joined.hide(first, slot)
    assert torch.equal(joined.product(x, mapping), product_of(kernels, weight)(x))


def test_joined_terms_of_many_slots_and_sets_are_each_slots_own(kernels: Kernels) -> None:
    weight, n_slots = weight_of(N), 40
    joined = joined_with(kernels, weight, [])
    sets: list[TermArrays] = [make(s, (M,), N, bits) for s in range(1, 8) for bits in (2, 4)]
    for slot in range(n_slots):
        for term in sets[slot % 5 :: 5]:
            joined.put((term, slot), term, FIRST)
            joined.show((term, slot), slot, slot % 3)
    mapping = mapping_of(tuple((slot, 1) for slot in range(n_slots)))
    x = random(n_slots, N, seed=1)
    want = x.double() @ weight.double().T
    for slot in range(n_slots):
        for term in sets[slot % 5 :: 5]:
            row = slice(slot, slot + 1)
            want[row, FIRST : FIRST + M] += change(term, slot % 3, x[row], torch.float32)
    largest = float(want.abs().max())
    torch.testing.assert_close(
        joined.product(x, mapping).double(), want, rtol=0, atol=1e-5 * largest
    )
