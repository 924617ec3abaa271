"""What config.json may say of quantised weights; anything else is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.checkpoint.quantised.settings import dense_config, quantisation_of
from compressor.errors import CheckpointError
from tests.compressor.checkpoint.quantised.schemes import SCHEMES

PACKED = SCHEMES["packed-4"].config


def weights(**changes: Any) -> dict[str, Any]:
    """A compressed-tensors configuration with other settings of weights."""
    (group,) = PACKED["config_groups"].values()
    changed = group | {"weights": group["weights"] | changes}
    return PACKED | {"config_groups": {"group_0": changed}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gptq-4", "gptq 4 bit"),
        ("awq", "awq 4 bit"),
        ("fp8-blocks", "fp8"),
        ("fp8-tensor", "compressed-tensors float8"),
        ("packed-8-rows", "compressed-tensors int8"),
        ("bnb-int8", "bitsandbytes 8 bit"),
        ("bnb-nf4-nested", "bitsandbytes nf4"),
    ],
)
def test_quantisation_is_named_for_people(name: str, text: str) -> None:
    found = quantisation_of({"dtype": "float16", "quantization_config": SCHEMES[name].config})
    assert found is not None
    assert (found.text, found.dtype) == (text, "F16")


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"torch_dtype": "bfloat16"}, "BF16"),
        ({"text_config": {"dtype": "float32"}}, "F32"),
        ({}, "BF16"),
    ],
)
def test_dtype_is_the_models_own(config: dict[str, Any], code: str) -> None:
    found = quantisation_of(config | {"compression_config": PACKED})
    assert found is not None
    assert found.dtype == code


def test_dense_configuration_says_nothing_of_quantisation() -> None:
    config = {"a": 1, "quantization_config": {}, "compression_config": {}}
    assert dense_config(config) == {"a": 1}
    assert quantisation_of({"a": 1}) is None
    assert quantisation_of({"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("gptq", "no JSON object"),
        ({}, "quantised by an unnamed method"),
        ({"quant_method": "aqlm"}, "quantised by aqlm, which cannot be read"),
        ({"quant_method": "gptq"}, "bits None"),
        ({"quant_method": "gptq", "bits": 5}, "bits 5"),
        ({"quant_method": "gptq", "bits": True}, "bits True"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format True"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "128"}, "group_size '128'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "bits 8"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point False"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "no pair"),
        ({"quant_method": "fp8", "weight_block_size": [128, -1]}, "no pair"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf8"}, "nf8"),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
        (PACKED | {"config_groups": {"g": {"weights": 3, "targets": []}}}, "does not parse"),
        (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (PACKED | {"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
        (weights(num_bits=3), "num_bits 3"),
        (weights(type="float", num_bits=4), "num_bits 4"),
        (weights(strategy="tensor_group"), "tensor_group"),
    ],
)
def test_settings_that_are_not_known_are_refused_by_name(given: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as refused:
        quantisation_of({"quantization_config": given})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [({"dtype": "float64"}, "float64"), ({"model_type": "gpt2"}, "turned round")],
)
def test_models_whose_weights_would_come_out_wrong_are_refused(
    config: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        quantisation_of(config | {"quantization_config": PACKED})


def test_models_that_turn_matrices_round_are_all_known() -> None:
    """Their definitions use transformers' Conv1D; others with it are no causal language models."""
    from pathlib import Path

    import transformers

    from compressor.checkpoint.quantised.settings import TRANSPOSING

    folder = Path(transformers.__file__).parent / "models"
    using = {
        file.parent.name
        for file in folder.glob("*/modeling_*.py")
        if "import Conv1D" in file.read_text() or " Conv1D," in file.read_text()
    }
    others = {"clvp", "convbert"}
    assert using - others == {name.replace("openai-gpt", "openai") for name in TRANSPOSING}
