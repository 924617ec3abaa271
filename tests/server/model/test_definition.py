"""The definition beside the served model: the same numbers as before, and no weights of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor.codecs.term import DenseRows, TensorDelta
from server.engine.check.synthetic import synthetic_deltas
from server.model.base import prepare_base_model
from server.model.definition import Watch
from server.model.mask import attention_named
from server.ops.kernels import TorchKernels
from tests.server.engine.check.models import definition

IDS = torch.tensor([[5, 17, 200, 31, 5, 8, 99]])


def eager(model: Any) -> torch.Tensor:
    with torch.inference_mode(), attention_named(model, "eager"):
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_logits_are_those_before_layers_were_replaced(kind: str) -> None:
    model = definition(kind)
    wanted = eager(model)
    base = prepare_base_model(model, TorchKernels())
    assert base.definition is not None
    watch = Watch(base.definition.model)
    # Equal but for the order of sums: a matrix may lie elsewhere, or turned, in memory now.
    torch.testing.assert_close(base.definition.run(IDS, {}, watch), wanted, rtol=0, atol=2e-6)
    assert len(watch.outputs) == 4  # the embedding and three layers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_deltas_are_added_as_in_the_fine_tune(kind: str) -> None:
    model = definition(kind)
    finetune = definition(kind)
    base = prepare_base_model(model, TorchKernels())
    deltas = synthetic_deltas(base.parameters.values())
    by_name = {name: deltas[parameter] for name, parameter in base.parameters.items()}
    with torch.no_grad():
        for name, value in finetune.named_parameters():
            turned = kind == "gpt2" and ".c_" in name and value.dim() == 2
            old = value.t() if turned else value
            new = by_name[name].reconstruct(old)
            value.copy_(new.t() if turned else new)
    assert base.definition is not None
    found = base.definition.run(IDS, deltas, Watch(base.definition.model))
    torch.testing.assert_close(found, eager(finetune), rtol=1e-5, atol=1e-5)


def test_added_rows_make_the_tables_longer() -> None:
    base = prepare_base_model(definition("llama"), TorchKernels())
    parameter = base.parameters["lm_head.weight"]
    rows = torch.randn(3, 32)
    delta = TensorDelta("lm_head.weight", (303, 32), (300, 32), False, (), DenseRows(300, rows))
    assert base.definition is not None
    watch = Watch(base.definition.model)
    plain = base.definition.run(IDS, {}, watch)
    longer = base.definition.run(IDS, {parameter: delta}, watch)
    assert longer.shape[-1] == 303
    torch.testing.assert_close(longer[..., :300], plain)


def test_it_has_no_weights_of_its_own_between_passes() -> None:
    base = prepare_base_model(definition("llama"), TorchKernels())
    assert base.definition is not None
    base.definition.run(IDS, {}, Watch(base.definition.model))
    for parameter in base.definition.model.parameters():
        assert parameter.untyped_storage().nbytes() <= 8
