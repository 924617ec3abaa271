"""Definitions that multiply queries and keys themselves. That their tokens are those of `generate`
is the matrix's to show (tests/models).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.errors import ConfigError
from server.model.attention import ATTENTION_NAME, register_attention
from server.model.base import BaseModel, prepare_base_model
from server.model.mask import CAUSAL, MaskForm, use_attention
from server.ops.kernels import TorchKernels
from tests.models.builder import tiny_model
from tests.models.cases import Case


def paged_model(case: Case) -> PreTrainedModel:
    """As the server loads it."""
    register_attention()
    model = tiny_model(case).requires_grad_(False)
    use_attention(model, ATTENTION_NAME)
    return model


def prepared(kind: str, **changes: object) -> BaseModel:
    return prepare_base_model(paged_model(Case(kind, kind, changes)), TorchKernels())


def test_own_attention_mask_in_a_buffer_is_a_window_beyond_the_tokens_probed() -> None:
    base = prepared("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=100)
    layers = [layer for layers in base.store.layers.values() for layer in layers]
    assert [layer.mask for layer in layers] == [CAUSAL, MaskForm(window=100)]


def test_own_attention_alibi_is_in_wider_keys() -> None:
    base = prepared("bloom")
    widths = {(x.key_width, x.value_width) for layers in base.store.layers.values() for x in layers}
    assert widths == {(24, 16)}


class Clipped(nn.Module):
    """An attention that bounds its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, 64)

    def forward(self, x: Tensor, residual: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        q = self.q(x).view(1, -1, 4, 16).transpose(1, 2)
        scores = torch.matmul(q, q.transpose(2, 3)).clamp(-1, 1)
        out = torch.matmul(scores.softmax(-1), q).transpose(1, 2).flatten(2)
        return out + residual, None


def test_own_attention_that_does_something_else_is_refused_by_what_it_does() -> None:
    model = paged_model(Case("bloom", "bloom"))
    model.transformer.h[1].self_attention = Clipped()
    with pytest.raises(ConfigError, match=r"uses `clamp` on its scores; .*impart reconstruct"):
        prepare_base_model(model, TorchKernels())
