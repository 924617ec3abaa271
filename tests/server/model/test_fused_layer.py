"""Which decoder layers add within the norm that follows, what that saves, and that no bit changes.

That the engine's tokens are right is `test_parity`'s and `test_static_parity`'s business.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from server.model.attention import ATTENTION_NAME, register_attention
from server.model.base import BaseModel, prepare_base_model
from server.model.fused_layer import ResidualLayer
from server.model.kv_store import KVStore
from server.model.norm import DeltaNorm
from server.ops.kernels import Kernels, TorchKernels
from server.ops.norm import RmsForm
from tests.server.conftest import PAIR, Served
from tests.server.helpers import CoreHarness
from tests.server.model.test_base import PROMPTS

CPU = torch.device("cpu")
LAYERS = 3
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def random_model(kind: str, **config: Any) -> PreTrainedModel:
    register_attention()
    fields = AutoConfig.for_model(kind, **(SIZES | config))
    model = AutoModelForCausalLM.from_config(fields, attn_implementation=ATTENTION_NAME).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def fused_layers(model: nn.Module) -> list[ResidualLayer]:
    return [m.forward for m in model.modules() if isinstance(m.forward, ResidualLayer)]


def prepared(kind: str, kernels: Kernels | None = None, **config: Any) -> BaseModel:
    return prepare_base_model(random_model(kind, **config), kernels or TorchKernels())


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "mistral", "gemma", "smollm3", "phi3", "mixtral"]
)
def test_fuse_residuals_usual_form_fuses_every_layer_with_the_norm_after_it(kind: str) -> None:
    model = prepared(kind).model
    fused = fused_layers(model)
    followers = [layer.input_layernorm for layer in model.model.layers[1:]] + [model.model.norm]
    assert len(fused) == LAYERS
    assert [forward._follower for forward in fused] == followers


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gemma2", {}),  # four norms
        ("gemma3_text", {}),
        ("glm4", {}),
        ("granite", {"residual_multiplier": 0.5}),
        ("phi", {}),  # attention and MLP side by side
        ("cohere", {}),
        ("gpt_neox", {}),
        ("starcoder2", {}),  # norms with a bias
        ("gpt2", {}),
    ],
)
def test_fuse_residuals_other_form_fuses_none(kind: str, config: dict[str, Any]) -> None:
    assert fused_layers(prepared(kind, **config).model) == []


def changed_layer(change: str) -> Callable[..., Tensor]:
    """Llama's layer with one thing different."""

    def forward(self: Any, hidden_states: Tensor, **rest: Any) -> Tensor:
        given = dict(rest) | ({"use_cache": True} if change == "argument" else {})
        normed = self.input_layernorm(hidden_states)
        if change == "input of attention":
            normed = normed * 1.0
        attended, _ = self.self_attn(hidden_states=normed, **given)
        scale = 1.001 if change == "first sum" else 1.0
        summed = hidden_states + attended * scale
        if change == "norm called twice":
            self.post_attention_layernorm(summed)
        y = self.mlp(self.post_attention_layernorm(summed))
        if change == "input changed in place":
            hidden_states.add_(attended)
        if change == "output in place":
            return summed.add_(y)
        return hidden_states + y if change == "second sum" else summed + y

    return forward


@pytest.mark.parametrize(
    "change",
    [
        "argument", "input of attention", "first sum", "second sum",
        "norm called twice", "input changed in place", "output in place",
    ],
)  # fmt: skip
def test_fuse_residuals_layer_that_does_something_else_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "forward", changed_layer(change))
    assert fused_layers(prepared("llama").model) == []


def test_fuse_residuals_layer_as_written_here_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "forward", changed_layer("nothing"))
    assert len(fused_layers(prepared("llama").model)) == LAYERS


def test_fuse_residuals_sum_changed_after_the_layer_has_no_follower() -> None:
    """As models do that mix image features into the stream."""
    model = random_model("llama")

    def double(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].mul_(2)

    model.model.layers[1].register_forward_pre_hook(double)
    prepare_base_model(model, TorchKernels())
    followers = [forward._follower is not None for forward in fused_layers(model)]
    assert followers == [False, True, True]


@pytest.mark.parametrize("kernels", ["numba", "torch"])
@pytest.mark.parametrize(("kind", "dtype"), [("llama", "bfloat16"), ("gemma", "float32")])
@pytest.mark.parametrize("static", [False, True])
def test_fused_layers_give_the_bits_of_the_unfused(
    served: Callable[..., Served],
    harness: Callable[..., CoreHarness],
    monkeypatch: pytest.MonkeyPatch,
    kernels: str,
    kind: str,
    dtype: str,
    static: bool,
) -> None:
    if static and kernels == "numba":
        pytest.skip("these kernels need the rows in Python")
    pair = served(kind, PAIR)
    logits = []
    for fuse in (True, False):
        if not fuse:
            monkeypatch.setattr("server.model.base.fuse_residuals", lambda _, run: run() or 0)
        engine = harness(pair, kernels=kernels, dtype=dtype, static=static)
        runner = engine.core._runner
        assert bool(fused_layers(runner.base.model)) == fuse
        seen = record_logits(runner, monkeypatch)
        for name in pair.checkpoints:  # loaded one by one: the same steps both times
            engine.run(engine.submit(name, PROMPTS[2], max_tokens=1))
        seen.clear()
        engine.run(*(engine.submit(name, PROMPTS[0], max_tokens=4) for name in pair.checkpoints))
        logits.append(seen)
    assert len(logits[0]) == len(logits[1]) >= 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*logits, strict=True))


def record_logits(runner: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    forward = runner.forward

    def recorded(step: Any) -> Tensor:
        logits: Tensor = forward(step)
        seen.append(logits.clone())
        return logits

    monkeypatch.setattr(runner, "forward", recorded)
    return seen


class Counting(TorchKernels):
    """How often each is called; the one that adds does not."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def rms_norm(self, x: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm) -> Tensor:
        self.calls["rms_norm"] += 1
        return super().rms_norm(x, weights, index, form)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
    ) -> tuple[Tensor, Tensor]:
        self.calls["add_rms_norm"] += 1
        return x.detach(), residual.detach()


class Additions(TorchDispatchMode):
    """Counts additions of two tensors of hidden rows."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.n = shape, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function._schema.name in ("aten::add", "aten::add_"):
            self.n += all(isinstance(a, Tensor) and a.shape == self.shape for a in args[:2])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fuse", [True, False])
def test_fused_layer_takes_two_launches_less(monkeypatch: pytest.MonkeyPatch, fuse: bool) -> None:
    """Each layer's two additions and two norms are two calls; the first norm has no addition."""
    kernels = Counting()
    if not fuse:
        monkeypatch.setattr("server.model.base.fuse_residuals", lambda _, run: run() or 0)
    base = prepared("llama", kernels)
    monkeypatch.setattr(KVStore, "attend", lambda _store, _module, qkv, *_: qkv[0])
    kernels.calls.clear()
    ids = torch.arange(4).unsqueeze(0)
    with torch.inference_mode(), Additions((1, 4, 32)) as additions:
        base.model(input_ids=ids, position_ids=ids, use_cache=False)
    n_norms, n_added = kernels.calls["rms_norm"], kernels.calls["add_rms_norm"]
    assert n_norms + n_added == 2 * LAYERS + 1
    assert (n_added, additions.n) == ((2 * LAYERS, 0) if fuse else (0, 2 * LAYERS))


@pytest.fixture
def norms() -> list[DeltaNorm]:
    model = prepared("llama").model
    return [layer.input_layernorm for layer in model.model.layers]


def test_add_ahead_hands_its_result_to_that_norm_and_tensor_only(norms: list[DeltaNorm]) -> None:
    x, residual = torch.randn(2, 1, 3, 32)
    summed = norms[0].add_ahead(x, residual)
    want = norms[0](residual + x)
    assert torch.equal(norms[1](summed), norms[1](residual + x))
    assert torch.equal(norms[0](summed + 1), norms[0](residual + x + 1))
    calls: list[Any] = []
    norms[0]._weight.kernels.rms_norm = lambda *args: calls.append(args)  # type: ignore[method-assign, assignment]
    assert torch.equal(norms[0](summed), want)
    assert not calls
    norms[0](summed)
    assert len(calls) == 1, "handed over once"


def test_add_ahead_keeps_nothing_alive_that_nobody_asks_for(norms: list[DeltaNorm]) -> None:
    gc.disable()
    try:
        with torch.inference_mode():
            summed = norms[0].add_ahead(*torch.randn(2, 1, 3, 32))
            held = weakref.ref(summed)
            del summed
        assert held() is None
    finally:
        gc.enable()


def test_add_of_another_dtype_equals_the_plain_operations(norms: list[DeltaNorm]) -> None:
    x, residual = torch.randn(2, 1, 3, 32).to(torch.bfloat16)
    normed, summed = norms[0].add(x, residual)
    assert torch.equal(summed, residual + x)
    assert torch.equal(normed, norms[0](residual + x))
