"""A Llama decode step made of this project's kernels and cuBLAS: what a captured step costs.

Not the engine: Hugging Face's model definition around the same kernels adds a few small launches.
It bounds what the engine can reach, runs without a checkpoint, and - tested against Hugging Face on
a tiny model - shows that the kernels together compute the right thing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.cases import BLOCK_TOKENS, random_blocks
from benchmarks.gpu.shapes import Codec, ModelShape
from server.engine.step.static_buffers import StaticBatch
from server.ops.packed import PackedBlocks
from server.ops.quantize import QuantizedWeight, quantize_int8
from server.ops.triton.attention import NewTokens, paged_decode
from server.ops.triton.blockdiag import (
    BlockKernel,
    block_kernel,
    blockdiag_add_,
)
from server.ops.triton.linear import linear_
from server.ops.triton.norm import add_rms_norm, rms_norm, silu_mul
from server.ops.triton.segments import DECODE_ROWS, SegmentArrays

Weight = Tensor | QuantizedWeight


@dataclass
class GroupWeights:
    """Base weights [sum m, n] of linears that read one input, and their slot arrays."""

    base: Weight
    blocks: PackedBlocks | None = None
    present: Tensor | None = None  # int32 [C]
    kernels: dict[bool, BlockKernel] = field(default_factory=dict)  # by prefill

    def __post_init__(self) -> None:
        if self.blocks is not None:
            self.kernels = {p: block_kernel(self.blocks, prefill=p) for p in (False, True)}

    def product(self, x: Tensor, segments: SegmentArrays | None) -> Tensor:
        """``x W^T`` + deltas of the rows' slots."""
        if isinstance(self.base, QuantizedWeight):
            out = torch.empty(len(x), len(self.base.values), dtype=x.dtype, device=x.device)
            y = linear_(out, x, self.base)
        else:
            y = F.linear(x, self.base)
        if segments is not None and self.blocks is not None and self.present is not None:
            kernel = self.kernels[segments.tile_rows > DECODE_ROWS]
            parts = y.split(self.blocks.sizes, 1)
            blockdiag_add_(parts, x, segments, self.blocks, kernel, self.present)
        return y


@dataclass
class Layer:
    """Norm weights are [1 + C, hidden]: the base's, then each slot's."""

    norm_in: Tensor
    norm_mlp: Tensor
    groups: dict[str, GroupWeights]
    k_cache: Tensor
    v_cache: Tensor


@dataclass
class Decoder:
    """`StaticStep`'s forward."""

    shape: ModelShape
    embedding: Tensor
    layers: list[Layer]
    norm_out: Tensor
    lm_head: Weight
    inverse_frequency: Tensor
    eps: float = 1e-5
    n_splits: int | None = None  # of the attention; default: by the number of rows

    def __call__(self, batch: StaticBatch, with_deltas: bool) -> Tensor:
        """Logits [T, V]."""
        segments = batch.segments if with_deltas else None
        which = batch.vector_rows
        h = F.embedding(batch.input_ids[0], self.embedding)
        angle = batch.position_ids[0].float().unsqueeze(1) * self.inverse_frequency
        angle = torch.cat([angle, angle], dim=1)
        cos, sin = angle.cos().to(h.dtype), angle.sin().to(h.dtype)
        x = rms_norm(h, self.layers[0].norm_in, which, self.eps)
        after = [layer.norm_in for layer in self.layers[1:]] + [self.norm_out]
        for layer, next_norm in zip(self.layers, after, strict=True):
            fused = layer.groups["qkv"].product(x, segments)
            y = layer.groups["o"].product(self._attend(fused, cos, sin, layer, batch), segments)
            x, h = add_rms_norm(y, h, layer.norm_mlp, which, self.eps)
            both = layer.groups["gate_up"].product(x, segments)
            y = layer.groups["down"].product(silu_mul(*both.chunk(2, dim=1)), segments)
            x, h = add_rms_norm(y, h, next_norm, which, self.eps)
        return GroupWeights(self.lm_head).product(x, None)

    def _attend(
        self, fused: Tensor, cos: Tensor, sin: Tensor, layer: Layer, batch: StaticBatch
    ) -> Tensor:
        dim, rows = self.shape.head_dim, len(fused)
        cut = [self.shape.heads * dim, self.shape.kv_heads * dim, self.shape.kv_heads * dim]
        q, k, v = (part.view(rows, -1, dim) for part in fused.split(cut, dim=1))
        new = NewTokens(k, v, cos, sin, batch.cache_rows)
        out = paged_decode(
            q,
            layer.k_cache,
            layer.v_cache,
            batch.kv_blocks,
            batch.lengths,
            scale=dim**-0.5,
            n_splits=self.n_splits,
            new=new,
        )
        return out.flatten(1)

    def linears(self, x: Tensor, segments: SegmentArrays | None) -> None:
        """The products of a prefill chunk, without attention: what deltas add is all in these."""
        for layer in self.layers:
            fused = layer.groups["qkv"].product(x, segments)
            q = fused[:, : layer.groups["o"].base.shape[1]]  # type: ignore[union-attr]
            layer.groups["o"].product(q.contiguous(), segments)
            both = layer.groups["gate_up"].product(x, segments)
            layer.groups["down"].product(silu_mul(*both.chunk(2, dim=1)), segments)


def random_decoder(
    shape: ModelShape,
    codec: Codec,
    n_slots: int,
    n_kv_blocks: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    int8_base: bool = False,
) -> Decoder:
    """Random weights made on the device; every slot holds a random delta of every linear."""

    def weight(m: int, n: int) -> Weight:
        values = torch.randn(m, n, device=device, dtype=dtype).mul_(n**-0.5)
        return quantize_int8(values) if int8_base else values

    def norms() -> Tensor:
        return torch.rand(n_slots + 1, shape.hidden, device=device, dtype=dtype) + 0.5

    def cache() -> Tensor:
        size = (n_kv_blocks, BLOCK_TOKENS, shape.kv_heads, shape.head_dim)
        return torch.zeros(size, device=device, dtype=dtype)

    def layer() -> Layer:
        groups = {
            group.name: GroupWeights(
                weight(sum(group.sizes), group.n),
                random_blocks(group, codec, n_slots, device) if n_slots else None,
                torch.arange(1, n_slots + 1, dtype=torch.int32, device=device),
            )
            for group in shape.groups()
        }
        return Layer(norms(), norms(), groups, cache(), cache())

    exponent = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    return Decoder(
        shape,
        embedding=torch.randn(shape.vocab, shape.hidden, device=device, dtype=dtype),
        layers=[layer() for _ in range(shape.layers)],
        norm_out=norms(),
        lm_head=weight(shape.vocab, shape.hidden),
        inverse_frequency=500000.0**-exponent,
    )
