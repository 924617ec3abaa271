"""The hook that lets Hugging Face model definitions run on our paged cache.

transformers calls the registered function with the new tokens' q, k, v (after RoPE); for a name it
has no mask builder for, it builds no mask. State hangs on the attention modules, never in globals.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from server.errors import ConfigError
from server.model.kv_store import AttentionForm, KVStore, ProbedCall

ATTENTION_NAME = "impart_paged"
# Keyword arguments that change the result and that `paged_attention` does not implement.
UNSUPPORTED = ("s_aux", "sinks", "head_mask", "position_bias")


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
    form = AttentionForm(scale, sliding_window, softcap)
    if store.is_probing:
        return _probe(store, module, ProbedCall(query, key, value, form), kwargs), None
    qkv = (_packed(query), _packed(key), _packed(value))
    return store.attend(module, qkv, form).unsqueeze(0), None


def _packed(x: Tensor) -> Tensor:
    """[1, H, T, D] -> [T, H, D] with a contiguous last axis."""
    rows = x[0].transpose(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _probe(store: KVStore, module: nn.Module, call: ProbedCall, kwargs: dict[str, Any]) -> Tensor:
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ConfigError(f"this base model's attention uses `{name}`, which is not supported")
    if call.v.shape != call.k.shape:
        raise ConfigError(
            "this base model's keys and values differ in shape, which the KV cache cannot hold"
        )
    store.probe(module, call)
    return call.q.transpose(1, 2)
