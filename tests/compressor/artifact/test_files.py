"""Which files may stand in an artifact."""

from __future__ import annotations

import pytest

from compressor.artifact.files import is_auxiliary
from compressor.checkpoint.companions import COMPANIONS


@pytest.mark.parametrize("name", COMPANIONS)
def test_what_the_compressor_takes_along_may_stand_in_an_artifact(name: str) -> None:
    assert is_auxiliary(name)


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.json", "tokenizer.py", "modeling.py", "config.json", "model.safetensors",
        "tokenizer.json/x", "TOKENIZER.JSON", "tokenizer.bin", "README.md", "",
    ],
)  # fmt: skip
def test_other_files_may_not(name: str) -> None:
    assert not is_auxiliary(name)
