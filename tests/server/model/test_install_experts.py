"""Experts and routers are found under the names that artifacts have for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from compressor.checkpoint.layout import read_layout
from server.deltas.experts import ExpertParameter
from server.deltas.parameter import DeltaParameter
from server.deltas.residency import Residency
from server.deltas.whole import WholeParameter
from server.model.context import StepContext
from server.model.install import install_delta_layers
from server.model.observe import observe
from server.ops.kernels import TorchKernels
from tests.models.builder import tiny_model
from tests.models.cases import all_cases

KINDS = ("mixtral", "granitemoe", "deepseek_v3", "gpt_oss", "phimoe", "minimax_m2", "ernie4_5_moe")
MORE = ("qwen2_moe", "granitemoeshared", "olmoe", "flex_olmo", "afmoe", "cohere2_moe", "glm4_moe")


def installed(model: PreTrainedModel) -> dict[str, DeltaParameter]:
    seen = observe(model, {})
    return install_delta_layers(model, StepContext(), TorchKernels(), Residency(), seen)


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]
)
def test_everything_that_artifacts_name_has_a_parameter(kind: str, tmp_path: Path) -> None:
    """Against the names that the compressor reads from a checkpoint."""
    tiny_model(all_cases()[kind]).save_pretrained(tmp_path)
    made = installed(AutoModelForCausalLM.from_pretrained(tmp_path))
    for name, parameter in read_layout(tmp_path).parameters.items():
        if "sinks" in name:  # the attention's
            continue
        shape = made[name].shape
        assert parameter.shape in (shape, shape[::-1])


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "phimoe", "minimax_m2", "granitemoe"])
def test_matrices_of_one_expert_are_those_that_checkpoints_hold(kind: str) -> None:
    """Against what transformers makes of the weights themselves when it saves."""
    model = tiny_model(all_cases()[kind])
    experts = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 3}
    stored: dict[str, Tensor] = {}
    for name, value in revert_weight_conversion(model, dict(experts)).items():
        stored |= (
            {name: value} if value.dim() == 2 else {f"{name}[{e}]": v for e, v in enumerate(value)}
        )
    made = installed(model)
    for name, value in stored.items():
        assert isinstance(made[name], ExpertParameter)
        assert torch.equal(made[name].base, value)


def test_bytes_of_experts_are_counted_once() -> None:
    model = tiny_model(all_cases()["mixtral"])
    n_bytes = sum(value.numel() * 4 for value in model.state_dict().values())
    counted = sum(parameter.n_base_bytes for parameter in set(installed(model).values()))
    assert counted == n_bytes


def test_routers_that_are_linears_are_not_taken_for_plain_ones() -> None:
    made = installed(tiny_model(all_cases()["phimoe"]))
    routers = [p for name, p in made.items() if name.endswith("router.weight")]
    assert routers
    assert all(isinstance(p, WholeParameter) for p in routers)
