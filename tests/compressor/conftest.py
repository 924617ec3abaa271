"""Artifacts shared by the tests of reading them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.compressor.artifacts import write_artifact


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "delta"
    write_artifact(path)
    return path


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "delta"))
