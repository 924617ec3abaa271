"""Keys and texts of ``delta_config.json`` that a reader does not take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.artifact.reader import read_artifact, read_config
from compressor.errors import Corrupt, ImpartError, TooLarge
from tests.compressor.artifacts import edit_config, write_artifact


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "one")
    return tmp_path / "one"


UNKNOWN = {"note": "later addition"}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(UNKNOWN),
        lambda record: record["base"].update(UNKNOWN),
        lambda record: record.update(coding={"coder": "zstd", "raw_bytes": {}} | UNKNOWN),
        lambda record: record["tensors"][0].update(UNKNOWN),
        lambda record: record["tensors"][0].update(exact={"row_start": 0} | UNKNOWN),
        lambda record: record["tensors"][0].update(
            terms=[{"codec": "blockdiag", "params": {}} | UNKNOWN]
        ),
    ],
)
def test_key_that_no_format_version_has_raises_corrupt(
    artifact: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    edit_config(artifact, change)
    with pytest.raises(Corrupt, match="'note'"):
        read_config(artifact)


@pytest.mark.parametrize("holder", ["options", "fidelity", "finetuned"])
def test_key_of_an_object_of_free_content_is_kept(artifact: Path, holder: str) -> None:
    edit_config(artifact, lambda record: record[holder].update(UNKNOWN))
    config = read_artifact(artifact).config
    kept = {
        "options": config.options,
        "fidelity": config.fidelity,
        "finetuned": config.finetuned_details,
    }
    assert kept[holder]["note"] == "later addition"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"codec": "x" * 65}, Corrupt),
        ({"created_by": "x" * 4097}, Corrupt),
        ({"fidelity": {"x": "y" * (64 << 10)}}, TooLarge),
        ({"fidelity": {str(i): i for i in range(10_000)}}, TooLarge),
        ({"bytes": {str(i): i for i in range(1025)}}, TooLarge),
    ],
)
def test_texts_that_servers_show_are_not_endless(
    artifact: Path, change: dict[str, Any], error: type[ImpartError]
) -> None:
    edit_config(artifact, lambda record: record.update(change))
    with pytest.raises(error):
        read_config(artifact)
