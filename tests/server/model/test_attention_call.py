"""Whatever could change what attention gives is served or refused, never dropped."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from server.errors import ConfigError
from server.model.attention_call import AS_SERVED, INERT, WHAT_IT_IS, check_call
from server.model.kv_store import AttentionForm, ProbedCall

MODELS = Path(transformers.__file__).parent / "models"
SERVED = {"scaling", "sliding_window", "softcap", "s_aux", "attention_mask"}
# Handed over by encoders of images and sound only, which the server does not run.
LENGTHS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
OF_ENCODERS = LENGTHS | {"query", "key", "value"}
Q, KV = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
GOOD = ProbedCall(Q, KV, KV, AttentionForm(scale=1.0), torch.zeros(4))


def test_call_that_the_server_computes_is_taken() -> None:
    others = {"dropout": 0.0, "position_ids": torch.zeros(1, 3), "use_cache": False}
    check_call(nn.Identity(), GOOD, others | {"is_causal": True, "head_mask": None})
    check_call(nn.Identity(), replace(GOOD, v=torch.zeros(1, 2, 3, 4), sinks=None), {})


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"dropout": 0.1}, "is told `dropout`"),
        ({"is_causal": False}, "attention that is not causal"),
        ({"head_mask": torch.ones(4)}, "a mask of its heads"),
        ({"softmax_scale": 2.0}, "is told `softmax_scale`"),
        ({"position_bias": torch.zeros(1, 4, 3, 3)}, "a bias that depends"),
        ({"indices": torch.zeros(1, 3, 2)}, "reads chosen keys"),
        ({"something_new": 0}, "is told `something_new`"),
    ],
)
def test_argument_that_could_change_the_result_is_refused(others: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_call(nn.Identity(), GOOD, others)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (replace(GOOD, q=torch.zeros(2, 4, 3, 8)), "splits or repeats the sequence"),
        (replace(GOOD, k=torch.zeros(1, 2, 5, 8)), "keys of other tokens"),
        (replace(GOOD, v=torch.zeros(1, 4, 3, 8)), "other numbers of heads"),
        (replace(GOOD, v=KV.half()), "mixes dtypes"),
        (replace(GOOD, sinks=torch.zeros(1, 4, 3, 1)), "not one number a head"),
        (replace(GOOD, form=AttentionForm(scale=torch.ones(4))), "by a tensor"),  # type: ignore[arg-type]
    ],
)
def test_call_of_another_shape_is_refused(call: ProbedCall, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_call(nn.Identity(), call, {})


def test_every_argument_that_transformers_definitions_name_was_thought_of() -> None:
    """By name in the source: a new one must be looked at, then served, refused or found inert."""
    known = SERVED | OF_ENCODERS | INERT | set(AS_SERVED) | set(WHAT_IT_IS) | {"sinks"}
    call = re.compile(
        r"^( *)\S[^\n]* = attention_interface\(\n(.*?)\n\1\)", re.DOTALL | re.MULTILINE
    )
    unknown = {}
    for source in sorted(MODELS.glob("*/modeling_*.py")):
        for _, arguments in call.findall(source.read_text()):
            for name in re.findall(r"^\s*(\w+)=", arguments, re.MULTILINE):
                if name not in known:
                    unknown[name] = source.parent.name
    assert not unknown
