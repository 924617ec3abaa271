"""LoRA of parameters rather than modules: what PEFT merges is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.checkpoint.parameter import Parameter
from compressor.peft.experts import Share
from tests.compressor.checkpoint.test_layout import make
from tests.compressor.cli.test_app import impart, one_line_error
from tests.compressor.peft.test_factors import lora, merged, trained

Bases = dict[str, Path]
EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
# Name -> base, configuration.
TARGETED: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "experts": ("experts", lambda: lora(target_parameters=EXPERTS)),
    "experts, stored one by one": ("apart", lambda: lora(target_parameters=EXPERTS)),
    "experts, stored inputs first": ("turned", lambda: lora(target_parameters=EXPERTS)),
    "one parameter of experts": (
        "apart",
        lambda: lora(
            target_parameters=["mlp.experts.gate_up_proj"],
            use_rslora=True,
            rank_pattern={"experts.gate_up_proj": 2},
        ),
    ),
    "router": ("experts", lambda: lora(target_parameters=["mlp.gate.weight", *EXPERTS])),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("experts")
    for name, whole in (("experts", True), ("apart", False)):
        make("qwen3_moe", folder / name, whole=whole)
    make("gpt_oss", folder / "turned")
    return {name: folder / name for name in ("experts", "apart", "turned")}


@pytest.mark.parametrize("kind", TARGETED)
def test_factors_of_targeted_parameters_equal_pefts_own_merge(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    """Whichever way the base stores its experts: transformers loads what is reconstructed."""
    name, config = TARGETED[kind]
    adapter = trained(bases[name], config(), tmp_path / "adapter")
    assert impart("import", bases[name], adapter, tmp_path / "delta")[0] == 0
    assert impart("reconstruct", bases[name], tmp_path / "delta", tmp_path / "full")[0] == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "full").state_dict()
    before = AutoModelForCausalLM.from_pretrained(bases[name]).state_dict()
    expected = merged(bases[name], adapter)
    changed = {key for key, tensor in before.items() if not torch.equal(found[key], tensor)}
    assert changed == {key for key, tensor in before.items() if not expected[key].equal(tensor)}
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("is_turned", [False, True])
def test_factors_of_square_experts_are_told_apart_by_the_model(is_turned: bool) -> None:
    """As `ParamWrapper.get_delta_weight` has them; other shapes tell by themselves."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 5, generator=generator), torch.randn(5, 6, generator=generator)
    equation = "ore,eri->eio" if is_turned else "ore,eri->eoi"
    expected = torch.einsum(equation, b.reshape(5, 2, 3), a.reshape(3, 2, 5))
    for expert in range(3):
        share = Share("x", (5, 5), is_turned, expert, 3, slice(1, 4))
        parameter = Parameter("x", "linear", (3, 5), False, "Experts")
        found = share.factors(parameter, a, b)
        torch.testing.assert_close(found.b.T @ found.a, expected[expert, 1:4])
    with pytest.raises(ValueError, match="number of experts"):
        share.factors(parameter, a[:5], b[:, :5])


def test_factors_of_parameters_that_the_base_lacks_are_refused(
    bases: Bases, tmp_path: Path
) -> None:
    adapter = trained(bases["experts"], lora(target_parameters=EXPERTS), tmp_path / "adapter")
    error = one_line_error("import", bases["turned"], adapter, tmp_path / "delta")
    assert "is this the right base" in error
