"""The hook that lets Hugging Face model definitions run on our paged cache.

transformers calls the registered function with the new tokens' q, k, v (after RoPE); for a name it
has no mask builder for, it builds no mask: so it is in steps. In the probing pass, under another
name, it hands over what the masks would be. State hangs on the attention modules, never in globals.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from server.errors import ConfigError
from server.model.attention_call import check_call
from server.model.kv_store import AttentionForm, KVStore, ProbedCall
from server.model.mask import CAUSAL, HandedMask, MaskForm, form_of, register_masks
from server.model.refusal import WAY_OUT

ATTENTION_NAME = "impart_paged"
PROBING_NAME = "impart_probing"  # the same function, and masks are handed over


def register_attention() -> None:
    """Make ``attn_implementation="impart_paged"`` known to transformers (idempotent)."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionInterface.register(PROBING_NAME, attention_forward)
    register_masks(PROBING_NAME)


def attach_store(model: nn.Module, store: KVStore) -> None:
    """Let every module of the model find the store; attention modules will use it."""
    for module in model.modules():
        object.__setattr__(module, "impart_kv_store", store)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | HandedMask | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> ([1, T, H, Dv], None).

    s_aux  sinks [H]; see `AttentionCall`
    """
    store: KVStore = module.impart_kv_store  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    form = AttentionForm(scale, sliding_window, softcap)
    if store.is_probing:
        if store.wants_mask(module):
            store.learn_mask(module, _mask_form(store, module, attention_mask, sliding_window))
        call = ProbedCall(query, key, value, form, s_aux)
        check_call(module, call, kwargs)
        store.probe(module, call)
        return call.stand_in(), None
    qkv = (_packed(query), _packed(key), _packed(value))
    return store.attend(module, qkv, form, sinks=s_aux).unsqueeze(0), None


def _packed(x: Tensor) -> Tensor:
    """[1, H, T, D] -> [T, H, D] with a contiguous last axis."""
    rows = x[0].transpose(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _mask_form(
    store: KVStore, module: nn.Module, mask: Tensor | HandedMask | None, window: int | None
) -> MaskForm:
    """Which positions the module's tokens see in this call; transformers' masks have the last word,
    for they are what `generate` computes with. Raises ConfigError if that is not known or not
    supported.
    """
    if isinstance(mask, HandedMask):
        if mask not in store.forms:
            store.forms[mask] = form_of(mask, store.n_positions)
        form = store.forms[mask]
    elif mask is None and getattr(module, "is_causal", True) is not False:
        form = CAUSAL if window is None else MaskForm(window=window)
    else:
        raise ConfigError(
            f"{type(module).__name__} of this base model makes its attention mask itself, which "
            f"the server cannot read; {WAY_OUT}"
        )
    return form
