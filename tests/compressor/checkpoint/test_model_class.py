"""The class of a configuration is the one whose checkpoint it is."""

from __future__ import annotations

import pytest
import transformers
from transformers import AutoConfig, LlamaConfig, LlavaConfig, PreTrainedConfig, T5Config
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig

from compressor.checkpoint.model_class import language_model
from compressor.errors import CheckpointError


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LlavaConfig(architectures=["LlavaForConditionalGeneration"]), None),
        (LlavaConfig(), "LlavaForConditionalGeneration"),
        (Emu3TextConfig(architectures=["Emu3ForCausalLM"]), None),
        # Saved with another head, and of both kinds: the first of transformers' registries.
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "LlamaForCausalLM"),
        (AutoConfig.for_model("llama4", architectures=["Llama4ForConditionalGeneration"]), None),
    ],
)
def test_model_of_a_configuration_is_the_named_one_that_writes_text(
    config: PreTrainedConfig, name: str | None
) -> None:
    kind, own = language_model(config)
    assert kind is getattr(transformers, name or config.architectures[0])
    assert own is config


def test_model_of_text_alone_gets_the_text_part() -> None:
    config = AutoConfig.for_model("llama4", architectures=["Llama4ForCausalLM"])
    kind, own = language_model(config)
    assert kind is transformers.Llama4ForCausalLM
    assert own is config.get_text_config()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (T5Config(architectures=["T5ForConditionalGeneration"]), "what an encoder has read"),
        (AutoConfig.for_model("vit"), "a newer release of it may have this one"),
    ],
)
def test_model_that_does_not_continue_text_is_refused_in_a_sentence(
    config: PreTrainedConfig, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        language_model(config)
