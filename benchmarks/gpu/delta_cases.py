"""Specs of the kernels that apply deltas."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.cases import (
    Case,
    Place,
    Sizes,
    Spec,
    all_places,
    even_segments,
    random_blocks,
    relative,
)
from benchmarks.gpu.shapes import Codec, Group
from compressor.codecs.columns import packed_rows
from server.ops.blockdiag import TorchBlockDiag
from server.ops.factors import ImpartFactors, LowRankFactors, rank_lists
from server.ops.kernels import TorchKernels
from server.ops.lowrank import PackedLowRank
from server.ops.row_mapping import RowMapping
from server.ops.triton.blockdiag import (
    PREFILL_ROWS,
    block_kernel,
    blockdiag_add_,
)
from server.ops.triton.impart import impart_add_, impart_add_reference_
from server.ops.triton.lowrank import lowrank_add_, lowrank_add_reference_
from server.ops.triton.packed_lowrank import packed_lowrank_add_, packed_lowrank_add_reference_
from server.ops.triton.segments import DECODE_ROWS, segment_arrays

# From the inner loops' machine code: 2 and 3 bit are bound by instructions (README).
SHARES = {2: 0.55, 3: 0.45, 4: 0.75, 8: 0.8, 16: 0.8}
LOWRANK_SHARE = 0.7
HEAD_SHARE_PER_BIT = 0.075  # unpacking binds, some nine instructions a code whatever its bits
IMPART_SHARE = 0.6
RANK = 16
IMPART_ROWS = 64  # R


def blockdiag_spec(group: Group, codec: Codec, rows: int, slots: int) -> Spec:
    """All matrices of a group, `slots` variants."""
    prefill = rows > DECODE_ROWS * slots
    tile_rows = PREFILL_ROWS if prefill else DECODE_ROWS
    width = sum(group.sizes)

    def make(place: Place) -> Case:
        blocks = random_blocks(group, codec, slots, place.device)
        present = all_places(slots, place.device)
        kernel = block_kernel(blocks, prefill=prefill)
        segments = even_segments(rows, slots)
        where = segment_arrays(segments, tile_rows, place.device)
        x, y = place.randn(rows, group.n), place.randn(rows, width).zero_()
        parts = y.split(group.sizes, 1)

        def error() -> float:
            got, want = torch.zeros_like(y), torch.zeros_like(y, dtype=torch.float64)
            blockdiag_add_(got.split(group.sizes, 1), x, where, blocks, kernel, present)
            wanted = want.split(group.sizes, 1)
            held = frozenset((slot, slot) for slot in range(slots))
            table = RowMapping(segments, place.device).table(held)
            TorchBlockDiag(blocks).add_(wanted, x.double(), table)
            return relative(got, want)

        return Case(lambda: blockdiag_add_(parts, x, where, blocks, kernel, present), error)

    distinct = min(rows, slots)
    kind = "prefill" if prefill else "decode"
    return Spec(
        f"blockdiag {kind} {group.name} ({codec.name}, k = {distinct}, {rows} rows)",
        distinct * group.delta_bytes(codec) + rows * (group.n + 2 * width) * 2,
        SHARES[codec.bits],
        make,
        n_flops=2 * rows * group.n * width // codec.n_blocks if prefill else 0,
        variants=0 if prefill else distinct,
    )


def lowrank_spec(group: Group, rank: int, rows: int, slots: int) -> Spec:
    """One rank for all matrices of a group."""
    width = sum(group.sizes)

    def make(place: Place) -> Case:
        present = all_places(slots, place.device)
        terms = [
            LowRankFactors(
                place.randn(slots, rank, group.n) * group.n**-0.5,
                place.randn(slots, rank, m),
                frozenset(),
                present,
            )
            for m in group.sizes
        ]
        where = segment_arrays(even_segments(rows, slots), DECODE_ROWS, place.device)
        x, y = place.randn(rows, group.n), place.randn(rows, width).zero_()
        parts = y.split(group.sizes, 1)

        def error() -> float:
            got, want = torch.zeros_like(y), torch.zeros_like(y, dtype=torch.float64)
            lowrank_add_(got.split(group.sizes, 1), x, where, terms)
            wanted = want.split(group.sizes, 1)
            lowrank_add_reference_(wanted, x, where, terms, torch.float64)
            return relative(got, want)

        return Case(lambda: lowrank_add_(parts, x, where, terms), error)

    distinct = min(rows, slots)
    n_bytes = distinct * 2 * rank * (len(group.sizes) * group.n + width)
    name = f"lowrank {group.name} (rank {rank}, k = {distinct}, {rows} rows)"
    return Spec(name, n_bytes, LOWRANK_SHARE, make, n_launches=2, variants=distinct)


def head_spec(group: Group, rank: int, bits: int, rows: int, slots: int) -> Spec:
    """Quantised low-rank heads, kept packed; one rank for all matrices of a group."""
    width = sum(group.sizes)

    def make(place: Place) -> Case:
        heads = [_random_head(m, group.n, rank, bits, slots, place) for m in group.sizes]
        where = segment_arrays(even_segments(rows, slots), DECODE_ROWS, place.device)
        x, y = place.randn(rows, group.n) * group.n**-0.5, place.randn(rows, width).zero_()
        parts = y.split(group.sizes, 1)

        def error() -> float:
            got, want = torch.zeros_like(y), torch.zeros_like(y, dtype=torch.float64)
            packed_lowrank_add_(got.split(group.sizes, 1), x, where, heads)
            wanted = want.split(group.sizes, 1)
            packed_lowrank_add_reference_(wanted, x, where, heads, torch.float64)
            return relative(got, want)

        return Case(lambda: packed_lowrank_add_(parts, x, where, heads), error)

    distinct = min(rows, slots)
    each = [
        packed_rows(group.n, bits) * rank + packed_rows(rank, bits) * m + 6 * rank
        for m in group.sizes
    ]
    name = f"packed head {group.name} (rank {rank}, {bits} bit, k = {distinct}, {rows} rows)"
    share = HEAD_SHARE_PER_BIT * bits
    return Spec(name, distinct * sum(each), share, make, n_launches=2, variants=distinct)


def _random_head(m: int, n: int, rank: int, bits: int, slots: int, place: Place) -> PackedLowRank:
    device = place.device

    def codes(inputs: int, outputs: int) -> Tensor:
        size = (slots, packed_rows(inputs, bits), outputs)
        return torch.randint(0, 256, size, dtype=torch.uint8, device=device)

    return PackedLowRank(
        codes(n, rank),
        torch.rand(slots, rank, device=device).add_(0.5).half(),
        torch.ones(slots, 1, device=device),
        codes(rank, m),
        torch.rand(slots, rank, device=device) + 0.5,
        n=n,
        bits=bits,
        make_op=TorchKernels().blockdiag,
        place_of=all_places(slots, device),
    )


def impart_kept(m: int, n: int, ratio: int) -> int:
    """Components S kept in each block so that 16-bit values meet the ratio.

    At least 8: fewer of a tiny matrix's might be others in U than in V, and nothing be computed.
    """
    return max(8, m * n // ((m + n) * ratio))


def impart_bytes(group: Group, ratio: int) -> int:
    """Values, both indices and lists of one variant's group."""
    total = 0
    for m in group.sizes:
        kept = impart_kept(m, group.n, ratio)
        blocks = -(-m // IMPART_ROWS) + -(-group.n // IMPART_ROWS)
        total += kept * blocks * (2 * IMPART_ROWS + 4)
    return total


def _impart_factors(m: int, n: int, kept: int, slots: int, place: Place) -> ImpartFactors:
    ranks = max(kept, min(m, n) * 3 // 10)
    bu, bv = -(-m // IMPART_ROWS), -(-n // IMPART_ROWS)

    def draw(blocks: int) -> Tensor:
        chosen = torch.rand(slots, blocks, ranks, device=place.device).topk(kept).indices
        return chosen.sort().values.flatten(1).int()

    v_index = draw(bv)
    lists = [rank_lists(index, ranks) for index in v_index]
    return ImpartFactors(
        u_values=place.randn(slots, bu, IMPART_ROWS, kept),
        u_index=draw(bu),
        v_values=place.randn(slots, bv, IMPART_ROWS, kept),
        v_index=v_index,
        order=torch.stack([order for order, _ in lists]),
        first=torch.stack([first for _, first in lists]),
        sigma=torch.full((slots, ranks), 2.0**-8, device=place.device, dtype=place.dtype),
        present=frozenset(),
        place_of=all_places(slots, place.device),
    )


def impart_spec(group: Group, ratio: int, rows: int, slots: int) -> Spec:
    """All matrices of a group at one ratio: k and v keep fewer components than q."""
    width = sum(group.sizes)

    def make(place: Place) -> Case:
        terms = [
            _impart_factors(m, group.n, impart_kept(m, group.n, ratio), slots, place)
            for m in group.sizes
        ]
        where = segment_arrays(even_segments(rows, slots), DECODE_ROWS, place.device)
        x, y = place.randn(rows, group.n), place.randn(rows, width).zero_()
        parts = y.split(group.sizes, 1)

        def error() -> float:
            got, want = torch.zeros_like(y), torch.zeros_like(y, dtype=torch.float64)
            impart_add_(got.split(group.sizes, 1), x, where, terms)
            wanted = want.split(group.sizes, 1)
            impart_add_reference_(wanted, x, where, terms, torch.float64)
            return relative(got, want)

        return Case(lambda: impart_add_(parts, x, where, terms), error)

    distinct = min(rows, slots)
    n_bytes = distinct * impart_bytes(group, ratio)
    name = f"impart {group.name} (ratio {ratio}, k = {distinct}, {rows} rows)"
    return Spec(name, n_bytes, IMPART_SHARE, make, n_launches=3, variants=distinct)


def block_specs(codec: Codec, sizes: Sizes, groups: tuple[Group, ...]) -> Iterator[Spec]:
    """blockdiag of one setting, for each group and number of variants."""
    for k in sizes.variants:
        for group in groups:
            yield blockdiag_spec(group, codec, max(sizes.rows, k), k)
    for group in groups:
        yield blockdiag_spec(group, codec, sizes.prefill_rows, 2)


def factor_specs(sizes: Sizes, groups: tuple[Group, ...]) -> Iterator[Spec]:
    """The other codecs once a group: every row another variant, or as many as there are."""
    k = min(sizes.rows, max(sizes.variants))
    for group in groups:
        yield lowrank_spec(group, RANK, sizes.rows, k)
        yield head_spec(group, RANK, 4, sizes.rows, k)
        yield impart_spec(group, 32, sizes.rows, k)
