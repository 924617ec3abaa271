"""Specs of everything in a layer but deltas: attention, RoPE, norms, SiLU-mul, int8 products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.cases import BLOCK_TOKENS, Case, Place, Sizes, Spec, relative
from benchmarks.gpu.shapes import Group, ModelShape
from server.ops import norm as torch_norm
from server.ops.attention import (
    AttentionCall,
    AttentionMetadata,
    PrefillChunk,
    Rotary,
    rotate_and_write_,
)
from server.ops.quantize import linear_reference, quantize_int8
from server.ops.triton.attention import (
    NewTokens,
    paged_decode,
    paged_decode_reference,
    splits_for,
)
from server.ops.triton.linear import linear_
from server.ops.triton.norm import add_rms_norm, rms_norm, silu_mul
from server.ops.triton.prefill import paged_prefill_, prefill_tiles
from server.ops.triton.rope import rope_and_write_

ATTENTION_SHARE = 0.85
LINEAR_SHARE = 0.8
SMALL_SHARE = 0.5  # a launch is most of what these cost
VARIANT_NORMS = 8
NORM = torch_norm.RmsForm(1e-5, 0.0, casts_first=True)


def decode_spec(shape: ModelShape, batch: int, length: int) -> Spec:
    """`batch` sequences of `length` tokens, the first a third as long. q and k are not turned yet:
    a step that only decodes.
    """
    lengths = [max(1, length // 3), *[length] * (batch - 1)]
    dim, cut = shape.head_dim, _heads_of(shape)

    def make(place: Place) -> Case:
        per_row = -(-length // BLOCK_TOKENS)
        cache = (batch * per_row, BLOCK_TOKENS, shape.kv_heads, dim)
        caches = place.randn(*cache), place.randn(*cache)
        kv_blocks = torch.randperm(batch * per_row, device=place.device).int().view(batch, per_row)
        sizes = torch.tensor(lengths, device=place.device, dtype=torch.int32)
        fused = place.randn(batch, sum(cut))
        q, k, v = (part.view(batch, -1, dim) for part in fused.split(cut, dim=1))
        last = (sizes - 1).long()
        cache_rows = (
            kv_blocks.gather(1, (last // BLOCK_TOKENS).unsqueeze(1))[:, 0] * BLOCK_TOKENS
            + last % BLOCK_TOKENS
        )
        rotary = Rotary(*_angles(place, batch, dim))
        new = NewTokens(k, v, rotary.cos, rotary.sin, cache_rows)
        scale = dim**-0.5

        def run() -> Tensor:
            return paged_decode(q, *caches, kv_blocks, sizes, scale=scale, new=new)

        def error() -> float:
            got = run()
            wide_q, *wide = q.double(), *(cache.double() for cache in caches)
            _rotate_and_write(wide_q, k.double(), v.double(), *wide, cache_rows, rotary)
            arguments = (wide_q, *wide, kv_blocks, sizes)
            want = paged_decode_reference(*arguments, scale=scale, compute=torch.float64)
            return max(relative(got, want), *map(relative, caches, wide))

        return Case(run, error)

    new_bytes = 2 * batch * dim * (2 * shape.heads + 4 * shape.kv_heads)
    n_bytes = sum(lengths) * 4 * shape.kv_heads * dim + new_bytes
    name = f"rope + KV write + paged decode attention ({batch} x {length} tokens)"
    n_launches = 1 if splits_for(batch) == 1 else 2
    return Spec(name, n_bytes, ATTENTION_SHARE, make, n_launches=n_launches)


def _heads_of(shape: ModelShape) -> list[int]:
    """Columns of q, k and v in one fused product."""
    return [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)]


def _angles(place: Place, rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, dim]."""
    angle = torch.rand(rows, dim // 2, device=place.device).repeat(1, 2)
    return angle.cos().to(place.dtype), angle.sin().to(place.dtype)


def _rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_rows: Tensor,
    rotary: Rotary,
) -> None:
    """In place, in float64 where these are."""
    metadata = AttentionMetadata(cache_rows, None, ())
    rotate_and_write_(AttentionCall(q, k, v, k_cache, v_cache, metadata, 1.0, rotary=rotary))


def prefill_spec(shape: ModelShape, tokens: int) -> Spec:
    """Two prompts of half of `tokens` each; the second has as much in the cache already."""
    half = tokens // 2
    heads, dim = shape.heads, shape.head_dim

    def make(place: Place) -> Case:
        per_row = -(-2 * half // BLOCK_TOKENS)
        k, v = (place.randn(2 * per_row, BLOCK_TOKENS, shape.kv_heads, dim) for _ in range(2))
        kv_blocks = torch.randperm(2 * per_row, device=place.device).view(2, per_row)
        chunks = [
            PrefillChunk(0, half, 0, kv_blocks[0, : -(-half // BLOCK_TOKENS)]),
            PrefillChunk(half, 2 * half, half, kv_blocks[1]),
        ]
        tiles = prefill_tiles(chunks, place.device, place.dtype)
        q = place.randn(2 * half, heads, dim)
        out = torch.empty_like(q)
        scale = dim**-0.5

        def error() -> float:
            got = torch.empty_like(q)
            paged_prefill_(got, q, k, v, tiles, scale=scale)
            return max(_prefill_error(chunk, got, q, k, v, scale) for chunk in chunks)

        return Case(lambda: paged_prefill_(out, q, k, v, tiles, scale=scale), error)

    pairs = half * half // 2 + half * half + half * half // 2
    kv = 3 * half * 4 * shape.kv_heads * dim
    return Spec(
        f"paged prefill attention ({2 * half} tokens, {half} in the cache)",
        kv + 4 * tokens * heads * dim,
        ATTENTION_SHARE,
        make,
        n_flops=4 * pairs * heads * dim,
    )


def _prefill_error(
    chunk: PrefillChunk, got: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> float:
    """Against a float64 softmax, query head by query head."""
    rows = slice(chunk.start, chunk.end)
    length = chunk.context + chunk.end - chunk.start
    group = q.shape[1] // k.shape[2]
    position = torch.arange(chunk.context, length, device=q.device).unsqueeze(1)
    seen = torch.arange(length, device=q.device) <= position
    worst = 0.0
    for head in range(q.shape[1]):
        keys, values = (
            cache[chunk.kv_blocks, :, head // group].flatten(0, 1)[:length].double()
            for cache in (k, v)
        )
        scores = (q[rows, head].double() @ keys.T * scale).masked_fill(~seen, float("-inf"))
        worst = max(worst, relative(got[rows, head], scores.softmax(-1) @ values))
    return worst


def rope_spec(shape: ModelShape, rows: int) -> Spec:
    """q, k and v as slices of one fused product: of steps with a prefill."""
    dim, cut = shape.head_dim, _heads_of(shape)

    def make(place: Place) -> Case:
        fused = place.randn(rows, sum(cut))
        cos, sin = _angles(place, rows, dim)
        caches = place.randn(2, -(-rows // BLOCK_TOKENS), BLOCK_TOKENS, shape.kv_heads, dim).zero_()
        cache_rows = torch.arange(rows, device=place.device)

        def rope(target: Tensor) -> None:
            q, k, v = (part.view(rows, -1, dim) for part in target.split(cut, dim=1))
            rope_and_write_(q, k, v, cos, sin, caches[0], caches[1], cache_rows)

        def error() -> float:
            target = fused.clone()
            rope(target)
            # k is turned on its way into the cache only
            got = torch.cat([target[:, : cut[0]].flatten(), caches.flatten()])
            wide, wide_caches = fused.double(), torch.zeros_like(caches, dtype=torch.float64)
            q, k, v = (part.view(rows, -1, dim) for part in wide.split(cut, dim=1))
            _rotate_and_write(q, k, v, *wide_caches, cache_rows, Rotary(cos, sin))
            want = torch.cat([wide[:, : cut[0]].flatten(), wide_caches.flatten()])
            return relative(got, want)

        scratch = fused.clone()
        return Case(lambda: rope(scratch), error)

    n_bytes = 2 * rows * dim * (2 * shape.heads + 4 * shape.kv_heads)
    return Spec(f"rope + KV write ({rows} rows)", n_bytes, SMALL_SHARE, make)


def norm_spec(shape: ModelShape, rows: int) -> Spec:
    """Rows of the base and of variants with weights of their own."""

    def make(place: Place) -> Case:
        x = place.randn(rows, shape.hidden)
        vectors = place.randn(VARIANT_NORMS + 1, shape.hidden)
        which = torch.arange(rows, device=place.device) % (VARIANT_NORMS + 1)

        def error() -> float:
            want = torch_norm.rms_norm(x.double(), vectors, which, NORM)
            return relative(rms_norm(x, vectors, which, NORM.eps), want)

        return Case(lambda: rms_norm(x, vectors, which, NORM.eps), error)

    n_bytes = 2 * shape.hidden * (2 * rows + min(rows, VARIANT_NORMS + 1))
    return Spec(f"rms norm ({rows} rows)", n_bytes, SMALL_SHARE, make)


def add_norm_spec(shape: ModelShape, rows: int) -> Spec:
    """A residual addition and the norm after it, otherwise as `norm_spec`."""

    def make(place: Place) -> Case:
        x, residual = place.randn(rows, shape.hidden), place.randn(rows, shape.hidden)
        vectors = place.randn(VARIANT_NORMS + 1, shape.hidden)
        which = torch.arange(rows, device=place.device) % (VARIANT_NORMS + 1)

        def error() -> float:
            normed, summed = add_rms_norm(x, residual, vectors, which, NORM.eps)
            want = torch_norm.rms_norm(summed.double(), vectors, which, NORM)
            off = relative(summed, residual.double() + x.double())
            return max(relative(normed, want), off)

        return Case(lambda: add_rms_norm(x, residual, vectors, which, NORM.eps), error)

    n_bytes = 2 * shape.hidden * (4 * rows + min(rows, VARIANT_NORMS + 1))
    return Spec(f"add + rms norm ({rows} rows)", n_bytes, SMALL_SHARE, make)


def silu_spec(shape: ModelShape, rows: int) -> Spec:
    """gate and up as slices of one fused product."""

    def make(place: Place) -> Case:
        both = place.randn(rows, 2 * shape.intermediate).chunk(2, dim=1)

        def error() -> float:
            gate, up = both
            return relative(silu_mul(*both), F.silu(gate.double()) * up.double())

        return Case(lambda: silu_mul(*both), error)

    return Spec(f"silu mul ({rows} rows)", 6 * rows * shape.intermediate, SMALL_SHARE, make)


def linear_spec(group: Group, rows: int) -> Spec:
    """The base's own product with int8 weights."""
    m = sum(group.sizes)

    def make(place: Place) -> Case:
        weight = quantize_int8(place.randn(m, group.n))
        x, y = place.randn(rows, group.n), place.randn(rows, m)

        def error() -> float:
            got = linear_(torch.empty_like(y), x, weight)
            return relative(got, linear_reference(x, weight, torch.float64))

        return Case(lambda: linear_(y, x, weight), error)

    n_bytes = m * group.n + 4 * m + 2 * rows * (group.n + m)
    return Spec(f"int8 linear {group.name} ({rows} rows)", n_bytes, LINEAR_SHARE, make)


def layer_specs(shape: ModelShape, sizes: Sizes, groups: tuple[Group, ...]) -> Iterator[Spec]:
    """One layer's worth."""
    yield rope_spec(shape, sizes.rows)
    yield norm_spec(shape, sizes.rows)
    yield add_norm_spec(shape, sizes.rows)
    yield silu_spec(shape, sizes.rows)
    yield decode_spec(shape, sizes.rows, sizes.length)
    yield prefill_spec(shape, sizes.prefill_rows)
    for group in groups:
        yield linear_spec(group, sizes.rows)
