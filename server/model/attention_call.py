"""What a definition may hand to the attention function: all that could change a result is known or
refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from server.errors import ConfigError
from server.model.kv_store import ProbedCall
from server.model.refusal import WAY_OUT

# What asks for other outputs or tells of caches that the engine does not use, and positions, which
# are in q and k by now. Everything else that is given is a question of the result.
INERT = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
# Those that say in other words what the server does.
AS_SERVED: Mapping[str, object] = {"dropout": 0, "is_causal": True}
WHAT_IT_IS = {
    "block_indices": "sparse attention, which reads chosen blocks of the keys",
    "head_mask": "a mask of its heads",
    "indices": "sparse attention, which reads chosen keys",
    "is_causal": "attention that is not causal",
    "position_bias": "a bias that depends on what the tokens are",
}


def check_call(module: nn.Module, call: ProbedCall, others: Mapping[str, Any]) -> None:
    """Raise ConfigError, saying why, unless `paged_attention` computes this call.

    others  keyword arguments that the attention function has no parameter for
    """
    for problem in _problems(module, call, others):
        raise ConfigError(
            f"the attention of this base model ({type(module).__name__}) {problem}, which the "
            f"server does not support; {WAY_OUT}"
        )


def _problems(module: nn.Module, call: ProbedCall, others: Mapping[str, Any]) -> Iterator[str]:
    for name, value in others.items():
        if value is None or name in INERT or (name in AS_SERVED and _is(value, AS_SERVED[name])):
            continue
        meaning = WHAT_IT_IS.get(name)
        yield f"uses {meaning} (`{name}`)" if meaning else f"is told `{name}`"
    if isinstance(call.form.scale, Tensor):
        yield "scales its scores by a tensor"
    tokens = call.q.shape[2]
    if not call.q.shape[0] == call.k.shape[0] == call.v.shape[0] == 1:
        yield "splits or repeats the sequence it is given"
    elif not call.k.shape[2] == call.v.shape[2] == tokens:
        yield "reads keys of other tokens than those it is given"
    if call.k.shape[1] != call.v.shape[1] or call.q.shape[1] % call.k.shape[1]:
        yield "has other numbers of heads for keys and values"
    if call.k.dtype != call.v.dtype or call.k.dtype != call.q.dtype:
        yield "mixes dtypes"
    if call.sinks is not None and not _is_of_heads(call):
        yield "has sinks that are not one number a head"


def _is(value: object, wanted: object) -> bool:
    return isinstance(value, bool | int | float) and value == wanted


def _is_of_heads(call: ProbedCall) -> bool:
    sinks = call.sinks
    return isinstance(sinks, torch.Tensor) and sinks.shape == call.q.shape[1:2]
