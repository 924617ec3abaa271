"""A fine-tune's files of settings: what a server would take from them, and what it must not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compressor.artifact.reader import describe_artifact, open_artifact, read_artifact
from compressor.artifact.settings_files import check_generation, check_settings_file
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import CheckpointError, Corrupt, TooLarge
from tests.compressor.artifacts import BASE, seal, write_artifact

GENERATION = "generation_config.json"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", 101),
        ("temperature", True),
        ("temperature", [1]),
        ("top_p", 0),
        ("top_p", 5),
        ("top_k", 1.5),
        ("top_k", -2),
        ("top_k", 10**30),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.2),
        ("repetition_penalty", {}),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", 1 << 40),
        ("do_sample", 1),
        ("do_sample", "no"),
        ("eos_token_id", -1),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", list(range(65))),
        ("eos_token_id", True),
    ],
)
def test_generation_value_beyond_its_range_raises_corrupt(key: str, value: Any) -> None:
    with pytest.raises(Corrupt, match=f"generation_config.json: {key} must be"):
        check_generation({key: value})


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"temperature": None, "eos_token_id": None, "do_sample": None},
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0.0},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.05},
        {"eos_token_id": [128001, 128009], "bos_token_id": "anything", "max_new_tokens": 2048},
        # Transformers itself writes such: greedy, with a leftover that nothing uses.
        {"do_sample": False, "temperature": -1, "top_p": 0, "top_k": None},
    ],
)
def test_generation_values_of_real_models_are_taken(record: dict[str, Any]) -> None:
    check_generation(record)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b'{"a": NaN}', b"[" * 5000, b'""'])
@pytest.mark.parametrize(
    "name",
    [GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
)
def test_settings_that_are_no_object_raise_corrupt_by_name(name: str, content: bytes) -> None:
    with pytest.raises(Corrupt, match=name):
        check_settings_file(name, content)


def test_files_of_other_kinds_are_not_looked_at() -> None:
    check_settings_file("tokenizer.json", b"not JSON")
    check_settings_file("chat_template.jinja", b"{{ 1")


def test_compress_refuses_what_no_server_would_take_and_writes_nothing(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    tuned = shutil.copytree(tiny_llama_ft, tmp_path / "ft")
    (tuned / GENERATION).write_text('{"do_sample": true, "top_p": 5}')
    options = Options(codec="blockdiag", ratio=9)
    with pytest.raises(CheckpointError, match="top_p must be a number above 0 to 1"):
        compress(tiny_llama, tuned, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    (tuned / GENERATION).write_text('{"do_sample": true, "top_p": 0.5}')
    compress(tiny_llama, tuned, tmp_path / "out", options)
    assert GENERATION in read_artifact(tmp_path / "out").aux


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "one")
    return tmp_path / "one"


def test_artifact_with_a_wrong_setting_is_refused_by_every_way_of_reading(artifact: Path) -> None:
    (artifact / GENERATION).write_text(json.dumps({"repetition_penalty": 0}))
    seal(artifact)
    for read in (read_artifact, open_artifact):
        with pytest.raises(Corrupt, match="repetition_penalty"):
            read(artifact)
    with pytest.raises(Corrupt, match="repetition_penalty"):
        describe_artifact(artifact, base_identity=BASE)


def test_describe_reads_neither_tensors_nor_tokenizer(artifact: Path) -> None:
    (artifact / GENERATION).write_text('{"temperature": 0.5}')
    seal(artifact)
    for name in ("delta.safetensors", "tokenizer.json"):
        content = bytearray((artifact / name).read_bytes())
        content[0] ^= 1
        (artifact / name).write_bytes(content)
    described = describe_artifact(artifact, base_identity=BASE)
    assert set(described.aux) == {GENERATION}
    assert described.n_bytes == sum(f.stat().st_size for f in artifact.iterdir())
    with pytest.raises(Corrupt):
        open_artifact(artifact)


@pytest.mark.parametrize("name", ["delta.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("is_linked", [False, True])
def test_describe_notices_a_missing_or_linked_file(
    artifact: Path, name: str, is_linked: bool
) -> None:
    (artifact / name).rename(artifact.parent / "elsewhere")
    if is_linked:
        (artifact / name).symlink_to(artifact.parent / "elsewhere")
    with pytest.raises(Corrupt, match=name):
        describe_artifact(artifact, base_identity=BASE)


def test_describe_notices_empty_weights(artifact: Path) -> None:
    (artifact / "delta.safetensors").write_bytes(b"")
    with pytest.raises(Corrupt, match="empty"):
        describe_artifact(artifact, base_identity=BASE)


@pytest.mark.parametrize("name", [GENERATION, "chat_template.jinja"])
def test_small_file_beyond_its_limit_raises_too_large(artifact: Path, name: str) -> None:
    (artifact / name).write_bytes(b" " * ((1 << 20) + 1))
    seal(artifact)
    with pytest.raises(TooLarge, match=name):
        read_artifact(artifact)
