"""The first forward passes of a definition: which layers it has, and whether it uses the hook."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from server.errors import ConfigError
from server.model.attention import PROBING_NAME
from server.model.kv_store import KVStore
from server.model.mask import MaskUsed, attention_named, use_attention
from server.model.observe import unlike_numbers
from server.model.own_attention import OwnAttention, own_attention
from server.model.positions import counted_tables
from server.model.refusal import not_served
from server.model.scores import ScoresUsed

N_PROBED = 5  # tokens: some embeddings are all zeros
_HOOK = "transformers' attention interface, in which the server puts its paged KV cache"
NO_INTERFACE = f"its definition does not use {_HOOK}"
MASK_USED = f"its definition computes with the attention mask itself, outside {_HOOK}"
EXCHANGED = "its definition exchanges its attention layers by the length of what it is given"


def learn_attention(model: PreTrainedModel, store: KVStore) -> list[OwnAttention]:
    """The first probing pass. Returns the modules that do not use the attention interface of
    themselves, made to use it.
    """
    before = set(model.modules())
    try:
        probe(model, store)
        return []
    except _Outside as error:
        n_tokens, _ = unlike_numbers(model)
        ids = torch.arange(n_tokens, device=model.get_input_embeddings().weight.device)
        with attention_named(model, "eager"):
            own = own_attention(model, ids.unsqueeze(0))
        if before != set(model.modules()):
            raise not_served(model, EXCHANGED) from error
        for attention in own:
            attention.install()
        try:
            probe(model, store, n_tokens)
        except ScoresUsed as used:
            raise not_served(model, f"{error.why}; and {used}") from used
        for attention in own:
            attention.is_learning = False
        use_attention(model, PROBING_NAME)  # it expects masks, which are not looked at in steps
        return own


def tables_counted(model: PreTrainedModel, store: KVStore) -> dict[nn.Embedding, int]:
    """Tables of positions that count rows; see `counted_tables`. After the layers are known."""
    table = model.get_input_embeddings().weight
    n_tokens, _ = unlike_numbers(model)
    some = torch.full((1, n_tokens), len(table) // 2, device=table.device)
    return counted_tables(model, some, store.probing)


class _Outside(ConfigError):
    """The definition does not compute attention through transformers' interface."""

    def __init__(self, model: nn.Module, why: str) -> None:
        super().__init__(str(not_served(model, why)))
        self.why = why


def probe(model: PreTrainedModel, store: KVStore, n_tokens: int = N_PROBED) -> None:
    """One forward pass without a cache: learns the layers' KV shapes, checks the hook is used."""
    ids = torch.arange(n_tokens, device=model.get_input_embeddings().weight.device).unsqueeze(0)
    try:
        named = attention_named(model, PROBING_NAME)
        with torch.inference_mode(), store.probing(), named:
            model(input_ids=ids, position_ids=ids, use_cache=False)
    except MaskUsed as error:
        raise _Outside(model, MASK_USED) from error
    if not store.layers:
        raise _Outside(model, NO_INTERFACE)
