"""An 8-bit base under deltas made against the unquantised one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.errors import ConfigError
from server.ops.quantize import quantize
from server.settings import Settings
from tests.server.conftest import N_TRUTH, PAIR, Served

PROMPT = "The quick brown fox"


def dequantised(served: Served, name: str, kind: str) -> PreTrainedModel:
    """The variant's own weights plus what rounding the base does to each of its linears."""
    base = served.oracle("base")
    model = AutoModelForCausalLM.from_pretrained(served.checkpoints[name], dtype=torch.float32)
    output = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output:
            weight = base.get_parameter(f"{path}.weight").data
            if isinstance(module, Conv1D):
                change = (quantize(weight.T, kind).dense(torch.float32) - weight.T).T
            else:
                change = quantize(weight, kind).dense(torch.float32) - weight
            module.weight.data += change
    return model


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "int8"), ("gpt2", "float8")])
def test_engine_on_an_8_bit_base_equals_generate_on_the_dequantised_model(
    served, harness, architecture: str, kind: str
) -> None:
    pair = served(architecture, PAIR)
    engine = harness(pair, base_quant=kind)
    sent = {
        name: engine.submit(name, PROMPT, max_tokens=N_TRUTH, ignore_eos=True)
        for name in pair.checkpoints
    }
    engine.run(*sent.values())
    for name, recorded in sent.items():
        ids = torch.tensor([recorded.request.prompt_ids + recorded.output_ids])
        with torch.inference_mode():
            logits = dequantised(pair, name, kind)(ids).logits[0]
        choices = logits[len(recorded.request.prompt_ids) - 1 : -1].argmax(-1).tolist()
        assert recorded.output_ids == choices, name
        assert len(choices) == N_TRUTH
    plain = harness(pair)
    assert engine.core.stats().base_bytes < 0.8 * plain.core.stats().base_bytes


def test_reconstruction_from_an_8_bit_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="base_quant"):
        Settings(base=".", base_quant="int8", mode="reconstruct")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="base_quant"):
        Settings(base=".", base_quant="int8", mode_overrides={"a": "reconstruct"})  # type: ignore[arg-type]
