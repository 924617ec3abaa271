"""Attention over a paged cache: what a step and a layer's call of it consist of.

Cache layout per layer: ``k [n_kv_blocks, block_tokens, Hkv, D]``, ``v [.., Hkv, Dv]``. A step's
tokens are packed on one axis; a sequence with one new token is a decode row, any other a prefill
chunk. The parts in plain torch that read the cache are `server.ops.attend`'s.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from server.ops.norm import RmsForm


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """All sequences with one new token.

    rows   [B] int64, their rows in the packed batch
    kv_blocks  [B, P] int64, KV block ids, padded with KV block 0
    lengths [B] int64, context length including the new token
    """

    rows: Tensor
    kv_blocks: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One sequence's chunk: rows ``[start, end)`` hold positions from `context` on.

    kv_blocks  [P] int64, the sequence's KV blocks up to the chunk's end
    """

    start: int
    end: int
    context: int
    kv_blocks: Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Where each row's keys and values go, and who reads what.

    cache_rows    [T] int64, row in the flattened cache ``[n_kv_blocks * block_tokens]``
    made          what layers derive from it and share in this step, by what it depends on
    first_row     which of the step's rows the first is, where these are a part of them
    parts         what `part` has made
    """

    cache_rows: Tensor
    decode: DecodeBatch | None
    prefill: tuple[PrefillChunk, ...]
    made: dict[Hashable, Tensor] = field(default_factory=dict)
    first_row: int = 0
    parts: dict[tuple[int, int], AttentionMetadata] = field(default_factory=dict)

    def part(self, start: int, end: int) -> AttentionMetadata:
        """Of the rows ``[start, end)`` alone, whole sequences, counted from 0."""
        if (start, end) not in self.parts:
            chunks = [c for c in self.prefill if start <= c.start and c.end <= end]
            moved = (replace(c, start=c.start - start, end=c.end - start) for c in chunks)
            decode = None if self.decode is None else _decode_part(self.decode, start, end)
            self.parts[start, end] = replace(
                self,
                cache_rows=self.cache_rows[start:end],
                decode=decode,
                prefill=tuple(moved),
                first_row=self.first_row + start,
                made={},
                parts={},
            )
        return self.parts[start, end]


def _decode_part(batch: DecodeBatch, start: int, end: int) -> DecodeBatch | None:
    inside = ((batch.rows >= start) & (batch.rows < end)).nonzero().flatten()
    if not len(inside):
        return None
    rows, kv_blocks, lengths = batch.rows[inside], batch.kv_blocks[inside], batch.lengths[inside]
    return DecodeBatch(rows - start, kv_blocks, lengths)


@dataclass(frozen=True, slots=True)
class Rotary:
    """The angles of rotary position embedding (Su et al., arXiv 2104.09864).

    cos, sin  [T, R], R <= D even: the first R dimensions of every head turn, dimension i < R / 2
              together with i + R / 2, as in Hugging Face's Llama
    """

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm of every head of q or k before it turns (Qwen3): as `Kernels.rms_norm` takes it."""

    weights: Tensor
    index: Tensor | None
    form: RmsForm


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention in one step; T new tokens.

    q [T, H, D]; k [T, Hkv, D]; v [T, Hkv, Dv]: the new tokens', may be slices of one fused tensor,
    last axis contiguous; k_cache [n_kv_blocks, block_tokens, Hkv, D], v_cache [.., Hkv, Dv]
    rotary   turns q and k first; None if they are turned already, or the model has no such thing
    norms    of q and of k, before they turn; None if they are normed already, or the model has none
    window   each token sees only the last `window` positions
    softcap  tanh cap on the scores
    chunk    each token sees only positions from the last multiple of `chunk` on
    sinks    [H], or [T, H] if rows differ: logits that join the softmax and have no value (the
             learned sinks of gpt-oss), after scaling and capping
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    metadata: AttentionMetadata
    scale: float
    window: int | None = None
    softcap: float | None = None
    rotary: Rotary | None = None
    norms: tuple[HeadNorm, HeadNorm] | None = None
    chunk: int | None = None
    sinks: Tensor | None = None

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """``[T, H, Dv]``."""
        return (*self.q.shape[:2], self.v.shape[2])


class AttentionKernels(Protocol):
    """The parts of `Kernels` that attention consists of; see the functions below."""

    def rms_norm(
        self, x: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
    ) -> Tensor: ...

    def rotate_and_write_(self, call: AttentionCall) -> None: ...

    def decode_(self, out: Tensor, call: AttentionCall) -> None: ...

    def rotate_and_decode_(self, out: Tensor, call: AttentionCall) -> bool:
        """Norms and both of these at once, for a step that only decodes; q and k stay as they are.

        False, and nothing is done, where there is no such kernel.
        """
        ...

    def prefill_(self, out: Tensor, call: AttentionCall) -> None: ...


def paged_attention(call: AttentionCall, kernels: AttentionKernels) -> Tensor:
    """Causal attention of every new token over its own sequence.

    Norms and turns q and k, maybe in place, and writes k and v to the cache. Returns [T, H, Dv] in
    q's dtype.
    Numerics: float32 accumulation.
    """
    out = call.q.new_empty(call.out_shape)
    decode = call.metadata.decode
    only_decodes = decode is not None and len(decode.rows) == len(call.q)
    if only_decodes and call.rotary is not None and kernels.rotate_and_decode_(out, call):
        return out
    if call.norms is not None:
        q, k = (
            kernels.rms_norm(x.unsqueeze(0), norm.weights, norm.index, norm.form)[0]
            for x, norm in zip((call.q, call.k), call.norms, strict=True)
        )
        call = replace(call, q=q, k=k, norms=None)
    kernels.rotate_and_write_(call)
    if decode is not None:
        kernels.decode_(out, call)
    if call.metadata.prefill:
        kernels.prefill_(out, call)
    return out


def rotate_and_write_(call: AttentionCall) -> None:
    """Turn q and k in place (in float32, float64 where they are; rounded once); write every new key
    and value.
    """
    if call.rotary is not None:
        for x in (call.q, call.k):
            x.copy_(rotate(x, call.rotary, torch.promote_types(x.dtype, torch.float32)))
    write_cache_(call.k_cache, call.k, call.metadata.cache_rows)
    write_cache_(call.v_cache, call.v, call.metadata.cache_rows)


def rotate(x: Tensor, rotary: Rotary, compute: torch.dtype) -> Tensor:
    """``x [T, H, D]`` turned, computed in `compute`, in x's dtype."""
    cos, sin = (t.to(compute).unsqueeze(1) for t in (rotary.cos, rotary.sin))
    wide, rotated = x.to(compute), cos.shape[2]
    turning, rest = wide[..., :rotated], wide[..., rotated:]
    first, second = turning.chunk(2, dim=2)
    turned = turning * cos + torch.cat([-second, first], dim=2) * sin
    return torch.cat([turned, rest], dim=2).to(x.dtype)


def write_cache_(cache: Tensor, values: Tensor, cache_rows: Tensor) -> None:
    """``values [T, Hkv, D]`` go to these rows of ``[n_kv_blocks, block_tokens, Hkv, D]``."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, cache_rows, values)
