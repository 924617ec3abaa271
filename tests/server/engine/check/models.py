"""Served models of tiny definitions, with something broken in them if asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.model.attention import ATTENTION_NAME, register_attention
from server.model.base import BaseModel, prepare_base_model
from server.ops.kernels import TorchKernels

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 256, "vocab_size": 300}


def definition(kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """Random weights large enough that every module matters."""
    register_attention()
    fields = (GPT2 if kind == "gpt2" else FIELDS) | config
    made = AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, attn_implementation=ATTENTION_NAME)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(scale * noise)
    return model.to(dtype).eval().requires_grad_(False)


def served(
    kind: str, change: Callable[[PreTrainedModel], None] = lambda model: None, **config: Any
) -> BaseModel:
    """The model, changed before its layers are replaced."""
    model = definition(kind, **config)
    change(model)
    return prepare_base_model(model, TorchKernels())


class Carrying(nn.Module):
    """Adds what the rows before got: state outside attention, in disguise."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        y: torch.Tensor = self.inner(x + 0.5 * before)
        return y
