"""Which attention modules take the fused forward; that it is right is `test_parity`'s business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.engine.model import load_base_model
from server.engine.rotary import RotaryAttention
from tests.server.engine.conftest import PAIR, Served


def fused_of(served: Callable[..., Served], kind: str, **options: Any) -> list[bool]:
    base = load_base_model(served(kind, PAIR, **options).base, torch.device("cpu"), torch.float32)
    return [isinstance(module.forward, RotaryAttention) for module in base.store.probed]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_fuse_rotary_usual_form_fuses_every_layer(served: Callable[..., Served], kind: str) -> None:
    assert all(fused_of(served, kind))


def test_fuse_rotary_no_rotary_embedding_fuses_none(served: Callable[..., Served]) -> None:
    assert not any(fused_of(served, "gpt2"))


def test_fuse_rotary_other_pairing_of_dimensions_fuses_none(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours turned together (GPT-J's form): the results differ, so the plain path stays."""
    from transformers.models.llama import modeling_llama

    def neighbours(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)

    monkeypatch.setattr(modeling_llama, "rotate_half", neighbours)
    assert not any(fused_of(served, "llama"))
