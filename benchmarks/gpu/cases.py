"""One case per kernel: inputs of a decode step's (or a prefill's) shape, the launch, the oracle.

The same cases are compiled offline, run tiny under the interpreter in a test, and timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Codec, Group, ModelShape
from server.ops.packed import PackedBlocks, packed_rows
from server.ops.quantize import QuantizedWeight, linear_reference, quantize_int8
from server.ops.rows import Segment
from server.ops.triton.attention import paged_decode, paged_decode_reference
from server.ops.triton.blockdiag import (
    DECODE_ROWS,
    PREFILL_ROWS,
    blockdiag_add_,
    blockdiag_add_reference_,
    plan_kernel,
)
from server.ops.triton.impart import (
    ImpartArrays,
    impart_add_,
    impart_add_reference_,
    rank_lists,
)
from server.ops.triton.layout import segment_arrays
from server.ops.triton.linear import linear_
from server.ops.triton.lowrank import (
    LowRankArrays,
    lowrank_add_,
    lowrank_add_reference_,
    output_tiles,
)
from server.ops.triton.norm import rms_norm, rms_norm_reference, silu_mul, silu_mul_reference
from server.ops.triton.rope import rope_and_write_, rope_and_write_reference_

PAGE = 32
Errors = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """One launch site.

    n_bytes   least bytes it must move
    run       one launch (in place where the kernel is)
    error     runs once on fresh outputs; largest deviation from float64 in units of the largest
              float64 result
    bound     what `error` may be: roundings of the dtypes involved
    """

    name: str
    n_bytes: int
    run: Callable[[], None]
    error: Errors
    bound: float = 0.02


def relative(got: Tensor, want: Tensor) -> float:
    """Largest deviation over the largest magnitude; infinite if anything is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    difference = (got.double() - want.double()).abs().max()
    return float(difference / want.double().abs().max())


def random_blocks(group: Group, codec: Codec, n_slots: int, device: torch.device) -> PackedBlocks:
    """Slot arrays full of random values of about 1e-3."""
    s, bits = codec.n_blocks, codec.bits
    outputs = sum(-(-m // s) for m in group.sizes)
    shape = (n_slots, s, packed_rows(-(-group.n // s), bits), outputs)
    if bits == 16:
        codes = torch.randn(shape, device=device).half()
    else:
        codes = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    scales = torch.rand((n_slots, s, outputs), device=device).add_(0.5).half()
    units = torch.full((n_slots, len(group.sizes)), 2.0**-10, device=device)
    return PackedBlocks(codes, scales, units, group.sizes, group.n, bits)


def even_segments(rows: int, slots: int) -> list[Segment]:
    """`rows` rows shared by `slots` slots as evenly as possible."""
    cuts = [rows * i // slots for i in range(slots + 1)]
    return [Segment(i, a, b) for i, (a, b) in enumerate(pairwise(cuts)) if b > a]


def blockdiag_case(
    group: Group, codec: Codec, rows: int, slots: int, device: torch.device, dtype: torch.dtype
) -> Case:
    prefill = rows > DECODE_ROWS * slots
    blocks = random_blocks(group, codec, slots, device)
    present = torch.arange(1, slots + 1, dtype=torch.int32, device=device)
    kernel = plan_kernel(blocks, prefill=prefill)
    tile_rows = PREFILL_ROWS if prefill else DECODE_ROWS
    where = segment_arrays(even_segments(rows, slots), tile_rows, device)
    x = torch.randn(rows, group.n, device=device, dtype=dtype)
    y = torch.zeros(rows, sum(group.sizes), device=device, dtype=dtype)
    parts = y.split(group.sizes, 1)

    def error() -> float:
        got, want = torch.zeros_like(y), torch.zeros_like(y, dtype=torch.float64)
        blockdiag_add_(got.split(group.sizes, 1), x, where, blocks, kernel, present)
        wanted = want.split(group.sizes, 1)
        blockdiag_add_reference_(wanted, x, where, blocks, present, torch.float64)
        return relative(got, want)

    distinct = min(rows, slots)
    n_bytes = distinct * group.delta_bytes(codec) + rows * (group.n + 2 * sum(group.sizes)) * 2
    kind = "prefill" if prefill else "decode"
    name = f"blockdiag {kind} {group.name} ({codec.name}, {distinct} variants, {rows} rows)"
    run = lambda: blockdiag_add_(parts, x, where, blocks, kernel, present)  # noqa: E731
    return Case(name, n_bytes, run, error)


def lowrank_case(
    group: Group, rank: int, rows: int, slots: int, device: torch.device, dtype: torch.dtype
) -> Case:
    total, wide = sum(group.sizes), len(group.sizes) * rank
    a = torch.randn(slots, wide, group.n, device=device, dtype=dtype) * group.n**-0.5
    b = torch.randn(slots, rank, total, device=device, dtype=dtype)
    present = torch.arange(1, slots + 1, dtype=torch.int32, device=device)
    arrays = LowRankArrays(a, b, group.sizes, present)
    tiles = output_tiles(group.sizes).to(device)
    where = segment_arrays(even_segments(rows, slots), DECODE_ROWS, device)
    x = torch.randn(rows, group.n, device=device, dtype=dtype)
    y = torch.zeros(rows, total, device=device, dtype=dtype)

    def error() -> float:
        got, want = torch.zeros_like(y), torch.zeros_like(y, dtype=torch.float64)
        lowrank_add_(got, x, where, arrays, tiles)
        lowrank_add_reference_(want, x, where, arrays, torch.float64)
        return relative(got, want)

    n_bytes = min(rows, slots) * 2 * (wide * group.n + rank * total)
    name = f"lowrank {group.name} (rank {rank}, {min(rows, slots)} variants, {rows} rows)"
    return Case(name, n_bytes, lambda: lowrank_add_(y, x, where, arrays, tiles), error)


def impart_case(
    m: int, n: int, kept: int, rows: int, slots: int, device: torch.device, dtype: torch.dtype
) -> Case:
    block_rows, ranks = 64, min(m, n) * 3 // 10 or 1
    kept = min(kept, ranks)
    bu, bv = -(-m // block_rows), -(-n // block_rows)

    def draw(blocks: int) -> Tensor:
        chosen = torch.rand(slots, blocks, ranks, device=device).topk(kept).indices
        return chosen.sort().values.flatten(1)

    v_index = draw(bv)
    lists = [rank_lists(v_index[slot], ranks) for slot in range(slots)]
    arrays = ImpartArrays(
        u_values=torch.randn(slots, bu, block_rows, kept, device=device, dtype=dtype),
        u_index=draw(bu).int(),
        v_values=torch.randn(slots, bv, block_rows, kept, device=device, dtype=dtype),
        order=torch.stack([order for order, _ in lists]),
        first=torch.stack([first for _, first in lists]),
        sigma=torch.full((slots, ranks), 2.0**-8, device=device, dtype=dtype),
        present=torch.arange(1, slots + 1, dtype=torch.int32, device=device),
    )
    where = segment_arrays(even_segments(rows, slots), DECODE_ROWS, device)
    x = torch.randn(rows, n, device=device, dtype=dtype)
    y = torch.zeros(rows, m, device=device, dtype=dtype)

    def error() -> float:
        got, want = torch.zeros_like(y), torch.zeros_like(y, dtype=torch.float64)
        impart_add_(got, x, where, arrays)
        impart_add_reference_(want, x, where, arrays, torch.float64)
        return relative(got, want)

    n_bytes = min(rows, slots) * kept * ((bu + bv) * (2 * block_rows + 4))
    name = f"impart [{m}, {n}] (S {kept}, {min(rows, slots)} variants, {rows} rows)"
    return Case(name, n_bytes, lambda: impart_add_(y, x, where, arrays), error)


def attention_case(
    shape: ModelShape, batch: int, length: int, device: torch.device, dtype: torch.dtype
) -> Case:
    per_row = -(-length // PAGE)
    cache = (batch * per_row, PAGE, shape.kv_heads, shape.head_dim)
    k, v = (torch.randn(cache, device=device, dtype=dtype) for _ in range(2))
    pages = torch.randperm(batch * per_row, device=device).int().view(batch, per_row)
    lengths = torch.full((batch,), length, device=device, dtype=torch.int32)
    lengths[0] = max(1, length // 3)
    q = torch.randn(batch, shape.heads, shape.head_dim, device=device, dtype=dtype)
    options = {"scale": shape.head_dim**-0.5}

    def error() -> float:
        got = paged_decode(q, k, v, pages, lengths, **options)  # type: ignore[arg-type]
        want = paged_decode_reference(
            q.double(), k, v, pages, lengths, compute=torch.float64, **options
        )  # type: ignore[arg-type]
        return relative(got, want)

    n_bytes = int(lengths.sum()) * 2 * shape.kv_heads * shape.head_dim * q.element_size()
    name = f"paged decode attention ({batch} x {length} tokens)"
    run = lambda: paged_decode(q, k, v, pages, lengths, **options)  # type: ignore[arg-type] # noqa: E731
    return Case(name, n_bytes, run, error)  # type: ignore[arg-type]


def small_cases(
    shape: ModelShape, rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    """RoPE and KV write, RMSNorm, SiLU-mul: one layer's worth."""
    dim, width = shape.head_dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    fused = torch.randn(rows, width, device=device, dtype=dtype)
    cut = [shape.heads * dim, shape.kv_heads * dim, shape.kv_heads * dim]
    angle = torch.rand(rows, dim // 2, device=device).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    caches = torch.zeros(2, -(-rows // PAGE), PAGE, shape.kv_heads, dim, device=device, dtype=dtype)
    places = torch.arange(rows, device=device)

    def rope(target: Tensor) -> None:
        q, k, v = (part.view(rows, -1, dim) for part in target.split(cut, dim=1))
        rope_and_write_(q, k, v, cos, sin, caches[0], caches[1], places)

    def rope_error() -> float:
        target = fused.clone()
        rope(target)
        got = torch.cat([target.flatten(), caches.flatten()])
        wide, wide_caches = fused.double(), torch.zeros_like(caches, dtype=torch.float64)
        q, k, v = (part.view(rows, -1, dim) for part in wide.split(cut, dim=1))
        rope_and_write_reference_(q, k, v, cos, sin, *wide_caches, places, torch.float64)
        return relative(got, torch.cat([wide.flatten(), wide_caches.flatten()]))

    scratch = fused.clone()
    n_bytes = 2 * rows * dim * (2 * shape.heads + 4 * shape.kv_heads)
    yield Case(f"rope + KV write ({rows} rows)", n_bytes, lambda: rope(scratch), rope_error)

    x = torch.randn(rows, shape.hidden, device=device, dtype=dtype)
    vectors = torch.rand(9, shape.hidden, device=device, dtype=dtype) + 0.5
    which = torch.arange(rows, device=device) % 9

    def norm_error() -> float:
        want = rms_norm_reference(x.double(), vectors, which, 1e-5, compute=torch.float64)
        return relative(rms_norm(x, vectors, which, 1e-5), want)

    n_bytes = 2 * shape.hidden * (2 * rows + min(rows, 9))
    run = lambda: rms_norm(x, vectors, which, 1e-5)  # noqa: E731
    yield Case(f"rms norm ({rows} rows)", n_bytes, run, norm_error)  # type: ignore[arg-type]

    both = torch.randn(rows, 2 * shape.intermediate, device=device, dtype=dtype).chunk(2, dim=1)

    def silu_error() -> float:
        return relative(silu_mul(*both), silu_mul_reference(*(part.double() for part in both)))

    n_bytes = 6 * rows * shape.intermediate
    yield Case(f"silu mul ({rows} rows)", n_bytes, lambda: silu_mul(*both), silu_error)  # type: ignore[arg-type, return-value]


def linear_case(group: Group, rows: int, device: torch.device, dtype: torch.dtype) -> Case:
    """The base's own product with int8 weights."""
    m = sum(group.sizes)
    weight: QuantizedWeight = quantize_int8(torch.randn(m, group.n, device=device, dtype=dtype))
    x = torch.randn(rows, group.n, device=device, dtype=dtype)
    y = torch.empty(rows, m, device=device, dtype=dtype)

    def error() -> float:
        return relative(
            linear_(torch.empty_like(y), x, weight), linear_reference(x, weight, torch.float64)
        )

    n_bytes = m * group.n + 4 * m + 2 * rows * (group.n + m)
    name = f"int8 linear {group.name} ({rows} rows)"
    return Case(name, n_bytes, lambda: linear_(y, x, weight), error)  # type: ignore[arg-type, return-value]


def all_cases(
    shape: ModelShape,
    codecs: tuple[Codec, ...],
    *,
    rows: int,
    variants: tuple[int, ...],
    length: int,
    prefill_rows: int,
    device: torch.device,
    dtype: torch.dtype,
    groups: tuple[Group, ...] | None = None,
) -> Iterator[Case]:
    """Every kernel; blockdiag for each codec, group (default: all) and number of variants."""
    groups = shape.groups() if groups is None else groups
    yield from small_cases(shape, rows, device, dtype)
    yield attention_case(shape, rows, length, device, dtype)
    for codec in codecs:
        for k in variants:
            for group in groups:
                yield blockdiag_case(group, codec, max(rows, k), k, device, dtype)
        for group in groups:
            yield blockdiag_case(group, codec, prefill_rows, 2, device, dtype)
    for group in groups:
        yield lowrank_case(group, 16, rows, max(variants), device, dtype)
        yield linear_case(group, rows, device, dtype)
    last = groups[-1]
    yield impart_case(last.sizes[0], last.n, 96, rows, max(variants), device, dtype)
