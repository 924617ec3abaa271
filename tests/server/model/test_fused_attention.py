"""Which attention modules take the fused forward; that it is right is `test_parity`'s business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from server.model.attention import ATTENTION_NAME, register_attention
from server.model.base import load_base_model, prepare_base_model
from server.model.fused_attention import RotaryAttention
from server.ops.attention import AttentionCall, HeadNorm
from server.ops.kernels import TorchKernels
from server.ops.norm import RmsForm
from tests.server.conftest import PAIR, Served


def fused_of(served: Callable[..., Served], kind: str, **options: Any) -> list[bool]:
    base = load_base_model(served(kind, PAIR, **options).base, torch.device("cpu"), torch.float32)
    return [isinstance(module.forward, RotaryAttention) for module in base.store.layers]


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


@pytest.mark.parametrize(
    ("kind", "fuses"),
    [("olmo2", False), ("olmo", True)],  # a norm over all heads; norms without weights
)
def test_fuse_rotary_model_of_unusual_norms_is_served(kind: str, fuses: bool) -> None:
    register_attention()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    base = prepare_base_model(model.eval().requires_grad_(False), TorchKernels())
    assert len(base.store.layers) == 1
    assert all(isinstance(m.forward, RotaryAttention) == fuses for m in base.store.layers)


class Joined(TorchKernels):
    """Has a kernel for a step that only decodes, which does nothing."""

    def __init__(self) -> None:
        self.norms: list[tuple[HeadNorm, HeadNorm] | None] = []
        self.n_rms_norms = 0

    def rotate_and_decode_(self, out: Tensor, call: AttentionCall) -> bool:
        self.norms.append(call.norms)
        out.zero_()
        return True

    def rms_norm(self, x: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm) -> Tensor:
        self.n_rms_norms += 1
        return super().rms_norm(x, weights, index, form)


def test_step_that_only_decodes_leaves_norms_of_heads_to_the_kernel(
    served: Callable[..., Served], harness: Callable[..., Any]
) -> None:
    kernels = Joined()
    engine = harness(served("qwen3", PAIR), static=True, kernels=kernels)
    request = engine.submit("blockdiag", "The quick brown fox", max_tokens=1, ignore_eos=True)
    engine.run(request)
    assert not kernels.norms, "a prefill has none of it"
    before = kernels.n_rms_norms
    sent = [engine.submit(n, "x", max_tokens=2, ignore_eos=True) for n in ("base", "blockdiag")]
    engine.run(*sent)
    layers = [m.forward for m in engine.core._runner.base.store.layers]
    assert len(kernels.norms) == len(layers), "one step in which both decode"
    assert kernels.n_rms_norms - before == (2 * len(layers) + 1) + 1, "of the prefill, of the step"
    for forward, norms in zip(layers, kernels.norms, strict=True):
        assert norms is not None
        for ours, module in zip(norms, (forward._q_norm, forward._k_norm), strict=True):
            assert ours.index is not None
            base, own = ours.weights[ours.index]
            assert torch.equal(base, module.weight)
            assert not torch.equal(own, module.weight)
