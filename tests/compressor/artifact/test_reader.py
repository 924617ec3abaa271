"""Reading: what is right is read exactly, what is wrong has its own error."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from compressor.artifact.config import dump_config, parse_config
from compressor.artifact.reader import (
    open_artifact,
    read_artifact,
    read_config,
    read_digest,
    read_terms,
)
from compressor.errors import (
    Corrupt,
    NotADelta,
    TooLarge,
    WrongBase,
)
from tests.compressor.artifacts import (
    AUX,
    BASE,
    CONFIG,
    deltas,
    same_delta,
    seal,
)

# --- the right thing ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [1, 3])
def test_read_artifact_returns_what_was_written(pristine: Path, n_threads: int) -> None:
    artifact = read_artifact(pristine, base_identity=BASE, n_threads=n_threads)
    expected = sorted(deltas(), key=lambda delta: delta.name)
    assert [entry.name for entry in artifact.config.tensors] == [d.name for d in expected]
    for got, want in zip(artifact.tensors, expected, strict=True):
        same_delta(got, want)
    assert artifact.aux == AUX
    assert artifact.path == pristine
    assert artifact.n_bytes == sum(p.stat().st_size for p in pristine.iterdir())
    assert artifact.config.with_tensors(()) == CONFIG
    assert all(entry.error == 0.5 for entry in artifact.config.tensors)
    assert read_config(pristine) == artifact.config
    assert read_artifact(str(pristine)).digest == artifact.digest


def test_open_artifact_returns_all_but_the_tensors_and_does_not_touch_them(artifact: Path) -> None:
    whole = read_artifact(artifact)
    tensors = artifact / "delta.safetensors"
    tensors.write_bytes(b"x" * tensors.stat().st_size)
    opened = open_artifact(str(artifact), base_identity=BASE)
    assert (opened.config, opened.digest, opened.aux) == (whole.config, whole.digest, AUX)
    assert (opened.path, opened.n_bytes) == (artifact, whole.n_bytes)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_read_terms_returns_the_tensors_and_does_not_touch_the_text_files(
    artifact: Path, n_threads: int
) -> None:
    whole = read_artifact(artifact)
    for name in AUX:
        (artifact / name).unlink()
    read = read_terms(artifact, base_identity=BASE, n_threads=n_threads)
    assert (read.config, read.digest, read.aux) == (whole.config, whole.digest, {})
    for got, want in zip(read.tensors, whole.tensors, strict=True):
        same_delta(got, want)


@pytest.mark.parametrize("read", [open_artifact, read_terms, read_artifact])
def test_reading_a_part_is_as_strict_as_reading_all(
    artifact: Path, read: Callable[..., object]
) -> None:
    with pytest.raises(WrongBase):
        read(artifact, base_identity="cd" * 32)
    file = "tokenizer.json" if read is open_artifact else "delta.safetensors"
    content = bytearray((artifact / file).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / file).write_bytes(content)
    with pytest.raises(Corrupt, match="checksum"):
        read(artifact)
    (artifact / "unlisted").touch()
    with pytest.raises(Corrupt, match="not listed"):
        read(artifact)


def test_read_digest_is_sha256_of_the_checksum_file(pristine: Path) -> None:
    raw = (pristine / "SHA256SUMS").read_bytes()
    assert read_digest(pristine) == hashlib.sha256(raw).hexdigest()
    assert read_artifact(pristine).digest == read_digest(pristine)


def test_checksums_are_what_coreutils_checks(pristine: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=pristine, check=True)
    listed = [line.split("  ")[1] for line in (pristine / "SHA256SUMS").read_text().splitlines()]
    assert listed == sorted(listed)
    assert set(listed) == {p.name for p in pristine.iterdir()} - {"README.md", "SHA256SUMS"}


def test_tensor_file_is_read_alike_by_the_safetensors_library(pristine: Path) -> None:
    artifact = read_artifact(pristine)
    with safe_open(pristine / "delta.safetensors", "pt") as stored:
        assert stored.metadata() == {"format": "pt", "impart_format_version": "3"}
        expected = {}
        for index, delta in enumerate(artifact.tensors):
            for t, term in enumerate(delta.terms):
                for part, tensor in term.tensors().items():
                    expected[f"{index}.{t}.{part}"] = tensor
            if delta.exact is not None:
                expected[f"{index}.exact"] = delta.exact.values
        assert set(stored.keys()) == set(expected)
        for key, tensor in expected.items():
            assert stored.get_tensor(key).dtype == tensor.dtype
            assert torch.equal(stored.get_tensor(key), tensor)


def test_tensor_file_is_aligned_for_every_dtype(pristine: Path) -> None:
    raw = (pristine / "delta.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    widths = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1}
    for key, entry in header.items():
        if key != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0


def test_config_text_is_one_line_a_tensor_and_round_trips(pristine: Path) -> None:
    text = (pristine / "delta_config.json").read_bytes()
    config = parse_config(text)
    assert dump_config(config) == text
    lines = text.decode().splitlines()
    for entry in config.tensors:
        (line,) = [line for line in lines if f'"name":"{entry.name}"' in line]
        assert json.loads(line.rstrip(","))["shape"] == list(entry.shape)


def test_readme_change_keeps_the_digest_and_counts_in_the_bytes(artifact: Path) -> None:
    before = read_artifact(artifact)
    (artifact / "README.md").write_text("x" * 1000)
    after = read_artifact(artifact)
    assert after.digest == before.digest
    assert after.n_bytes > before.n_bytes


def test_hidden_files_of_git_and_the_hub_client_are_ignored(artifact: Path) -> None:
    (artifact / ".gitattributes").write_text("* lfs")
    (artifact / ".cache").mkdir()
    read_artifact(artifact)


def test_linked_directory_is_read(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact)
    assert read_artifact(tmp_path / "link").digest == read_digest(artifact)


# --- damage -------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_in_any_covered_file_raises(pristine: Path, tmp_path_factory, data) -> None:
    name = data.draw(st.sampled_from(["delta.safetensors", "delta_config.json", *AUX]))
    raw = bytearray((pristine / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    copy = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("flip") / "d"))
    raw[bit // 8] ^= 1 << bit % 8
    (copy / name).write_bytes(raw)
    with pytest.raises(Corrupt, match=r"differs from its checksum"):
        read_artifact(copy)
    shutil.rmtree(copy)


def test_flipped_bit_in_any_byte_of_the_checksums_raises(artifact: Path) -> None:
    file = artifact / "SHA256SUMS"
    raw = file.read_bytes()
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises((Corrupt, NotADelta)):
            read_artifact(artifact)


def _cuts(pristine: Path) -> list[tuple[str, int]]:
    raw = (pristine / "delta.safetensors").read_bytes()
    data = 8 + struct.unpack("<Q", raw[:8])[0]
    cuts = [("delta.safetensors", n) for n in (0, 4, 8, 20, data - 1, data, data + 3, len(raw) - 1)]
    config = (pristine / "delta_config.json").stat().st_size
    cuts += [("delta_config.json", n) for n in (0, 1, config // 2, config - 1)]
    sums = (pristine / "SHA256SUMS").stat().st_size
    return cuts + [("SHA256SUMS", n) for n in (0, 10, 64, 80, sums // 2, sums - 1)]


@pytest.mark.parametrize("index", range(18))
def test_file_cut_short_anywhere_raises_corrupt(artifact: Path, index: int) -> None:
    name, size = _cuts(artifact)[index]
    os.truncate(artifact / name, size)
    with pytest.raises(Corrupt):
        read_artifact(artifact)


@pytest.mark.parametrize("index", range(8))
def test_tensor_file_cut_short_and_sealed_again_raises_corrupt(artifact: Path, index: int) -> None:
    name, size = _cuts(artifact)[index]
    os.truncate(artifact / name, size)
    seal(artifact)
    with pytest.raises(Corrupt):
        read_artifact(artifact)


@pytest.mark.parametrize("name", ["delta.safetensors", "delta_config.json", "tokenizer.json"])
def test_missing_file_raises_corrupt(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(Corrupt, match="is missing"):
        read_artifact(artifact)


@pytest.mark.parametrize("name", ["delta.safetensors", "delta_config.json"])
def test_missing_file_sealed_again_raises_corrupt(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    seal(artifact)
    with pytest.raises(Corrupt, match="does not list"):
        read_artifact(artifact)


def test_missing_checksums_missing_directory_and_file_raise_not_a_delta(
    artifact: Path, tmp_path: Path
) -> None:
    (artifact / "SHA256SUMS").unlink()
    (tmp_path / "file").write_text("")
    for path in (artifact, tmp_path / "nothing", tmp_path / "file", tmp_path):
        for read in (read_artifact, read_config, read_digest):
            with pytest.raises(NotADelta):
                read(path)


@pytest.mark.parametrize("name", ["extra.json", "model.bin", "sub"])
def test_extra_file_raises_corrupt(artifact: Path, name: str) -> None:
    if name == "sub":
        (artifact / name).mkdir()
    else:
        (artifact / name).write_text("x")
    with pytest.raises(Corrupt, match="not listed"):
        read_artifact(artifact)


@pytest.mark.parametrize("name", ["modeling_evil.py", "pytorch_model.bin", "config.json"])
def test_listed_file_of_a_foreign_kind_raises_corrupt(artifact: Path, name: str) -> None:
    (artifact / name).write_text("x")
    seal(artifact)
    with pytest.raises(Corrupt, match="does not belong"):
        read_artifact(artifact)


@pytest.mark.parametrize("name", ["delta.safetensors", "delta_config.json", "tokenizer.json"])
def test_symbolic_link_raises_corrupt(artifact: Path, tmp_path: Path, name: str) -> None:
    shutil.move(artifact / name, tmp_path / "elsewhere")
    (artifact / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match="not a link"):
        read_artifact(artifact)


def test_linked_checksums_raise_corrupt(artifact: Path, tmp_path: Path) -> None:
    shutil.move(artifact / "SHA256SUMS", tmp_path / "sums")
    (artifact / "SHA256SUMS").symlink_to(tmp_path / "sums")
    with pytest.raises(Corrupt):
        read_digest(artifact)


@pytest.mark.parametrize("kind", ["fifo", "socket", "directory"])
def test_special_file_raises_corrupt_and_does_not_hang(artifact: Path, kind: str) -> None:
    file = artifact / "delta.safetensors"
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        here = Path.cwd()
        os.chdir(artifact)  # a socket's path is limited to 108 bytes
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(file.name)
        finally:
            os.chdir(here)
    with pytest.raises(Corrupt):
        read_artifact(artifact)


def test_oversized_files_raise_too_large_without_being_read(artifact: Path) -> None:
    for name, size in [("delta_config.json", (64 << 20) + 1), ("delta.safetensors", 1 << 37)]:
        copy = (artifact / name).read_bytes()
        os.truncate(artifact / name, size)  # sparse
        with pytest.raises(TooLarge):
            read_artifact(artifact)
        (artifact / name).write_bytes(copy)


@pytest.mark.parametrize(
    "text",
    [
        b"garbage\n",
        b"\xff" * 66 + b"\n",
        b"0" * 64 + b"  ../../etc/passwd\n",
        b"0" * 64 + b"  .hidden\n",
        b"0" * 64 + b" *delta.safetensors\n",
        b"0" * 64 + b"  b\n" + b"0" * 64 + b"  a\n",
        b"0" * 64 + b"  a\n" + b"0" * 64 + b"  a\n",
        b"A" * 64 + b"  a\n",
        b"\n",
    ],
)
def test_malformed_checksums_raise_corrupt(artifact: Path, text: bytes) -> None:
    (artifact / "SHA256SUMS").write_bytes(text)
    with pytest.raises(Corrupt):
        read_artifact(artifact)
