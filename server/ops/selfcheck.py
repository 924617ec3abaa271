"""A tiny random case of every kernel on the device against plain torch, before anything is served.

Compilers, drivers and devices differ; an answer from a wrong kernel would look like any other.
CPU kernels are tried in a process of their own (`server.ops.cpu.check`): there a compiler's failure
may be the end of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compressor.codecs.columns import packed_rows
from server.ops.attention import (
    AttentionCall,
    AttentionMetadata,
    DecodeBatch,
    HeadNorm,
    PrefillChunk,
    Rotary,
    paged_attention,
)
from server.ops.factors import ImpartFactors, LowRankFactors, rank_lists
from server.ops.kernels import Kernels, TorchKernels
from server.ops.lowrank import HeldLowRank, PackedLowRank
from server.ops.norm import RmsForm
from server.ops.packed import PackedBlocks
from server.ops.quantize import has_float8, quantize
from server.ops.row_mapping import Places, RowMapping, Segment, SlotSegments

_SIZES = ((0, 40), (1, 24))
BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}  # of the largest value
Case = tuple[str, Callable[[Kernels], Tensor]]  # what is tried, and its result


def check_kernels(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError naming every kernel that deviates from torch by more than rounding."""
    reference = TorchKernels()
    wrong = []
    with torch.inference_mode():
        for name, run in cases(device, dtype):
            problem = deviation(run, kernels, lambda run=run: run(reference), dtype)  # type: ignore[misc]
            if problem is not None:
                wrong.append(name + problem)
    if wrong:
        raise ValueError(
            f"on this device the {kernels.name} kernels are wrong or do not run: "
            f"{', '.join(wrong)}; serve with --kernels torch"
        )


def deviation(
    run: Callable[[Kernels], Tensor],
    kernels: Kernels,
    wanted: Callable[[], Tensor],
    dtype: torch.dtype,
) -> str | None:
    """None where the result in `dtype` is what is wanted but for rounding; else what is wrong."""
    try:
        got, want = run(kernels).double(), wanted().double()
        bound = BOUND[dtype] * float(want.abs().max())
        return None if torch.allclose(got, want, rtol=0, atol=bound) else ""
    except Exception as error:  # a compiler's or driver's, whatever its type
        return f" ({type(error).__name__}: {str(error)[:200]})"


def randoms(
    device: torch.device, dtype: torch.dtype, values_of: torch.dtype | None = None
) -> tuple[Callable[..., Tensor], torch.Generator]:
    """What makes normal numbers of a shape in `dtype`, the same at every call of this function.

    values_of: round them to this dtype first, so that a wider one gets the same values.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator)
        return made.to(values_of or dtype).to(device, dtype)

    return random, generator


def cases(
    device: torch.device, dtype: torch.dtype, values_of: torch.dtype | None = None
) -> Iterator[Case]:
    """Every operation that has a kernel on some device; see `randoms` for the arguments."""
    random, generator = randoms(device, dtype, values_of)
    for bits in (2, 3, 4, 8):
        yield f"blockdiag {bits} bit", _blockdiag(bits, 3, random, generator, device)
    yield "blockdiag 4 bit, many rows", _blockdiag(4, 40, random, generator, device)
    yield from _factors(random, generator, device)
    yield from _norms(random, device)
    gate, up = random(3, 48), random(3, 48)
    yield "silu_mul", lambda kernels: kernels.silu_mul(gate, up)
    yield from _linears(random, device, dtype)
    yield from _attention(random, device)


def _blockdiag(
    bits: int,
    n_rows: int,
    random: Callable[..., Tensor],
    generator: torch.Generator,
    device: torch.device,
) -> Callable[[Kernels], Tensor]:
    s, nb, sizes = 2, 32, (32, 16)
    width = sum(m // s for m in sizes)
    shape = (2, s, packed_rows(nb, bits), width)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    scales = torch.rand((2, s, width), generator=generator).half().to(device)
    units = torch.full((2, len(sizes)), 0.05, device=device)
    blocks = PackedBlocks(codes, scales, units, sizes, s * nb, bits)
    table = torch.tensor([[1, 1, 2], [0, 2, n_rows]], device=device)
    segments = SlotSegments(table, 2, n_rows - 2)
    x, start = random(n_rows, s * nb), random(n_rows, sum(sizes))

    def run(kernels: Kernels) -> Tensor:
        y = start.clone()
        kernels.blockdiag(blocks).add_(y.split_with_sizes(sizes, 1), x, segments)
        return y

    return run


def _linears(
    random: Callable[..., Tensor], device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    """Of an 8-bit base, with few rows and with many."""
    weight = random(40, 48)
    for kind in ("int8", "float8") if has_float8(device) else ("int8",):
        held = quantize(weight, kind)
        for rows in (3, 40):
            x = random(rows, 48)
            yield f"{kind} linear", lambda k, w=held, x=x: k.quantized_linear(w, dtype)(x)  # type: ignore[misc]


def _factors(
    random: Callable[..., Tensor], generator: torch.Generator, device: torch.device
) -> Iterator[Case]:
    """Two matrices [40, 32] and [24, 32]; slot 1 has the first only."""
    x, start = random(4, 32), random(4, 64)
    rows = RowMapping([Segment(-1, 0, 1), Segment(0, 1, 2), Segment(1, 2, 4)], device)
    held: list[tuple[Places, Tensor]] = [
        (frozenset({(0, 1), (1, 0)}), torch.tensor([2, 1], dtype=torch.int32, device=device)),
        (frozenset({(0, 0)}), torch.tensor([1, 0], dtype=torch.int32, device=device)),
    ]
    low = [LowRankFactors(random(2, 5, 32), random(2, 5, m), *held[g]) for g, m in _SIZES]
    parts = [_impart(random, m, device, *held[g]) for g, m in _SIZES]

    def added(add: Callable[..., None], terms: object) -> Tensor:
        y = start.clone()
        add(y.split_with_sizes([m for _, m in _SIZES], 1), x, rows, terms)
        return y

    yield "lowrank", lambda kernels: added(kernels.lowrank_add_, low)
    for bits in (2, 3, 4, 8):
        heads = [_head(bits, m, generator, device, *held[g]) for g, m in _SIZES]
        yield f"packed lowrank {bits} bit", lambda k, h=heads: added(k.packed_lowrank_add_, h)  # type: ignore[misc]
    yield "impart", lambda kernels: added(kernels.impart_add_, parts)


def _head(
    bits: int,
    m: int,
    generator: torch.Generator,
    device: torch.device,
    present: Places,
    place_of: Tensor,
) -> HeldLowRank:
    rank, n = 8, 32

    def codes(inputs: int, outputs: int) -> Tensor:
        size = (2, packed_rows(inputs, bits), outputs)
        return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device)

    factors = PackedLowRank(
        codes(n, rank),
        torch.rand((2, rank), generator=generator).half().to(device),
        torch.full((2, 1), 0.5**bits, device=device),
        codes(rank, m),
        torch.rand((2, rank), generator=generator).mul_(0.5**bits).to(device),
        n=n,
        bits=bits,
        make_op=TorchKernels().blockdiag,
        place_of=place_of,
    )
    return HeldLowRank(factors, present)


def _impart(
    random: Callable[..., Tensor], m: int, device: torch.device, present: Places, place_of: Tensor
) -> ImpartFactors:
    ranks, kept, n = 6, 3, 32
    bu, bv = -(-m // 16), n // 16
    u_index, v_index = (
        torch.arange(2 * blocks * kept).remainder(ranks).view(2, -1) for blocks in (bu, bv)
    )
    lists = [rank_lists(index, ranks) for index in v_index]
    return ImpartFactors(
        u_values=random(2, bu, 16, kept),
        u_index=u_index.int().to(device),
        v_values=random(2, bv, 16, kept),
        v_index=v_index.int().to(device),
        order=torch.stack([order for order, _ in lists]).to(device),
        first=torch.stack([first for _, first in lists]).to(device),
        sigma=random(2, ranks),
        present=present,
        place_of=place_of,
    )


def _norms(random: Callable[..., Tensor], device: torch.device) -> Iterator[Case]:
    x, weights = random(1, 3, 2, 24), random(4, 24)
    index = torch.tensor([0, 3, 1], device=device)
    residual = random(1, 3, 2, 24)

    def added(kernels: Kernels, which: Tensor | None, form: RmsForm) -> Tensor:
        return torch.stack(kernels.add_rms_norm(x, residual, weights, which, form))

    for form in (RmsForm(1e-5, 0.0, True), RmsForm(1e-5, 1.0, False)):
        for which in (None, index):
            yield "rms_norm", lambda k, f=form, w=which: k.rms_norm(x, weights, w, f)  # type: ignore[misc]
            yield "add_rms_norm", lambda k, f=form, w=which: added(k, w, f)  # type: ignore[misc]


def _other_forms(random: Callable[..., Tensor], device: torch.device) -> Iterator[Case]:
    """Sinks, other for each row, attention chunks of 3 and values narrower than keys: two
    sequences, one token and three new ones, in blocks of four.
    """
    q, k, v, sinks = random(4, 4, 16), random(4, 2, 16), random(4, 2, 8), random(4, 4)
    k_past, v_past = random(6, 4, 2, 16), random(6, 4, 2, 8)
    decode = DecodeBatch(
        rows=torch.tensor([0], device=device),
        kv_blocks=torch.tensor([[4, 1]], device=device),
        lengths=torch.tensor([8], device=device),
    )
    chunk = PrefillChunk(1, 4, 4, torch.tensor([3, 0], device=device))
    metadata = AttentionMetadata(torch.tensor([7, 0, 1, 2], device=device), decode, (chunk,))

    def attended(kernels: Kernels) -> Tensor:
        caches = k_past.clone(), v_past.clone()
        call = AttentionCall(q, k, v, *caches, metadata, 0.25, chunk=3, sinks=sinks)
        return paged_attention(call, kernels)

    yield "decode attention, sinks and chunks", lambda k: attended(k)[:1]
    yield "prefill attention, sinks and chunks", lambda k: attended(k)[1:]


def _attention(random: Callable[..., Tensor], device: torch.device) -> Iterator[Case]:
    heads, kv_heads, dim, block_tokens = 4, 2, 16, 4
    qkv = random(2, heads, dim), random(2, kv_heads, dim), random(2, kv_heads, dim)
    past = random(2, 6, block_tokens, kv_heads, dim)
    angles = Rotary(random(2, dim), random(2, dim))
    decode = DecodeBatch(
        rows=torch.arange(2, device=device),
        kv_blocks=torch.tensor([[4, 1, 2], [5, 0, 0]], device=device),
        lengths=torch.tensor([10, 3], device=device),
    )
    cache_rows = torch.tensor([2 * block_tokens + 1, 5 * block_tokens + 2], device=device)

    weights = random(3, dim)
    norms = tuple(
        HeadNorm(weights, index, RmsForm(1e-5, 0.0, True))
        for index in (torch.tensor([2, 1], device=device), None)
    )

    def call(window: int | None, softcap: float | None, *, normed: bool = False) -> AttentionCall:
        caches, metadata = past.clone(), AttentionMetadata(cache_rows, decode, ())
        q, k, v = (t.clone() for t in qkv)
        how = (metadata, 0.25, window, softcap, angles, norms if normed else None)
        return AttentionCall(q, k, v, caches[0], caches[1], *how)  # type: ignore[arg-type]

    def written(kernels: Kernels) -> Tensor:
        one = call(None, None)
        kernels.rotate_and_write_(one)
        return torch.cat([one.q.flatten(), one.k_cache.flatten(), one.v_cache.flatten()])

    def attended(kernels: Kernels, window: int | None, softcap: float | None) -> Tensor:
        one = call(window, softcap)
        out = torch.zeros_like(one.q)
        kernels.decode_(out, one)
        return out

    def joined(
        kernels: Kernels, window: int | None, softcap: float | None, *, normed: bool = False
    ) -> Tensor:
        """A step that only decodes, as the engine calls it."""
        one = call(window, softcap, normed=normed)
        out = paged_attention(one, kernels)
        return torch.cat([out.flatten(), one.k_cache.flatten(), one.v_cache.flatten()])

    new = random(3, heads, dim), random(3, kv_heads, dim), random(3, kv_heads, dim)

    def prefilled(kernels: Kernels) -> Tensor:
        """A chunk of 3 tokens after 6 that are in the cache."""
        chunk = PrefillChunk(0, 3, 6, torch.tensor([4, 1, 2], device=device))
        cache_rows = torch.tensor(
            [block_tokens + 2, block_tokens + 3, 2 * block_tokens], device=device
        )
        metadata = AttentionMetadata(cache_rows, None, (chunk,))
        caches = past.clone()
        one = AttentionCall(*new, caches[0], caches[1], metadata, 0.25)
        out = torch.zeros_like(one.q)
        kernels.rotate_and_write_(one)
        kernels.prefill_(out, one)
        return out

    def many(kernels: Kernels) -> Tensor:
        """More sequences than are cut into stretches, each with one KV block and 1 to 4 tokens."""
        n = 40
        first, lengths = (
            torch.arange(n, device=device),
            torch.arange(n, device=device) % block_tokens + 1,
        )
        metadata = AttentionMetadata(
            first * block_tokens + lengths - 1, DecodeBatch(first, first.unsqueeze(1), lengths), ()
        )
        q, k, v = (t[:1].repeat(n, 1, 1) for t in qkv)
        one = AttentionCall(
            q,
            k,
            v,
            past[0, :1].repeat(n, 1, 1, 1),
            past[1, :1].repeat(n, 1, 1, 1),
            metadata,
            0.25,
            rotary=Rotary(angles.cos[:1].repeat(n, 1), angles.sin[:1].repeat(n, 1)),
        )
        return paged_attention(one, kernels)

    yield from _other_forms(random, device)
    yield "rotate_and_decode, many rows", many
    yield "rotate_and_decode, norms", lambda k: joined(k, None, None, normed=True)
    yield "rotate_and_write", written
    yield "prefill attention", prefilled
    for window, softcap in ((None, None), (5, None), (None, 20.0)):
        yield "decode attention", lambda k, w=window, c=softcap: attended(k, w, c)  # type: ignore[misc]
        yield "rotate_and_decode", lambda k, w=window, c=softcap: joined(k, w, c)  # type: ignore[misc]
