"""Models by Hub id, with the real huggingface_hub client against a Hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compressor.artifact.reader import read_artifact, read_config
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.folder import resolve
from compressor.checkpoint.hub import cached_ref, parse_ref, with_revision
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import CheckpointError, InputError
from compressor.export.reconstruct import reconstruct
from tests.hub import FakeHub, serving
from tests.tiny import make_tiny

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("org/name", "org/name", None),
        ("org/na.me-1_b@main", "org/na.me-1_b", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
    ],
)
def test_parse_ref_hub_id_gives_repository_and_revision(
    text: str, repo: str, revision: str | None
) -> None:
    ref = parse_ref(text)
    assert ref is not None
    assert (ref.repo, ref.revision, str(ref)) == (repo, revision, text)


@pytest.mark.parametrize("text", ["/a/b", "./a", "a/b/c", "a b", "", "a@", "a/b@../x", "~/x"])
def test_parse_ref_anything_else_is_none(text: str) -> None:
    assert parse_ref(text) is None


def test_with_revision_joins_and_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    assert with_revision("org/name", None) == "org/name"
    assert with_revision("org/name", "v1") == "org/name@v1"
    with pytest.raises(InputError, match="--base-revision is for Hub ids"):
        with_revision(str(tmp_path), "v1", "--base-revision")
    with pytest.raises(InputError, match="already"):
        with_revision("org/name@v1", "v2")
    with pytest.raises(InputError, match="not a branch"):
        with_revision("org/name", "a b")


def test_checkpoint_from_hub_fetches_weights_of_the_revision_and_nothing_else(
    hub: FakeHub, tmp_path: Path
) -> None:
    old = make_tiny("llama", tmp_path / "old", seed=1)
    new = make_tiny("llama", tmp_path / "new", seed=2, max_shard_size="60KB")
    for folder in (old, new):
        (folder / "pytorch_model.bin").write_bytes(b"a pickle")
        (folder / "consolidated.safetensors").write_bytes(b"the same again")
        (folder / "onnx").mkdir()
        (folder / "onnx" / "config.json").write_text("{}")
        (folder / "modeling.py").write_text("raise SystemExit")
    commit = hub.add("org/model", old, "v1")
    hub.add("org/model", new, "main")
    with Checkpoint("org/model@v1") as found, Checkpoint(old) as expected:
        assert (found.name, found.revision) == ("org/model", commit)
        assert found.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(found.read_rows(n), expected.read_rows(n)) for n in found.tensors)
    names = {name.removeprefix("org/model/") for name in hub.downloads}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    with Checkpoint("org/model") as found, Checkpoint(new) as expected:
        assert all(torch.equal(found.read_rows(n), expected.read_rows(n)) for n in expected.tensors)
        assert found.revision not in (None, commit)
    assert sum("model-0000" in name for name in hub.downloads) > 2
    asked = len(hub.downloads)
    resolve(f"org/model@{commit}")
    assert len(hub.downloads) == asked


def test_resolve_unusable_repository_is_refused_before_its_weights(
    hub: FakeHub, tmp_path: Path
) -> None:
    folder = make_tiny("llama", tmp_path / "remote-code")
    text = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}}
    (folder / "config.json").write_text(json.dumps(text))
    hub.add("org/code", folder)
    with pytest.raises(CheckpointError, match="auto_map"):
        resolve("org/code")
    assert not any("safetensors" in name for name in hub.downloads)


def test_resolve_failure_names_the_remedy(hub: FakeHub, tiny_llama: Path) -> None:
    hub.add("org/model", tiny_llama)
    hub.add("org/closed", tiny_llama)
    hub.gated.add("org/closed")
    for name, message in {
        "org/gone": "org/gone: .*no such repository.*HF_TOKEN",
        "org/model@v9": "org/model@v9: .*no revision 'v9'",
        "org/closed": "org/closed: .*gated.*HF_TOKEN",
        "/no/such/place": "no such directory, and not a Hub id",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            resolve(name)


def test_resolve_repository_of_pickles_says_so(hub: FakeHub, tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "old")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.add("org/old", folder)
    with pytest.raises(CheckpointError, match=r"no safetensors weights"):
        Checkpoint("org/old")
    assert not any("pytorch_model" in name for name in hub.downloads)


def test_resolve_offline_uses_the_cache_or_says_it_is_not_enough(
    hub: FakeHub, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", tiny_llama)
    here = resolve("org/model")
    hub.add("org/other", tiny_llama)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("org/model") == here
    with pytest.raises(CheckpointError, match=r"org/other.*HF_HUB_OFFLINE is set"):
        resolve("org/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert resolve("org/model") == here
    with pytest.raises(CheckpointError, match=r"org/other.*cannot be reached"):
        resolve("org/other")


def test_compress_hub_pair_records_names_and_commits_and_a_delta_comes_from_the_hub(
    hub: FakeHub, tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    base_commit = hub.add("org/base", tiny_llama)
    tuned_commit = hub.add("me/tuned", tiny_llama_ft)
    compress("org/base", "me/tuned@main", tmp_path / "delta", Options(ratio=10))
    config = read_config(tmp_path / "delta")
    assert (config.base.name_or_path, config.base.revision) == ("org/base", base_commit)
    assert (config.finetuned, config.finetuned_details["revision"]) == ("me/tuned", tuned_commit)
    hub.add("me/delta", tmp_path / "delta", "v1")
    folder = resolve("me/delta@v1")
    assert read_artifact(folder).digest == read_artifact(tmp_path / "delta").digest
    reconstruct("org/base", "me/delta@v1", tmp_path / "full")
    reconstruct(tiny_llama, tmp_path / "delta", tmp_path / "local")
    full, local = (tmp_path / n / "model.safetensors" for n in ("full", "local"))
    assert full.read_bytes() == local.read_bytes()


def test_cached_ref_only_of_a_snapshot(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--org--my--model" / "snapshots" / commit
    ref = cached_ref(snapshot)
    assert ref is not None
    assert (ref.repo, ref.revision) == ("org/my--model", commit)
    assert cached_ref(tmp_path) is None


def test_command_line_with_hf_endpoint_takes_revisions(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    """The environment variable is read when huggingface_hub is imported: a process of its own."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    with serving() as server:
        server.add("org/base", tmp_path / "base", "v2")
        server.add("me/tuned", tiny_llama_ft, "v1")
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "compressor", "compress", "org/base", "me/tuned@v1"]
        options = ["--base-revision", "v2", "--ratio", "10", "--codec", "blockdiag"]
        done = subprocess.run(
            [*command, str(tmp_path / "delta"), *options],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert read_config(tmp_path / "delta").base.name_or_path == "org/base"
