"""Artifacts shared by the tests of reading them."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.compressor.artifacts import write_artifact

# An installation from before entropy coding may lack what only these need.
collect_ignore = (
    [] if find_spec("zstandard") else ["artifact/test_coded_file.py", "plan/test_coding.py"]
)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "delta"
    write_artifact(path)
    return path


@pytest.fixture(scope="session")
def pristine_coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zstandard")
    path = tmp_path_factory.mktemp("coded") / "delta"
    write_artifact(path, coded=True)
    return path


@pytest.fixture
def coded(pristine_coded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_coded, tmp_path / "coded"))


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "delta"))
