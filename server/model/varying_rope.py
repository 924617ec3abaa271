"""Rotary embeddings whose angles depend on the step: dynamic NTK and LongRoPE.

transformers chooses their frequencies by the longest sequence of the forward pass. In a batch of
many requests a long one would then turn the others' keys differently from what is in their cache,
and a captured graph could not look at the lengths at all. Up to a length the choice never changes:
only that far is such a base served, and without graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class VaryingRope:
    """kind: transformers' `rope_type`; n_fixed: tokens up to which its angles never change."""

    kind: str
    n_fixed: int


def varying_rope(model: nn.Module) -> VaryingRope | None:
    """What rotary embedding of this kind the model has, if any; the shortest-lived of several."""
    found = [rope for module in model.modules() for rope in _ropes_of(module)]
    return min(found, key=lambda rope: rope.n_fixed, default=None)


def _ropes_of(module: nn.Module) -> list[VaryingRope]:
    kinds: Any = getattr(module, "rope_type", None)
    by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
    return [
        VaryingRope(kind, _n_fixed(module, layer))
        for layer, kind in by_layer.items()
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")
    ]


def _n_fixed(module: nn.Module, layer: str | None) -> int:
    config: Any = module.config
    fields = getattr(config, "rope_parameters", None) or {}
    fields = fields if layer is None else fields.get(layer, {})
    limit = fields.get("original_max_position_embeddings")
    return int(limit or config.max_position_embeddings)
