"""Bases that transformers cannot load end start-up with one sentence, not a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from server.errors import ConfigError
from server.model.base import load_base_model

CPU = torch.device("cpu")


def with_config(base: Path, folder: Path, **changes: object) -> Path:
    copy = Path(shutil.copytree(base, folder / "base"))
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "nonsense"}, "cannot read the base's config.json: .*nonsense"),
        ({"hidden_size": 32, "head_dim": 8}, "the base cannot be loaded: .*mismatch"),
    ],
)
def test_base_that_transformers_refuses_is_said_in_a_line(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        load_base_model(with_config(tiny_llama, tmp_path, **changes), CPU, None, "torch")
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 500
