"""Grouped application of every codec against the codec's own dense matrix in float64."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch
from torch import Tensor

from compressor.codecs.lowrank import lowrank_from_factors
from compressor.codecs.term import Term
from compressor.encoders.codec import make_encoder
from compressor.encoders.rows import encode_largest_rows
from compressor.encoders.sources import TensorSource
from server.deltas.pools.base import FactorPool, PoolParts, TermPool
from server.deltas.pools.blockdiag import BlockDiagPool, SharedBlocks
from server.deltas.pools.geometry import geometry_of, make_pool
from server.deltas.upload import SlotUploader
from server.ops.choose import choose_kernels
from server.ops.kernels import Kernels, TorchKernels
from server.ops.row_mapping import BASE_SLOT, RowMapping, Segment
from server.ops.static_row_mapping import StaticRowMapping
from tests.server.ops.test_row_mapping import mapping_of

CPU = torch.device("cpu")
SHAPES = [(64, 48), (50, 37), (96, 24), (33, 80)]
OPTIONS = {
    "blockdiag": [
        {"bits": 2, "scale_bits": 16},
        {"bits": 2},
        {"bits": 3},
        {"bits": 16},
        {"bits": 4, "head_fraction": 0.3},
    ],
    "lowrank": [{"bits": 16}, {"bits": 8}, {"bits": 4}, {"bits": 3}],
    "impart": [{"block_rows": 16}],
    "impart-qt": [{"block_rows": 16}],
    "rows": [{"bits": 2, "n_rows": 7}, {"bits": 3, "n_rows": 20}],
}
CASES = [
    (codec, o, shape) for codec, options in OPTIONS.items() for o in options for shape in SHAPES
]
BATCHES = [
    {0: 1},
    {-1: 3, 0: 2, 1: 2},
    {-1: 1, 0: 1, 1: 5, 2: 3},
    {0: 40, 1: 1, 2: 1},
    {-1: 2, 2: 4},
]


@pytest.fixture(scope="module", params=["torch", "numba"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return choose_kernels(request.param, CPU, torch.float32)


def random_delta(seed: int, shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.01


def encode_rows(seed: int, shape: tuple[int, int], *, n_rows: int, bits: int) -> tuple[Term, ...]:
    """Of variant after variant a row less, so that the shared arrays have rows to fill up."""
    source = TensorSource(random_delta(seed, shape))
    return (encode_largest_rows(f"w{seed}", source, n_rows - seed, bits),)


def encode_all(
    codec: str, options: dict[str, object], shape: tuple[int, int]
) -> list[tuple[Term, ...]]:
    if codec == "rows":
        return [encode_rows(seed, shape, **options) for seed in range(3)]
    encoder = make_encoder(codec, **options)
    terms = []
    for seed in range(3):
        dense = random_delta(seed, shape)
        params = encoder.fit(shape, shape[0] * shape[1] * 2 / 6)
        terms.append(encoder.encode(f"w{seed}", TensorSource(dense), params, seed))
    return terms


def reserve(pool: TermPool, slot: int, staged: PoolParts) -> None:
    place = pool.places.reserve(slot)
    if place >= pool.capacity:
        pool.store.adopt(pool.store.grown_arrays(staged, place))


def put(pool: TermPool, slot: int, staged: PoolParts) -> None:
    targets = (array[pool.places[slot]] for array in pool.arrays)
    SlotUploader(CPU).copy(list(zip(targets, staged, strict=True)))


def fill(term_index: int, variants: list[tuple[Term, ...]], kernels: Kernels) -> TermPool:
    first = variants[0][term_index]
    pool = make_pool(geometry_of(first), first.shape, torch.float32, CPU, kernels)
    pool.map_slots(torch.zeros(64, dtype=torch.int32))
    for slot, terms in enumerate(variants):
        staged = pool.stage(terms[term_index])
        reserve(pool, slot, staged)
        put(pool, slot, staged)
        pool.show(slot)
    return pool


def test_array_that_finds_no_memory_to_grow_leaves_the_pool_as_it_was() -> None:
    codec, options, shape = next(case for case in CASES if case[0] == "blockdiag")
    variants = encode_all(codec, options, shape)
    pool = fill(0, variants[:1], TorchKernels())
    x = random_delta(9, (2, shape[1]))
    rows = RowMapping([Segment(0, 0, 2)], CPU)
    before, arrays = torch.zeros(2, shape[0]), pool.arrays
    pool.add_(before, x, rows)

    def out_of_memory(blocks: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    pool.kernels.blockdiag = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        reserve(pool, 1, pool.stage(variants[1][0]))
    assert pool.arrays is arrays
    assert pool.capacity == 1
    after = torch.zeros(2, shape[0])
    pool.add_(after, x, rows)
    assert torch.equal(before, after)


def expected(x: Tensor, slots: list[int], dense: list[Tensor], m: int) -> Tensor:
    rows = [
        dense[slot] @ x[i].double() if slot != BASE_SLOT else torch.zeros(m, dtype=torch.float64)
        for i, slot in enumerate(slots)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize(("codec", "options", "shape"), CASES)
@pytest.mark.parametrize("counts", BATCHES)
def test_pool_mixed_batch_equals_dense_products(
    codec: str,
    options: dict[str, object],
    shape: tuple[int, int],
    counts: dict[int, int],
    kernels: Kernels,
) -> None:
    variants = encode_all(codec, options, shape)
    mapping = mapping_of(counts)
    x = torch.randn(mapping.n_rows, shape[1], generator=torch.Generator().manual_seed(9))
    for t in range(len(variants[0])):
        pool = fill(t, variants, kernels)
        y = torch.zeros(mapping.n_rows, shape[0])
        pool.add_(y, x, mapping)
        dense = [terms[t].to_dense().double() for terms in variants]
        want = expected(x, mapping.slot_of_row.tolist(), dense, shape[0])
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("codec", "options", "shape"), CASES)
def test_pool_embedding_look_up_equals_dense_rows(
    codec: str, options: dict[str, object], shape: tuple[int, int]
) -> None:
    variants = encode_all(codec, options, shape)
    mapping = mapping_of({-1: 2, 0: 5, 1: 1, 2: 7})
    ids = torch.randint(0, shape[0], (mapping.n_rows,), generator=torch.Generator().manual_seed(1))
    for t in range(len(variants[0])):
        pool = fill(t, variants, TorchKernels())
        y = torch.zeros(mapping.n_rows, shape[1])
        pool.add_rows_(y, ids, mapping)
        for row, slot in enumerate(mapping.slot_of_row.tolist()):
            want = torch.zeros(shape[1]) if slot < 0 else variants[slot][t].to_dense()[ids[row]]
            torch.testing.assert_close(y[row], want, rtol=1e-4, atol=1e-7)


def as_data(mapping: RowMapping) -> StaticRowMapping:
    """The mapping as a static step sees it, with a padding row and an entry not in use."""
    slots = torch.cat([mapping.slot_of_row, torch.tensor([BASE_SLOT])])
    entries = [[s.slot, s.start, s.end] for s in mapping.segments if s.slot != BASE_SLOT]
    table = torch.tensor([*entries, [0, 0, len(slots)]])
    count = torch.tensor([len(entries)], dtype=torch.int32)
    return StaticRowMapping(slots, table, count, 16, with_deltas=True)


@pytest.mark.parametrize(("codec", "options", "shape"), CASES[::2])
def test_pool_with_rows_as_data_equals_the_pool_with_a_mapping(
    codec: str, options: dict[str, object], shape: tuple[int, int]
) -> None:
    assert_data_equals_mapping(encode_all(codec, options, shape), TorchKernels())


@pytest.mark.parametrize(
    ("codec", "options"),
    [("lowrank", {"bits": 16}), ("impart", {}), ("rows", {"bits": 2, "n_rows": 7})],
)
def test_triton_pools_take_rows_as_data(codec: str, options: dict[str, object]) -> None:
    pytest.importorskip("triton")
    from server.ops.triton.kernels import TritonKernels

    assert_data_equals_mapping(encode_all(codec, options, (50, 37)), TritonKernels(CPU))


def assert_data_equals_mapping(variants: list[tuple[Term, ...]], kernels: Kernels) -> None:
    """Slot 1 is held by nobody; products and embedding rows, against plain torch and a mapping."""
    mapping = mapping_of({-1: 2, 0: 1, 1: 3, 2: 4})
    m, n = variants[0][0].shape
    x = torch.randn(mapping.n_rows + 1, n, generator=torch.Generator().manual_seed(9))
    ids = torch.randint(0, m, (mapping.n_rows + 1,), generator=torch.Generator().manual_seed(1))
    for t in range(len(variants[0])):
        pool, oracle = fill(t, variants, kernels), fill(t, variants, TorchKernels())
        pool.hide(1)
        oracle.hide(1)
        assert pool.as_data
        got, want = torch.zeros(mapping.n_rows + 1, m), torch.zeros(mapping.n_rows, m)
        pool.add_(got, x, as_data(mapping))
        oracle.add_(want, x[:-1], mapping)
        torch.testing.assert_close(got[:-1], want, rtol=1e-4, atol=1e-6)
        got, want = torch.zeros(mapping.n_rows + 1, n), torch.zeros(mapping.n_rows, n)
        pool.add_rows_(got, ids, as_data(mapping))
        oracle.add_rows_(want, ids[:-1], mapping)
        torch.testing.assert_close(got[:-1], want, rtol=1e-4, atol=1e-6)
        assert not got[-1].any(), "padding"


def test_packed_lowrank_pools_of_other_bits_are_of_another_kind() -> None:
    def kind(rank: int, bits: int) -> Hashable:
        geometry = "packed_lowrank", (rank, bits)
        pool = make_pool(geometry, (8, 8), torch.float32, CPU, TorchKernels())
        assert isinstance(pool, FactorPool)
        return pool.kind

    assert kind(4, 3) == kind(8, 3)
    assert kind(4, 3) != kind(4, 4)


def test_impart_place_that_nobody_has_yet_may_hold_anything() -> None:
    variants = encode_all("impart", {"block_rows": 16}, (50, 37))
    pool = fill(0, variants, TorchKernels())
    pool.hide(0)
    for part in (array[pool.places[1]] for array in pool.arrays):
        part.fill_(0)
    for array in pool.arrays:
        array[0].fill_(-(10**9) if not array.is_floating_point() else float("nan"))
    y = torch.zeros(4, 37)
    pool.add_rows_(y, torch.arange(4), as_data(mapping_of({-1: 2, 0: 1})))
    assert not y.any()


def test_rows_place_that_nobody_has_yet_may_hold_anything() -> None:
    variants = encode_all("rows", {"bits": 2, "n_rows": 7}, (50, 37))
    pool = fill(0, variants, TorchKernels())
    pool.hide(0)
    for array in pool.arrays:
        array[0].fill_(-(10**9) if array.dtype is torch.int64 else 255)
    mapping = mapping_of({-1: 2, 0: 1, 2: 1})
    x = torch.randn(mapping.n_rows, 37, generator=torch.Generator().manual_seed(9))
    for rows, more in ((mapping, 0), (as_data(mapping), 1)):
        y, looked_up = torch.zeros(4 + more, 50), torch.zeros(4 + more, 37)
        pool.add_(y, torch.cat([x, x[:more]]), rows)
        pool.add_rows_(looked_up, torch.arange(4 + more), rows)
        want = variants[2][0]
        assert not y[:3].any()
        assert not looked_up[:3].any()
        torch.testing.assert_close(y[3:4], want.apply(x[3:4]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(looked_up[3], want.to_dense()[3], rtol=1e-4, atol=1e-7)


def test_pool_hidden_slot_full_of_nan_is_never_read(kernels: Kernels) -> None:
    variants = encode_all("blockdiag", {"bits": 4}, (64, 48))
    pool = fill(0, variants, kernels)
    place = pool.places[1]
    pool.hide(1)
    pool.arrays[2][place].fill_(float("nan"))  # units
    mapping = mapping_of({0: 2, 1: 2, 2: 2})
    y = torch.zeros(mapping.n_rows, 64)
    pool.add_(y, torch.randn(mapping.n_rows, 48), mapping)
    assert y.isfinite().all()
    assert not y[2:4].any()


def test_pool_result_does_not_depend_on_neighbours(kernels: Kernels) -> None:
    variants = encode_all("blockdiag", {"bits": 4}, (64, 48))
    pool = fill(0, variants, kernels)
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(2))
    together, alone = torch.zeros(6, 64), torch.zeros(2, 64)
    pool.add_(together, x, mapping_of({0: 2, 1: 2, 2: 2}))
    pool.add_(alone, x[2:4].contiguous(), mapping_of({1: 2}))
    torch.testing.assert_close(together[2:4], alone, rtol=1e-6, atol=1e-7)


def siblings(kernels: Kernels, variants: list[tuple[Term, ...]]) -> list[BlockDiagPool]:
    """Two matrices that share their arrays, the second without slot 1."""
    first = variants[0][0]
    pools = [make_pool(geometry_of(first), first.shape, torch.float32, CPU, kernels) for _ in "ab"]
    together = [pool for pool in pools if isinstance(pool, BlockDiagPool)]
    SharedBlocks(together)
    for slot, terms in enumerate(variants):
        for pool in together:
            reserve(pool, slot, pool.stage(terms[0]))
            put(pool, slot, pool.stage(terms[0]))
            pool.show(slot)
    together[1].hide(1)
    return together


def test_shared_blocks_member_without_a_slot_adds_nothing_there(kernels: Kernels) -> None:
    variants = encode_all("blockdiag", {"bits": 4}, (50, 37))
    pools = siblings(kernels, variants)
    mapping = mapping_of({-1: 1, 0: 2, 1: 2, 2: 3})
    x = torch.randn(mapping.n_rows, 37, generator=torch.Generator().manual_seed(3))
    fused = torch.zeros(mapping.n_rows, 100)
    shared = pools[0].shared
    assert shared is not None
    shared.add_(torch.split(fused, 50, dim=1), x, mapping)
    dense = [terms[0].to_dense().double() for terms in variants]
    slots = mapping.slot_of_row.tolist()
    both = [
        expected(x, slots, dense, 50),
        expected(x, slots, [dense[0], dense[1] * 0, dense[2]], 50),
    ]
    torch.testing.assert_close(fused.double(), torch.cat(both, 1), rtol=1e-4, atol=1e-6)


def test_shared_blocks_one_member_alone_equals_its_own_product(kernels: Kernels) -> None:
    variants = encode_all("blockdiag", {"bits": 3}, (50, 37))
    pools = siblings(kernels, variants)
    mapping = mapping_of({0: 2, 1: 1, 2: 70})
    x = torch.randn(mapping.n_rows, 37, generator=torch.Generator().manual_seed(3))
    y = torch.zeros(mapping.n_rows, 50)
    pools[0].add_(y, x, mapping)
    dense = [terms[0].to_dense().double() for terms in variants]
    want = expected(x, mapping.slot_of_row.tolist(), dense, 50)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-6)


def test_packed_low_rank_pool_takes_variants_of_near_ranks_in_their_stored_bytes(
    kernels: Kernels,
) -> None:
    factors = [(torch.randn(k, 200) * 0.01, torch.randn(k, 300)) for k in (9, 12, 11)]
    terms = [lowrank_from_factors(a, b, bits=4) for a, b in factors]
    assert len({geometry_of(term) for term in terms}) == 1
    pool = fill(0, [(term,) for term in terms], kernels)
    mapping = mapping_of({-1: 2, 0: 1, 1: 3, 2: 9})
    x = torch.randn(mapping.n_rows, 200, generator=torch.Generator().manual_seed(3))
    y = torch.zeros(mapping.n_rows, 300)
    pool.add_(y, x, mapping)
    want = expected(x, mapping.slot_of_row.tolist(), [t.to_dense().double() for t in terms], 300)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-6)
    held = sum(part[0].nbytes for part in pool.arrays)
    assert held < 1.05 * sum(part.nbytes for part in terms[1].tensors().values())


@pytest.mark.parametrize("codec", ["blockdiag", "lowrank", "impart", "rows"])
def test_pool_slot_far_up_takes_one_place_and_gives_it_back(codec: str) -> None:
    terms = encode_all(codec, {"bits": 2, "n_rows": 7} if codec == "rows" else {}, (64, 48))
    pool = fill(0, terms, TorchKernels())
    capacity = pool.capacity
    pool.hide(1)
    staged = pool.stage(terms[1][0])
    reserve(pool, 60, staged)
    put(pool, 60, staged)
    pool.show(60)
    assert pool.capacity == capacity <= len(terms)
    mapping = mapping_of({0: 2, 2: 1, 60: 3})
    x = torch.randn(mapping.n_rows, 48, generator=torch.Generator().manual_seed(4))
    y = torch.zeros(mapping.n_rows, 64)
    pool.add_(y, x, mapping)
    dense = {0: terms[0], 2: terms[2], 60: terms[1]}
    want = [
        dense[s][0].to_dense().double() @ x[i].double()
        for i, s in enumerate(mapping.slot_of_row.tolist())
    ]
    torch.testing.assert_close(y.double(), torch.stack(want), rtol=1e-4, atol=1e-6)
    for slot in (0, 2, 60):
        assert not pool.idle
        pool.hide(slot)
    assert pool.idle


def test_shared_blocks_free_a_place_when_no_member_holds_it(kernels: Kernels) -> None:
    variants = encode_all("blockdiag", {"bits": 4}, (50, 37))
    pools = siblings(kernels, variants)
    shared = pools[0].shared
    assert shared is not None
    pools[0].hide(1)  # the second gave it up before: its place goes to a slot only the second has
    put_again = pools[1].stage(variants[1][0])
    reserve(pools[1], 7, put_again)
    put(pools[1], 7, put_again)
    pools[1].show(7)
    assert shared.places[7] == 1
    mapping = mapping_of({0: 1, 7: 2})
    x = torch.randn(3, 37, generator=torch.Generator().manual_seed(5))
    fused = torch.zeros(3, 100)
    shared.add_(torch.split(fused, 50, dim=1), x, mapping)
    dense = variants[1][0].to_dense().double()
    assert not fused[1:, :50].any()
    torch.testing.assert_close(
        fused[1:, 50:].double(), x[1:].double() @ dense.T, rtol=1e-4, atol=1e-6
    )
    for pool in pools:
        for slot in (0, 2, 7):
            pool.hide(slot)
    assert all(pool.idle for pool in pools)
