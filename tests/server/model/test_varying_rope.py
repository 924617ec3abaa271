"""Rotary embeddings that look at a step's lengths: served as far as they do not change, eagerly."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from server.model.varying_rope import VaryingRope, varying_rope
from tests.server.conftest import PAIR
from tests.server.model.test_base import assert_parity

FACTORS = [1.0 + i for i in range(8)]  # a head has 16 dimensions
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "long_factor": FACTORS,
        "short_factor": [1.0] * 8,
        "original_max_position_embeddings": 128,
    },
}
LENGTHS = {"dynamic": 512, "longrope": 128}


@pytest.mark.parametrize("kind", ROPES)
def test_base_runs_eagerly_within_the_length_that_fixes_its_angles_and_says_so(
    served: Any, harness: Any, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.WARNING)
    pair = served("llama", {"blockdiag": PAIR["blockdiag"]}, rope_parameters=ROPES[kind])
    engine = harness(pair, static=True, kernels="torch")
    base = engine.core._runner.base
    assert base.varying_rope == VaryingRope(kind, LENGTHS[kind])
    assert base.max_len == LENGTHS[kind]
    assert f"base's {kind} rotary embedding" in caplog.text
    assert ("limits sequences to that length instead of 512" in caplog.text) == (kind == "longrope")
    assert_parity(engine, pair)
    assert engine.core.stats().n_static_steps == 0


def test_the_usual_kinds_are_not_held_back(tiny_llama: Any) -> None:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert varying_rope(model) is None


def test_layers_of_several_kinds_count_the_shortest() -> None:
    class Config:
        max_position_embeddings = 4096
        rope_parameters = {  # noqa: RUF012
            "full_attention": {"original_max_position_embeddings": 64},
            "sliding_attention": {},
        }

    class Rope(nn.Module):
        rope_type = {"full_attention": "longrope", "sliding_attention": "dynamic"}  # noqa: RUF012
        config = Config()

    assert varying_rope(nn.Sequential(Rope())) == VaryingRope("longrope", 64)
