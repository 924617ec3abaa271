"""What one forward pass shows of a definition's modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from server.model.attention import attach_store
from server.model.kv_store import KVStore
from server.model.observe import Observation, observe
from server.ops.kernels import TorchKernels
from tests.server.model.test_fused_layer import SIZES, random_model


def observed(
    model: PreTrainedModel, owners: dict[nn.Module, tuple[str, ...]] | None = None
) -> Observation:
    store = KVStore(TorchKernels())
    attach_store(model, store)
    with store.probing():
        return observe(model, owners or {})


def seen_of(kind: str, **config: object) -> tuple[nn.Module, Observation]:
    model = random_model(kind, **config)
    return model, observed(model)


def test_observe_tokens_and_kept_rows_are_no_other_size() -> None:
    """Where a layer is as wide as the first choice, another is made."""
    model, seen = seen_of("llama", intermediate_size=11)
    assert {seen.n_tokens, seen.n_kept}.isdisjoint(SIZES.values())
    assert seen.n_tokens not in (11, seen.n_kept)
    assert seen.keeps
    (call,) = seen.of(model.get_submodule("model.layers.0.mlp.act_fn"))
    assert call.tensors == ((1, seen.n_tokens, 11),)


@pytest.mark.parametrize(
    ("kind", "norm", "axis"),
    [("qwen3", "q_norm", 1), ("hunyuan_v1_dense", "query_layernorm", 2)],
)
def test_observe_norm_of_heads_finds_the_tokens_axis(kind: str, norm: str, axis: int) -> None:
    model, seen = seen_of(kind)
    (call,) = seen.of(model.get_submodule(f"model.layers.0.self_attn.{norm}"))
    assert seen.axis(call.tensors[0]) == axis


def test_observe_head_sees_kept_rows_and_the_backbone_all() -> None:
    model, seen = seen_of("modernbert-decoder", cls_token_id=1, sep_token_id=2)
    kept = {name for name, module in model.named_modules() if seen.sees_kept_rows(module)}
    assert kept == {"lm_head", "lm_head.dense", "lm_head.act", "lm_head.norm", "decoder"}


def test_observe_leaves_the_model_as_it_was() -> None:
    model = random_model("llama")
    before = {module: dict(vars(module)) for module in model.modules()}
    norm = model.get_submodule("model.norm")
    seen = observed(model, {norm: ("weight",)})
    assert [stack[-1].module for stack in seen.reads[norm, "weight"]] == [norm]
    for module, held in before.items():
        now = dict(vars(module))
        now.pop("impart_kv_store")
        assert now == held
        assert not module._forward_hooks
        assert type(vars(module)["_parameters"]) is dict


def test_observe_copies_what_a_module_changes_in_place() -> None:
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    model = random_model("llama")
    model.model.layers[0].mlp.act_fn = doubling = Doubling()
    (call,) = observed(model).of(doubling)
    assert torch.equal(call.args[0] * 2, call.output)


class Reader(nn.Module):
    """Multiplies with the weight of a linear that it never calls, as LongCat's router does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.called = linear, nn.Linear(*linear.weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(nn.functional.linear(x, self.linear.weight))


def test_observe_linear_whose_weight_another_module_reads_is_only_read() -> None:
    model = random_model("llama")
    width = model.config.hidden_size
    model.model.layers[0].mlp = reader = Reader(nn.Linear(width, width, bias=False))
    seen = observed(model, {reader.linear: ("weight",)})
    assert seen.is_only_read(reader.linear)
    assert not seen.is_only_read(reader.called)
