"""Definitions that count positions by the rows of their input, which a packed step's are not.

Llama 4 scales the queries of layers without rotary embedding by each token's position
(arXiv 2501.19399): the row, and the length of the cache the layer is handed before it. Such a layer
is handed something that has no other use than to tell that length, row by row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "self_attn"


class RowPositions:
    """In the place of a cache: holds nothing, and each row comes after as many as its position."""

    def __init__(self, position_ids: Tensor) -> None:
        """``position_ids [1, T]``."""
        rows = torch.arange(position_ids.shape[1], device=position_ids.device)
        self._before = position_ids[0] - rows

    def get_seq_length(self, layer_idx: int | None = None) -> Tensor:
        """``[T]``: what, added to a row's number, is its position."""
        return self._before

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return keys, values


def count_by_positions(model: nn.Module) -> int:
    """Let every layer that counts rows count positions. Returns how many layers there are."""
    layers = [module for module in model.modules() if _counts_rows(module)]
    for layer in layers:
        layer.register_forward_pre_hook(_hand_positions, with_kwargs=True)
    return len(layers)


def _counts_rows(layer: nn.Module) -> bool:
    attention = getattr(layer, ATTENTION, None)
    tuned = getattr(attention, "attn_temperature_tuning", False)
    return isinstance(attention, nn.Module) and bool(tuned)


def _hand_positions(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"past_key_values": RowPositions(kwargs["position_ids"])}
