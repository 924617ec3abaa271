"""Models that see or hear: the server has their text part alone."""

from __future__ import annotations

import torch

from compressor.codecs.term import DenseRows, TensorDelta
from server.model.base import BaseModel, prepare_base_model
from server.model.text_only import UnreachedParameter
from server.ops.kernels import TorchKernels
from tests.models.cases import Case
from tests.server.model.test_own_attention import paged_model


def prepared(kind: str) -> tuple[BaseModel, dict[str, torch.Size]]:
    """The base, and shapes of the definition's parameters."""
    model = paged_model(Case(kind, kind))
    shapes = {name: value.shape for name, value in model.named_parameters()}
    return prepare_base_model(model, TorchKernels()), shapes


def test_towers_are_left_out_and_every_parameter_may_be_changed() -> None:
    base, shapes = prepared("llava_next")
    unreached = {n for n, p in base.parameters.items() if isinstance(p, UnreachedParameter)}
    outside = {name for name in shapes if ".language_model." not in name and "lm_head" not in name}
    assert outside <= unreached
    assert "model.image_newline" in outside  # of a module that runs and does not read it
    assert shapes.keys() <= base.parameters.keys()
    kept = {name.partition(".")[2].partition(".")[0] for name, _ in base.model.named_parameters()}
    assert not kept & {"vision_tower", "multi_modal_projector"}


def test_delta_of_a_tower_takes_no_memory() -> None:
    base, shapes = prepared("llava")
    name = next(name for name in shapes if name.endswith("patch_embedding.weight"))
    rows, parameter = torch.zeros(shapes[name].numel()), base.parameters[name]
    shape = (len(rows),)
    staged = parameter.stage(TensorDelta(name, shape, shape, False, (), DenseRows(0, rows)))
    assert staged.n_bytes == parameter.n_base_bytes == 0


def test_bias_that_a_module_shares_with_its_linear_is_reached() -> None:
    base, _ = prepared("bert")
    own = base.parameters["cls.predictions.decoder.bias"]
    assert base.parameters["cls.predictions.bias"] is own
    assert not isinstance(own, UnreachedParameter)


def test_attention_to_an_encoder_is_left_out_and_a_tied_table_is_not() -> None:
    base, shapes = prepared("bart")
    unreached = {n for n, p in base.parameters.items() if isinstance(p, UnreachedParameter)}
    assert unreached == {name for name in shapes if ".encoder_attn" in name}


def test_experts_that_no_token_chose_are_served() -> None:
    base, _ = prepared("qwen3_vl_moe")
    unreached = [p for p in base.parameters.values() if isinstance(p, UnreachedParameter)]
    assert unreached
    assert not [p.name for p in unreached if "language_model" in p.name]
