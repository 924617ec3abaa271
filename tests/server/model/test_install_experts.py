"""Experts and routers are found under the names that artifacts have for them."""

from __future__ import annotations

import pytest
import torch

from server.deltas.experts import ExpertParameter
from server.deltas.parameter import DeltaParameter
from server.deltas.residency import Residency
from server.deltas.whole import WholeParameter
from server.model.base import install_delta_layers
from server.model.context import StepContext
from server.ops.kernels import TorchKernels
from tests.models.builder import tiny_model
from tests.models.cases import all_cases

KINDS = ("mixtral", "qwen2_moe", "granitemoe", "deepseek_v3", "gpt_oss", "phimoe", "minimax_m2")


def installed(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, DeltaParameter]]:
    """The model's own tensors, and what was made of them."""
    model = tiny_model(all_cases()[kind])
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    made = install_delta_layers(model, StepContext(), TorchKernels(), Residency())
    return tensors, made


@pytest.mark.parametrize("kind", KINDS)
def test_everything_of_a_moe_checkpoint_has_a_parameter(kind: str) -> None:
    tensors, made = installed(kind)
    for name, value in tensors.items():
        wanted = [f"{name}[{e}]" for e in range(len(value))] if value.dim() == 3 else [name]
        if "sinks" not in name:  # the attention's
            assert set(wanted) <= made.keys()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "phimoe", "minimax_m2"])
def test_matrices_of_one_expert_are_found_as_checkpoints_name_them(kind: str) -> None:
    """Against what transformers makes of the weights themselves when it saves."""
    from transformers.core_model_loading import revert_weight_conversion

    model = tiny_model(all_cases()[kind])
    experts = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 3}
    saved = revert_weight_conversion(model, dict(experts))
    assert len(saved) == 3 * sum(len(p) for n, p in experts.items() if "down" in n)
    made = install_delta_layers(model, StepContext(), TorchKernels(), Residency())
    for name, value in saved.items():
        assert isinstance(made[name], ExpertParameter)
        assert torch.equal(made[name].base, value)


def test_bytes_of_experts_are_counted_once() -> None:
    tensors, made = installed("mixtral")
    counted = sum(parameter.n_base_bytes for parameter in set(made.values()))
    assert counted == sum(value.numel() * 4 for value in tensors.values())


def test_routers_that_are_linears_are_not_taken_for_plain_ones() -> None:
    _, made = installed("phimoe")
    routers = [p for name, p in made.items() if name.endswith("router.weight")]
    assert routers
    assert all(isinstance(p, WholeParameter) for p in routers)
