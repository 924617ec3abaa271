"""The hook that lets Hugging Face model definitions run on our paged cache.

transformers calls the registered function with the new tokens' q, k, v (after RoPE); for a name it
has no mask builder for, it builds no mask. State hangs on the attention modules, never in globals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.errors import ConfigError
from server.ops.attention import (
    AttentionCall,
    AttentionKernels,
    AttentionMetadata,
    HeadNorm,
    Rotary,
    paged_attention,
)

ATTENTION_NAME = "impart_paged"
# Keyword arguments that change the result and that `paged_attention` does not implement.
UNSUPPORTED = ("s_aux", "sinks", "head_mask", "position_bias")


@dataclass(slots=True)
class LayerKVBlocks:
    """One layer's KV blocks ``[n_kv_blocks, block_tokens, Hkv, D]``."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Seen:
    """What a module handed to the attention function in a probing forward pass.

    q [1, H, T, D]; k, v [1, Hkv, T, D]; the rest as in `AttentionCall`, the same in every step
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: int | None
    softcap: float | None


@dataclass(slots=True)
class KVStore:
    """All layers' KV blocks and the metadata of the step in progress.

    Layers are found by a probing forward pass: each attention module that calls `attention_forward`
    registers its ``(Hkv, D)`` here.
    """

    kernels: AttentionKernels
    metadata: AttentionMetadata | None = None
    probed: dict[nn.Module, tuple[int, int, torch.dtype]] = field(default_factory=dict)
    seen: dict[nn.Module, Seen] = field(default_factory=dict)
    layers: dict[nn.Module, LayerKVBlocks] = field(default_factory=dict)
    n_kv_blocks: int = 0
    block_tokens: int = 0

    def attend(
        self,
        module: nn.Module,
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float,
        window: int | None,
        softcap: float | None,
        rotary: Rotary | None = None,
        norms: tuple[HeadNorm, HeadNorm] | None = None,
    ) -> Tensor:
        """Attention of one layer: q [T, H, D]; k, v [T, Hkv, D] -> [T, H, D]."""
        assert self.metadata is not None, "attention called outside an engine step"
        kv_blocks = self.layers[module]
        call = AttentionCall(
            *qkv,
            kv_blocks.k,
            kv_blocks.v,
            self.metadata,
            scale,
            window,
            softcap,
            rotary=rotary,
            norms=norms,
        )
        return paged_attention(call, self.kernels)

    def bytes_per_token(self) -> int:
        return sum(2 * heads * dim * dtype.itemsize for heads, dim, dtype in self.probed.values())

    def allocate(self, n_kv_blocks: int, block_tokens: int, device: torch.device) -> None:
        """Create the KV blocks: zeros, for padding is read (masked), so it must be finite."""
        self.n_kv_blocks, self.block_tokens = n_kv_blocks, block_tokens
        for module, (heads, dim, dtype) in self.probed.items():
            shape = (n_kv_blocks, block_tokens, heads, dim)
            self.layers[module] = LayerKVBlocks(
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )

    def wipe(self, kv_blocks: list[int]) -> None:
        """Zero KV blocks that may hold NaN or infinity before somebody else gets them."""
        if not kv_blocks:
            return
        index = None  # on the layers' device: one copy for all
        for layer in self.layers.values():
            if index is None:
                index = torch.tensor(kv_blocks, device=layer.k.device)
            layer.k.index_fill_(0, index, 0)
            layer.v.index_fill_(0, index, 0)


def register_attention() -> None:
    """Make ``attn_implementation="impart_paged"`` known to transformers (idempotent)."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)


def attach_store(model: nn.Module, store: KVStore) -> None:
    """Let every module of the model find the store; attention modules will use it."""
    for module in model.modules():
        object.__setattr__(module, "impart_kv_store", store)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, Hkv, T, D] -> ([1, T, H, D], None)."""
    store: KVStore = module.impart_kv_store  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not store.layers:
        seen = Seen(query, key, value, scale, sliding_window, softcap)
        return _probe(store, module, seen, kwargs), None
    qkv = (_packed(query), _packed(key), _packed(value))
    return store.attend(module, qkv, scale, sliding_window, softcap).unsqueeze(0), None


def _packed(x: Tensor) -> Tensor:
    """[1, H, T, D] -> [T, H, D] with a contiguous last axis."""
    rows = x[0].transpose(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _probe(store: KVStore, module: nn.Module, seen: Seen, kwargs: dict[str, Any]) -> Tensor:
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ConfigError(f"this base model's attention uses `{name}`, which is not supported")
    k = seen.k
    if seen.v.shape != k.shape:
        raise ConfigError(
            "this base model's keys and values differ in shape, which the KV cache cannot hold"
        )
    store.probed[module] = (k.shape[1], k.shape[3], k.dtype)
    store.seen[module] = seen
    return seen.q.transpose(1, 2)
