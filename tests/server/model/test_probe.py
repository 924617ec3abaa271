"""What the first passes refuse, in one sentence with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.errors import ConfigError
from server.model.base import load_base_model
from tests.models.builder import tiny_model
from tests.models.cases import Case


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("big_bird", "exchanges its attention layers by the length"),
        ("doge", "computes with the attention mask itself"),
        ("reformer", "uses `logsumexp` on its scores"),
    ],
)
def test_definition_outside_the_interface_is_refused_by_what_it_does(
    kind: str, says: str, tmp_path: Path
) -> None:
    model = tiny_model(Case(kind, kind))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as refused:
        load_base_model(tmp_path, torch.device("cpu"), None, "torch")
    message = refused.value.message
    assert message.startswith(f"{type(model).__name__} cannot be served: its definition")
    assert says in message
    assert message.endswith("serve them with vLLM or transformers")
