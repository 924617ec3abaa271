"""What is found of the base and refused before anything is loaded."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from server.errors import ConfigError
from server.process.inputs import located, stored_model
from server.settings import Settings
from tests.hub import FakeHub, serving
from tests.unprivileged import forbid, open_folder, run_unprivileged

LOCATE = """
import sys
from pathlib import Path
from server.errors import ConfigError
from server.process.inputs import located
from server.settings import Settings
"""
ASK = """
try:
    located(Settings(base=Path(sys.argv[1]), deltas=Path(sys.argv[2])))
except ConfigError as error:
    print(error.message)
"""


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        located(Settings(**settings))
    return refused.value.message


def test_located_directory_keeps_its_name_and_says_what_it_is(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(base / "model.safetensors")
    n_parameters = sum(tensor.numel() for tensor in weights.values())
    with caplog.at_level(logging.INFO):
        found = located(Settings(base=base))
    assert (found.base, found.served_base_name) == (base, "base")
    assert f"the base base has {n_parameters:,} parameters in float32" in caplog.text
    assert stored_model(base).n_parameters == n_parameters
    assert located(Settings(base=base, served_base_name="b")).served_base_name == "b"


def test_located_hub_id_is_fetched_once_and_served_under_its_id(
    hub: FakeHub, tiny_llama: Path, tiny_llama_ft: Path
) -> None:
    commit = hub.add("org/name", tiny_llama)
    hub.add("org/name", tiny_llama_ft, "v2")
    found = located(Settings(base=Path("org/name")))
    assert found.served_base_name == "org/name"
    assert found.base.name == commit
    assert (found.base / "model.safetensors").read_bytes() == (
        tiny_llama / "model.safetensors"
    ).read_bytes()
    n_downloads = len(hub.downloads)
    assert located(Settings(base=Path("org/name"))).base == found.base
    assert len(hub.downloads) == n_downloads

    other = located(Settings(base=Path("org/name@v2")))
    assert other.base != found.base
    assert located(Settings(base=Path("org/name"), base_revision="v2")) == other


def test_located_hub_id_offline_comes_from_the_cache_or_is_refused(
    hub: FakeHub, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("org/name", tiny_llama)
    found = located(Settings(base=Path("org/name")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert located(Settings(base=Path("org/name"))) == found
    assert "HF_HUB_OFFLINE is set" in refusal(base=Path("org/other"))


def test_located_revision_of_a_directory_is_refused(base: Path) -> None:
    assert "--base-revision is for Hub ids" in refusal(base=base, base_revision="main")


def test_located_wrong_paths_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/none: no such directory" in refusal(base=tmp_path / "none")
    assert "config.json is a file" in refusal(base=base / "config.json")
    assert f"{tmp_path}/empty: no config.json" in refusal(base=tmp_path / "empty")
    assert f"the deltas: {tmp_path}/none" in refusal(base=base, deltas=tmp_path / "none")
    assert "is a file" in refusal(base=base, deltas=base / "config.json")


def test_located_base_that_is_not_whole_is_refused(base: Path) -> None:
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "is cut short" in refusal(base=base)
    weights.write_bytes(struct.pack("<Q", 10) + b"no json at all")
    assert "not a safetensors file" in refusal(base=base)
    weights.unlink()
    assert "neither model.safetensors nor" in refusal(base=base)
    (base / "pytorch_model.bin").touch()
    assert "a pickle" in refusal(base=base)


def test_located_settings_beyond_base_or_machine_are_refused(base: Path) -> None:
    assert "kv_cache_bytes is 1024TiB" in refusal(base=base, device="cpu", kv_cache_bytes="1024TiB")
    assert "has positions for 512 tokens" in refusal(base=base, max_model_len=513)
    assert located(Settings(base=base, max_model_len=512)).max_model_len == 512
    config = json.loads((base / "config.json").read_text())
    config["text_config"] = {"max_position_embeddings": 100}
    (base / "config.json").write_text(json.dumps(config))
    assert "has positions for 100 tokens" in refusal(base=base, max_model_len=512)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "."])
def test_located_base_that_this_user_may_not_read_names_file_user_and_remedy(
    tiny_llama: Path, name: str
) -> None:
    with open_folder() as folder:
        base = Path(shutil.copytree(tiny_llama, folder / "base"))
        for file in base.iterdir():
            file.chmod(0o644)
        base.chmod(0o755)
        forbid(base / name)
        try:
            done = run_unprivileged(LOCATE, ASK, [str(base), str(folder)])
        finally:
            base.chmod(0o755)
        assert done.returncode == 0, done.stderr
        path = base if name == "." else base / name
        assert done.stdout.startswith(f"the base: {path} may not be read by this process's user")
        assert "chmod -R a+rX" in done.stdout
        assert f"--user {os.geteuid()}" in done.stdout


def test_located_deltas_that_this_user_may_not_list_are_refused(tiny_llama: Path) -> None:
    with open_folder() as folder:
        base = Path(shutil.copytree(tiny_llama, folder / "base"))
        for file in base.iterdir():
            file.chmod(0o644)
        base.chmod(0o755)
        deltas = folder / "deltas"
        deltas.mkdir()
        forbid(deltas)
        done = run_unprivileged(LOCATE, ASK, [str(base), str(deltas)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"the deltas: {deltas} may not be read")
