"""Artifacts by the real huggingface_hub client to a Hub on loopback, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compressor.artifact.reader import read_digest
from compressor.cli.app import app
from compressor.errors import Corrupt, InputError, OutputError
from compressor.export.publish import hub_ref, pull_artifact, push_artifact
from tests.compressor.artifacts import write_artifact
from tests.hub import FakeHub, serving

# How the Hub's client calls its HTTP library is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
URL = "hf://org/name"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with serving() as server:
        server.root = tmp_path / "hub"
        server.root.mkdir()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the Hub takes plain LFS too
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def impart(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_push_and_pull_give_the_same_files_and_a_new_push_removes_what_is_gone(
    hub: FakeHub, tmp_path: Path
) -> None:
    digest = write_artifact(tmp_path / "delta")
    code, shown = impart("push", tmp_path / "delta", URL, "--private")
    assert code == 0, shown
    assert f"digest {digest}" in shown
    assert hub.commits == ["org/name"]
    code, shown = impart("pull", URL, tmp_path / "pulled")
    assert code == 0, shown
    assert files(tmp_path / "pulled") == files(tmp_path / "delta")
    assert read_digest(tmp_path / "pulled") == digest
    on_hub = hub.repos["org/name", "main"]
    (on_hub / "vocab.txt").write_text("of an earlier artifact")
    push_artifact(tmp_path / "delta", URL)
    assert files(on_hub) == files(tmp_path / "delta")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_push_into_a_repository_of_something_else_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    write_artifact(tmp_path / "delta")
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"of another kind")
    hub.add("org/name", model)
    with pytest.raises(InputError, match=r"holds model\.safetensors"):
        push_artifact(tmp_path / "delta", URL)
    assert files(model) == {"model.safetensors": b"of another kind"}
    hub.root = None
    with pytest.raises(OutputError, match="HF_TOKEN"):
        push_artifact(tmp_path / "delta", "hf://org/forbidden")


def test_push_and_pull_of_damaged_artifacts_show_nothing(hub: FakeHub, tmp_path: Path) -> None:
    write_artifact(tmp_path / "delta")
    push_artifact(tmp_path / "delta", URL)
    tensors = tmp_path / "delta" / "delta.safetensors"
    damaged = tensors.read_bytes()[:-1] + b"\xff"
    for folder in (tmp_path / "delta", hub.repos["org/name", "main"]):
        (folder / "delta.safetensors").write_bytes(damaged)
    with pytest.raises(Corrupt):
        push_artifact(tmp_path / "delta", URL)
    assert len(hub.commits) == 1
    with pytest.raises(Corrupt):
        pull_artifact(URL, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_pull_replaces_artifacts_only_and_only_when_asked(hub: FakeHub, tmp_path: Path) -> None:
    write_artifact(tmp_path / "delta")
    push_artifact(tmp_path / "delta", URL)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists"):
            pull_artifact(URL, other, overwrite=overwrite)
    assert files(other) == {"mine.txt": b"keep"}
    with pytest.raises(OutputError, match="exists"):
        pull_artifact(URL, tmp_path / "delta")
    assert pull_artifact(URL, tmp_path / "delta", overwrite=True)


@pytest.mark.parametrize("text", ["org/name", "hf://name", "hf://a/b/c", "https://x/y", "hf://"])
def test_hub_ref_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="hf://org/name"):
        hub_ref(text)
