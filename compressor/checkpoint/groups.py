"""The groups that the bytes of a model's tensors are counted in."""

from __future__ import annotations

from compressor.checkpoint.layout import Parameter
from compressor.checkpoint.pairing import TensorPair

VOCABULARY = ("embeddings", "lm_head")  # groups of `group_of`
ADDED_ROWS = "added rows"


def group_of(pair: TensorPair | Parameter) -> str:
    """Name the group a tensor's bytes are counted in."""
    if pair.kind not in ("linear", "embedding"):
        return "norms and biases"
    if pair.kind == "embedding":
        return "embeddings"
    words = pair.name.lower()
    if "lm_head" in words or "embed_out" in words:
        return "lm_head"
    if "attn" in words or "attention" in words:
        return "attention"
    return "mlp" if "mlp" in words or "feed_forward" in words else "other matrices"


def exact_group_of(pair: TensorPair) -> str:
    """Name the group that its exact rows are counted in."""
    return ADDED_ROWS if pair.exact_start else group_of(pair)
