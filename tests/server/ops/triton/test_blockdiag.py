"""The packed grouped GEMM under the interpreter, against dense float64 products."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from server.ops.row_mapping import RowMapping
from server.ops.triton import compat
from server.ops.triton.blockdiag import (
    block_kernel,
    blockdiag_add_,
)
from server.ops.triton.segments import from_table, gathers, segment_arrays
from tests.corners import corners
from tests.server.ops.triton.helpers import (
    CPU,
    assert_guard_intact,
    expected,
    generator,
    guarded,
    pack,
    random_term,
    segments_of,
)

BITS = [2, 3, 4, 8, 16]
# outputs of each matrix, inputs, blocks: words of two bytes, a group like q, k, v; neither divides;
# one block; bytes only
SHAPES = [((64, 32, 32), 48, 2), ((50,), 27, 3), ((33,), 40, 1), ((21, 10), 29, 2)]
BATCHES = [[(-1, 3), (0, 2), (1, 1)], [(-1, 1), (1, 5), (3, 20)]]


def test_interpreter_is_on_and_dots_are_upcast() -> None:
    assert compat.INTERPRET
    assert compat.UPCAST


@pytest.mark.parametrize(
    ("sizes", "n", "s", "bits", "counts"), corners(SHAPES, BITS, BATCHES, rounds=2)
)
def test_kernel_mixed_batch_equals_dense_products(
    bits: int, sizes: tuple[int, ...], n: int, s: int, counts: list[tuple[int, int]]
) -> None:
    variants = {
        slot: [random_term((m, n), s, bits, 10 * slot + g) for g, m in enumerate(sizes)]
        for slot in (0, 1, 3)
    }
    blocks, present = pack(variants, 5)
    segments = segments_of(counts)
    rows = segments[-1].end
    x = torch.randn(rows, n, generator=generator(7))
    y, whole = guarded(rows, sum(sizes), 8, torch.float32)
    dense = {slot: torch.cat([t.to_dense() for t in terms]) for slot, terms in variants.items()}
    want = expected(y, x, segments, dense)
    arrays = segment_arrays(segments, 16, CPU)
    blockdiag_add_(y.split(sizes, 1), x, arrays, blocks, block_kernel(blocks), present)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    assert_guard_intact(whole, rows, sum(sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_kernel_half_precision_stays_within_a_rounding(bits: int, dtype: torch.dtype) -> None:
    variants = {slot: [random_term((64, 32), 2, bits, slot)] for slot in (0, 1)}
    blocks, present = pack(variants, 2)
    segments = segments_of([(0, 3), (1, 18)])
    x = torch.randn(21, 32, generator=generator(1)).to(dtype)
    y, whole = guarded(21, 64, 2, dtype)
    dense = {slot: terms[0].to_dense() for slot, terms in variants.items()}
    want = expected(y, x, segments, dense)
    before = y.clone()
    blockdiag_add_([y], x, segment_arrays(segments, 16, CPU), blocks, block_kernel(blocks), present)
    step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    # one rounding of the sum (truncation under the interpreter), one of each 16-bit value
    bound = step * (want.abs() + (want - before.double()).abs() + (0.5 if bits == 16 else 1e-3))
    assert bool(((y.double() - want).abs() <= bound).all())
    assert_guard_intact(whole, 21, 64)


def test_prefill_tiles_and_the_engines_table_equal_decode_tiles() -> None:
    variants = {slot: [random_term((40, 64), 2, 4, slot)] for slot in (0, 1)}
    blocks, present = pack(variants, 2)
    segments = segments_of([(-1, 5), (0, 70), (1, 33)])
    x = torch.randn(108, 64, generator=generator(1))
    table = RowMapping(segments, CPU).table(frozenset({(0, 0), (1, 1)}))
    results = []
    for tile_rows in (16, 64):
        for arrays in (segment_arrays(segments, tile_rows, CPU), from_table(table, tile_rows)):
            y = torch.zeros(108, 40)
            kernel = block_kernel(blocks, prefill=tile_rows == 64)
            blockdiag_add_([y], x, arrays, blocks, kernel, present)
            results.append(y)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-5, atol=1e-6)


def test_a_matrix_left_out_is_untouched() -> None:
    terms = [random_term((m, 32), 2, 4, m) for m in (32, 16, 16)]
    blocks, present = pack({0: terms}, 1)
    x = torch.randn(2, 32, generator=generator(1))
    y = torch.zeros(2, 64)
    parts = list(y.split((32, 16, 16), 1))
    arrays = segment_arrays(segments_of([(0, 2)]), 16, CPU)
    blockdiag_add_([None, parts[1], None], x, arrays, blocks, block_kernel(blocks), present)
    want = x.double() @ terms[1].to_dense().double().T
    torch.testing.assert_close(parts[1].double(), want, rtol=1e-5, atol=1e-5)
    assert bool((parts[0] == 0).all())
    assert bool((parts[2] == 0).all())


def test_absent_slots_and_padding_entries_are_never_read() -> None:
    blocks, present = pack({1: [random_term((32, 32), 2, 4, 0)]}, 4)  # others: garbage, NaN scales
    segments = segments_of([(0, 2), (1, 2), (2, 1)])
    arrays = segment_arrays(segments, 16, CPU)
    bad = {"slots": 3, "starts": 10**6, "ends": 10**6 + 9}
    wide = [
        torch.cat([getattr(arrays, name), torch.full((3,), value, dtype=torch.int32)])
        for name, value in bad.items()
    ]
    padded = type(arrays)(*wide, arrays.count, 16)
    padded.slots[2] = -1
    x = torch.randn(5, 32, generator=generator(3))
    y = torch.zeros(5, 32)
    blockdiag_add_([y], x, padded, blocks, block_kernel(blocks), present)
    assert bool((y[2:4] != 0).any())
    assert bool((y[[0, 1, 4]] == 0).all())


def test_a_row_does_not_depend_on_who_shares_the_batch() -> None:
    variants = {slot: [random_term((32, 40), 2, 2, slot)] for slot in range(4)}
    blocks, present = pack(variants, 4)
    x = torch.randn(6, 40, generator=generator(3))
    together, alone = torch.zeros(6, 32), torch.zeros(6, 32)
    kernel = block_kernel(blocks)
    segments = segments_of([(0, 1), (1, 2), (2, 1), (3, 2)])
    blockdiag_add_([together], x, segment_arrays(segments, 16, CPU), blocks, kernel, present)
    for segment in segments:
        blockdiag_add_([alone], x, segment_arrays([segment], 16, CPU), blocks, kernel, present)
    assert torch.equal(together, alone)


def test_three_bit_shapes_use_both_paths() -> None:
    assert not gathers(pack({0: [random_term((64, 48), 2, 3, 0)]}, 1)[0])
    assert gathers(pack({0: [random_term((50, 27), 3, 3, 0)]}, 1)[0])
